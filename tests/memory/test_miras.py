"""Miras: every memory, loss and retention runs through one engine, and its chunk form is the paper's rule; what is approximate says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from memory.plain_miras import plain_miras
from remanence.errors import Mistake
from remanence.memory import dual
from remanence.memory.bias import BIASES, bias, register_bias
from remanence.memory.miras import MirasMemory, convolved, memora, moneta, yaad
from remanence.memory.miras_rule import Carry, Written, answer, gradients, read_write, recall
from remanence.memory.retention import CUSTOM, NAMES, register_retention, retention, soft_threshold
from remanence.memory.state import MemoryState

MEMORIES = ("vector", "matrix", "mlp2")
D, N, T = 4, 3, 13
AWKWARD = ((1, 3), (4, 7), (16, 18))  # chunk and length


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(seed: int = 0, **settings) -> MirasMemory:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = MirasMemory(settings.pop("dim", D), settings.pop("heads", 1), **settings).double()
        for parameter in layer.parameters():  # nothing at zero or at its start
            parameter.data += 0.1 * torch.randn_like(parameter)
    return layer


def case(layer: MirasMemory, length: int = T, seed: int = 1) -> tuple[Carry, Tensor, Written, tuple[Tensor, Tensor]]:
    """A first state, queries, tokens with two masked ones, and the layer norm's scale and shift, N of each."""
    channels = D if layer.settings["gates"] == "channel" else 1
    write = torch.ones(N, length, 1, dtype=torch.bool)
    write[0, 3:5] = write[2, 0] = False
    tokens = Written(
        torch.nn.functional.normalize(drawn(seed, N, length, D), dim=-1),
        drawn(seed + 1, N, length, D),
        0.3 * torch.sigmoid(drawn(seed + 2, N, length, channels)),
        torch.sigmoid(drawn(seed + 3, N, length, channels) + 2),
        torch.sigmoid(drawn(seed + 4, N, length, 1)) if layer.momentum else None,
        0.5 + torch.sigmoid(drawn(seed + 5, N, length, 1)),
        write,
    )
    begin = tuple(layer.retention.begin(w.detach() + 0.2 * drawn(seed + 6, N, *w.shape[1:])) for w in layer.begin)
    zero = tuple(torch.zeros_like(z) for z in begin) if layer.momentum else ()
    norm = (1 + 0.1 * drawn(seed + 7, N, 1, D), 0.1 * drawn(seed + 8, N, 1, D))
    return Carry(begin, begin, zero), drawn(seed + 9, N, length, D), tokens, norm


def chunked(layer: MirasMemory, carry: Carry, q: Tensor, tokens: Written, norm: tuple[Tensor, Tensor]) -> tuple[Tensor, Carry, Tensor]:
    return read_write(layer.choices, carry, q, tokens, norm if layer.settings["memory"] == "mlp2" else None, 0)


def assert_same(layer: MirasMemory, length: int = T) -> None:
    carry, q, tokens, norm = case(layer, length)
    y, after, surprise = chunked(layer, carry, q, tokens, norm)
    plain_y, plain_W, plain_norms = plain_miras(layer, carry.start, q, tokens, norm)
    assert (y - plain_y).abs().max() < 1e-10
    assert ((surprise - plain_norms) / plain_norms.clamp_min(1)).abs().max() < 1e-10
    for z, w in zip(after.now, plain_W):
        assert (layer.retention.link(z) - w).abs().max() < 1e-10


# 1. One engine, equal to the plain rule


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_chunk_form_equals_the_token_by_token_rule_for_every_triple(memory: str, rule: str) -> None:
    for number, loss in enumerate(BIASES):
        assert_same(made(memory=memory, bias=loss, retention=rule, chunk=4), length=6 + number % 3)
    for loss, b in (("l2", 1), ("huber_mixed", 1), ("huber_norm", 16)):
        assert_same(made(memory=memory, bias=loss, retention=rule, chunk=b), length=5 if b == 1 else 19)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("rule", ["l2", "lq", "bregman_sig", "elastic_net_ftrl"])
def test_chunk_form_equals_the_plain_rule_with_momentum(memory: str, rule: str) -> None:
    for b, length in AWKWARD:
        assert_same(made(memory=memory, bias="huber_norm", retention=rule, optimizer="momentum", chunk=b), length)


@pytest.mark.parametrize(
    ("memory", "rule", "optimizer"),
    [(m, r, "gd") for m in MEMORIES for r in NAMES if not (r == "kl" and m != "matrix")] + [("mlp2", "l2", "momentum")],
)
def test_chunk_form_equals_the_plain_rule_with_a_gate_per_channel(memory: str, rule: str, optimizer: str) -> None:
    for b, length in AWKWARD:
        assert_same(made(memory=memory, bias="l2", retention=rule, gates="channel", optimizer=optimizer, chunk=b), length)


