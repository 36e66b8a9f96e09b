"""Influence approximation: each line of what a faithful implementation means, as a test."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.forget.fine_tune import FineTune
from remanence.forget.gradient_ascent import GradientAscent
from remanence.forget.iau import IAU
from remanence.storage import load_tree, save_tree
from remanence.stream import Request
from remanence.training.batches import IGNORED
from remanence.training.gradients import row_hashes, save_total_gradient
from remanence.training.trainer import Settings, Trainer
from toy import Double, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
pytestmark = [
    pytest.mark.filterwarnings("ignore:request .* the weights moved"),
    pytest.mark.filterwarnings("ignore:request .* should stay"),
]


def mlp(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Double(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def line() -> nn.Module:
    model = Double(nn.Linear(5, 3))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model


def classes(count: int, seed: int) -> Dataset:
    made = np.random.default_rng(seed)
    label = made.integers(0, 3, count)
    return Dataset.from_dict({"features": (made.normal(size=(count, 5)) + 0.5 * np.eye(5)[label]).tolist(), "label": label.tolist()})


def joined(*parts: Dataset) -> Dataset:
    return Dataset.from_dict({name: [value for part in parts for value in part[name]] for name in parts[0].column_names})


FORGET, RETAIN = classes(6, 1), classes(14, 2)
REQUEST = Request("gone", FORGET, RETAIN, kind="classes")
WHOLE = joined(RETAIN, FORGET)
QA = Request(
    "gone",
    Dataset.from_dict({"question": ["who is bo", "who is al"], "answer": ["x y", "z"]}),
    Dataset.from_dict({"question": [f"what is {n}" for n in range(8)], "answer": [str(n * 7) for n in range(8)]}),
)


def trainer(notes: list | None = None, size: int = 4, processor: Any = None, **settings: Any) -> Trainer:
    def record(table: str, rows: list[dict[str, Any]]) -> None:
        if notes is not None and table == "notes":
            notes.extend(row["content"] for row in rows)

    return Trainer(Settings(**({"batch_size": size} | settings)), processor=processor, seed=5, record=record, progress=False)


def pixels(rows: Dataset) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows["features"], dtype=torch.float32), torch.tensor(rows["label"])


def slopes(model: nn.Module, rows: Dataset, reduction: str = "mean") -> dict[str, Tensor]:
    x, y = pixels(rows)
    still = copy.deepcopy(model).eval()
    names, weights = zip(*still.named_parameters())
    return dict(zip(names, torch.autograd.grad(F.cross_entropy(still(x), y, reduction=reduction), weights)))


def near(model: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=tolerance, atol=tolerance * 1e-2)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("correction", "gamma"), [(1.0, 1.0), (0.4, 2.0)])
@pytest.mark.parametrize("weighting", ["mean", "sum"])
def test_01_the_step_is_the_difference_of_two_gradients(weighting: str, correction: float, gamma: float) -> None:
    model = mlp().train()
    retain, forget = (slopes(model, rows, weighting) for rows in (RETAIN, FORGET))
    expected = {name: weight - 0.3 * (correction * retain[name] - gamma * forget[name]) for name, weight in weights_of(model).items()}
    IAU(step="sgd", lr=0.3, weighting=weighting, correction=correction, gamma=gamma).forget(model, REQUEST, trainer())
    near(model, expected)
    assert model.training


def test_02_every_weight_moves_by_the_rate_against_the_sign_and_as_torch_s_adam_does() -> None:
    model = mlp()
    before, retain, forget = weights_of(model), slopes(model, RETAIN), slopes(model, FORGET)
    gradient = {name: retain[name] - forget[name] for name in retain}
    other = copy.deepcopy(model)
    for name, weight in other.named_parameters():
        weight.grad = gradient[name].clone()
    torch.optim.Adam(other.parameters(), lr=1e-3).step()
    IAU().forget(model, REQUEST, trainer())
    near(model, weights_of(other), 1e-9)
    for name, weight in model.named_parameters():
        clear = gradient[name].abs() > 1e-4
        assert clear.any()
        torch.testing.assert_close((weight - before[name])[clear], -1e-3 * gradient[name].sign()[clear], rtol=1e-3, atol=0)


def test_02_adam_moves_as_far_for_one_row_as_for_many_and_scaled_does_not() -> None:
    lengths: dict[tuple[bool, int], float] = {}
    for scaled in (False, True):
        for count in (1, 6):
            notes: list = []
            IAU(scaled=scaled).forget(mlp(), Request("r", FORGET.select(range(count)), RETAIN, kind="classes"), trainer(notes))
            lengths[scaled, count] = notes[0]["displacement"]
    assert lengths[False, 1] == pytest.approx(lengths[False, 6], rel=1e-3)
    assert lengths[True, 6] / lengths[True, 1] == pytest.approx((6 / 20) / (1 / 15), rel=1e-3)


def logistic(x: Tensor, y: Tensor, weights: Tensor, n: float, lam: float) -> Tensor:
    """Solve min (1/n) sum_i w_i log(1 + exp(-y_i theta.x_i)) + lam/2 |theta|^2 by Newton's method."""
    theta = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(60):
        slope = torch.sigmoid(-y * (x @ theta))
        gradient = -(weights * y * slope) @ x / n + lam * theta
        hessian = (x * (weights * slope * (1 - slope))[:, None]).T @ x / n + lam * torch.eye(x.shape[1], dtype=torch.float64)
        theta = theta - torch.linalg.solve(hessian, gradient)
    return theta


