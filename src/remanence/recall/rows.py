"""Between rows and items: vectors as bytes, texts plain or sealed, checks of what is to be stored."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from remanence.errors import Mistake, nearest
from remanence.recall.items import ROLES, Chunk, Message, NewChunk, NewMessage
from remanence.recall.sealing import Sealer

PRECISIONS = ("float32", "float16", "int8")


@dataclass(frozen=True)
class Space:
    """A row of `spaces`, with what opens its records (`None`: they are plain)."""

    id: int
    name: str
    sealer: Sealer | None

    def look(self, kind: str, value: str) -> str:
        """Return what a value is found by: itself, or its keyed hash."""
        return value if self.sealer is None else self.sealer.look(kind, value)

    def shut(self, kind: str, content: str) -> tuple[str | None, bytes | None]:
        """Return the columns (text, sealed) of a content."""
        return (content, None) if self.sealer is None else (None, self.sealer.seal(kind, content.encode()))

    def open(self, kind: str, text: str | None, sealed: bytes | None) -> str:
        """Return the content of the columns (text, sealed)."""
        return text or "" if self.sealer is None else self.sealer.open(kind, bytes(sealed or b"")).decode()


# Vectors.


def encode_vector(vector: Float32[np.ndarray, "D"], precision: str) -> bytes:
    """Return a unit vector as bytes; int8 is its scale (fp32) and 127 steps to each side."""
    if precision == "int8":
        scale = np.float32(np.abs(vector).max() / 127)
        return scale.tobytes() + np.rint(vector / scale).astype(np.int8).tobytes()
    return np.asarray(vector, dtype=precision).tobytes()


def decode_vectors(found: Sequence[bytes], precision: str, dim: int) -> Float32[np.ndarray, "N D"]:
    """Return the vectors that `encode_vector` wrote."""
    whole = b"".join(found)
    if precision == "int8":
        rows = np.frombuffer(whole, dtype=np.uint8).reshape(len(found), 4 + dim)
        scales = np.ascontiguousarray(rows[:, :4]).view(np.float32)  # (N, 1)
        return rows[:, 4:].view(np.int8).astype(np.float32) * scales
    return np.frombuffer(whole, dtype=precision).reshape(len(found), dim).astype(np.float32)


# Messages and chunks.

MESSAGE = "m.id, m.space, m.turn, m.role, m.text, m.person, m.meta, m.sealed, m.at, m.edited, m.crc, v.name, v.sealed"


def shut_message(space: Space, text: str, person: str | None, meta: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the columns (text, person, meta, sealed, crc) of a message; what is sealed carries a tag of its own."""
    if space.sealer is None:
        told = json.dumps(dict(meta), ensure_ascii=False)
        return text, person, told, None, checksum(text, person, told)
    content = json.dumps({"text": text, "person": person, "meta": dict(meta)}, ensure_ascii=False)
    return None, person if person is None else space.look("person", person), None, space.sealer.seal("message", content.encode()), None


def checksum(*parts: str | None) -> int:
    """Return the CRC-32 of texts: SQLite's pages have none, so that an altered letter would be read as if it had been said."""
    return zlib.crc32("\0".join("" if part is None else part for part in parts).encode())


def open_message(space: Space, row: Sequence[Any]) -> Message:
    """Return the message of a row of `MESSAGE`.

    Raises:
        Mistake: it is not what was stored.
    """
    id, _, turn, role, text, person, meta, sealed, at, edited, crc, name, sealed_name = row
    if space.sealer is None:
        if crc != checksum(text, person, meta):
            raise Mistake(f"message {id}", "is damaged: its checksum does not fit", "restore the store from a backup")
        held = {"text": text, "person": person, "meta": json.loads(meta)}
    else:
        held = json.loads(space.sealer.open("message", bytes(sealed)))
        name = space.sealer.open("conversation", bytes(sealed_name)).decode()
    return Message(id, space.name, name, turn, role, held["text"], held["person"], at, held["meta"], edited)


def open_chunk(message: Message, id: int, begins: int, ends: int, last: int | None) -> Chunk:
    """Return a chunk of a message."""
    text = message.text[begins:ends]
    return Chunk(id, message.id, message.space, message.conversation, message.turn, message.role, text, message.person, message.at, last)


# Checks.


def check_text(place: str, text: object) -> None:
    """Refuse what is no text, and what no database can hold."""
    if not isinstance(text, str):
        raise Mistake(place, f"is {type(text).__name__}, not text", "give a string")
    if "\0" in text:
        raise Mistake(place, "holds a NUL character", "remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Mistake(place, "holds half a surrogate pair", "decode the text as UTF-8 or UTF-16") from None


def check_name(place: str, name: object) -> None:
    """Refuse a name that is no text, empty, or longer than 500 characters."""
    check_text(place, name)
    if not name or len(str(name)) > 500:
        raise Mistake(place, "is empty" if not name else "is longer than 500 characters", "give it a short name")


def check_time(place: str, at: object) -> None:
    """Refuse a time that is no finite number."""
    if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at):
        raise Mistake(place, "is no time", "give seconds since the epoch")


def check_message(message: NewMessage) -> None:
    """Refuse an unknown role, an empty text, a person or key without a name, a time that is none, and meta that is no JSON."""
    if message.role not in ROLES:
        raise Mistake("role", f"'{message.role}' is none", nearest(str(message.role), ROLES))
    check_text("text", message.text)
    if not message.text:
        raise Mistake("text", "is empty", "store nothing where nothing was said")
    for place, name in (("person", message.person), ("key", message.key)):
        if name is not None:
            check_name(place, name)
    if message.at is not None:
        check_time("at", message.at)
    if message.turn is not None and (isinstance(message.turn, bool) or not isinstance(message.turn, int) or not 0 < message.turn < 2**62):
        raise Mistake("turn", f"{message.turn!r} is no turn number", "count turns from 1")
    try:
        check_text("meta", json.dumps(dict(message.meta), ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise Mistake("meta", f"is no JSON object ({error})", "give names with strings, numbers, lists and objects") from error


def check_chunks(text: str, chunks: Sequence[NewChunk], dim: int) -> None:
    """Refuse pieces outside of the text, and vectors of another width, with NaN, or zero."""
    for chunk in chunks:
        if not 0 <= chunk.start < chunk.end <= len(text):
            raise Mistake("chunk", f"{chunk.start}..{chunk.end} is no piece of a text of {len(text)} characters", "cut within the text")
        if chunk.vector.shape != (dim,):
            raise Mistake(
                "vector",
                f"has the shape {chunk.vector.shape}, the store's vectors have {dim} numbers",
                "use the embedder that the store was made with",
            )
        length = float(np.linalg.norm(chunk.vector))
        if not 0.99 < length < 1.01:  # NaN as well
            raise Mistake("vector", f"has the length {length:.3g}", "mend the embedder: it must return unit vectors")