@pytest.mark.parametrize("memory", MEMORIES)
def test_chunk_form_equals_the_plain_rule_with_the_mirror_link_and_clipped_gradients(memory: str) -> None:
    for b, length in AWKWARD:
        assert_same(made(memory=memory, bias="l2", retention="lq", link="mirror", q=3.0, chunk=b, max_grad_norm=0.7), length)


@pytest.mark.parametrize("make", [moneta, yaad, memora], ids=["moneta", "yaad", "memora"])
def test_outer_gradients_equal_those_through_the_plain_rule(make) -> None:
    layer = made(**{key: value for key, value in make(D).settings.items() if key not in ("dim", "heads")} | {"mode": "exact", "chunk": 4})
    carry, q, tokens, norm = case(layer, 11)
    leaves = [*(z.requires_grad_() for z in carry.start), tokens.k, tokens.v, tokens.eta, tokens.alpha, tokens.delta, *norm]
    for leaf in leaves:
        leaf.requires_grad_()
    fast = torch.autograd.grad(chunked(layer, carry, q, tokens, norm)[0].square().sum(), leaves, allow_unused=True)
    plain = torch.autograd.grad(plain_miras(layer, carry.start, q, tokens, norm)[0].square().sum(), leaves, allow_unused=True)
    for one, other in zip(fast, plain):
        assert (one is None or not one.any()) if other is None else (one - other).abs().max() < 1e-9 * max(1, other.abs().max())


APPROXIMATE = [
    ({"bias": "lp", "retention": "lq"}, "boundary"),
    ({"bias": "l2", "retention": "lq", "link": "mirror"}, "boundary"),
    ({"bias": "l2", "retention": "kl"}, "boundary"),
    ({"bias": "l2", "retention": "kl"}, "paper_linear"),
    ({"bias": "l2", "retention": "bregman_sig"}, "boundary"),
]


@pytest.mark.parametrize(("choice", "mode"), APPROXIMATE)
@pytest.mark.parametrize("memory", ["matrix", "mlp2"])
def test_approximate_modes_differ_and_converge_to_the_rule_at_b_one(memory: str, choice: dict, mode: str) -> None:
    gaps = []
    for b in (16, 4, 2, 1):
        exact, near = (made(memory=memory, chunk=b, mode=m, **choice) for m in ("exact", mode))
        parts = case(exact, 32)
        gaps.append((chunked(exact, *parts)[0] - chunked(near, *parts)[0]).abs().mean().item())
    assert gaps[0] > 1e-6
    assert gaps[0] > gaps[2] > gaps[3]
    assert gaps[3] < 1e-10


@pytest.mark.parametrize("rule", ["lq", "kl"])
def test_boundary_mode_is_exact_at_chunk_ends(rule: str) -> None:
    exact, near = (made(bias="lp", retention=rule, chunk=4, mode=mode) for mode in ("exact", "boundary"))
    parts = case(exact, 12)
    (y, after, _), (near_y, near_after, _) = chunked(exact, *parts), chunked(near, *parts)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(after.now, near_after.now))
    assert (y - near_y)[:, 3::4].abs().max() < 1e-10
    assert (y - near_y).abs().max() > 1e-6


def test_modes_of_l2_retention_are_one() -> None:
    exact, near = (made(bias="huber_mixed", mode=mode) for mode in ("exact", "boundary"))
    parts = case(exact)
    assert torch.equal(chunked(exact, *parts)[0], chunked(near, *parts)[0])


# 2. The error is the loss's gradient


