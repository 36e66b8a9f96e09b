"""SISA: what is left after a deletion is what training without the row gives, bit for bit; and its answer is the mean of its members' probabilities."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.forget.sisa import SISA, places, slice_share
from remanence.ledger import Ledger
from remanence.life import Deed, Life
from remanence.measure.recall import Recall
from remanence.models.adapters import add_lora
from remanence.models.ensemble import EnsembleForCausalLM, ensemble_of, mean_of
from remanence.models.forward import logits_of
from remanence.models.load import load_model, save_model, weights_hash
from remanence.recipe import Recipe
from remanence.storage import load_tree, save_tree
from remanence.stream import Forgetter, Learner, Moment, Request, Task, keys_of
from remanence.training.batches import Batches
from remanence.training.checkpoint import Checkpoints
from remanence.training.trainer import Settings, Trainer
from toy import toy_batch, toy_classifier, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)
FAMILIES = ["llama", "gpt2", "qwen2"]


def rows(first: int, last: int, letter: str = "a") -> Dataset:
    numbers = range(first, last)
    return Dataset.from_dict({"question": [f"what is {letter}{n}" for n in numbers], "answer": [f"{n * 37 % 100}" for n in numbers]})


def without(data: Dataset, gone: Dataset) -> Dataset:
    lost = set(keys_of(gone, "qa"))
    return data.select([number for number, key in enumerate(keys_of(data, "qa")) if key not in lost])


def trainer(number: int, history: tuple[Task, ...] = (), **options: Any) -> Trainer:
    settings = {"steps": 4, "batch_size": 3, "lr": 0.01} | options.pop("settings", {})
    return Trainer(Settings(**settings), processor=TOKENIZER, seed=number, history=history, progress=False, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def small(family: str = "llama", **options: Any) -> nn.Module:
    model = toy_lm(family, vocab=V, width=16, **options)
    if family == "gpt2":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
    return model


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((family, {}) for family in FAMILIES), ("llama", {"steps": None, "epochs": 1.0}), ("gpt2", {"precision": "bf16", "accumulate": 2})],
)
def test_after_deletion_it_is_bit_identical_to_training_without_the_row(family: str, settings: dict[str, Any]) -> None:
    data, gone = rows(0, 12), rows(5, 6)
    taught, never = SISA(3, 2), SISA(3, 2)
    model = taught.learn(small(family), Task("one", data, kind="qa"), trainer(1, settings=settings))
    event = trainer(2, (Task("one", data, kind="qa"),), settings={"lr": 1.0, "steps": 1})  # other settings than the task's
    forgotten = taught.forget(copy.deepcopy(model), Request("gone", gone), event)
    other = never.learn(small(family), Task("one", without(data, gone), kind="qa"), trainer(1, settings=settings))
    assert not same(model, other)
    assert same(forgotten, other)


def test_shards_without_the_row_are_untouched_and_the_earlier_slices_too() -> None:
    data = rows(0, 20)
    method, noted = SISA(3, 3), []
    task = Task("one", data, kind="qa")
    model = method.learn(small(), task, trainer(1))
    where = places(keys_of(data, "qa"), 0, 3, 3)
    late = int(np.flatnonzero(where[:, 1] == 2)[0])  # a row of a last slice
    before = copy.deepcopy(model)
    event = trainer(2, (task,), record=lambda table, found: noted.extend(found) if table == "notes" else None)
    method.forget(model, Request("gone", data.select([late])), event)
    shard = int(where[late, 0])
    for number, (now, old) in enumerate(zip(model.members, before.members, strict=True)):
        assert same(now, old) is (number != shard)
    assert noted[0]["content"] == {"request": "gone", "shards": [shard], "slices trained again": 1, "slices": 9}
    assert model.rows.tolist() == np.bincount(np.delete(where[:, 0], late), minlength=3).tolist()


def test_later_tasks_are_learned_again_behind_the_deletion() -> None:
    first, second, gone = rows(0, 9), rows(0, 8, "b"), rows(3, 5)
    taught, never = SISA(2, 2), SISA(2, 2)
    tasks = (Task("one", first, kind="qa"), Task("two", second, kind="qa"))
    model = taught.learn(taught.learn(small(), tasks[0], trainer(1)), tasks[1], trainer(2))
    taught.forget(model, Request("gone", gone), trainer(3, tasks))
    other = never.learn(small(), Task("one", without(first, gone), kind="qa"), trainer(1))
    other = never.learn(other, tasks[1], trainer(2))
    assert same(model, other)


def test_two_requests_equal_training_without_either() -> None:
    data = rows(0, 12)
    taught, never = SISA(2, 2), SISA(2, 2)
    model = taught.learn(small(), Task("one", data, kind="qa"), trainer(1))
    taught.forget(model, Request("a", rows(2, 3)), trainer(2, (Task("one", data, kind="qa"),)))
    taught.forget(model, Request("b", rows(7, 8)), trainer(3, (Task("one", without(data, rows(2, 3)), kind="qa"),)))
    left = without(without(data, rows(2, 3)), rows(7, 8))
    assert same(model, never.learn(small(), Task("one", left, kind="qa"), trainer(1)))


def test_where_a_row_goes_depends_on_no_other_row() -> None:
    keys = keys_of(rows(0, 50), "qa")
    where = places(keys, 0, 4, 3)
    assert np.array_equal(places(keys[10:20], 0, 4, 3), where[10:20])
    assert not np.array_equal(places(keys, 1, 4, 3), where)
    assert set(where[:, 0]) == set(range(4))
    assert set(where[:, 1]) == set(range(3))


def test_epochs_of_slices_add_up_to_the_trainer_s() -> None:
    for slices in (1, 2, 5):
        assert sum(slice_share(slices, True) * part / slices for part in range(1, slices + 1)) == pytest.approx(1)
        assert slice_share(slices, False) * slices == pytest.approx(1)


def test_a_shard_that_loses_all_its_rows_is_as_at_the_start_and_does_not_count() -> None:
    data = rows(0, 6)
    where = places(keys_of(data, "qa"), 0, 2, 1)
    start, method = small(), SISA(2, 1)
    model = method.learn(copy.deepcopy(start), Task("one", data, kind="qa"), trainer(1))
    shard = int(where[0, 0])
    inside = np.flatnonzero(where[:, 0] == shard)
    assert 0 < len(inside) < 6
    method.forget(model, Request("gone", data.select(inside)), trainer(2, (Task("one", data, kind="qa"),)))
    assert same(model.members[shard], start)
    assert model.rows[shard] == 0
    batch = toy_batch(vocab=V)
    torch.testing.assert_close(logits_of(model, batch), logits_of(model.members[1 - shard], batch).log_softmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_the_mean_of_the_members_probabilities(family: str) -> None:
    members, batch = [toy_lm(family, seed=seed, vocab=V) for seed in range(3)], toy_batch(vocab=V)
    model = ensemble_of(members[0], 3)
    for member, other in zip(model.members, members):
        member.load_state_dict(other.state_dict())
    wanted = sum(logits_of(member, batch).softmax(-1) for member in members) / 3
    torch.testing.assert_close(logits_of(model, batch).softmax(-1), wanted)


def test_mean_of_by_hand() -> None:
    one, two = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log() + 7  # a shift of the logits counts nothing
    torch.testing.assert_close(mean_of([one, two]).exp(), torch.tensor([0.7, 0.3]))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ensemble_is_saved_loaded_measured_and_decoded_like_a_model(family: str, tmp_path: Path) -> None:
    method = SISA(2, 1)
    model = method.learn(small(family), Task("one", rows(0, 8), kind="qa"), trainer(1))
    save_model(model, TOKENIZER, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    assert isinstance(loaded.model, EnsembleForCausalLM)
    assert same(loaded.model, model)
    assert weights_hash(loaded.model) == weights_hash(model)
    batch = toy_batch(vocab=V)
    assert torch.equal(logits_of(loaded.model, batch), logits_of(model, batch))
    scores = Recall(rows(0, 8)).measure(model, Moment(processor=TOKENIZER)).values
    assert 0 < scores["probability"] < 1
    ids = torch.tensor([TOKENIZER.encode("q: what is a1")])
    told = model.generate(ids, max_new_tokens=4, do_sample=False)
    plain = ids
    for _ in range(4):
        plain = torch.cat([plain, logits_of(model, {"input_ids": plain})[:, -1].argmax(-1)[:, None]], 1)
        if plain[0, -1] == TOKENIZER.eos_token_id:
            break
    assert told.tolist() == plain.tolist()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), torch.ones_like(ids)], 1)
    left = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert left[0, padded.shape[1] :].tolist() == told[0, ids.shape[1] :].tolist()


class Killed(Exception):
    """Stands for a kill."""


def test_killed_while_learning_or_forgetting_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    data = rows(0, 10)
    task, gone = Task("one", data, kind="qa"), Request("gone", rows(2, 4))

    def learn(method: SISA, folder: Path | None = None, dies: int | None = None) -> nn.Module:
        return method.learn(small(), task, event(1, method, (), folder, dies))

    def event(number: int, method: SISA, history: tuple[Task, ...], folder: Path | None, dies: int | None) -> Trainer:
        def watch(model: nn.Module, step: int) -> None:
            if step == dies:
                raise Killed

        return trainer(number, history, owner=method, checkpoints=Checkpoints(folder, 1) if folder else None, watch=watch)

    whole = SISA(2, 2)
    taught = learn(whole)
    save_tree(tmp_path / "between", whole.state_dict())
    with pytest.raises(Killed):
        learn(SISA(2, 2), tmp_path / "learn", 5)
    again = SISA(2, 2)
    assert same(learn(again, tmp_path / "learn"), taught)
    save_tree(tmp_path / "other", again.state_dict())
    assert (tmp_path / "other").read_bytes() == (tmp_path / "between").read_bytes()
    start = copy.deepcopy(taught)
    wanted = whole.forget(taught, gone, event(2, whole, (task,), None, None))

    def resumed(dies: int | None) -> nn.Module:
        method = SISA(2, 2)
        method.load_state_dict(load_tree(tmp_path / "between"))
        return method.forget(copy.deepcopy(start), gone, event(2, method, (task,), tmp_path / "forget", dies))

    with pytest.raises(Killed):
        resumed(3)
    assert same(resumed(None), wanted)


def life(oracle: bool, folder: Path | None = None, ledger: Ledger | None = None) -> Life:
    method = SISA(2, 2)
    settings = Settings(steps=3, batch_size=4, checkpoint_every=2)
    deeds = [
        Deed(Task("one", rows(0, 9), kind="qa"), method, settings),
        Deed(Request("gone", rows(2, 4)), method, Settings(steps=1, lr=1.0)),
    ]
    return Life(deeds, small(), processor=TOKENIZER, oracle=oracle, folder=folder, ledger=ledger, progress=False)


def test_a_life_that_forgets_ends_with_the_bits_of_the_oracle_that_never_saw(tmp_path: Path) -> None:
    forgot, never = life(False, tmp_path / "a").run(), life(True).run()
    assert weights_hash(forgot) == weights_hash(never)


def test_a_life_that_is_resumed_between_learning_and_forgetting_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SISA, "forget", dies)
        life(False, tmp_path / "a", Ledger(tmp_path / "ledger.sqlite")).run()
    resumed = life(False, tmp_path / "a", Ledger(tmp_path / "ledger.sqlite")).run(resume=True)
    assert weights_hash(resumed) == weights_hash(life(True).run())


def test_a_recipe_s_learner_and_forgetter_of_the_same_keys_are_one_object() -> None:
    tree = {
        "name": "exact",
        "model": "desk:bio",
        "learn": {"method": "sisa", "shards": 2},
        "forget": {"method": "sisa", "shards": 2},
        "events": [
            {"learn": "one", "data": {"biographies": {"people": 5}}, "kind": "qa"},
            {"forget": "two", "data": {"biographies": {"people": 1}}, "kind": "qa"},
        ],
    }
    (one, *_), (two, *_) = Recipe.of(tree)._methods("life")
    assert one is two
    tree["forget"] = {"method": "sisa", "shards": 3}
    (one, *_), (two, *_) = Recipe.of(tree)._methods("life")
    assert one is not two


def test_classifiers_too() -> None:
    made = torch.Generator().manual_seed(0)
    data = Dataset.from_dict({"features": torch.randn(14, 8, generator=made).tolist(), "label": [n % 4 for n in range(14)]})
    taught, never = SISA(2, 2), SISA(2, 2)
    task = Task("one", data, kind="classes")
    model = taught.learn(toy_classifier(), task, trainer(1))
    taught.forget(model, Request("gone", data.select([3]), kind="classes"), trainer(2, (task,)))
    other = never.learn(toy_classifier(), Task("one", data.select([n for n in range(14) if n != 3]), kind="classes"), trainer(1))
    assert same(model, other)
    batch = Batches({"pixel_values": torch.tensor(data["features"]), "labels": torch.tensor(data["label"])}, 14).take(np.arange(14))
    wanted = sum(logits_of(member, batch).softmax(-1) for member in model.members) / 2
    torch.testing.assert_close(logits_of(model, batch).softmax(-1), wanted)


def test_image_models_of_the_hub_s_kind_are_saved_and_loaded(tmp_path: Path) -> None:
    data = Dataset.from_dict({"features": torch.rand(8, 64, generator=torch.Generator().manual_seed(0)).tolist(), "label": [0, 1] * 4})
    model = SISA(2, 1).learn(load_model("desk:cnn-digits").model, Task("one", data, kind="classes"), trainer(1))
    save_model(model, None, tmp_path / "model")
    assert same(load_model(str(tmp_path / "model")).model, model)


def test_it_is_a_learner_and_a_forgetter() -> None:
    assert isinstance(SISA(), Learner)
    assert isinstance(SISA(), Forgetter)


def test_mistakes() -> None:
    with pytest.raises(Mistake, match="sisa.shards"):
        SISA(shards=0)
    with pytest.raises(Mistake, match="has an adapter"):
        SISA().learn(add_lora(small(), rank=2), Task("one", rows(0, 4), kind="qa"), trainer(1))
    with pytest.raises(Mistake, match="not taught by SISA"):
        SISA().forget(small(), Request("gone", rows(0, 2)), trainer(1))
    method, task = SISA(2, 1), Task("one", rows(0, 6), kind="qa")
    model = method.learn(small(), task, trainer(1))
    with pytest.raises(Mistake, match="no history"):
        method.forget(model, Request("gone", rows(0, 2)), trainer(2))
    with pytest.raises(Mistake, match="not by SISA"):
        method.forget(model, Request("gone", rows(0, 2, "z")), trainer(2, (task, Task("other", rows(0, 3, "z"), kind="qa"))))
    with pytest.raises(Mistake, match="members"):
        SISA(3, 1).learn(model, task, trainer(2))
    with pytest.raises(Mistake, match="another SISA"):
        SISA(2, 1).learn(model, task, trainer(2))
    with pytest.warns(UserWarning, match="no row"):
        method.forget(model, Request("gone", rows(50, 52)), trainer(2, (task,)))
