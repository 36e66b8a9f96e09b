"""Every random stream has a name: it is derived from the run's seed and words, never drawn from the global generator."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part, in order (`derive(seed, event, "replay")`)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU `torch.Generator` seeded with `derive(*parts)`."""
    import torch

    return torch.Generator().manual_seed(derive(*parts))


def numpy_generator(*parts: object) -> np.random.Generator:
    """Return a numpy generator seeded with `derive(*parts)`."""
    import numpy as np

    return np.random.default_rng(derive(*parts))