@pytest.mark.parametrize("name", list(BIASES))
def test_error_is_the_gradient_of_the_loss_by_the_prediction(name: str) -> None:
    for p in (1.0, 1.5, 2.0, 3.0):
        prediction, value, delta = drawn(0, 50, D).requires_grad_(), drawn(1, 50, D), 1 + torch.rand(50, 1, dtype=torch.float64)
        (expected,) = torch.autograd.grad(BIASES[name].loss(prediction, value, p, delta).sum(), prediction)
        assert (BIASES[name].error(prediction, value, p, delta) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", list(BIASES))
def test_back_propagated_error_equals_autograd_of_the_loss(memory: str, name: str) -> None:
    layer = made(memory=memory, bias=name)
    carry, _, tokens, norm = case(layer, 1)
    inside = norm if memory == "mlp2" else None
    W = tuple(z.clone().requires_grad_() for z in carry.start)
    loss = layer.choices.bias.loss(answer(memory, W, tokens.k, inside), tokens.v, 3.0, tokens.delta).sum()
    a, delta, _ = gradients(layer.choices, W, tokens, inside)
    for expected, one, other in zip(torch.autograd.grad(loss, W), a, delta):
        assert (one.mT @ other - expected).abs().max() < 1e-10


def test_errors_by_hand() -> None:
    e, zero = torch.tensor([[3.0, -4.0]]), torch.zeros(1, 2)
    two, ten = torch.tensor([[2.0]]), torch.tensor([[10.0]])
    assert torch.allclose(BIASES["dot"].error(e, torch.ones(1, 2), 3, two), torch.tensor([[-1.0, -1.0]]))
    assert torch.allclose(BIASES["l2"].error(e, zero, 3, two), torch.tensor([[6.0, -8.0]]))
    assert torch.allclose(BIASES["lp"].error(e, zero, 3, two), torch.tensor([[27.0, -48.0]]))
    assert torch.allclose(BIASES["lp"].error(e, zero, 1, two), torch.tensor([[1.0, -1.0]]))  # signs: the value-less memory
    assert torch.allclose(BIASES["huber_coord"].error(e, zero, 3, two), torch.tensor([[2.0, -2.0]]))
    assert torch.allclose(BIASES["huber_norm"].error(e, zero, 3, two), torch.tensor([[1.2, -1.6]]))
    assert torch.allclose(BIASES["huber_mixed"].error(e, zero, 3, two), torch.tensor([[2.0, -2.0]]))
    assert torch.allclose(BIASES["huber_mixed"].error(e, zero, 3, ten), torch.tensor([[6.0, -8.0]]))
    assert torch.allclose(BIASES["robust_shift"].error(e, zero, 3, two), torch.tensor([[4.2, -5.6]]))


# 3. Reductions


def same_outputs(first: MirasMemory, second: MirasMemory, change=lambda tokens: tokens, other=lambda tokens: tokens) -> bool:
    carry, q, tokens, norm = case(first)
    start = Carry(*([second.retention.inverse(first.retention.link(z)) for z in part] for part in carry[:2]), carry.S)
    y, z = chunked(first, carry, q, change(tokens), norm)[0], chunked(second, start, q, other(tokens), norm)[0]
    return bool((y - z).abs().max() < 1e-10)


@pytest.mark.parametrize("memory", MEMORIES)
def test_lp_of_two_is_l2_and_lq_of_two_is_l2_retention(memory: str) -> None:
    plain = made(memory=memory)
    assert same_outputs(made(memory=memory, bias="lp", p=2.0), plain)
    for link in ("literal", "mirror"):
        assert same_outputs(made(memory=memory, retention="lq", q=2.0, link=link), plain)
    assert same_outputs(made(memory=memory, retention="lq", q=2.0, mode="boundary"), plain)


@pytest.mark.parametrize("memory", MEMORIES)
def test_huber_with_an_infinite_threshold_is_l2(memory: str) -> None:
    def endless(tokens: Written) -> Written:
        return tokens._replace(delta=torch.full_like(tokens.delta, float("inf")))

    def half(tokens: Written) -> Written:
        return tokens._replace(eta=tokens.eta / 2)

    assert same_outputs(made(memory=memory, bias="huber_mixed"), made(memory=memory), endless)
    for name in ("huber_coord", "huber_norm"):  # half the squared error
        assert same_outputs(made(memory=memory, bias=name), made(memory=memory), endless, half)


@pytest.mark.parametrize("gates", ["head", "channel"])
def test_dot_with_decay_is_the_recurrence_of_retnet_and_gla(gates: str) -> None:
    layer = made(memory="matrix", bias="dot", gates=gates)
    carry, q, tokens, norm = case(layer)
    tokens = tokens._replace(write=torch.ones_like(tokens.write))
    S, ys = carry.start[0], []
    for t in range(T):
        S = tokens.alpha[:, t, :, None] * S + (tokens.eta * tokens.k)[:, t, :, None] * tokens.v[:, t, None, :]
        ys.append(torch.einsum("ni,nio->no", q[:, t], S))
    assert (chunked(layer, carry, q, tokens, norm)[0] - torch.stack(ys, 1)).abs().max() < 1e-10


def test_l2_matrix_without_decay_at_b_one_is_deltanet() -> None:
    layer = made(memory="matrix", chunk=1)
    carry, q, tokens, norm = case(layer)
    tokens = tokens._replace(write=torch.ones_like(tokens.write), alpha=torch.ones_like(tokens.alpha))
    S, ys = carry.start[0], []
    for t in range(T):
        beta, k, v = 2 * tokens.eta[:, t], tokens.k[:, t], tokens.v[:, t]
        S = S - beta[..., None] * k[..., None] * (torch.einsum("ni,nio->no", k, S) - v)[:, None]
        ys.append(torch.einsum("ni,nio->no", q[:, t], S))
    assert (chunked(layer, carry, q, tokens, norm)[0] - torch.stack(ys, 1)).abs().max() < 1e-10


def titans(layer: MirasMemory) -> Tensor:
    carry, q, tokens, norm = case(layer)
    mu = None if tokens.mu is None else tokens.mu[..., 0]
    theirs = dual.Tokens(tokens.k, tokens.v, tokens.eta[..., 0], mu, 1 - tokens.alpha[..., 0], tokens.write[..., 0])
    rule = dual.Rule(chunk=layer.settings["chunk"])
    begin = dual.start(carry.start, theirs, momentum=layer.momentum)
    return dual.read_write(rule, begin, q, theirs, norm if layer.settings["memory"] == "mlp2" else None).y


@pytest.mark.parametrize("memory", ["matrix", "mlp2"])
@pytest.mark.parametrize("optimizer", ["momentum", "gd"])
def test_l2_and_l2_is_the_memory_of_titans(memory: str, optimizer: str) -> None:
    layer = made(memory=memory, optimizer=optimizer, chunk=4)
    assert (chunked(layer, *case(layer))[0] - titans(layer)).abs().max() < 1e-10


def test_moneta_of_two_and_two_is_yaad_without_threshold_is_titans_without_momentum() -> None:
    first = made(**{"bias": "lp", "p": 2.0, "retention": "lq", "q": 2.0, "mode": "boundary"})
    second = made(bias="huber_mixed")
    carry, q, tokens, norm = case(second)
    endless = tokens._replace(delta=torch.full_like(tokens.delta, float("inf")))
    expected = titans(second)
    assert (chunked(second, carry, q, endless, norm)[0] - expected).abs().max() < 1e-10
    assert (chunked(first, carry, q, tokens, norm)[0] - expected).abs().max() < 1e-10


# 4. Memora stays on the simplex


def test_memoras_slices_stay_distributions_over_ten_thousand_tokens_in_single_precision() -> None:
    layer = made(retention="kl", c=2.0).float()
    carry, q, tokens, norm = case(layer, 10_000)
    carry = Carry(*(tuple(z.float() for z in part) for part in carry))
    tokens = Written(*(part if part is None or part.dtype == torch.bool else part.float() for part in tokens))
    with torch.no_grad():
        y, after, _ = chunked(layer, carry, q.float(), tokens, (norm[0].float(), norm[1].float()))
    assert y.isfinite().all()
    for z in after.now:
        W = layer.retention.link(z)
        assert W.min() > 0
        assert (W.sum(-1) - 2.0).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["exact", "boundary", "paper_linear"])