def test_03_deleting_a_row_equals_adding_its_negative_up_to_one_over_n_squared() -> None:
    """z+ is a row of the other class, c times as long, with the exact opposite gradient at the optimum; every row stands k times among n = 20 k."""
    made = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=made, dtype=torch.float64), torch.randint(2, (20,), generator=made).double() * 2 - 1
    gaps, moves = [], []
    for copies in (2, 4, 8, 16):
        n, ones = 20 * copies, torch.full((20,), float(copies), dtype=torch.float64)
        start = logistic(x, y, ones, n, 0.05)
        margin = (y[0] * (x[0] @ start)).item()
        low, high = 0.0, 50.0
        for _ in range(200):  # c sigmoid(c m) = sigmoid(-m)
            middle = (low + high) / 2
            low, high = (middle, high) if middle / (1 + math.exp(-middle * margin)) < 1 / (1 + math.exp(margin)) else (low, middle)
        opposite = low * x[0]
        slope_z = -y[0] * torch.sigmoid(-y[0] * (x[0] @ start)) * x[0]
        slope_plus = y[0] * torch.sigmoid(y[0] * (opposite @ start)) * opposite
        torch.testing.assert_close(slope_plus, -slope_z, rtol=1e-9, atol=1e-12)
        less = ones.clone()
        less[0] -= 1
        deleted = logistic(x, y, less, n, 0.05) - start
        added = logistic(torch.cat([x, opposite[None]]), torch.cat([y, -y[:1]]), torch.cat([ones, ones.new_ones(1)]), n, 0.05) - start
        gaps.append((deleted - added).norm().item())
        moves.append(deleted.norm().item())
    for first, second in pairwise(gaps):
        assert second / first < 0.3  # a quarter, in the limit
    for first, second in pairwise(moves):
        assert 0.45 < second / first < 0.55
    assert gaps[-1] < 0.05 * moves[-1]


def test_04_without_correction_it_is_a_step_of_gradient_ascent() -> None:
    one, other = mlp().eval(), mlp().eval()
    other.body[2].p = 0.0
    IAU(step="sgd", lr=0.2, correction=0).forget(one, Request("gone", FORGET, kind="classes"), trainer())
    plain = {"steps": 1, "optimizer": "sgd", "lr": 0.2, "clip": None}
    GradientAscent().forget(other, REQUEST, trainer(size=6, **plain))
    near(one, weights_of(other))


def test_04_without_negative_rows_it_is_a_step_of_fine_tuning() -> None:
    one, other = mlp().eval(), mlp().eval()
    other.body[2].p = 0.0
    IAU(step="sgd", lr=0.2, gamma=0).forget(one, REQUEST, trainer())
    plain = {"steps": 1, "optimizer": "sgd", "lr": 0.2, "clip": None}
    FineTune().forget(other, REQUEST, trainer(size=14, **plain))
    near(one, weights_of(other))


def test_04_nothing_to_forget_is_refused() -> None:
    with pytest.raises(Mistake, match="forget set of request 'none'.*empty"):
        Request("none", FORGET.select([]), RETAIN, kind="classes")


