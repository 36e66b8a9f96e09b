"""The engine of test-time memories: its chunk form is the token-by-token rule, in values, states and gradients."""

import dataclasses
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
    norm = tuple(level + 0.1 * torch.randn(N, 1, D, generator=rng, dtype=dtype) for level in (1, 0))
    return W, S, norm


def draw(T, momentum=True, decay=True, masked=0.0, dtype=torch.float64, seed=1):
    rng = torch.Generator().manual_seed(seed)
    q, k = (F.normalize(torch.randn(N, T, D, generator=rng, dtype=dtype), dim=-1) for _ in range(2))
    v = torch.randn(N, T, D, generator=rng, dtype=dtype)
    theta, eta, alpha = (torch.rand(N, T, generator=rng, dtype=dtype) for _ in range(3))
    write = torch.rand(N, T, generator=rng) >= masked
    return q, Tokens(k, v, 0.03 * theta, eta * 0.9 if momentum else None, alpha * 0.05 if decay else None, write)


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


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunk_form_holds_in_float32(chunk):
    W, S, norm = memory(2, dtype=torch.float32)
    q, tokens = draw(61, dtype=torch.float32)
    reading = read(Rule(chunk), W, S, q, tokens, norm)
    y, W_end, S_end = dual.read_write_reference(Rule(chunk), W, S, q, tokens, norm)
    ours_W, ours_S = dual.settle(Rule(chunk), reading.carry, norm)
    assert largest([reading.y, *ours_W, *ours_S], [y, *W_end, *S_end]) < 1e-4


GRADIENT_RULES = {
    "after": Rule(4),
    "before": Rule(4, "before"),
    "recomputed": Rule(4, recompute=1),
    "bounded": Rule(4, max_grad_norm=1.0),
    "plain loop": Rule(4, link=lambda Z: Z, within="linear"),
    "other bias": Rule(4, bias=lambda prediction, v, extra: (prediction - v).tanh() * prediction),
}


@pytest.mark.parametrize("T", [1, 4, 11])
@pytest.mark.parametrize("name", GRADIENT_RULES)
@pytest.mark.parametrize(("layers", "momentum", "normed"), [(3, True, True), (1, True, False), (2, False, True)])
def test_outer_gradients_are_those_of_the_sequential_rule(T, name, layers, momentum, normed):
    rule = GRADIENT_RULES[name]
    W, S, norm = memory(layers, momentum)
    norm = norm if normed else None
    q, tokens = draw(T, momentum, masked=0.2)
    inputs = [part.requires_grad_() for part in (*W, *S, *(norm or ()), q, *tokens[:5]) if part is not None]
    reading = read(rule, W, S, q, tokens, norm)
    ours = torch.autograd.grad(total([reading.y, *itertools.chain(*dual.settle(rule, reading.carry, norm))]), inputs)
    y, W_end, S_end = dual.read_write_reference(rule, W, S, q, tokens, norm)
    theirs = torch.autograd.grad(total([y, *W_end, *(S_end if momentum else ())]), inputs)
    assert largest(ours, theirs) < 1e-9
    assert all(gradient.abs().max() > 0 for gradient in ours)


def total(tensors):
    return sum((tensor * torch.arange(tensor.numel(), dtype=tensor.dtype).view_as(tensor).cos()).sum() for tensor in tensors)


def test_outer_gradcheck_passes_through_two_chunks():
    W, S, norm = memory(2)
    q, tokens = draw(5)
    one = slice(0, 1)

    def read_all(q, k, v, theta, eta, alpha, *weights):
        inside = Tokens(k, v, theta, eta, alpha, tokens.write[one])
        reading = read(Rule(3), weights[:2], weights[2:4], q, inside, weights[4:])
        return (reading.y, *reading.carry.W, *reading.carry.S)

    inputs = (q, *tokens[:5], *W, *S, *norm)
    assert torch.autograd.gradcheck(read_all, [part[one].clone().requires_grad_() for part in inputs], fast_mode=True)