@pytest.mark.parametrize("alpha", [0.0, 1e-30, 1.0])
def test_memora_has_no_nan_where_alpha_is_nothing_or_everything(mode: str, alpha: float) -> None:
    layer = made(retention="kl", mode=mode, chunk=4)
    carry, q, tokens, norm = case(layer)
    tokens = tokens._replace(alpha=torch.full_like(tokens.alpha, alpha).requires_grad_())
    y, after, _ = chunked(layer, carry, q, tokens, norm)
    (slope,) = torch.autograd.grad(y.square().sum(), tokens.alpha)
    assert y.isfinite().all()
    assert slope.isfinite().all()
    assert all(z.isfinite().all() for z in after.now)


def test_the_printed_memora_leaves_the_simplex_inside_a_chunk() -> None:
    layer = made(retention="kl", mode="paper_linear", chunk=16)
    _, after, _ = chunked(layer, *case(layer, 15))
    assert any(((W.sum(-1) - 1).abs() > 1e-3).any() for W in after.now)


# 5. Stationarity


def slope(objective, W: Tensor) -> Tensor:
    W = W.detach().requires_grad_()
    return torch.autograd.grad(objective(W), W)[0]


def test_kl_update_is_stationary_on_the_simplex() -> None:
    W, g, eta, c = 2 * drawn(0, 3, 5).softmax(-1), drawn(1, 3, 5), 0.7, 2.0
    rule = retention("kl", c=c)
    new = rule.link(rule.inverse(W) - eta * g)
    by = slope(lambda w: eta * (g * w).sum() + (w * (w / W).log()).sum(), new)
    assert (by - by.mean(-1, keepdim=True)).abs().max() < 1e-10  # only the multiplier of each slice's mass is left
    assert (new.sum(-1) - c).abs().max() < 1e-12


def test_bregman_update_is_stationary() -> None:
    W, g, eta = torch.sigmoid(drawn(0, 3, 5)), drawn(1, 3, 5), 0.7
    rule = retention("bregman_sig")
    new = rule.link(rule.inverse(W) - eta * g)

    def objective(w: Tensor) -> Tensor:
        def f(x: Tensor) -> Tensor:
            return (x * x.log() + (1 - x) * (1 - x).log()).sum()

        return eta * (g * w).sum() + f(w) - f(W) - (W.logit() * (w - W)).sum()

    assert slope(objective, new).abs().max() < 1e-10


