"""What a recurrence must offer to be the base of a memory cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor

from remanence.errors import Mistake

State = dict[str, Tensor]
Gates = Mapping[str, Tensor]


class Rule(Protocol):
    """A recurrence that a memory cache can stand on."""

    name: ClassVar[str]
    matrix: ClassVar[bool]  # whether the read is linear in the weights, so that a soup of memories is their gated sum

    @property
    def biases(self) -> dict[str, float]:
        """The gates that the layer computes per head and token, each with the bias its sigmoid starts from."""
        ...

    def initial(self, heads: int, width: int) -> State:
        """Return the learned weights that every segment begins with, (H, ...) each; empty where it begins with zeros."""
        ...

    def begin(self, initial: Mapping[str, Tensor], like: Float[Tensor, "... T D"]) -> State:
        """Return the state before the first token, for the leading axes (B, H, ...) of `like`."""
        ...

    def run(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read T tokens in the chunk form: y_t of every token, read after its write, and the last state."""
        ...

    def close(self, state: State) -> State:
        """Return the state as the next segment finds it, where it goes on from this one."""
        ...

    def weights(self, state: State) -> State:
        """Return what `read` needs, and a cache keeps."""
        ...

    def read(self, q: Float[Tensor, "... T D"], weights: State) -> Float[Tensor, "... T D"]:
        """Ask a memory that stands still."""
        ...

    def surprise(self, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> Float[Tensor, "... T"]:
        """Return the norm of the gradient that each token brings."""
        ...


class Layered(Rule, Protocol):
    """A rule whose weights are those of a network, so that a soup of memories is a network of its own."""

    def trajectory(self, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> State:
        """Return the weights after every token, (..., T, ...) each."""
        ...

    def soup(self, q: Tensor, shares: Tensor, weights: State, moving: State | None) -> Tensor:
        """Read from the average by `shares` (..., T, S + 1) of S still memories, (..., S, ...) each, and, last, of one that moves."""
        ...


def check_chunk(chunk: int) -> None:
    """Refuse chunks of no token."""
    if chunk < 1:
        raise Mistake("chunk", f"must be at least 1, got {chunk}", "correct the value")