def test_online_rule_takes_the_gradient_at_the_last_weights_and_larger_chunks_do_not():
    W, S, _ = memory(1)
    q, tokens = draw(6)
    M, surprise, ys = W[0], S[0], []
    for t in range(6):  # by hand: the online rule of a matrix memory
        k, v = tokens.k[:, t], tokens.v[:, t]
        u = 2 * torch.einsum("nd,ne->nde", k, torch.einsum("nd,nde->ne", k, M) - v)
        surprise = tokens.eta[:, t, None, None] * surprise - tokens.theta[:, t, None, None] * u
        M = (1 - tokens.alpha[:, t, None, None]) * M + surprise
        ys.append(torch.einsum("nd,nde->ne", q[:, t], M))
    online, chunked = (read(Rule(b), W, S, q, tokens, None).y for b in (1, 3))
    assert (online - torch.stack(ys, 1)).abs().max() < 1e-12
    assert (online - chunked).abs().max() > 1e-4


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_hand_written_gradients_are_those_of_the_inner_loss(layers, normed):
    W, _, norm = memory(layers)
    norm = norm if normed else None
    _, tokens = draw(6)
    a, delta, length = dual.rank_one_gradients(Rule(), W, tokens.k, tokens.v, None, norm, True)
    for t in range(6):
        weights = [weight.clone().requires_grad_() for weight in W]
        x = tokens.k[:, t : t + 1]
        z = x
        for l, weight in enumerate(weights):
            z = (F.gelu(z) if l else z) @ weight
        if normed:
            z = x + F.layer_norm(z, (D,), eps=1e-5) * norm[0] + norm[1]
        gradients = torch.autograd.grad((z - tokens.v[:, t : t + 1]).square().sum(), weights)
        assert largest([one[:, t, :, None] * other[:, t, None] for one, other in zip(a, delta)], gradients) < 1e-11
        assert torch.allclose(length[:, t], sum(gradient.square().sum((1, 2)) for gradient in gradients).sqrt())


def test_without_momentum_it_is_gradient_descent_with_a_forget_gate():
    W, S, norm = memory(2)
    q, tokens = draw(9)
    never = tokens._replace(eta=torch.zeros_like(tokens.theta))
    for chunk in (1, 4):
        with_zeros = read(Rule(chunk), W, S, q, never, norm)
        assert largest([with_zeros.y], [read(Rule(chunk), W, (), q, tokens._replace(eta=None), norm).y]) < 1e-12
        y, W_end, _ = dual.read_write_reference(Rule(chunk), W, S, q, never, norm)
        assert largest([with_zeros.y, *dual.settle(Rule(chunk), with_zeros.carry, norm)[0]], [y, *W_end]) < 1e-12


def test_zero_gates_give_finite_outer_gradients():
    W, S, norm = memory(2)
    q, tokens = draw(9)
    eta, alpha = torch.zeros(N, 9, dtype=q.dtype, requires_grad=True), torch.ones(N, 9, dtype=q.dtype, requires_grad=True)
    tokens = tokens._replace(eta=eta, alpha=alpha)
    ours = torch.autograd.grad(read(Rule(4), W, S, q, tokens, norm).y.square().sum(), [eta, alpha])
    theirs = torch.autograd.grad(dual.read_write_reference(Rule(4), W, S, q, tokens, norm)[0].square().sum(), [eta, alpha])
    assert largest(ours, theirs) < 1e-11
    assert ours[0].abs().max() > 0


def test_linear_online_memory_without_gates_is_the_delta_rule():
    W, _, _ = memory(1)
    q, tokens = draw(9, momentum=False, decay=False)
    M, ys = W[0], []
    for t in range(9):
        k, v, beta = tokens.k[:, t, :, None], tokens.v[:, t, None], 2 * tokens.theta[:, t, None, None]
        M = M - beta * k @ (k.mT @ M) + beta * k @ v  # (I - beta k k^T) M + beta k v^T
        ys.append(q[:, t, None] @ M)
    assert (read(Rule(1), W, (), q, tokens, None).y - torch.cat(ys, 1)).abs().max() < 1e-12


def test_full_forgetting_leaves_the_momentum_alone():
    W, S, norm = memory(2)
    q, tokens = draw(8)
    tokens = tokens._replace(alpha=torch.ones_like(tokens.theta))
    for T in (5, 8):
        part = Tokens(*(None if one is None else one[:, :T] for one in tokens))
        ours_W, ours_S = dual.settle(Rule(4), read(Rule(4), W, S, q[:, :T], part, norm).carry, norm)
        assert largest(ours_W, ours_S) < 1e-12


def test_without_a_step_the_memory_only_fades():
    W, _, norm = memory(2)
    q, tokens = draw(10)
    zeros = tuple(torch.zeros_like(weight) for weight in W)
    reading = read(Rule(4), W, zeros, q, tokens._replace(theta=torch.zeros_like(tokens.theta)), norm)
    faded = (1 - tokens.alpha).prod(1)[:, None, None]
    assert largest(dual.settle(Rule(4), reading.carry, norm)[0], [weight * faded for weight in W]) < 1e-12


