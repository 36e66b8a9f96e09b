"""Selective synaptic dampening: each line of what a faithful implementation means, as a test."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.forget.ssd import SSD, auto_alpha, dampening
from remanence.stream import Request
from remanence.training.batches import Batches
from remanence.training.importance import importance_of, save_importance
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
pytestmark = pytest.mark.filterwarnings("ignore:request .* is selected")


class Mlp(nn.Module):
    """A classifier in float64 that reads float32 features, with dropout."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.double())


class Conv(nn.Module):
    """An image classifier with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(pixels)


def classes(count: int, seed: int, only: int | None = None, shape: tuple[int, ...] = (5,)) -> Dataset:
    made = np.random.default_rng(seed)
    label = made.integers(0, 3, count) if only is None else np.full(count, only)
    return Dataset.from_dict(
        {"features": (made.normal(size=(count, *shape)) + label.reshape(-1, *[1] * len(shape))).tolist(), "label": label.tolist()}
    )


FORGET, RETAIN = classes(6, 1, only=2), classes(14, 2)
REQUEST = Request("gone", FORGET, RETAIN, kind="classes")


def trainer(notes: list | None = None, size: int = 4, processor: Any = None) -> Trainer:
    def record(table: str, rows: list[dict[str, Any]]) -> None:
        if notes is not None and table == "notes":
            notes.extend(row["content"] for row in rows)

    return Trainer(Settings(batch_size=size), processor=processor, seed=5, record=record)


def pixels(rows: Dataset) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows["features"], dtype=torch.float32), torch.tensor(rows["label"])


def plain_importance(model: nn.Module, x: Tensor, y: Tensor, parts: list[Tensor]) -> dict[str, Tensor]:
    """The mean over parts (rows or batches) of the squared gradient of the part's mean cross-entropy, by a loop."""
    model = copy.deepcopy(model).eval()
    total = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for part in parts:
        model.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        for name, weight in model.named_parameters():
            total[name] += weight.grad**2 / len(parts)
    return total


def shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=trainer().generator("importance"))


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_01_equals_a_brute_force_loop(mode: str) -> None:
    model, (x_f, y_f), (x_r, y_r) = Mlp(), pixels(FORGET), pixels(RETAIN)
    x, y = torch.cat([x_r, x_f]), torch.cat([y_r, y_f])
    rows = [order.split(1 if mode == "sample" else 4) for order in (shuffled(len(x_f)), shuffled(len(x)))]
    special = plain_importance(model, x_f, y_f, list(rows[0]))
    general = plain_importance(model, x, y, list(rows[1]))
    expected = {}
    for name, weight in model.named_parameters():
        flat = [
            theta * min(0.8 * d / f, 1.0) if f > 1.2 * d else theta
            for theta, f, d in zip(weight.flatten().tolist(), special[name].flatten().tolist(), general[name].flatten().tolist())
        ]
        expected[name] = torch.tensor(flat, dtype=torch.float64).view_as(weight)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    SSD(alpha=1.2, lam=0.8, mode=mode).forget(model, REQUEST, trainer())
    assert any(not torch.equal(before[name], expected[name]) for name in expected)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-10, atol=1e-14)


def test_02_no_ratio_exceeds_the_share_of_the_forget_rows() -> None:
    model, event = Mlp(), trainer()
    both = Batches(event.encode(Dataset.from_dict({n: [*RETAIN[n], *FORGET[n]] for n in RETAIN.column_names}), "classes"), 4)
    special = importance_of(model, Batches(event.encode(FORGET, "classes"), 4), "sample", event)
    general = importance_of(model, both, "sample", event)
    highest = max((special[name] / general[name]).nan_to_num().max().item() for name in special)
    assert 1 < highest <= 20 / 6 + 1e-9


def test_02_importance_without_the_forget_rows_is_refused(tmp_path: Path) -> None:
    model = Mlp()
    save_importance(tmp_path / "d.safetensors", model, classes(40, 3, only=0), "classes", trainer())
    with pytest.raises(Mistake, match="lack the forget rows"):
        SSD(importance=str(tmp_path / "d.safetensors")).forget(model, REQUEST, trainer())