def solved(rows: Dataset, start: nn.Module | None = None) -> nn.Module:
    """Return the unregularised optimum of a linear classifier (the rows are not separable)."""
    model, (x, y) = start or line(), pixels(rows)
    descent = torch.optim.LBFGS(
        model.parameters(), lr=1, max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        descent.zero_grad()
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value

    for _ in range(3):
        descent.step(closure)
    model.zero_grad()
    return model


def test_05_at_an_optimum_the_sum_form_is_exactly_twice_the_ascent() -> None:
    forget, retain = classes(8, 5), classes(80, 6)
    model = solved(joined(retain, forget))
    request = Request("gone", forget, retain, kind="classes")
    start, twice, ascent = weights_of(model), copy.deepcopy(model), copy.deepcopy(model)
    IAU(step="sgd", weighting="sum", lr=1e-3).forget(twice, request, trainer())
    IAU(step="sgd", weighting="sum", lr=1e-3, correction=0).forget(ascent, request, trainer())
    for name, weight in twice.named_parameters():
        single = weights_of(ascent)[name] - start[name]
        assert single.norm() > 1e-4
        torch.testing.assert_close(weight.detach() - start[name], 2 * single, rtol=1e-6, atol=1e-10)


def test_08_the_kept_total_gives_the_same_step_without_the_other_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "total.safetensors")
    for weighting in ("mean", "sum"):
        two_passes, kept = mlp(), mlp()
        save_total_gradient(path, kept, WHOLE, "classes", trainer())
        IAU(step="sgd", lr=0.3, weighting=weighting, total_gradient=path).forget(kept, Request("gone", FORGET, kind="classes"), trainer())
        IAU(step="sgd", lr=0.3, weighting=weighting).forget(two_passes, REQUEST, trainer())
        assert not same(two_passes, mlp())
        near(kept, weights_of(two_passes))


def test_08_the_kept_total_of_a_language_model_is_a_mean_over_tokens(tmp_path: Path) -> None:
    path, whole = str(tmp_path / "total.safetensors"), joined(QA.retain, QA.forget)
    kept, two_passes, plain = (toy_lm("gpt2", vocab=len(TOKENIZER), dtype=torch.float64) for _ in range(3))
    event = trainer(processor=TOKENIZER)
    save_total_gradient(path, kept, whole, "qa", event)
    IAU(step="sgd", lr=0.1, total_gradient=path).forget(kept, Request("gone", QA.forget), event)
    IAU(step="sgd", lr=0.1).forget(two_passes, QA, event)
    near(kept, weights_of(two_passes), 1e-9)
    means = []
    for rows in (QA.retain, QA.forget):
        batch = event.batches(rows, "qa", size=len(rows), shuffle=False)[0]
        logits = plain(input_ids=batch["input_ids"]).logits[:, :-1]
        means.append(F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED))
    gradients = torch.autograd.grad(means[0] - means[1], list(plain.parameters()))
    expected = {name: weight.detach() - 0.1 * slope for (name, weight), slope in zip(plain.named_parameters(), gradients)}
    near(two_passes, expected, 1e-8)


def test_09_the_size_of_chunks_does_not_matter() -> None:
    ends = []
    for size in (1, 3, 100):
        model = toy_lm("gpt2", vocab=len(TOKENIZER), dtype=torch.float64)
        ends.append(weights_of(IAU(step="sgd", lr=0.1, batch_size=size).forget(model, QA, trainer(processor=TOKENIZER))))
    for other in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-12)


def test_10_requests_in_a_row_take_the_weights_as_they_are_and_leave_a_log_and_their_drift_is_seen(tmp_path: Path) -> None:
    """At the optimum of a convex loss, each of four requests is compared with the optimum without the rows forgotten so far."""
    retain, gone = classes(120, 6), classes(12, 5)
    whole = joined(retain, gone)
    model, drifts, nothing = solved(whole), [], []
    start, method = weights_of(model), IAU(step="sgd", weighting="sum", lr=0.03, correction=0.0)
    for number in range(4):
        part, stay = gone.select(range(3 * number, 3 * number + 3)), whole.select([*range(120), *range(123 + 3 * number, 132)])
        before = copy.deepcopy(model)
        expected = {name: weight + 0.03 * slopes(before, part, "sum")[name] for name, weight in weights_of(before).items()}
        method.forget(model, Request(f"part {number}", part, stay, kind="classes"), trainer())
        near(model, expected)
        again = weights_of(solved(stay))
        drifts.append(math.sqrt(sum((weight - again[name]).square().sum().item() for name, weight in weights_of(model).items())))
        nothing.append(math.sqrt(sum((start[name] - again[name]).square().sum().item() for name in start)))
    assert [entry["request"] for entry in method.log] == [f"part {number}" for number in range(4)]
    assert [entry["rows_retain"] for entry in method.log] == [129, 126, 123, 120]
    assert len({entry["norm_forget"] for entry in method.log}) == 4
    assert drifts[-1] > drifts[0]  # errors add up ...
    assert drifts[-1] < nothing[-1]  # ... and it is still nearer to the retrained model than no step at all
    save_tree(tmp_path / "state.safetensors", method.state_dict())
    other = IAU()
    other.load_state_dict(load_tree(tmp_path / "state.safetensors"))
    assert other.log == method.log