def test_mirror_link_is_stationary_and_the_printed_one_is_not() -> None:
    A, q = drawn(0, 3, 5), 4.0
    dual_power = q / (q - 1)

    def objective(w: Tensor) -> Tensor:
        return -(A * w).sum() + w.abs().pow(dual_power).sum() ** (2 / dual_power) / 2

    assert slope(objective, retention("lq", q=q, link="mirror").link(A)).abs().max() < 1e-10
    assert slope(objective, retention("lq", q=q).link(A)).abs().max() > 0.1


@pytest.mark.parametrize("form", ["elastic_net", "elastic_net_ftrl"])
def test_elastic_net_update_is_stationary(form: str) -> None:
    W, g, eta, alpha, s = drawn(0, 3, 5), drawn(1, 3, 5), torch.tensor(0.7), torch.tensor(0.8), 0.4
    rule = retention(form, sparsity=s)
    if rule.step is not None:
        b = alpha * eta / (1 - alpha)
        new = rule.step(W, eta * g, alpha, eta)
        smooth = slope(lambda w: (g * w).sum() + (w - W).square().sum() / (2 * eta) + w.square().sum() / (2 * b), new)
    else:
        new = rule.link(W)
        smooth = slope(lambda w: -(W * w).sum() + w.square().sum() / 2, new)
    zero = new == 0
    assert 0 < zero.sum() < zero.numel()
    assert (smooth + s * new.sign())[~zero].abs().max() < 1e-6  # alpha and eta are single-precision numbers
    assert smooth[zero].abs().max() <= s  # within the subgradient of the corner


@pytest.mark.parametrize(
    ("name", "f"), [("kl", lambda t: t * t.log()), ("chi2", lambda t: (t - 1).square() / 2), ("reverse_kl", lambda t: -t.log())]
)
def test_f_divergence_update_is_stationary_and_keeps_its_mass(name: str, f) -> None:
    W, g, eta = 2 * drawn(0, 3, 5).softmax(-1), drawn(1, 3, 5), torch.tensor(0.3)
    rule = retention("f_divergence", c=2.0, divergence=name)
    new = rule.step(W, 0.3 * g, torch.tensor(1.0), eta)
    assert (new.sum(-1) - 2).abs().max() < 1e-10
    assert (new > 0).all()
    by = slope(lambda w: 0.3 * (g * w).sum() + (W * f(w / W)).sum(), new)
    assert (by - by.mean(-1, keepdim=True)).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["kl", "chi2", "reverse_kl"])
def test_gradient_passes_through_the_multiplier_of_the_f_divergence(name: str) -> None:
    W, push = drawn(0, 2, 4).softmax(-1).requires_grad_(), (0.2 * drawn(1, 2, 4)).requires_grad_()
    step = retention("f_divergence", divergence=name).step
    assert torch.autograd.gradcheck(lambda w, p: step(w, p, torch.tensor(1.0), torch.tensor(1.0)), (W, push))