def test_03_no_weight_grows_or_turns_and_unselected_ones_are_bit_identical() -> None:
    model, notes = Mlp(), []
    before = copy.deepcopy(model)
    method = SSD(alpha=1.1)
    method.forget(model, REQUEST, trainer(notes))
    changed = 0
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert bool((new.abs() <= old.abs()).all())
        assert bool((new * old >= 0).all())
        moved = (new != old).sum().item()
        assert moved <= notes[0]["selected_by_parameter"][name]
        changed += moved
    assert 0 < changed <= notes[0]["selected"] < notes[0]["weights"]


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_04_infinite_alpha_and_large_lambda_change_nothing() -> None:
    for options in ({"alpha": math.inf}, {"alpha": 1.1, "lam": 1e6}):
        model = Mlp()
        SSD(**options).forget(model, REQUEST, trainer())
        assert same(model, Mlp())


def test_04_lambda_zero_prunes_exactly_the_selected() -> None:
    model, notes, method = Mlp(), [], SSD(alpha=1.1, lam=0.0)
    method.forget(model, REQUEST, trainer(notes))
    for name, weight in model.named_parameters():
        places = method.edits[0]["weights"][name]["places"]
        assert sorted(places.tolist()) == (weight.flatten() == 0).nonzero()[:, 0].tolist()
        assert len(places) == notes[0]["selected_by_parameter"][name]


def test_05_beta_is_continuous_at_the_border_when_lambda_is_alpha() -> None:
    general = torch.full((4,), 0.5, dtype=torch.float64)
    special = general * torch.tensor([2.9, 3.0, 3.0000001, 6.0], dtype=torch.float64)
    selected, beta = dampening(special, general, alpha=3.0, lam=3.0)
    assert selected.tolist() == [False, False, True, True]
    assert beta.tolist() == pytest.approx([1, 1, 1, 0.5], abs=1e-7)
    assert beta[2] < 1


def test_05_exponent_and_cap() -> None:
    _, beta = dampening(torch.tensor([4.0, 1.5]), torch.tensor([1.0, 1.0]), alpha=1.0, lam=1.0, exponent=2.0, lower_bound=0.3)
    assert beta.tolist() == pytest.approx([1 / 16, 0.3])


def test_06_forgetting_everything_selects_nothing(tmp_path: Path) -> None:
    model, notes = Mlp(), []
    request = Request("all", FORGET, kind="classes")
    for mode in ("batch", "sample", "label_free"):
        path = str(tmp_path / f"{mode}.safetensors")
        save_importance(path, model, FORGET, "classes", trainer(), mode)
        SSD(alpha=1.0 + 1e-9 if mode != "sample" else 1 - 1e-9, mode=mode, importance=path, dry_run=mode == "sample").forget(
            model, request, trainer(notes)
        )
    assert [note["selected"] for note in notes] == [0, sum(w.count_nonzero().item() for w in _alive(model)), 0]
    assert same(model, Mlp())


def _alive(model: nn.Module) -> list[Tensor]:
    return list(importance_of(model, Batches(trainer().encode(FORGET, "classes"), 4), "sample", trainer()).values())


def test_07_works_from_a_saved_importance_alone(tmp_path: Path) -> None:
    whole = Dataset.from_dict({name: [*RETAIN[name], *FORGET[name]] for name in RETAIN.column_names})
    whole.save_to_disk(str(tmp_path / "data"))
    with_rows, from_file = Mlp(), Mlp()
    save_importance(tmp_path / "d.safetensors", from_file, load_from_disk(str(tmp_path / "data")), "classes", trainer())
    shutil.rmtree(tmp_path / "data")
    SSD(importance=str(tmp_path / "d.safetensors")).forget(from_file, Request("gone", FORGET, kind="classes"), trainer())
    SSD().forget(with_rows, REQUEST, trainer())
    assert not same(with_rows, Mlp())
    for a, b in zip(from_file.parameters(), with_rows.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_07_another_model_or_mode_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "d.safetensors")
    save_importance(path, Mlp(0), RETAIN, "classes", trainer())
    with pytest.raises(Mistake, match="other weights"):
        SSD(importance=path).forget(Mlp(1), REQUEST, trainer())
    with pytest.raises(Mistake, match="empirical"):
        SSD(importance=path, mode="batch").forget(Mlp(0), REQUEST, trainer())
    with pytest.raises(Mistake, match="does not exist"):
        SSD(importance=str(tmp_path / "no.safetensors")).forget(Mlp(0), REQUEST, trainer())


