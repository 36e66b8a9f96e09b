"""The engine of test-time memories: its chunk form is the token-by-token rule, in values, states and gradients."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from remanence.memory import dual
from remanence.memory.dual import Rule, Tokens

N, D, E = 3, 5, 7


def memory(layers, momentum=True, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    widths = [D] + [E] * (layers - 1) + [D]
    W = tuple(torch.randn(N, i, o, generator=rng, dtype=dtype) / i**0.5 for i, o in itertools.pairwise(widths))
    S = tuple(0.1 * torch.randn(weight.shape, generator=rng, dtype=dtype) for weight in W) if momentum else ()
    norm = tuple(torch.randn(N, 1, D, generator=rng, dtype=dtype) for _ in range(2))
    return W, S, norm


def draw(T, momentum=True, decay=True, masked=0.0, dtype=torch.float64, seed=1):
    rng = torch.Generator().manual_seed(seed)
    q, k = (F.normalize(torch.randn(N, T, D, generator=rng, dtype=dtype), dim=-1) for _ in range(2))
    v = torch.randn(N, T, D, generator=rng, dtype=dtype)
    theta, eta, alpha = (torch.rand(N, T, generator=rng, dtype=dtype) for _ in range(3))
    write = torch.rand(N, T, generator=rng) >= masked
    return q, Tokens(k, v, 0.03 * theta, eta * 0.9 if momentum else None, alpha * 0.3 if decay else None, write)


def read(rule, W, S, q, tokens, norm, watch=False):
    return dual.read_write(rule, dual.Carry(W, S, dual._cut(tokens, 0, 0)), q, tokens, norm, watch)


def largest(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("momentum", "decay"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunk_form_is_the_sequential_rule(chunk, layers, momentum, decay, normed):
    W, S, norm = memory(layers, momentum)
    norm = norm if normed else None
    q, tokens = draw(23, momentum, decay, masked=0.2)
    for when in ("after", "before"):
        rule = Rule(chunk, when)
        reading = read(rule, W, S, q, tokens, norm)
        y, W_end, S_end = dual.read_write_reference(rule, W, S, q, tokens, norm)
        ours_W, ours_S = dual.settle(rule, reading.carry, norm)
        assert largest([reading.y, *ours_W, *ours_S], [y, *W_end, *(S_end if momentum else ())]) < 1e-10
