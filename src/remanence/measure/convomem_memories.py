"""ConvoMem's memories by name, as a command line gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remanence.errors import Mistake, nearest
from remanence.measure.convomem_mem0 import Mem0
from remanence.measure.convomem_policies import History, Memory, blocks, plain_memory
from remanence.measure.convomem_search import Hybrid, Passages, Retrieved, Searcher, bm25, dense, tf_idf

PLAIN = ("full-context", "extracted", "blocks", "nothing")
SEARCHED = ("tf-idf", "bm25", "dense", "mem0", "own")
NAMES = (*PLAIN, *SEARCHED, *(f"hybrid-{name}" for name in SEARCHED))


@dataclass(frozen=True)
class MemorySettings:
    """Set the memories that have something to set.

    Args:
        k: passages of a retrieval.
        until: conversations up to which a hybrid hands over everything.
        block: conversations of a block.
        encode: texts -> unit vectors, for `dense`.
        url: of a mem0 server.
        own: a searcher from outside, for `own`: the product's memory or the user's.
    """

    k: int = 20
    until: int = 30
    block: int = 10
    encode: Callable[[list[str]], Any] | None = None
    url: str | None = None
    own: Searcher | None = None

    def __post_init__(self) -> None:
        for name in ("k", "until", "block"):
            if getattr(self, name) < 1:
                raise Mistake(name, "it is below 1", "name at least 1")


def make_memory(name: str, settings: MemorySettings | None = None) -> Memory:
    """Return a memory by name; its settings are part of the name that stands in tables and caches.

    Raises:
        Mistake: an unknown name, or one whose encoder, address or searcher is missing.
    """
    chosen = settings or MemorySettings()
    if name not in NAMES:
        raise Mistake("policy", f"there is no policy '{name}'", nearest(name, NAMES))
    if name.startswith("hybrid-"):
        inner = name.removeprefix("hybrid-")
        return Hybrid(Retrieved(_searcher(inner, chosen), inner, chosen.k), chosen.until, f"hybrid-{inner}, {chosen.until}, top {chosen.k}")
    if name in SEARCHED:
        return Retrieved(_searcher(name, chosen), f"{name}, top {chosen.k}", chosen.k)
    if name == "blocks":
        return History(blocks(chosen.block), f"blocks of {chosen.block}")
    return plain_memory(name)


def _searcher(name: str, settings: MemorySettings) -> Searcher:
    if name == "own":
        if settings.own is None:
            raise Mistake("policy own", "there is no searcher", "give one")
        return settings.own
    if name == "mem0":
        if not settings.url:
            raise Mistake("policy mem0", "the server's address is missing", "name it, for example http://localhost:8888")
        return Mem0(settings.url)
    if name == "dense":
        if settings.encode is None:
            raise Mistake("policy dense", "there is no encoder", "name one")
        return Passages(dense(settings.encode))
    return Passages(tf_idf if name == "tf-idf" else bm25)
