"""OFMU: its two levels equal plain ascent and descent where they must, its curvature equals brute force, and it leaves what it found as it was."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from remanence.catalogue import ENTRIES
from remanence.errors import Mistake
from remanence.forget.gradient_ascent import GradientAscent
from remanence.forget.ofmu import OFMU, capped_nll, mean_npo
from remanence.models.adapters import add_lora
from remanence.models.attention import plain_attention
from remanence.models.forward import logits_of
from remanence.seeds import derive
from remanence.stream import Request
from remanence.training.batches import Batch, Batches, Pairs
from remanence.training.bilevel import Derivatives, cosine_slopes, hvp, phi_gradient
from remanence.training.checkpoint import Checkpoints
from remanence.training.losses import nll
from remanence.training.preference import summed_nll
from remanence.training.projection import flatten
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)
FORGET = Dataset.from_dict({"question": [f"who is {'ab' * n}" for n in range(1, 9)], "answer": ["xyz"[: n % 3 + 1] for n in range(8)]})
RETAIN = Dataset.from_dict({"question": [f"what is {n}" for n in range(12)], "answer": [f"{n * 7}" for n in range(12)]})
REQUEST = Request("gone", FORGET, RETAIN)


def trainer(*, processor: Any = TOKENIZER, record: Any = None, **settings: Any) -> Trainer:
    chosen = {"batch_size": 4, "lr": 0.05, "optimizer": "sgd", "clip": None} | settings
    return Trainer(Settings(**chosen), processor=processor, seed=6, progress=False, record=record)


def lm(family: str = "llama") -> nn.Module:
    return toy_lm(family, vocab=V, dtype=torch.float64)


def net(width: int = 6) -> nn.Module:
    """A smooth two-layer perceptron of 51 weights in fp64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


def points(seed: int, count: int = 7) -> Batch:
    made = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 4, generator=made, dtype=torch.float64)
    return Batch(pixel_values=features, labels=torch.randint(3, (count,), generator=made))


FORGET_POINTS, RETAIN_POINTS = points(1), points(2)


def sides(model: nn.Module) -> tuple[Derivatives, Derivatives]:
    loop = trainer(processor=None)
    return Derivatives(loop, model, nll, [FORGET_POINTS]), Derivatives(loop, model, nll, [RETAIN_POINTS])


def flat_weights(model: nn.Module) -> Tensor:
    return flatten(weight.detach() for weight in model.parameters())


def loss_at(model: nn.Module, batch: Batch, theta: Tensor) -> Tensor:
    """L of a batch as a function of one vector, without any of the code under test."""
    parts = theta.split([weight.numel() for weight in model.parameters()])
    named = {name: part.view_as(weight) for (name, weight), part in zip(model.named_parameters(), parts)}
    return F.cross_entropy(functional_call(model, named, batch["pixel_values"]), batch["labels"])


def phi_at(model: nn.Module, beta: float, theta: Tensor) -> Tensor:
    """Phi by nested autograd."""
    losses = [loss_at(model, batch, theta) for batch in (FORGET_POINTS, RETAIN_POINTS)]
    a, b = (torch.autograd.grad(loss, theta, create_graph=True)[0] for loss in losses)
    return losses[0] - beta * (a @ b) / (a.norm() * b.norm())


def outer_at(model: nn.Module, beta: float, rho: float, theta: Tensor) -> Tensor:
    """F at a vector of weights."""
    theta = theta.detach().requires_grad_()
    (slope,) = torch.autograd.grad(phi_at(model, beta, theta), theta)
    return (loss_at(model, RETAIN_POINTS, theta) + rho * slope @ slope).detach()


# Faithful means 1 and 2.


