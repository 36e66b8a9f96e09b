"""A memory that nobody has trained keeps what it is told: the first values of gates and thresholds, judged by one pair amid filler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.memory import dual
from remanence.memory.miras import MirasMemory
from remanence.memory.miras_rule import read_write, recall
from remanence.memory.titans import NeuralMemory

D, HEADS, ROWS, CHUNK = 32, 8, 8, 16  # eight memories of width 32, each with weights of its own
KINDS = ("titans", "moneta", "yaad", "memora")


def told(before: int, after: int) -> Tensor:
    """Rows of one filler token, but for a key and its value behind the first `before` tokens."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, D * HEADS, generator=random).expand(ROWS, before + 2 + after, -1).clone()
    x[:, before : before + 2] = torch.randn(ROWS, 2, D * HEADS, generator=random)
    return x


def fresh(kind: str) -> MirasMemory | NeuralMemory:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "titans":
            return NeuralMemory(D * HEADS, HEADS, chunk=CHUNK)
        return MirasMemory(D * HEADS, HEADS, preset=kind, chunk=CHUNK)


@torch.no_grad()
def asked(layer: MirasMemory | NeuralMemory, x: Tensor, place: int, write: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the key and the value at `place`, and the answer to that key behind all tokens; `write`: whether they were written."""
    here = slice(place, place + 1)
    mask = torch.ones(len(x) * HEADS, x.shape[1], dtype=torch.bool)
    mask[:, here] = write
    if isinstance(layer, NeuralMemory):
        q, tokens, _ = layer._tokens(x, None, None)
        tokens, norm = tokens._replace(write=mask), layer._norm(len(x), q)
        carry = dual.read_write(layer.rule, dual.start(layer._start(len(x), q), tokens, True), q, tokens, norm).carry
        return tokens.k[:, here], tokens.v[:, here], dual.recall(layer.rule, carry, tokens.k[:, here], norm)
    state, everything = layer.first_state(x), torch.ones(x.shape[:2], dtype=torch.bool)
    q, k, v, _ = layer._project(x, state.tensors["conv"], everything)
    tokens, norm = layer._gates(x, k, v, everything)._replace(write=mask[..., None]), layer._norm(q)
    behind = read_write(layer.choices, layer._carry(state), q, tokens, norm, 0)[1]
    return k[:, here], v[:, here], recall(layer.choices, behind, k[:, here], norm, x.shape[1])


def moved(layer: MirasMemory | NeuralMemory, before: int, after: int) -> tuple[float, float]:
    """Return how the pair's own write moved the answer: its cosine with the way to the value, and the share of that way."""
    x = told(before, after)
    _, value, answer = asked(layer, x, before + 1, True)
    old = asked(layer, x, before + 1, False)[2]
    way = value - old
    share = ((answer - old) * way).sum(-1) / way.square().sum(-1)
    return float(F.cosine_similarity(answer - old, way, dim=-1).mean()), float(share.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_one_write_into_a_fresh_memory_is_read_at_once(kind: str) -> None:
    direction, share = moved(fresh(kind), 0, 0)
    assert direction > 0.8
    assert share > 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_amid_filler_is_still_in_the_answer_after_two_hundred_tokens(kind: str) -> None:
    direction, share = moved(fresh(kind), 20, 200)
    assert direction > 0.6  # with steps near 0.5, keeping 0.98 and, for Yaad, a threshold of 1: 0.03 (Yaad) to 0.4
    assert share > 0.015  # then: 0.001 (Moneta) to 0.019


def test_yaads_first_threshold_is_above_the_first_errors() -> None:
    layer, x = fresh("yaad"), told(20, 20)
    key, value, answer = asked(layer, x, 21, False)
    assert layer.watch(x)["threshold"].min() > (value - answer).norm(dim=-1).max()
    assert key.norm(dim=-1).allclose(torch.ones(()))
