"""What the tests of the store share: unit vectors, and one way to say something."""

from __future__ import annotations

import numpy as np

from remanence.recall.items import NewChunk, NewMessage

DIM = 8


def unit(seed, dim=DIM):
    vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return vector / np.linalg.norm(vector)


def whole(text, seed=0):
    return [NewChunk(0, len(text), unit(seed))]


def say(store, text, space="default", conversation="default", seed=0, **more):
    return store.append(space, conversation, NewMessage("user", text, **more), whole(text, seed))


def everything(folder):
    """Return the bytes of every file below a folder."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