def test_the_audit_note_has_norms_cosine_displacement_and_time() -> None:
    model, notes = mlp(), []
    before, retain, forget = weights_of(model), slopes(model, RETAIN), slopes(model, FORGET)
    method = IAU(step="sgd", lr=0.5)
    method.forget(model, REQUEST, trainer(notes))

    def flat(tree: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.flatten() for value in tree.values()])

    (note,) = notes
    assert note["norm_forget"] == pytest.approx(flat(forget).norm().item())
    assert note["norm_retain"] == pytest.approx(flat(retain).norm().item())
    assert note["cosine"] == pytest.approx(F.cosine_similarity(flat(retain), flat(forget), dim=0).item())
    assert note["displacement"] == pytest.approx((flat(weights_of(model)) - flat(before)).norm().item())
    assert note["weights_norm"] == pytest.approx(flat(before).norm().item())
    assert (note["rows_forget"], note["rows_retain"], note["requests"]) == (6, 14, 1)
    assert method.log[0]["seconds"] > 0
    assert "seconds" not in note  # a run that was killed and resumed leaves the same ledger
    assert "guarantee" not in str(note)


def test_a_far_step_and_a_lost_guard_are_warnings_that_offer_half_the_rate() -> None:
    rows = classes(60, 8)
    model = solved(rows)
    forget, retain, near_by = rows.select(range(6)), rows.select(range(6, 60)), rows.select(range(30, 60))
    for neighbours in (None, near_by):
        request = Request("gone", forget, retain, neighbours, kind="classes")
        with pytest.warns(UserWarning, match="request 'gone'") as caught:
            IAU(step="sgd", lr=50.0).forget(copy.deepcopy(model), request, trainer())
        words = [str(warning.message) for warning in caught]
        assert any("weights moved by" in text and "(now 50, try 25)" in text for text in words)
        assert any("should stay lost" in text and "points" in text for text in words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IAU(step="sgd", lr=1e-4).forget(copy.deepcopy(model), request, trainer())


def test_guard_rows_are_neighbours_if_there_are_some() -> None:
    model, notes = mlp(), []
    x, y = pixels(RETAIN.select(range(5)))
    IAU(lr=0).forget(model, Request("gone", FORGET, RETAIN, RETAIN.select(range(5)), kind="classes"), trainer(notes))
    assert notes[0]["guard_before"] == notes[0]["guard_after"]
    with torch.no_grad():
        assert notes[0]["guard_before"] == pytest.approx((copy.deepcopy(model).eval()(x).argmax(1) == y).double().mean().item())
    IAU(guard=0).forget(model, REQUEST, trainer(notes))
    assert notes[1]["guard_before"] is None


def test_undo_is_bit_exact_and_survives_a_restart(tmp_path: Path) -> None:
    model = toy_lm("llama", vocab=len(TOKENIZER))
    start, method = copy.deepcopy(model), IAU(reversible=True)
    method.forget(model, QA, trainer(processor=TOKENIZER))
    assert not same(model, start)
    save_tree(tmp_path / "state.safetensors", method.state_dict())
    again = IAU(reversible=True)
    again.load_state_dict(load_tree(tmp_path / "state.safetensors"))
    assert same(again.undo(model), start)
    assert again.log == []
    with pytest.raises(Mistake, match="reversible: true"):
        again.undo(model)


def test_batch_norm_statistics_and_modes_stay() -> None:
    model = Double(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    with torch.no_grad():
        model(torch.randn(8, 5, generator=torch.Generator().manual_seed(1)))
    old, noise = copy.deepcopy(model), torch.get_rng_state()
    retain, forget = slopes(model, RETAIN), slopes(model, FORGET)
    expected = {name: weight - 0.1 * (retain[name] - forget[name]) for name, weight in weights_of(model).items()}
    IAU(step="sgd", lr=0.1).forget(model, REQUEST, trainer())
    near(model, expected)
    assert all(torch.equal(buffer, old.get_buffer(name)) for name, buffer in model.named_buffers())
    assert model.body[1].training
    assert torch.equal(torch.get_rng_state(), noise)


def test_more_than_half_of_the_rows_is_refused() -> None:
    model, request = mlp(), Request("most", RETAIN, FORGET, kind="classes")
    with pytest.raises(Mistake, match=r"request 'most': asks to forget 70% .*iau\.most"):
        IAU().forget(model, request, trainer())
    assert same(model, mlp())
    IAU(most=0.8).forget(model, request, trainer())
    assert not same(model, mlp())


def test_a_shared_row_is_refused() -> None:
    with pytest.raises(Mistake, match="stand in the retain set too"):
        Request("both", FORGET, WHOLE, kind="classes")


def test_files_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "total.safetensors")
    save_total_gradient(path, mlp(), WHOLE, "classes", trainer())
    plain = Request("gone", FORGET, kind="classes")

    def refused(words: str, model: nn.Module, request: Request = plain, file: str = path, event: Trainer | None = None) -> None:
        before = copy.deepcopy(model)
        with pytest.raises(Mistake, match=words):
            IAU(total_gradient=file).forget(model, request, event or trainer())
        assert same(model, before)

    refused("other weights", mlp(1))
    refused("does not exist", mlp(), file=str(tmp_path / "no.safetensors"))
    refused("row 1 of the forget set stands 0 times", mlp(), Request("x", joined(FORGET.select([0]), classes(1, 9)), kind="classes"))
    refused("asks to forget 100%", mlp(), Request("x", WHOLE, kind="classes"))
    frozen = mlp()
    frozen.body[0].bias.requires_grad_(False)
    refused("other parameters", frozen)
    save_tree(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    refused("holds no gradient", mlp(), file=str(tmp_path / "other.safetensors"))
    moved = mlp()
    IAU(total_gradient=path).forget(moved, plain, trainer())
    refused("other weights", moved)  # a second request after the first
    save_total_gradient(path, mlp(), joined(WHOLE, FORGET.select([2])), "classes", trainer())
    refused("row 2 of the forget set stands 2 times among the training rows, and 1 times", mlp())


def test_text_cut_into_blocks_has_no_total(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["one two three", "four five six seven"]})
    with pytest.raises(Mistake, match="blocks across documents"):
        save_total_gradient(tmp_path / "t.safetensors", toy_lm("llama"), rows, "text", trainer(processor=TOKENIZER))


def test_row_hashes_tell_rows_apart() -> None:
    hashes = row_hashes(joined(WHOLE, FORGET), "classes")
    assert len(hashes.unique()) == 20
    assert torch.equal(hashes[14:20], hashes[20:])


def test_a_gradient_that_is_no_number_is_refused_before_anything_changes() -> None:
    model = mlp()
    with torch.no_grad():
        model.body[3].bias[0] = math.nan
    with pytest.raises(Mistake, match=r"parameter 'body\..*not finite"):
        IAU().forget(model, REQUEST, trainer())
    assert torch.equal(model.body[0].weight, mlp().body[0].weight)


def test_no_retain_rows_and_no_file_is_a_mistake() -> None:
    plain = Request("gone", FORGET, kind="classes")
    with pytest.raises(Mistake, match=r"request 'gone'.*no retain set.*correction: 0"):
        IAU().forget(mlp(), plain, trainer())
    with pytest.raises(Mistake, match=r"iau\.scaled"):
        IAU(correction=0, scaled=True).forget(mlp(), plain, trainer())


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"step": "adamw"}, "iau.step"),
        ({"weighting": "means"}, "iau.weighting"),
        ({"lr": -1.0}, "iau.lr"),
        ({"correction": math.inf}, "iau.correction"),
        ({"gamma": math.nan}, "iau.gamma"),
        ({"most": 0.0}, "iau.most"),
        ({"guard": -1}, "iau.guard"),
        ({"batch_size": 0}, "iau.batch_size"),
    ],
)
def test_bad_values_are_refused_by_name(options: dict[str, Any], place: str) -> None:
    with pytest.raises(Mistake, match=place):
        IAU(**options)