def test_chi2_lets_entries_die_and_keeps_the_mass() -> None:
    W = torch.full((1, 4), 0.25, dtype=torch.float64)
    push = torch.tensor([[3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    new = retention("f_divergence", divergence="chi2").step(W, push, torch.tensor(1.0), torch.tensor(1.0))
    assert torch.allclose(new, torch.tensor([[0.0, 1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"name": "lq"}, {"name": "lq", "q": 3.0, "link": "mirror"}, {"name": "elastic_net_ftrl"}, {"name": "l2"}]
)
def test_inverse_links_undo_links(settings: dict) -> None:
    rule, W = retention(**settings), drawn(0, 2, 3, 5)
    assert (rule.link(rule.inverse(W)) - W).abs().max() < 1e-12


def test_inverse_links_undo_links_on_their_own_ranges() -> None:
    kl, sigmoid, W = retention("kl", c=2.0), retention("bregman_sig"), drawn(0, 2, 3, 5)
    assert (kl.link(kl.inverse(2 * W.softmax(-1))) - 2 * W.softmax(-1)).abs().max() < 1e-12
    assert (sigmoid.link(sigmoid.inverse(W.sigmoid())) - W.sigmoid()).abs().max() < 1e-12


def test_printed_lq_link_shrinks_where_the_accumulator_grows() -> None:
    A = drawn(0, 3, 5)
    literal, mirror = retention("lq", q=4.0), retention("lq", q=4.0, link="mirror")
    assert torch.allclose(literal.link(10 * A), literal.link(A) / 10)
    assert torch.allclose(mirror.link(10 * A), mirror.link(A) * 10)
    assert torch.allclose(literal.inverse(A), A / A.pow(4).sum().sqrt())  # A_0 = W_0 / ||W_0||_4^2


def test_soft_threshold_by_hand() -> None:
    assert torch.equal(soft_threshold(torch.tensor([3.0, -0.5, -2.0]), torch.tensor(1.0)), torch.tensor([2.0, 0.0, -1.0]))


# 6. Influence of one outlier


@pytest.mark.parametrize("memory", ["matrix", "mlp2"])
@pytest.mark.parametrize(("name", "growth"), [("huber_mixed", 1), ("huber_norm", 1), ("huber_coord", 1), ("l2", 10), ("lp", 100)])
def test_influence_of_an_outlier_is_bounded_with_huber_linear_with_l2_and_quadratic_with_l3(memory: str, name: str, growth: float) -> None:
    layer = made(memory=memory, bias=name)
    carry, q, tokens, norm = case(layer, 1)
    tokens = tokens._replace(write=torch.ones_like(tokens.write), alpha=torch.ones_like(tokens.alpha))
    u = drawn(30, N, 1, D)
    moves = []
    for s in (1e4, 1e5):
        after = chunked(layer, carry, q, tokens._replace(v=tokens.v + s * u), norm)[1]
        moves.append(sum((new - old).square().sum() for new, old in zip(after.now, carry.start)).sqrt().item())
    assert moves[1] / moves[0] == pytest.approx(growth, rel=0.01)


# 7. Retention and step size are separate gates


def test_step_size_and_retention_are_separate_gates() -> None:
    layer = made(memory="matrix")
    carry, q, tokens, norm = case(layer, 5)
    tokens = tokens._replace(write=torch.ones_like(tokens.write))
    still = chunked(layer, carry, q, tokens._replace(eta=torch.zeros_like(tokens.eta)), norm)[1]
    assert torch.allclose(still.now[0], tokens.alpha.prod(1)[..., None] * carry.start[0])  # forgets and writes nothing
    full = chunked(layer, carry, q, tokens._replace(alpha=torch.ones_like(tokens.alpha)), norm)[1]
    assert not torch.allclose(full.now[0], carry.start[0])  # writes and forgets nothing
    x = drawn(5, 2, 6, D)
    before = layer.watch(x)
    with torch.no_grad():
        layer.keep.weight.add_(1)
    after = layer.watch(x)
    assert torch.equal(before["write"], after["write"])
    assert not torch.equal(before["forget"], after["forget"])


# 8. Causality, streaming, isolation: the layer

LAYERS = {
    "moneta": {"bias": "lp", "retention": "lq", "mode": "boundary"},
    "moneta exact": {"bias": "lp", "retention": "lq"},
    "yaad": {"bias": "huber_mixed"},
    "yaad by channel": {"bias": "huber_mixed", "gates": "channel"},
    "memora": {"retention": "kl"},
    "memora delayed": {"retention": "kl", "mode": "boundary"},
    "memora as printed": {"retention": "kl", "mode": "paper_linear"},
    "with momentum": {"optimizer": "momentum"},
    "matrix": {"memory": "matrix", "retention": "elastic_net"},
    "vector": {"memory": "vector", "retention": "f_divergence"},
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer(request) -> MirasMemory:
    return made(dim=8, heads=2, chunk=4, **request.param)


def test_a_later_token_changes_no_earlier_output_by_a_bit(layer: MirasMemory) -> None:
    x = drawn(3, 2, 14, 8)
    y, _ = layer(x)
    for s in (0, 3, 4, 6, 13):
        changed = x.clone()
        changed[:, s] += 1
        z, _ = layer(changed)
        assert torch.equal(y[:, :s], z[:, :s])
        assert not torch.equal(y[:, s:], z[:, s:])


def test_reading_in_pieces_is_reading_at_once(layer: MirasMemory) -> None:
    x = drawn(3, 2, 14, 8)
    y, after = layer(x)
    for cuts in ([4, 8], [1, 2, 3, 9, 9], list(range(1, 14))):
        pieces, state = [], None
        for piece in x.tensor_split(cuts, 1):
            out, state = layer(piece, state)
            pieces.append(out)
        assert (torch.cat(pieces, 1) - y).abs().max() < 1e-10
        assert state is not None
        assert state.seen == after.seen == 14
        assert all((state.tensors[name] - tensor).abs().max() < 1e-10 for name, tensor in after.tensors.items())


def test_rows_of_a_batch_share_nothing(layer: MirasMemory) -> None:
    x = drawn(3, 3, 10, 8)
    y, state = layer(x)
    alone, its = layer(x[1:2])
    assert (y[1:2] - alone).abs().max() < 1e-12
    assert all((state.tensors[name][1:2] - tensor).abs().max() < 1e-12 for name, tensor in its.tensors.items())


def test_masked_tokens_change_nothing(layer: MirasMemory) -> None:
    x, mask = drawn(3, 2, 12, 8), torch.ones(2, 12, dtype=torch.bool)
    mask[0, 5:7], mask[1, :2] = False, False
    garbled = torch.where(mask[..., None], x, 7.0)
    (y, state), (z, other) = layer(x, mask=mask), layer(garbled, mask=mask)
    assert torch.equal(y[mask], z[mask])
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in other.tensors.items())
    whole = torch.ones(2, 12, dtype=torch.bool)
    assert torch.equal(layer(x)[0], layer(x, mask=whole)[0])
    _, before = layer(x[:, :5])
    _, after = layer(garbled[:, 5:7], before, mask=torch.zeros(2, 2, dtype=torch.bool))
    assert after.seen == 7
    assert all((after.tensors[name] - before.tensors[name]).abs().max() < 1e-12 for name in before.tensors)


def test_recall_writes_nothing_and_asks_the_memory_as_it_stands(layer: MirasMemory) -> None:
    x = drawn(3, 2, 12, 8)
    _, state = layer(x[:, :11])
    kept = state.clone()
    first = layer.recall(x[:, 11:], state)
    assert torch.equal(first, layer.recall(x[:, 11:], state))
    assert all(torch.equal(kept.tensors[name], tensor) for name, tensor in state.tensors.items())
    with torch.no_grad():
        for gate in (layer.step, layer.keep):  # a token that writes nothing reads what recall reads
            last = gate[-1] if isinstance(gate, torch.nn.Sequential) else gate
            last.weight.zero_()
            last.bias.fill_(-60.0 if gate is layer.step else 60.0)
    if layer.settings["mode"] == "exact" and not layer.momentum and layer.settings["retention"] != "elastic_net":
        assert (layer(x[:, 11:], state)[0] - first).abs().max() < 1e-10


def test_state_keeps_its_size_and_goes_on_from_a_file(layer: MirasMemory, tmp_path: Path) -> None:
    x = drawn(3, 2, 14, 8)
    _, state = layer(x[:, :9])
    assert state.bytes == layer(x)[1].bytes == layer.first_state(x).bytes
    state.save(tmp_path / "state.safetensors")
    again = MemoryState.load(tmp_path / "state.safetensors")
    assert torch.equal(layer(x[:, 9:], state)[0], layer(x[:, 9:], again)[0])


def test_outer_gradients_reach_every_parameter(layer: MirasMemory) -> None:
    x = drawn(3, 2, 9, 8)
    x[:, 2:5] *= 30  # wild values: an error within its threshold teaches Yaad's threshold nothing
    y, _ = layer(x)
    y.square().sum().backward()
    idle = {name for name, parameter in layer.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert idle <= ({name for name in idle if name.startswith("keep")} if layer.settings["retention"] == "f_divergence" else set())


def test_watch_shows_the_gates_and_the_gradients_norm(layer: MirasMemory) -> None:
    x, mask = drawn(3, 2, 7, 8), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 2] = False
    shown = layer.watch(x, mask=mask)
    assert {"surprise", "write", "forget"} <= shown.keys()
    assert ("momentum" in shown) == layer.momentum
    assert ("threshold" in shown) == (layer.settings["bias"] == "huber_mixed")
    assert all(value.shape == (2, 2, 7) and value[0, :, 2].eq(0).all() for value in shown.values())
    assert shown["write"].max() <= 1
    assert shown["forget"].max() < 1
    assert shown["surprise"].min() >= 0


def test_nothing_read_is_nothing_changed(layer: MirasMemory) -> None:
    x = drawn(3, 2, 5, 8)
    _, state = layer(x)
    y, same = layer(x[:, :0], state)
    assert y.shape == (2, 0, 8)
    assert all(torch.equal(same.tensors[name], tensor) for name, tensor in state.tensors.items())


def test_half_precision_reads_with_a_state_in_single() -> None:
    layer = made(dim=8, heads=2).to(torch.bfloat16)
    y, state = layer(drawn(3, 2, 9, 8).to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert state.tensors["now_0"].dtype == torch.float32
    y.float().sum().backward()


def test_convolution_skips_masked_tokens() -> None:
    x, weight, history = drawn(0, 1, 5, 2), drawn(1, 2, 4), torch.zeros(1, 3, 2, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, False, True]])
    full, tail = convolved(x, history, mask, weight)
    short, other = convolved(x[:, ::2], history, torch.ones(1, 3, dtype=torch.bool), weight)
    assert torch.equal(full[:, ::2], short)
    assert torch.equal(tail, other)
    by_hand = weight[:, 3] * x[0, 4] + weight[:, 2] * x[0, 2] + weight[:, 1] * x[0, 0]
    assert torch.allclose(short[0, 2], by_hand)


def test_presets_are_the_papers() -> None:
    found = {make.__name__: make(8, 2, chunk=8).settings for make in (moneta, yaad, memora)}
    assert [found["moneta"][key] for key in ("memory", "bias", "p", "retention", "q", "optimizer", "mode")] == [
        "mlp2", "lp", 3.0, "lq", 4.0, "gd", "boundary",
    ]  # fmt: skip
    assert [found["yaad"][key] for key in ("memory", "bias", "retention", "optimizer")] == ["mlp2", "huber_mixed", "l2", "gd"]
    assert [found["memora"][key] for key in ("memory", "bias", "retention", "optimizer", "c")] == ["mlp2", "l2", "kl", "gd", 1.0]
    assert all(settings["chunk"] == 8 for settings in found.values())
    for name, settings in found.items():
        assert MirasMemory(8, 2, chunk=8, preset=name).settings == settings | {"preset": name}
    assert moneta(8, mode="exact").settings["mode"] == "exact"


def test_own_bias_and_own_retention_run_through_the_engine() -> None:
    register_bias("log_cosh", lambda m, v, p, delta: (m - v).cosh().log().sum(-1))
    register_retention("doubled", lambda z: 2 * z, lambda w: w / 2)
    try:
        layer = made(bias="log_cosh", retention="doubled", chunk=4)
        carry, q, tokens, norm = case(layer)
        prediction, value = drawn(0, 5, D), drawn(1, 5, D)
        assert torch.allclose(bias("log_cosh").error(prediction, value, 3.0, tokens.delta), torch.tanh(prediction - value))
        plain = made(bias="log_cosh", chunk=4)  # links that double the step
        start = Carry(*(tuple(2 * z for z in part) for part in carry))
        faster = tokens._replace(eta=2 * tokens.eta)
        assert (chunked(layer, carry, q, tokens, norm)[0] - chunked(plain, start, q, faster, norm)[0]).abs().max() < 1e-10
        with pytest.raises(Mistake, match="already"):
            register_bias("log_cosh", BIASES["l2"].loss)
        with pytest.raises(Mistake, match="already"):
            register_retention("doubled", torch.exp, torch.log)
    finally:
        del BIASES["log_cosh"], CUSTOM["doubled"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bias": "lp", "p": 0.5}, "at least 1"),
        ({"retention": "lq", "q": 1.5}, "at least 2 for the literal"),
        ({"retention": "lq", "q": 1.0, "link": "mirror"}, "above 1 for the mirror"),
        ({"retention": "kl", "optimizer": "momentum"}, "momentum"),
        ({"retention": "kl", "gates": "channel"}, "along the softmax"),
        ({"retention": "kl", "gates": "channel", "memory": "vector"}, "along the softmax"),
        ({"retention": "kl", "c": -1.0}, "above 0"),
        ({"retention": "elastic_net", "sparsity": -1.0}, "at least 0"),
        ({"retention": "f_divergence", "divergence": "chi"}, "did you mean 'chi2'"),
        ({"retention": "f_divergence", "mode": "boundary"}, "no accumulator"),
        ({"retention": "elastic_net", "optimizer": "momentum"}, "momentum"),
        ({"retention": "l2", "mode": "paper_linear"}, "belongs to kl"),
        ({"retention": "kll"}, "did you mean 'kl'"),
        ({"bias": "hubber_norm"}, "did you mean 'huber_norm'"),
        ({"memory": "mlp3"}, "did you mean 'mlp2'"),
        ({"optimizer": "adam"}, "no optimizer"),
        ({"gates": "token"}, "no gates"),
        ({"mode": "fast"}, "no mode"),
        ({"link": "mirrored"}, "no link"),
        ({"preset": "yad"}, "did you mean 'yaad'"),
        ({"heads": 3}, "not divisible"),
        ({"chunk": 0}, "at least 1"),
        ({"max_step": 0.0}, "above 0"),
        ({"max_grad_norm": float("nan")}, "above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        MirasMemory(8, **settings)


def test_input_and_state_that_do_not_fit_are_refused() -> None:
    layer, x = made(dim=8, heads=2), drawn(0, 2, 5, 8)
    _, state = layer(x)
    with pytest.raises(Mistake, match="bias=l2, this memory has bias=dot"):
        made(dim=8, heads=2, bias="dot")(x, state)
    with pytest.raises(Mistake, match="holds 2 sequences"):
        layer.recall(x[:1], state)
    with pytest.raises(Mistake, match="not finite"):
        layer(x * float("nan"))
    with pytest.raises(Mistake, match="boolean mask"):
        layer(x, mask=torch.ones(2, 4, dtype=torch.bool))


def test_recall_inside_a_printed_chunk_reads_the_weights_as_they_are() -> None:
    layer = made(retention="kl", mode="paper_linear", chunk=8)
    carry, q, tokens, norm = case(layer, 5)
    y, after, _ = chunked(layer, carry, q, tokens, norm)
    assert (recall(layer.choices, after, q[:, -1:], norm, 5) - y[:, -1:]).abs().max() < 1e-12
