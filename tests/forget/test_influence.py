"""Influence functions against the whole Hessian and against retraining; Fisher forgetting and fine-tuning by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.forget.fine_tune import FineTune
from remanence.forget.fisher_forgetting import FisherForgetting
from remanence.forget.influence import InfluenceFunction, conjugate_gradients, dense_hessian, solve_dense
from remanence.stream import Request
from remanence.training.batches import Batches
from remanence.training.trainer import Settings, Trainer
from toy import Double, toy_lm, toy_tokenizer

LAM = 0.05


def classes(count: int, seed: int) -> Dataset:
    made = np.random.default_rng(seed)
    label = made.integers(0, 3, count)
    return Dataset.from_dict({"features": (made.normal(size=(count, 4)) + np.eye(4)[label]).tolist(), "label": label.tolist()})


WHOLE = classes(90, 1)
REQUEST = Request("gone", WHOLE.select(range(3)), WHOLE.select(range(3, 90)), kind="classes")


def pixels(rows: Dataset) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows["features"][:], dtype=torch.float32), torch.tensor(rows["label"][:])


def trainer(notes: list | None = None, size: int = 20, processor: Any = None) -> Trainer:
    def record(table: str, rows: list[dict[str, Any]]) -> None:
        if notes is not None and table == "notes":
            notes.extend(row["content"] for row in rows)

    return Trainer(Settings(batch_size=size), processor=processor, seed=5, record=record, progress=False)


def optimum(keep: slice, units: int = 90) -> nn.Module:
    """Minimise (1/units) sum of losses + LAM/2 |theta|^2 of a linear classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Double(nn.Linear(4, 3))
    x, y = (part[keep] for part in pixels(WHOLE))
    descent = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        descent.zero_grad()
        value = F.cross_entropy(model(x), y, reduction="sum") / units + LAM / 2 * sum(w.square().sum() for w in model.parameters())
        value.backward()
        return value

    descent.step(closure)
    model.zero_grad()
    return model