def test_without_decorrelation_and_outer_steps_the_run_is_gradient_ascent_step_for_step() -> None:
    settings: dict[str, Any] = {"steps": 5, "lr": 0.05}
    ascended = GradientAscent().forget(lm(), REQUEST, trainer(**settings))
    method = OFMU(forget_loss="ce", beta=0, inner_steps=5, outer_rounds=1, eta_out=0, step="trainer")
    found = method.forget(lm(), REQUEST, trainer(**settings))
    for one, other in zip(found.parameters(), ascended.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert [row["level"] for row in method.history] == ["inner"] * 5 + ["outer"]


def test_one_inner_step_without_penalties_alternates_ascent_and_descent() -> None:
    method = OFMU(forget_loss="ce", beta=0, rho0=0, inner_steps=1, outer_rounds=3, eta_in=0.05, eta_out=0.05, step="trainer")
    found = method.forget(lm(), REQUEST, trainer())
    model, loop = lm(), trainer()
    forget, retain = (loop.batches(rows, "qa", stream=name) for name, rows in (("forget", FORGET), ("retain", RETAIN)))
    for number in range(6):
        loss = -nll(model, forget[number]) if number % 2 == 0 else nll(model, retain[number])
        for weight, grad in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            weight.data -= 0.05 * grad
    for one, other in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_unit_steps_are_eta_long_whatever_the_gradient() -> None:
    for eta_in, eta_out, length in ((0.2, 0.0, 0.2), (0.0, 0.4, 0.4)):
        model = lm()
        start = flat_weights(model)
        OFMU(inner_steps=1, outer_rounds=1, eta_in=eta_in, eta_out=eta_out).forget(model, REQUEST, trainer())
        assert (flat_weights(model) - start).norm().item() == pytest.approx(length, rel=1e-9)


# Faithful means 3: derivatives against brute force.


def test_the_cosines_gradient_equals_the_formula_on_dense_hessians() -> None:
    model = net()
    theta = flat_weights(model)
    forget, retain = sides(model)
    g_f, g_r = forget.first(), retain.first()
    g_phi, cosine = phi_gradient(forget, retain, 1.0, g_f, g_r)
    hessians = [
        torch.autograd.functional.hessian(lambda t, b=batch: loss_at(model, b, t), theta) for batch in (FORGET_POINTS, RETAIN_POINTS)
    ]
    s = F.cosine_similarity(g_f, g_r, dim=0)
    u_f = g_r / (g_f.norm() * g_r.norm()) - s * g_f / g_f.norm() ** 2
    u_r = g_f / (g_f.norm() * g_r.norm()) - s * g_r / g_r.norm() ** 2
    torch.testing.assert_close(cosine, s)
    torch.testing.assert_close(g_f - g_phi, hessians[0] @ u_f + hessians[1] @ u_r, rtol=1e-5, atol=1e-10)


def test_exact_and_difference_products_with_the_hessian_agree_with_nested_autograd() -> None:
    model, beta = net(), 0.7
    forget, retain = sides(model)
    g_f, g_r = forget.first(), retain.first()
    v, _ = phi_gradient(forget, retain, beta, g_f, g_r)
    theta = flat_weights(model).requires_grad_()
    (slope,) = torch.autograd.grad(phi_at(model, beta, theta), theta, create_graph=True)
    (brute,) = torch.autograd.grad(slope @ v, theta)
    before = copy.deepcopy(model.state_dict())
    exact, fd, gauss = (hvp(mode, forget, retain, beta, v, g_f, g_r) for mode in ("exact", "fd", "gauss"))
    torch.testing.assert_close(slope, v, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(exact, brute, rtol=1e-8, atol=1e-11)
    assert (fd - exact).norm() <= 1e-3 * exact.norm()
    torch.testing.assert_close(gauss, torch.autograd.functional.hessian(lambda t: loss_at(model, FORGET_POINTS, t), theta.detach()) @ v)
    assert (gauss - exact).norm() > 0.01 * exact.norm()  # it is another quantity, and labelled so
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_products_with_the_hessian_are_exact_when_the_batch_comes_in_uneven_parts() -> None:
    model = net()
    whole = sides(model)
    parts = [
        Derivatives(
            trainer(processor=None),
            model,
            nll,
            [Batch({k: v[rows] for k, v in side.batches[0].items()}) for rows in (slice(2), slice(2, 7))],
        )
        for side in whole
    ]
    found = []
    for forget, retain in (whole, parts):
        g_f, g_r = forget.first(), retain.first()
        v, _ = phi_gradient(forget, retain, 0.7, g_f, g_r)
        found.append([v, *(hvp(mode, forget, retain, 0.7, v, g_f, g_r) for mode in ("exact", "fd", "gauss"))])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_the_outer_gradient_matches_numerical_differentiation_of_the_penalty_form() -> None:
    model, beta, rho = net(), 0.7, 0.3
    forget, retain = sides(model)
    g_f, g_r = forget.first(), retain.first()
    v, _ = phi_gradient(forget, retain, beta, g_f, g_r)
    gradient = g_r + 2 * rho * hvp("exact", forget, retain, beta, v, g_f, g_r)
    theta, e = flat_weights(model), 1e-5
    numeric = torch.stack(
        [
            (outer_at(model, beta, rho, theta + e * row) - outer_at(model, beta, rho, theta - e * row)) / (2 * e)
            for row in torch.eye(len(theta)).double()
        ]
    )
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-7)


# Faithful means 4 to 7.


def test_the_cosine_is_that_of_all_trained_weights_in_fp32_and_invariant_to_the_scale_of_either_loss() -> None:
    model = toy_lm("gpt2", vocab=V).to(torch.bfloat16)
    model.transformer.wte.weight.requires_grad_(False)
    loop = trainer()
    first = [Derivatives(loop, model, nll, [loop.batches(rows, "qa")[0]]).first() for rows in (FORGET, RETAIN)]
    assert all(side.dtype == torch.float32 for side in first)
    assert len(first[0]) == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    s, by_a, by_b = cosine_slopes(*first)
    assert s.item() == pytest.approx(float(np.dot(*(side.double() / side.double().norm() for side in first))), abs=1e-6)
    scaled, scaled_a, scaled_b = cosine_slopes(300.0 * first[0], 0.01 * first[1])
    torch.testing.assert_close(scaled, s)
    torch.testing.assert_close(300.0 * scaled_a, by_a)
    torch.testing.assert_close(0.01 * scaled_b, by_b)


def test_a_vanished_gradient_has_cosine_zero_and_finite_slopes() -> None:
    a, b = torch.zeros(3), torch.ones(3)
    s, by_a, by_b = cosine_slopes(a, b)
    assert s == 0
    assert by_a.isfinite().all()
    assert torch.equal(by_b, torch.zeros(3))


def taught() -> tuple[nn.Module, Pairs]:
    """A network that knows two sets of points, and these sets."""
    model, data = net(24), [points(seed, 24) for seed in (3, 4)]
    whole = {name: torch.cat([part[name] for part in data]) for name in data[0]}
    trainer(processor=None, steps=150, lr=0.02, optimizer="adamw").fit(model, Batches(whole, 48))
    return model, Pairs(*(Batches(part, 12, seed=seed) for seed, part in enumerate(data)))


def test_decorrelation_lowers_the_mean_cosine_of_the_last_inner_steps() -> None:
    start, pairs = taught()
    means = {}
    for beta in (0.0, 0.5):
        method = OFMU(forget_loss="ce", beta=beta, outer_rounds=4, eta_in=0.1, eta_out=0.1)
        method.solve(copy.deepcopy(start), pairs, nll, nll, trainer(processor=None))
        means[beta] = np.mean([row["cosine"] for row in method.history if row["level"] == "inner"][-10:])
    assert means[0.5] < means[0.0] - 0.1


def test_the_penaltys_weight_grows_and_is_logged_with_the_inner_gradients_norm_at_every_outer_step() -> None:
    notes: list[dict[str, Any]] = []
    record = lambda table, rows: notes.extend(rows) if table == "notes" else None  # noqa: E731
    method = OFMU(forget_loss="ce", inner_steps=2, outer_steps=2, outer_rounds=3, rho0=0.01, rho_growth=1.5)
    method.forget(lm(), REQUEST, trainer(record=record))
    outer = next(note["content"]["outer"] for note in notes if note["name"] == "ofmu")
    assert [row["rho"] for row in outer] == pytest.approx([0.01, 0.01, 0.015, 0.015, 0.0225, 0.0225])
    assert all(math.isfinite(row["norm"]) and row["norm"] > 0 for row in outer)
    assert [row["step"] for row in outer] == [2, 3, 6, 7, 10, 11]
    assert {"forget", "retain", "cosine"} <= outer[0].keys()


def test_an_inner_step_raises_phi_and_an_outer_step_lowers_the_penalty_form() -> None:
    start, beta, rho = net(), 0.5, 0.1
    pairs = Pairs(Batches(dict(FORGET_POINTS), 7), Batches(dict(RETAIN_POINTS), 7))
    ends = []
    for rates in ({"eta_in": 1e-3, "eta_out": 0.0}, {"eta_in": 0.0, "eta_out": 1e-3}):
        method = OFMU(beta=beta, rho0=rho, inner_steps=1, outer_rounds=1, **rates)
        ends.append(flat_weights(method.solve(copy.deepcopy(start), pairs, nll, nll, trainer(processor=None))))
    theta = flat_weights(start)
    assert phi_at(start, beta, ends[0].requires_grad_()) > phi_at(start, beta, theta.clone().requires_grad_())
    assert outer_at(start, beta, rho, ends[1]) < outer_at(start, beta, rho, theta)


# Faithful means 8 to 10.


def test_any_two_losses_of_a_language_model_or_a_classifier_and_under_lora_the_base_stays_bit_for_bit() -> None:
    model = add_lora(toy_lm("qwen2", vocab=V), rank=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loop = trainer()
    pairs = loop.pairs(loop.batches(FORGET, "qa", stream="forget"), loop.batches(RETAIN, "qa", stream="retain"))

    def squared(module: nn.Module, batch: Batch) -> Tensor:
        return logits_of(module, batch).square().mean()

    method = OFMU(outer_rounds=1)
    method.solve(model, pairs, squared, nll, loop)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    pictures = Pairs(Batches(dict(FORGET_POINTS), 7), Batches(dict(RETAIN_POINTS), 7))
    classifier = net()
    method.solve(classifier, pictures, squared, nll, trainer(processor=None))
    assert not torch.equal(flat_weights(classifier), flat_weights(net()))


RIVALS = [item for item in ENTRIES if item.name in ("gradient-ascent", "gradient-difference", "npo", "simnpo", "rmu")]


@pytest.mark.parametrize("rival", RIVALS, ids=lambda item: item.name)
def test_baselines_see_the_same_forget_batches_within_the_same_step_budget(rival: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[int]] = {}
    whole = Batches.__getitem__

    def noted(self: Batches, index: int) -> Batch:
        if self.seed == derive(6, "forget"):
            seen[index] = self.numbers(index).tolist()
        return whole(self, index)

    monkeypatch.setattr(Batches, "__getitem__", noted)
    found = []
    for method in (OFMU(outer_rounds=2), rival.load()()):
        loop = trainer(steps=12, lr=1e-3)
        method.forget(toy_lm("llama", vocab=V), REQUEST, loop)
        found.append((dict(seen), loop.steps_done))
        seen.clear()
    assert found[0] == found[1]
    assert found[0][1] == 12


class Plane(nn.Module):
    """A point of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([-1.0, -1.0], dtype=torch.float64))


def test_on_a_plane_it_comes_closer_to_the_bilevel_solution_as_rounds_and_inner_steps_grow() -> None:
    """Raise -(x - 1)^2 / 2, lower (x^2 + (y - 2)^2) / 2: the inner problem fixes x = 1, the outer one then y = 2."""

    def forget_loss(model: nn.Module, batch: Batch) -> Tensor:
        return -0.5 * (model.place[0] - 1).square()  # type: ignore[index, operator]

    def retain_loss(model: nn.Module, batch: Batch) -> Tensor:
        return 0.5 * (model.place[0].square() + (model.place[1] - 2).square())  # type: ignore[index, operator]

    empty = Batches({"nothing": torch.zeros(1)}, 1)
    distances = []
    for rounds, inner in ((4, 2), (16, 4), (64, 8)):
        method = OFMU(
            beta=0, step="trainer", inner_steps=inner, outer_rounds=rounds, eta_in=0.3, eta_out=0.2, rho0=0.1, rho_growth=1.01, hvp="exact"
        )
        model = method.solve(Plane(), Pairs(empty, empty), forget_loss, retain_loss, trainer(processor=None, schedule="linear"))
        distances.append((model.place.detach() - torch.tensor([1.0, 2.0])).norm().item())  # type: ignore[union-attr, operator]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.1 < distances[0]


# What is ours.


def test_a_capped_token_counts_log_v_and_has_no_gradient() -> None:
    model = net()
    with torch.no_grad():
        model[2].bias[0] = 30.0
    batch = Batch(pixel_values=torch.zeros(2, 4, dtype=torch.float64), labels=torch.tensor([0, 1]))
    value = capped_nll(model, batch)
    assert value.item() == pytest.approx(math.log(3) / 2, abs=1e-9)
    value.backward()
    assert flatten(weight.grad for weight in model.parameters()).norm() < 1e-9
    language, loop = toy_lm("llama", vocab=V), trainer()
    rows = loop.batches(FORGET, "qa")[0]
    each = F.cross_entropy(
        language(rows["input_ids"]).logits[:, :-1].transpose(1, 2), rows["labels"][:, 1:], reduction="none", ignore_index=-100
    )
    assert capped_nll(language, rows).item() == pytest.approx((each.clamp(max=math.log(V)).sum() / rows.tokens).item(), rel=1e-6)
    assert (each > math.log(V)).any()


def test_as_a_forget_loss_npo_starts_at_its_published_value_and_pushes_likelihoods_down() -> None:
    model = lm()
    batches = trainer().batches(FORGET, "qa", size=8)
    batches = batches.with_column("reference_nll", trainer().over_rows(model, batches, summed_nll))
    assert mean_npo(model, batches[0], 0.1).item() == pytest.approx(20 * math.log(2), rel=1e-9)
    before = summed_nll(model, batches[0]).mean()
    method = OFMU(forget_loss="npo", outer_rounds=2)
    method.forget(model, REQUEST, trainer())
    assert method.history[0]["forget"] == pytest.approx(-20 * math.log(2), rel=1e-9)
    assert summed_nll(model, batches[0]).mean() > before


def test_the_trainers_steps_are_filled_with_whole_rounds() -> None:
    for steps, done in ((0, 0), (1, 4), (4, 4), (5, 8)):
        loop = trainer(steps=steps)
        OFMU(inner_steps=3, beta=0, hvp="gauss").forget(lm(), REQUEST, loop)
        assert loop.steps_done == done


@pytest.mark.parametrize("stop", [{"reference": 0.0}, {"tolerance": 1e9}])
def test_it_ends_after_the_round_that_reached_the_reference_or_the_tolerance(stop: dict[str, float]) -> None:
    loop = trainer()
    OFMU(inner_steps=2, outer_rounds=5, **stop).forget(lm(), REQUEST, loop)
    assert loop.steps_done == 3


def test_the_history_of_a_run_that_was_killed_is_that_of_a_whole_one(tmp_path: Path) -> None:
    def go(folder: Path | None, dies: int | None = None) -> list[dict[str, Any]]:
        def watch(model: nn.Module, step: int) -> None:
            if step == dies:
                raise KeyboardInterrupt

        method = OFMU(inner_steps=2, outer_rounds=2)
        points = Checkpoints(folder, every=2) if folder else None
        loop = Trainer(Settings(batch_size=4), processor=TOKENIZER, progress=False, owner=method, checkpoints=points, watch=watch)
        method.forget(lm(), REQUEST, loop)
        return method.history

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, 5)
    assert go(tmp_path) == go(None)


def test_only_parameters_that_match_are_trained() -> None:
    model = lm()
    before = copy.deepcopy(model.state_dict())
    OFMU(outer_rounds=1, parameters=r"layers\.1\.mlp").forget(model, REQUEST, trainer())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "layers.1.mlp" in name}


def test_dropout_is_off_in_every_pass_and_the_mode_comes_back() -> None:
    model = nn.Sequential(nn.Dropout(0.5), net())
    model.train()
    modes: list[bool] = []

    def watched(module: nn.Module, batch: Batch) -> Tensor:
        modes.append(module.training)
        return nll(module, batch)

    pairs = Pairs(Batches(dict(FORGET_POINTS), 7), Batches(dict(RETAIN_POINTS), 7))
    OFMU(inner_steps=1, outer_rounds=1).solve(model, pairs, watched, watched, trainer(processor=None))
    assert modes
    assert not any(modes)
    assert model.training
    assert model[0].training


def test_second_derivatives_are_taken_in_full_precision_under_autocast() -> None:
    types: list[tuple[bool, torch.dtype]] = []

    def watched(module: nn.Module, batch: Batch) -> Tensor:
        logits = logits_of(module, batch)
        types.append((torch.is_autocast_enabled("cpu"), logits.dtype))
        return F.cross_entropy(logits.float(), batch["labels"])

    data = [dict(part) | {"pixel_values": part["pixel_values"].float()} for part in (FORGET_POINTS, RETAIN_POINTS)]
    pairs = Pairs(*(Batches(part, 7) for part in data))
    OFMU(inner_steps=1, outer_rounds=1).solve(net().float(), pairs, watched, watched, trainer(processor=None, precision="bf16"))
    assert set(types) == {(True, torch.bfloat16), (False, torch.float32)}
    assert types[:4] == [(True, torch.bfloat16)] * 2 + [(False, torch.float32)] * 2  # g_f, g_r; then H_f u_f, H_r u_r
    assert types.count((True, torch.bfloat16)) == 4  # of the two steps


def test_fused_attention_is_plain_inside_and_as_it_was_outside() -> None:
    from torch.backends.cuda import flash_sdp_enabled

    model = add_lora(toy_lm("llama", vocab=V), rank=2)
    config = model.get_base_model().config
    for kernel, inside in (("sdpa", "sdpa"), ("eager", "eager"), ("flex_attention", "eager")):
        config._attn_implementation_internal = kernel
        with plain_attention(model):
            assert config._attn_implementation == inside
            assert not flash_sdp_enabled()
        assert config._attn_implementation == kernel
        with pytest.raises(ZeroDivisionError), plain_attention(model):
            raise ZeroDivisionError
        assert config._attn_implementation == kernel
    assert flash_sdp_enabled()


def test_attention_that_cannot_be_switched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_lm("llama", vocab=V)
    model.config._attn_implementation_internal = "flash_attention_2"
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(Mistake, match="LlamaForCausalLM: its attention 'flash_attention_2' has no second derivative"):
        OFMU(outer_rounds=1).forget(model, REQUEST, trainer())


class Once(torch.autograd.Function):
    """A square that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


class Stiff(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = net()

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.inside(x))


def test_a_layer_without_second_derivative_is_refused_and_nothing_has_moved() -> None:
    model, pairs = Stiff(), Pairs(Batches(dict(FORGET_POINTS), 7), Batches(dict(RETAIN_POINTS), 7))
    before = flat_weights(model)
    with pytest.raises(Mistake, match=r"Stiff: cannot be differentiated twice .* beta: 0 with hvp: fd"):
        OFMU(outer_rounds=1).solve(model, pairs, nll, nll, trainer(processor=None))
    assert torch.equal(flat_weights(model), before)
    OFMU(outer_rounds=1, beta=0).solve(model, pairs, nll, nll, trainer(processor=None))  # the remedy
    assert not torch.equal(flat_weights(model), before)


def test_differences_are_refused_for_half_precision_weights() -> None:
    with pytest.raises(Mistake, match="bfloat16 cannot hold the small differences of fd"):
        OFMU(outer_rounds=1).forget(toy_lm("llama", vocab=V, dtype=torch.bfloat16), REQUEST, trainer())
    OFMU(outer_rounds=1, hvp="gauss").forget(toy_lm("llama", vocab=V, dtype=torch.bfloat16), REQUEST, trainer())


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    def broken(module: nn.Module, batch: Batch) -> Tensor:
        return nll(module, batch) + (next(module.parameters()).sum() - next(module.parameters()).sum()).sqrt()  # value 0, slope inf - inf

    pairs = Pairs(Batches(dict(FORGET_POINTS), 7), Batches(dict(RETAIN_POINTS), 7))
    with pytest.raises(Mistake, match=r"training, step 1: the gradient's norm is nan"):
        OFMU(beta=0).solve(net(), pairs, broken, nll, trainer(processor=None, steps=1))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"beta": -1}, "beta: must be 0 or more"),
        ({"rho0": -1e-3}, "rho0: must be 0 or more"),
        ({"rho_growth": 1.0}, "rho_growth: must be above 1"),
        ({"inner_steps": 0}, "inner_steps: must be 1 or more"),
        ({"outer_steps": 0}, "outer_steps: must be 1 or more"),
        ({"outer_rounds": -1}, "outer_rounds: must be 0 or more"),
        ({"hvp": "exakt"}, "did you mean 'exact'"),
        ({"forget_loss": "capped"}, "did you mean 'ce_capped'"),
        ({"step": "unitt"}, "did you mean 'unit'"),
        ({"npo_beta": 0.0}, "npo_beta: must be above 0"),
        ({"parameters": "("}, "is not a regular expression"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(Mistake, match=said):
        OFMU(**values)


def test_requests_and_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Mistake, match="has no retain set, and OFMU needs one"):
        OFMU().forget(lm(), Request("gone", FORGET), trainer())
    with pytest.raises(Mistake, match="stand in the retain set too"):
        Request("gone", FORGET, FORGET)
    with pytest.raises(Mistake, match="no parameter that requires a gradient matches"):
        OFMU().forget(lm().requires_grad_(False), REQUEST, trainer())
    with pytest.raises(Mistake, match="gradient_checkpointing"):
        OFMU().forget(lm(), REQUEST, trainer(gradient_checkpointing=True))
    quantised = lm()
    quantised.config.quantization_config = {"load_in_4bit": True}
    with pytest.raises(Mistake, match="the model is quantised"):
        OFMU().forget(quantised, REQUEST, trainer())
