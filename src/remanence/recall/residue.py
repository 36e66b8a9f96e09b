"""Look for what an erasure should have removed, in the bytes of every file of a store.

What is looked for is cut from the erased texts: overlapping pieces of `PIECE` characters (a page may hold a part of a text only), every word of eight bytes and
more with its endings (a full-text index keeps a word without the letters it shares with the one before), and runs of `RUN` bytes of every vector in each
precision it may have been stored in. Texts are looked for as UTF-8, UTF-16 (both orders), decomposed, folded as full-text indexes fold, escaped as in JSON,
HTML, URLs, SQL and CSV, and in base64 at its three offsets; capital and small letters are the same. A piece that also occurs in what is kept proves nothing
and is left out. Texts under eight bytes cannot be told from chance in a large file: they are counted, not looked for. Source: ours. Cost: one pass over the files at a few
hundred MB/s, one over the kept texts; memory by the size of what was erased.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import re
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from remanence.errors import Mistake
from remanence.recall.items import Message, Selection
from remanence.recall.protocols import Store

PIECE = 16  # characters: any 31 characters of an erased text in a row hold a whole piece
RUN = 16  # bytes of a vector: any 31 of its bytes in a row hold a whole run
SHORTEST = 8  # bytes: the matcher's key, and about what chance does not hit in a gigabyte
ECHO = 24  # characters: a phrase that long is a quotation
LONGEST = 256
PLACES = 3  # of one needle in one file: what is kept may say the same a million times
BLOCK = 1 << 22
PAGE = 1000  # messages read at once
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Residue:
    """Something that should be gone: where it is and what kind of thing it is, never what it says.

    Args:
        path: of the file.
        offset: of its first byte.
        kind: piece | word | vector.
        form: how it is written (utf-8, utf-16-le, json, float16, ...).
        source: index of the text or vector it was cut from.
    """

    path: str
    offset: int
    kind: str
    form: str
    source: int


@dataclass(frozen=True)
class Scan:
    """What a scan looked at and found."""

    files: int
    bytes: int
    needles: int
    found: tuple[Residue, ...] = ()
    left_out: int = 0  # needles that were found and also occur in what is kept
    short: int = 0  # texts too short to be looked for

    @property
    def clean(self) -> bool:
        """Return whether nothing was found."""
        return not self.found


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


# What is looked for.


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
            says = _bytes(_fold(cut)).lower()
            for form, written in _forms(cut, kind):
                if _speaks(written):
                    held.setdefault(written[:LONGEST].lower(), Needle(kind, form, source, says))
    for source, vector in enumerate(vectors):
        for form, written in precisions(vector):
            for at in range(0, len(written) - RUN + 1, RUN):
                run = written[at : at + RUN].lower()
                if _speaks(run):
                    held.setdefault(run, Needle("vector", form, source, run))
    return held


def _speaks(needle: bytes) -> bool:
    return len(needle) >= SHORTEST and len(set(needle)) >= 4  # else chance, or padding, says the same


def _bytes(text: str) -> bytes:
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
        occurring({_bytes(_fold(cut)).lower() for text in texts for cut, kind in _cuts(text) if kind == "piece"}, [_bytes(_fold(other))])
    )


def echoing(texts: Iterable[str], messages: Iterable[Message]) -> list[int]:
    """Return the ids of the messages that repeat a piece of `ECHO` characters of one of the texts, or a whole one of half of that."""
    pieces = {_bytes(piece).lower() for text in texts for piece in _long(_fold(text))}
    matcher = Matcher(piece for piece in pieces if _speaks(piece))
    return [message.id for message in messages if next(matcher.find(_bytes(_fold(message.text))), None)] if len(matcher.keys) else []


def _long(text: str) -> Iterator[str]:
    last = max(len(text) - ECHO, 0)
    if len(text) >= ECHO // 2:
        yield from (text[start : start + ECHO] for start in sorted({*range(0, last, ECHO // 3), last}))


def _cuts(text: str) -> Iterator[tuple[str, str]]:
    """Yield the pieces and words of a text."""
    last = max(len(text) - PIECE, 0)
    for start in sorted({*range(0, last, PIECE), last}):
        yield text[start : start + PIECE], "piece"
    for word in set(re.findall(r"\w{4,}", _fold(text))):
        ends = range(0, len(word) - 3)  # short endings fall out by their bytes
        yield from ((word[end:], "word") for end in ends if len(word[end:].encode("utf-8", "surrogatepass")) >= SHORTEST)


def _fold(text: str) -> str:
    """Return a text as a full-text index folds it: small letters without marks."""
    if text.isascii():
        return text.lower()
    return "".join(letter for letter in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(letter))


def _forms(cut: str, kind: str) -> Iterator[tuple[str, bytes]]:
    """Yield every way a piece may be written; words are those of a full-text index."""
    plain = _bytes(cut)
    yield "utf-8", plain
    if kind == "word":
        return
    yield "utf-16-le", cut.encode("utf-16-le", "surrogatepass")
    yield "utf-16-be", cut.encode("utf-16-be", "surrogatepass")
    yield "json", json.dumps(cut)[1:-1].encode()
    yield "html", _bytes(html.escape(cut))
    yield "url", urllib.parse.quote(plain).encode()
    yield "url", urllib.parse.quote_plus(plain).encode()
    yield "sql", plain.replace(b"'", b"''")
    yield "csv", plain.replace(b'"', b'""')
    for skip in range(3):  # the letters of base64 depend on where in a group of three the piece begins
        body = plain[skip:]
        yield "base64", base64.b64encode(body[: len(body) // 3 * 3])
    if not cut.isascii():
        yield "folded", _bytes(_fold(cut))
        yield "small", _bytes(cut.casefold())
        yield "composed", _bytes(unicodedata.normalize("NFC", cut))
        yield "decomposed", _bytes(unicodedata.normalize("NFD", cut))
        yield "json", _bytes(json.dumps(cut, ensure_ascii=False)[1:-1])


def precisions(vectors: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """Yield the bytes of vectors (D,) or (N, D) in every precision that a store or a cache may keep them in."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    yield "float32", vectors.astype("<f4").tobytes()
    yield "float16", vectors.astype("<f2").tobytes()
    yield "float64", vectors.astype("<f8").tobytes()
    yield "bfloat16", (vectors.view(np.uint32) >> 16).astype("<u2").tobytes()
    yield "int8", np.rint(np.clip(vectors, -1, 1) * 127).astype(np.int8).tobytes()
    top = np.abs(vectors).max(axis=-1, keepdims=True, initial=1e-30)
    yield "int8", np.rint(vectors * (127 / top)).astype(np.int8).tobytes()