def flat(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_the_exact_step_is_near_the_displacement_of_retraining() -> None:
    start, again = optimum(slice(None)), optimum(slice(3, None))
    model, notes = copy.deepcopy(start), []
    InfluenceFunction(solver="exact", damping=LAM).forget(model, REQUEST, trainer(notes))
    true, found = flat(again) - flat(start), flat(model) - flat(start)
    assert F.cosine_similarity(true, found, dim=0) > 0.99
    assert (true - found).norm() < 0.15 * true.norm()
    assert notes[0]["displacement"] == pytest.approx(found.norm().item())


def test_conjugate_gradients_and_lissa_find_what_the_exact_solver_finds() -> None:
    start, ends = optimum(slice(None)), {}
    for options in (
        {"solver": "exact"},
        {"solver": "cg", "tolerance": 1e-10},
        {"solver": "lissa", "iterations": 1200, "scale": 3.0},
    ):
        model = copy.deepcopy(start)
        event = trainer(size=90 if options["solver"] == "lissa" else 20)
        InfluenceFunction(damping=LAM, **options).forget(model, REQUEST, event)
        ends[options["solver"]] = flat(model) - flat(start)
    torch.testing.assert_close(ends["cg"], ends["exact"], rtol=1e-7, atol=1e-11)
    torch.testing.assert_close(ends["lissa"], ends["exact"], rtol=1e-3, atol=1e-6)


def test_the_dense_hessian_is_that_of_the_summed_loss() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Double(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model.body[0].bias.requires_grad_(False)
    x, y = pixels(WHOLE)
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([weight.numel() for weight in named.values()])
        parts = {name: piece.view_as(weight) for (name, weight), piece in zip(named.items(), pieces)}
        return F.cross_entropy(torch.func.functional_call(model, parts, x), y, reduction="sum")

    expected = torch.autograd.functional.hessian(loss, torch.cat([weight.detach().flatten() for weight in named.values()]))
    found = dense_hessian(model, Batches({"pixel_values": x, "labels": y}, 40))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_solvers_by_hand() -> None:
    matrix, right = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    expected = torch.tensor([1 / 11, 7 / 11], dtype=torch.float64)
    found, residual = conjugate_gradients(lambda vector: matrix @ vector, right, 5, 1e-12)
    torch.testing.assert_close(found, expected)
    assert residual < 1e-12
    torch.testing.assert_close(solve_dense(matrix - torch.eye(2, dtype=torch.float64), right, 1.0), expected)


def test_curvature_downwards_is_refused_with_the_remedy() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Double(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for solver in ("exact", "cg"):
        before = flat(model)
        with pytest.raises(Mistake, match=r"influence\.damping.*curves down.*raise"):
            InfluenceFunction(solver=solver, damping=0.0, tolerance=1e-9).forget(model, REQUEST, trainer())
        assert torch.equal(flat(model), before)


def test_lissa_that_diverges_and_a_hessian_too_large_are_refused() -> None:
    with pytest.raises(Mistake, match=r"influence\.scale.*diverges"):
        InfluenceFunction(solver="lissa", scale=0.05, damping=LAM).forget(optimum(slice(None)), REQUEST, trainer())
    tokenizer = toy_tokenizer()
    request = Request("gone", *(Dataset.from_dict({"question": ["who is bo"], "answer": [text]}) for text in ("x", "y")))
    with pytest.raises(Mistake, match=r"influence\.solver.*too large.*cg"):
        InfluenceFunction(solver="exact").forget(toy_lm("gpt2", vocab=len(tokenizer)), request, trainer(processor=tokenizer))


@pytest.mark.parametrize(
    ("options", "place"),
    [({"solver": "cgs"}, "solver"), ({"damping": -1.0}, "damping"), ({"scale": 0.0}, "scale"), ({"iterations": 0}, "iter")],
)
def test_bad_values_are_refused_by_name(options: dict[str, Any], place: str) -> None:
    with pytest.raises(Mistake, match=f"influence.{place}"):
        InfluenceFunction(**options)


def test_fisher_noise_has_the_variance_of_the_formula() -> None:
    class Wide(nn.Module):
        """Two weights for each feature; only the first of each is used by the retain rows."""

        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4000, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(x.repeat(1, 1000) * torch.tensor([1.0, 0.0]).repeat(2000))

    model = Wide()
    before = model.line.weight.detach().clone()
    retain = Dataset.from_dict({"features": classes(30, 3)["features"], "label": [n % 2 for n in range(30)]})
    request = Request("gone", retain.select([0]), retain.select(range(1, 30)), kind="classes")
    notes: list = []
    FisherForgetting(alpha=0.01, eps=1e-4).forget(model, request, trainer(notes))
    moved = model.line.weight.detach() - before
    unused = moved[:, 1::2]
    assert unused.std().item() == pytest.approx(0.01 * (1e-4) ** -0.25, rel=0.05)
    assert moved[:, 0::2].std() < 0.7 * unused.std()
    assert notes[0]["trace"] > 0
    with pytest.raises(Mistake, match=r"fisher_forgetting\.alpha"):
        FisherForgetting(alpha=-1.0)


def test_fine_tuning_is_training_on_the_retain_rows() -> None:
    one, other = optimum(slice(0, 40)), optimum(slice(0, 40))
    settings = Settings(steps=5, batch_size=10, lr=0.01)
    FineTune().forget(one, REQUEST, Trainer(settings, seed=3, progress=False))
    plain = Trainer(settings, seed=3, progress=False)
    plain.fit(other, plain.batches(REQUEST.retain, "classes", stream="retain"))
    assert torch.equal(flat(one), flat(other))
    with pytest.raises(Mistake, match="no retain set, and fine-tuning needs one"):
        FineTune().forget(one, Request("gone", WHOLE, kind="classes"), trainer())
