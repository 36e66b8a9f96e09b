"""Byte strings that prove, where they are found, that a text or a vector is still there; and a matcher that finds any of many of them.

Cut from the texts are overlapping pieces of `PIECE` characters (a page may hold a part of a text only) and every word of eight bytes and more with its endings (a
full-text index keeps a word without the letters it shares with the one before); from the vectors, runs of `RUN` bytes in each precision they may be stored in.
Source: ours. Cost: some microseconds per piece and form; the matcher some 5 ns per byte.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from remanence.recall.items import Message

PIECE = 16  # characters: any 31 characters of an erased text in a row hold a whole piece
RUN = 16  # bytes of a vector: any 31 of its bytes in a row hold a whole run
SHORTEST = 8  # bytes: the matcher's key, and about what chance does not hit in a gigabyte
ECHO = 24  # characters: a phrase that long is a quotation
LONGEST = 256  # bytes of a needle that are compared
BLOCK = 1 << 22
TOGETHER = 500  # messages looked through at once
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Matcher:
    """Find any of many byte strings in a text, capital and small letters alike.

    The first eight bytes of a needle are a number; a table of bits over a hash of it lets nearly everything else pass by.
    """

    def __init__(self, needles: Iterable[bytes]):
        self.by_key: dict[int, list[bytes]] = {}
        for needle in needles:
            self.by_key.setdefault(int.from_bytes(needle[:8], "little"), []).append(needle)
        self.keys = np.array(sorted(self.by_key), np.uint64)
        self.bits = np.uint64(64 - min(max(len(self.keys).bit_length() + 5, 20), 27))  # a few in a hundred pass, at most 128 MB
        self.table = np.zeros(1 << (64 - int(self.bits)), bool)
        self.table[self._slots(self.keys)] = True
        self.longest = max((len(needle) for needles in self.by_key.values() for needle in needles), default=0)

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return ((keys * _MIX) >> self.bits).astype(np.intp)

    def find(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, needle) of every occurrence."""
        if not len(self.keys) or len(data) < SHORTEST:
            return
        data = data.lower()
        for shift in range(min(8, len(data) - 7)):
            words = np.frombuffer(data, "<u8", (len(data) - shift) // 8, shift)
            maybe = np.flatnonzero(self.table[self._slots(words)])
            found = words[maybe]
            sure = self.keys[np.minimum(np.searchsorted(self.keys, found), len(self.keys) - 1)] == found
            for at, key in zip(maybe[sure].tolist(), found[sure].tolist(), strict=True):
                place = shift + 8 * at
                for needle in self.by_key[key]:
                    if data.startswith(needle, place):
                        yield place, needle


@dataclass(frozen=True)
class Needle:
    """What a byte string was cut from: its kind, how it is written, of which text or vector, and what it says (folded; of a vector: the bytes)."""

    kind: str
    form: str
    source: int
    says: bytes


def needles_of(texts: Sequence[str], vectors: Sequence[np.ndarray] = ()) -> dict[bytes, Needle]:
    """Return the byte strings that prove, where they are found, that one of the texts or vectors (D,) is still there."""
    held: dict[bytes, Needle] = {}
    for source, text in enumerate(texts):
        for cut, kind in _cuts(text):
            says = as_bytes(folded(cut)).lower()
            for form, written in _forms(cut, kind):
                if _speaks(written):
                    held.setdefault(written[:LONGEST].lower(), Needle(kind, form, source, says))
    for source, vector in enumerate(vectors):
        for form, written in precisions(vector):
            for at in range(0, len(written) - RUN + 1, RUN):
                run = written[at : at + RUN].lstrip(b"\0").lower()
                if _speaks(run):
                    held.setdefault(run, Needle("vector", form, source, run))
    return held


def _speaks(needle: bytes) -> bool:
    """Return whether chance or padding would not say the same; a beginning of one or two letters would be met on every empty page."""
    return len(needle) >= SHORTEST and len(set(needle)) >= 4 and len(set(needle[:SHORTEST])) >= 3


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def occurring(says: Iterable[bytes], kept: Iterable[bytes]) -> set[bytes]:
    """Return those byte strings that occur in any of the kept ones, capital and small letters alike."""
    matcher, seen, waiting, size = Matcher(one for one in says if len(one) >= SHORTEST), set(), [], 0
    for one in kept:
        waiting.append(one)
        size += len(one)
        if size >= BLOCK:
            seen |= {needle for _, needle in matcher.find(b"\0".join(waiting))}
            waiting, size = [], 0
    return seen | {needle for _, needle in matcher.find(b"\0".join(waiting))}


def repeats(texts: Iterable[str], other: str) -> bool:
    """Return whether a text repeats a piece of one of the texts, or a whole one that is short."""
    return bool(
        occurring(
            {as_bytes(folded(cut)).lower() for text in texts for cut, kind in _cuts(text) if kind == "piece"}, [as_bytes(folded(other))]
        )
    )


def echoing(texts: Iterable[str], messages: Iterable[Message]) -> list[int]:
    """Return the ids of the messages that repeat a piece of `ECHO` characters of one of the texts, or a whole one of half of that."""
    pieces = {as_bytes(piece).lower() for text in texts for piece in _long(folded(text))}
    matcher = Matcher(piece for piece in pieces if _speaks(piece))
    found: list[int] = []
    messages = iter(messages if len(matcher.keys) else ())
    while some := list(itertools.islice(messages, TOGETHER)):
        written = [as_bytes(folded(message.text)) + b"\0" for message in some]
        ends = np.cumsum([len(one) for one in written])
        places = [place for place, _ in matcher.find(b"".join(written))]
        found += [some[at].id for at in np.unique(np.searchsorted(ends, places, side="right")).tolist()]
    return found


def _long(text: str) -> Iterator[str]:
    last = max(len(text) - ECHO, 0)
    if len(text) >= ECHO // 2:
        yield from (text[start : start + ECHO] for start in sorted({*range(0, last, ECHO // 3), last}))


def _cuts(text: str) -> Iterator[tuple[str, str]]:
    """Yield the pieces and words of a text."""
    last = max(len(text) - PIECE, 0)
    for start in sorted({*range(0, last, PIECE), last}):
        yield text[start : start + PIECE], "piece"
    for word in set(re.findall(r"\w{4,40}", folded(text))):  # longer ones are what pieces are for
        written = as_bytes(word)
        last = max(len(written) - SHORTEST, -1)
        yield from ((written[end:].decode(errors="ignore"), "word") for end in range(last + 1))


def folded(text: str) -> str:
    """Return a text as a full-text index folds it: small letters without marks."""
    if text.isascii():
        return text.lower()
    return "".join(letter for letter in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(letter))


def _forms(cut: str, kind: str) -> Iterator[tuple[str, bytes]]:
    """Yield every way a piece may be written; words are those of a full-text index."""
    plain = as_bytes(cut)
    yield "utf-8", plain
    if kind == "word":
        return
    yield "utf-16-le", cut.encode("utf-16-le", "surrogatepass")
    yield "utf-16-be", cut.encode("utf-16-be", "surrogatepass")
    yield "json", json.dumps(cut)[1:-1].encode()
    yield "html", as_bytes(html.escape(cut))
    yield "url", urllib.parse.quote(plain).encode()
    yield "url", urllib.parse.quote_plus(plain).encode()
    yield "sql", plain.replace(b"'", b"''")
    yield "csv", plain.replace(b'"', b'""')
    for skip in range(3):  # the letters of base64 depend on where in a group of three the piece begins
        body = plain[skip:]
        yield "base64", base64.b64encode(body[: len(body) // 3 * 3])
    if not cut.isascii():
        yield "folded", as_bytes(folded(cut))
        yield "small", as_bytes(cut.casefold())
        yield "composed", as_bytes(unicodedata.normalize("NFC", cut))
        yield "decomposed", as_bytes(unicodedata.normalize("NFD", cut))
        yield "json", as_bytes(json.dumps(cut, ensure_ascii=False)[1:-1])


def precisions(vectors: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """Yield the bytes of vectors (D,) or (N, D) in every precision that a store or a cache may keep them in."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    yield "float32", vectors.astype("<f4").tobytes()
    yield "float16", vectors.astype("<f2").tobytes()
    yield "float64", vectors.astype("<f8").tobytes()
    yield "bfloat16", (vectors.view(np.uint32) >> 16).astype("<u2").tobytes()
    yield "int8", (np.clip(vectors, -1, 1) * 127).astype(np.int8).tobytes()  # cut, not rounded
    yield "int8", np.rint(np.clip(vectors, -1, 1) * 127).astype(np.int8).tobytes()
    top = np.abs(vectors).max(axis=-1, keepdims=True, initial=1e-30)
    yield "int8", np.rint(vectors * (127 / top)).astype(np.int8).tobytes()