# Where it is looked for.


def scan(
    files: Iterable[str | Path],
    texts: Sequence[str],
    vectors: Sequence[np.ndarray] = (),
    *,
    kept: Callable[[], Iterable[str]] = tuple,
    kept_vectors: Callable[[], Iterable[np.ndarray]] = tuple,
) -> Scan:
    """Look for erased texts and vectors in every byte of the files.

    Args:
        files: that may hold content; those that are gone meanwhile hold none.
        texts: that were erased.
        vectors: (D,) each, as the store gave them back.
        kept: called after the files were read, if anything was found; gives every text that stays.
        kept_vectors: the same for vectors, in blocks (N, D).

    Raises:
        Mistake: a file cannot be read.
    """
    needles = needles_of(texts, vectors)
    matcher, found, count, size = Matcher(needles), [], 0, 0
    for path in sorted(map(Path, files)):
        try:
            found += [(needle, str(path), offset) for offset, needle in _in_file(path, matcher)]
            size += path.stat().st_size
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Mistake(
                path, f"cannot be read ({error.strerror})", "check its permissions: a scan that skips a file proves nothing"
            ) from error
        count += 1
    hit = {needles[needle] for needle, _, _ in found}
    says, runs = ({one.says for one in hit if (one.kind == "vector") is vector} for vector in (False, True))
    fine = occurring(says, (_bytes(_fold(text)) for text in kept())) if says else set()
    fine |= occurring(runs, (written for block in kept_vectors() for _, written in precisions(block))) if runs else set()
    real = [
        Residue(path, offset, one.kind, one.form, one.source) for needle, path, offset in found if (one := needles[needle]).says not in fine
    ]
    short = sum(len(_bytes(text)) < SHORTEST for text in texts)
    return Scan(count, size, len(needles), tuple(real), sum(one.says in fine for one in hit), short)


def _in_file(path: Path, matcher: Matcher) -> Iterator[tuple[int, bytes]]:
    """Yield what occurs in a file, of each needle the first `PLACES`; blocks overlap by all but a byte of the longest needle."""
    overlap, places = max(matcher.longest - 1, 0), Counter[bytes]()
    with path.open("rb") as file:
        start, tail = 0, b""
        while block := file.read(BLOCK):
            data = tail + block
            for offset, needle in matcher.find(data):
                if offset + len(needle) > len(tail):  # else it was found in the block before
                    places[needle] += 1
                    if places[needle] <= PLACES:
                        yield start - len(tail) + offset, needle
            start += len(block)
            tail = data[-overlap:] if overlap else b""


# The files of a store.


def scan_store(store: Store, texts: Sequence[str], vectors: Sequence[np.ndarray] = ()) -> Scan:
    """Look for erased texts and vectors in every file of a store; what any of its spaces keeps is left out."""
    return scan(store.files(), texts, vectors, kept=lambda: kept_texts(store), kept_vectors=lambda: kept_vectors(store))


def kept_texts(store: Store) -> Iterator[str]:
    """Yield every text that a store keeps, its own words (tables, log) included."""
    yield from store.spaces()
    yield store.embedder
    yield from (json.dumps([entry["action"], entry["detail"]], sort_keys=True, ensure_ascii=False) for entry in store.audit_log())
    yield from (text for path in store.files() for text in _tables(path))
    for space in store.spaces():
        for conversation in store.conversations(space):
            yield conversation["name"]
            yield from (gist.text for gist in store.gists(space, conversation["name"]))
            yield from (gist.text for _, gist in store.gist_history(space, conversation["name"], 1 << 40))
        yield from (fact.text for fact in store.facts(space))
        after = 0
        while found := store.messages(Selection(space=space), after=after, limit=PAGE):
            for message in found:
                yield from (message.text, message.person or "", json.dumps(dict(message.meta), ensure_ascii=False) if message.meta else "")
            after = found[-1].id


def kept_vectors(store: Store) -> Iterator[np.ndarray]:
    """Yield the vectors that a store keeps, in blocks (N, D)."""
    for space in store.spaces():
        yield from (block for _, block in store.vectors(space))


def _tables(path: Path) -> list[str]:
    """Return what an SQLite file says about its own tables."""
    import sqlite3

    with contextlib.suppress(OSError, sqlite3.Error), path.open("rb") as file:
        if file.read(16) == b"SQLite format 3\0":
            with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as base:
                return [row[0] for row in base.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")]
    return []