@pytest.mark.parametrize("mode", ["sample", "batch", "label_free"])
def test_08_batch_norm_statistics_and_modes_stay(mode: str) -> None:
    model = Conv().train()
    with torch.no_grad():
        model(torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1)))
    old, state = copy.deepcopy(model), torch.get_rng_state()
    request = Request("gone", classes(5, 1, 2, (1, 6, 6)), classes(9, 2, None, (1, 6, 6)), kind="classes")
    SSD(mode=mode).forget(model, request, trainer())
    assert not same(model, old)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, old.get_buffer(name))
    assert model.training
    assert model.body[1].training
    assert torch.equal(torch.get_rng_state(), state)


def test_09_dead_weights_stay_and_give_no_nan() -> None:
    model = Mlp()
    with torch.no_grad():
        model.body[3].weight[:, 0] = 0  # nothing flows back to the first hidden unit
    old = copy.deepcopy(model)
    SSD(alpha=1.01).forget(model, REQUEST, trainer())
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    assert torch.equal(model.body[0].weight[0], old.body[0].weight[0])
    selected, beta = dampening(torch.zeros(1), torch.zeros(1), 2.0, 1.0)
    assert not selected.item()
    assert beta.item() == 1


def test_10_auto_selects_the_percentile() -> None:
    model, notes = Mlp(), []
    SSD().forget(model, REQUEST, trainer(notes))
    share = math.log(1 + 100 * 6 / 20) / 100
    assert abs(notes[0]["selected"] - share * notes[0]["weights"]) <= 1
    assert 1 < notes[0]["alpha"] < 20 / 6


def test_10_auto_threshold_is_numpy_percentile_without_nan() -> None:
    ratios = torch.randn(1001, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    wanted = np.percentile(ratios.numpy(), 100 - math.log(1 + 100 * 30 / 300))
    assert auto_alpha(torch.cat([ratios, torch.tensor([math.nan] * 9, dtype=torch.float64)]), 30, 300) == pytest.approx(wanted, rel=1e-12)


def test_10_label_free_runs_without_labels() -> None:
    model, (x, _) = Mlp(), pixels(FORGET)
    found = importance_of(model, Batches({"pixel_values": x}, 6), "label_free", trainer())
    still = copy.deepcopy(model).eval()
    still(x).square().sum(1).mean().backward()
    for name, weight in still.named_parameters():
        torch.testing.assert_close(found[name], weight.grad.abs(), rtol=1e-10, atol=1e-14)


def test_10_label_free_is_blind_to_padding() -> None:
    model, event = toy_lm("gpt2", vocab=len(TOKENIZER), dtype=torch.float64), trainer(processor=TOKENIZER)
    rows = event.encode(QA.forget, "qa")
    assert len({len(ids) for ids in rows["input_ids"]}) == 2
    found = importance_of(model, Batches(rows, 2), "label_free", event)
    means = [model(input_ids=torch.tensor([ids])).logits.square().sum(-1).mean() for ids in rows["input_ids"]]
    torch.stack(means).mean().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad.abs(), rtol=1e-8, atol=1e-12)


QA = Request(
    "gone",
    Dataset.from_dict({"question": ["who is bo", "who is al"], "answer": ["x y", "z"]}),
    Dataset.from_dict({"question": [f"what is {n}" for n in range(8)], "answer": [str(n * 7) for n in range(8)]}),
)