@pytest.mark.parametrize("pieces", [[4, 4, 3], [8, 3], [1] * 11, [3, 5, 3], [2, 9]])
def test_reading_in_pieces_is_reading_at_once(pieces):
    rule = Rule(4, max_grad_norm=1.0)
    W, S, norm = memory(2)
    q, tokens = draw(11, masked=0.2)
    whole = read(rule, W, S, q, tokens, norm, watch=True)
    carry, ys, surprises = dual.Carry(W, S, dual._cut(tokens, 0, 0)), [], []
    for begin, length in zip(itertools.accumulate([0, *pieces]), pieces, strict=False):
        end = begin + length
        packed = dual.pack(carry, 1, 4)
        carry = dual.unpack(packed, begin, 4)
        reading = dual.read_write(rule, carry, q[:, begin:end], dual._cut(tokens, begin, end), norm, watch=True)
        carry = reading.carry
        ys.append(reading.y)
        surprises.append(reading.surprise)
        assert {name: part.shape for name, part in packed.items()} == {name: part.shape for name, part in dual.pack(carry, 1, 4).items()}
    ends = itertools.chain(*dual.settle(rule, carry, norm))
    assert largest([torch.cat(ys, 1), *ends], [whole.y, *itertools.chain(*dual.settle(rule, whole.carry, norm))]) < 1e-12
    assert largest([torch.cat(surprises, 1)], [whole.surprise]) < 1e-12


def test_recall_reads_behind_the_last_token():
    W, S, norm = memory(2)
    q, tokens = draw(10)
    reading = read(Rule(4), W, S, q, tokens, norm)
    assert torch.allclose(dual.recall(Rule(4), reading.carry, q[:, -1:], norm), reading.y[:, -1:], atol=1e-12)


def test_a_masked_token_changes_neither_weights_nor_momentum():
    W, S, norm = memory(2)
    q, tokens = draw(12)
    write = torch.ones(N, 12, dtype=torch.bool)
    write[:, 4:8] = False  # a whole chunk: the others keep their places
    left = [*range(4), *range(8, 12)]
    masked = read(Rule(4), W, S, q, tokens._replace(write=write), norm)
    without = read(Rule(4), W, S, q[:, left], Tokens(*(None if part is None else part[:, left] for part in tokens)), norm)
    assert largest([masked.y[:, left], *masked.carry.W, *masked.carry.S], [without.y, *without.carry.W, *without.carry.S]) < 1e-12


def test_a_bound_on_the_gradient_bounds_what_one_token_writes():
    W, _, _ = memory(2)
    q, tokens = draw(1, momentum=False, decay=False)
    tokens = tokens._replace(v=1000 * tokens.v, theta=torch.ones_like(tokens.theta))
    rule = Rule(1, max_grad_norm=0.5)
    written = [now - before for now, before in zip(read(rule, W, (), q, tokens, None).carry.W, W, strict=True)]
    assert torch.allclose(sum(part.square().sum((1, 2)) for part in written).sqrt(), torch.full((N,), 0.5, dtype=q.dtype))


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("momentum", [True, False])
def test_a_link_read_exactly_is_the_sequential_rule(when, momentum):
    rule = Rule(4, when, link=lambda Z: tuple(weight.tanh() for weight in Z))
    W, S, norm = memory(2, momentum)
    q, tokens = draw(11, momentum, masked=0.2)
    reading = read(rule, W, S, q, tokens, norm)
    y, W_end, _ = dual.read_write_reference(rule, W, S, q, tokens, norm)
    assert largest([reading.y, *dual.settle(rule, reading.carry, norm)[0]], [y, *W_end]) < 1e-10
    nearby = [
        dual.read_write(dataclasses.replace(rule, within=way), dual.start(W, tokens, momentum), q, tokens, norm).y
        for way in ("linear", "start")
    ]
    assert all((one - y).abs().max() > 1e-3 for one in nearby)


def test_another_bias_is_told_apart_by_its_extra():
    def shifted(prediction, v, extra):
        return prediction - v - extra

    W, S, norm = memory(2)
    q, tokens = draw(10)
    tokens = tokens._replace(extra=tokens.v.flip(1)[..., :1])
    rule = Rule(4, bias=shifted)
    assert largest([read(rule, W, S, q, tokens, norm).y], [dual.read_write_reference(rule, W, S, q, tokens, norm)[0]]) < 1e-10
    moved = Rule(4, bias=lambda prediction, v, extra: prediction - v)
    assert (
        largest([read(rule, W, S, q, tokens, norm).y], [read(moved, W, S, q, tokens._replace(v=tokens.v + tokens.extra), norm).y]) < 1e-12
    )