def test_11_a_tied_weight_counts_once_and_stays_tied() -> None:
    model, notes = toy_lm("gpt2", vocab=len(TOKENIZER)), []
    assert model.lm_head.weight is model.transformer.wte.weight
    SSD().forget(model, QA, trainer(notes, processor=TOKENIZER))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert notes[0]["weights"] == sum(weight.numel() for weight in model.parameters())
    assert notes[0]["selected"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_families_are_vectorised_over_rows(family: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this model cannot be vectorised")
        SSD(dry_run=True).forget(toy_lm(family, vocab=len(TOKENIZER)), QA, trainer(processor=TOKENIZER))


@pytest.mark.parametrize("mode", ["sample", "batch", "label_free"])
def test_11_frozen_parameters_are_skipped_and_reported(mode: str) -> None:
    model, notes = toy_lm("llama", vocab=len(TOKENIZER)), []
    for layer in model.model.layers[0].modules():
        for weight in layer.parameters():
            weight.requires_grad_(False)
    old = copy.deepcopy(model)
    SSD(mode=mode).forget(model, QA, trainer(notes, processor=TOKENIZER))
    assert all(torch.equal(a, b) for a, b in zip(model.model.layers[0].parameters(), old.model.layers[0].parameters()))
    assert not same(model, old)
    assert notes[0]["frozen"]
    assert all(name.startswith("model.layers.0.") for name in notes[0]["frozen"])
    assert not set(notes[0]["frozen"]) & set(notes[0]["selected_by_parameter"])


def test_undo_is_bit_exact_and_survives_a_restart(tmp_path: Path) -> None:
    from remanence.storage import load_tree, save_tree

    model, method = toy_lm("llama", vocab=len(TOKENIZER)), SSD()
    start = copy.deepcopy(model)
    method.forget(model, QA, trainer(processor=TOKENIZER))
    middle = copy.deepcopy(model)
    method.forget(model, QA, trainer(processor=TOKENIZER))
    save_tree(tmp_path / "state.safetensors", method.state_dict())
    again = SSD()
    again.load_state_dict(load_tree(tmp_path / "state.safetensors"))
    assert same(again.undo(model), middle)
    assert same(again.undo(model), start)
    with pytest.raises(Mistake, match="no edit to undo"):
        again.undo(model)


def test_dry_run_notes_and_changes_nothing() -> None:
    model, notes, method = Mlp(), [], SSD(dry_run=True)
    method.forget(model, REQUEST, trainer(notes))
    assert same(model, Mlp())
    assert notes[0]["selected"] == sum(notes[0]["betas_by_tenth"]) > 0
    assert notes[0]["trace_forget"] > 0
    assert method.edits == []


def test_parameters_picks_by_name() -> None:
    model = Mlp()
    SSD(alpha=1.05, parameters=r"body\.3").forget(model, REQUEST, trainer())
    assert torch.equal(model.body[0].weight, Mlp().body[0].weight)
    assert not torch.equal(model.body[3].weight, Mlp().body[3].weight)
    with pytest.raises(Mistake, match=r"ssd\.parameters"):
        SSD(parameters="nothing").forget(Mlp(), REQUEST, trainer())


def test_a_crowded_tensor_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="forgetting too much"):
        SSD(alpha=1.01).forget(Mlp(), REQUEST, trainer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SSD(alpha=math.inf).forget(Mlp(), REQUEST, trainer())


def test_forgets_classes_of_digits_and_keeps_the_others() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    rows = Dataset.from_dict({"features": x[:400].tolist(), "label": y[:400].tolist()})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stages = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        stages += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)]
        model = nn.Sequential(*stages)
    learner = Trainer(Settings(epochs=4, lr=0.02, optimizer="sgd", momentum=0.9, batch_size=32), progress=False)
    learner.fit(model, learner.batches(rows, "classes"))

    def accuracy(model: nn.Module, part: Tensor) -> float:
        with torch.no_grad():
            return (copy.deepcopy(model).eval()(x).argmax(1) == y)[part].double().mean().item()

    lost, harm = [], []
    for digit in range(2):
        own = digits.target[:400] == digit
        request = Request("one", rows.select(np.flatnonzero(own)), rows.select(np.flatnonzero(~own)), kind="classes")
        edited = SSD().forget(copy.deepcopy(model), request, trainer(size=64))
        lost.append(accuracy(model, y == digit) - accuracy(edited, y == digit))
        harm.append(accuracy(model, y != digit) - accuracy(edited, y != digit))
    assert np.mean(lost) > 0.6
    assert np.mean(harm) < 0.05


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"alpha": 0.0}, "ssd.alpha"),
        ({"alpha": "automatic"}, "ssd.alpha"),
        ({"lam": -1.0}, "ssd.lam"),
        ({"mode": "sampel"}, "ssd.mode"),
        ({"lower_bound": 1.5}, "ssd.lower_bound"),
        ({"exponent": 0.0}, "ssd.exponent"),
        ({"batch_size": 0}, "ssd.batch_size"),
        ({"parameters": "("}, "ssd.parameters"),
    ],
)
def test_bad_values_are_refused_by_name(options: dict[str, Any], place: str) -> None:
    with pytest.raises(Mistake, match=place):
        SSD(**options)


def test_an_alpha_that_cannot_select_is_refused_with_the_bound() -> None:
    with pytest.raises(Mistake, match=r"ssd.alpha.*3.33.*10 selects nothing"):
        SSD(alpha=10).forget(Mlp(), REQUEST, trainer())


def test_neither_retain_rows_nor_a_file_is_a_mistake() -> None:
    with pytest.raises(Mistake, match=r"request 'gone'.*no retain set.*importance"):
        SSD().forget(Mlp(), Request("gone", FORGET, kind="classes"), trainer())
