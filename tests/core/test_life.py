"""A life: who sees which rows, what is measured, what is recorded, and that looking changes nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from remanence.errors import Mistake
from remanence.learn.replay import Replay
from remanence.learn.sequential import Sequential
from remanence.ledger import Ledger
from remanence.life import Deed, Life, differing, without_forgotten
from remanence.measure.accuracy import Accuracy
from remanence.models.load import weights_hash
from remanence.stream import Request, Task, keys_of
from remanence.training.batches import Draws
from remanence.training.trainer import Settings, Trainer
from toy import toy_classifier

FAST = Settings(steps=3, batch_size=4, lr=0.1)


def rows(*numbers: int) -> Dataset:
    """Return rows whose first feature is their number."""
    return Dataset.from_dict({"features": [[float(n)] + [0.5] * 7 for n in numbers], "label": [n % 4 for n in numbers]})


def seen(data: Dataset) -> set[int]:
    return {int(features[0]) for features in data["features"]}


@dataclass
class Spy:
    """Train for real, and write down the rows of each task and of the history."""

    tasks: dict[str, set[int]] = field(default_factory=dict, init=False)
    history: dict[str, dict[str, set[int]]] = field(default_factory=dict, init=False)
    erased: list[str] = field(default_factory=list, init=False)

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        self.tasks[task.name] = seen(task.train)
        self.history[task.name] = {earlier.name: seen(earlier.train) for earlier in trainer.history}
        return trainer.fit(model, trainer.batches(task.train, task.kind))

    def erase(self, request: Request, trainer: Trainer) -> int:
        self.erased.append(request.name)
        return len(request.forget)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Nothing:
    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        return model


def task(name: str, *numbers: int) -> Task:
    return Task(name, rows(*numbers), kind="classes")


def request(name: str, *numbers: int) -> Request:
    return Request(name, rows(*numbers), kind="classes")


EVENTS = [task("a", *range(10)), task("b", 20, 3, 21, 22), request("r", 3, 4, 20), task("c", 3, 30, 31), request("s", 30, 5)]


def life(events: list | None = None, learner: Any = None, **options: Any) -> tuple[Life, Any]:
    learner = Spy() if learner is None else learner
    deeds = [Deed(event, learner if isinstance(event, Task) else Nothing(), FAST) for event in events or EVENTS]
    options = {"progress": False, "ledger": Ledger(":memory:")} | options
    return Life(deeds, toy_classifier(), **options), learner


def test_an_oracle_never_trains_on_rows_that_a_later_request_names() -> None:
    lived, spy = life(oracle=True)
    lived.run()
    for number, event in enumerate(EVENTS):
        if isinstance(event, Task):
            later = set().union(*(seen(other.forget) for other in EVENTS[number:] if isinstance(other, Request)))
            assert spy.tasks[event.name] == seen(event.train) - later
    assert spy.tasks == {"a": {0, 1, 2, 6, 7, 8, 9}, "b": {21, 22}, "c": {3, 31}}  # row 3 came back behind the request


def test_every_other_life_trains_on_all_rows() -> None:
    lived, spy = life()
    lived.run()
    assert spy.tasks == {event.name: seen(event.train) for event in EVENTS if isinstance(event, Task)}


def test_the_history_holds_no_rows_that_were_forgotten_since() -> None:
    lived, spy = life([*EVENTS, task("d", 40)])
    lived.run()
    assert spy.history["b"] == {"a": set(range(10))}
    assert spy.history["c"] == {"a": set(range(10)) - {3, 4}, "b": {21, 22}}
    assert spy.history["d"] == {"a": set(range(10)) - {3, 4, 5}, "b": {21, 22}, "c": {3, 31}}


def test_a_task_that_was_forgotten_as_a_whole_leaves_the_history() -> None:
    lived, spy = life([task("a", 1, 2), task("b", 3), request("r", 1, 2), task("c", 4)])
    lived.run()
    assert spy.history["c"] == {"b": {3}}


def test_an_oracle_that_would_learn_nothing_is_refused() -> None:
    with pytest.raises(Mistake, match="the oracle has nothing to learn"):
        life([task("a", 1, 2), request("r", 1, 2)], oracle=True)


def test_rows_of_another_kind_are_not_taken_for_the_forgotten_ones() -> None:
    words = Request("r", Dataset.from_dict({"question": ["x"], "answer": ["y"]}), kind="qa")
    deeds = [Deed(task("a", 1, 2), Spy(), FAST), Deed(words, None, FAST)]
    assert seen(without_forgotten(deeds)[0].event.train) == {1, 2}


def test_every_request_erases_the_learners_memories_and_says_so() -> None:
    lived, spy = life()
    lived.run()
    assert spy.erased == ["r", "s"]
    notes = [(row["event"], json.loads(row["content"])) for row in lived.ledger.rows("notes") if row["name"] == "erased from memories"]
    assert notes == [(3, {"Spy": 3}), (5, {"Spy": 2})]


def test_a_replay_memory_holds_no_forgotten_row_behind_the_request() -> None:
    lived, learner = life(learner=Replay(capacity=50))
    lived.run()
    drawn = Draws(learner.kept, 64, seed=0)[0]["pixel_values"]
    kept = {int(value) for value in drawn.reshape(len(drawn), -1)[:, 0]}
    assert len(kept) > 5
    assert not kept & {30, 5}


def test_moved_weights_equal_a_comparison_by_hand() -> None:
    lived, _ = life(EVENTS[:1], learner=Sequential())
    before = {name: value.detach().clone() for name, value in lived.model.named_parameters()}
    after = dict(lived.run().named_parameters())
    found = {row["weight"]: row for row in lived.ledger.rows("moved")}
    assert found.keys() == before.keys()
    for name, old in before.items():
        assert found[name]["size"] == old.numel()
        assert found[name]["changed"] == int((old != after[name]).sum())
        expected = float((after[name].double() - old.double()).norm() / old.double().norm())
        assert found[name]["relative"] == pytest.approx(expected, rel=1e-5)


def test_hashes_chain_from_event_to_event_and_a_request_without_a_method_changes_nothing() -> None:
    lived, _ = life(oracle=True)
    start = weights_hash(lived.model)
    lived.run()
    events = lived.ledger.rows("events")
    assert events[0]["weights_before"] == start
    assert [row["weights_before"] for row in events[1:]] == [row["weights_after"] for row in events[:-1]]
    assert events[2]["weights_before"] == events[2]["weights_after"]
    assert events[-1]["weights_after"] == weights_hash(lived.model)


def test_probes_at_every_step_change_neither_weights_nor_losses() -> None:
    probe = Accuracy(rows(*range(8)), "classes")
    quiet, _ = life()
    watched, _ = life(probes={"all": {"accuracy": probe}}, every=1)
    quiet.run()
    watched.run()
    assert weights_hash(quiet.model) == weights_hash(watched.model)
    assert quiet.ledger.rows("steps") == watched.ledger.rows("steps")
    stops = {(row["event"], row["step"]) for row in watched.ledger.rows("scores")}
    assert stops == {(0, -1)} | {(n, -1) for n in range(1, 6)} | {(n, step) for n in (1, 2, 4) for step in (1, 2, 3)}


def test_the_global_generator_is_repeatable_whatever_came_before() -> None:
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        lived, _ = life()
        lived.run()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_method_of_the_wrong_verb_and_a_task_without_one_are_refused() -> None:
    with pytest.raises(Mistake, match="is not a learner"):
        Deed(task("a", 1), Nothing(), FAST)
    with pytest.raises(Mistake, match="is not a forgetter"):
        Deed(request("r", 1), Spy(), FAST)
    with pytest.raises(Mistake, match="no learner was given"):
        Deed(task("a", 1), None, FAST)


def test_a_run_that_is_in_the_ledger_is_not_begun_again() -> None:
    ledger = Ledger(":memory:")
    life(ledger=ledger)[0].run()
    with pytest.raises(Mistake, match="is here already"):
        life(ledger=ledger)[0].run()


def test_the_first_difference_of_two_recipes_is_named_and_harmless_ones_are_not() -> None:
    old = {
        "recipe": {"training": {"lr": 0.1}, "events": [{"learn": "a"}], "output": "x", "lives": {"me": {}, "other": {}}},
        "oracle": False,
    }
    new = json.loads(json.dumps(old))
    new["recipe"]["output"], new["recipe"]["lives"]["other"] = "y", {"oracle": True}
    assert differing(old, new, "me") is None
    assert differing(old, new, "other") == "lives.other.oracle"
    new["recipe"]["events"][0]["learn"] = "b"
    assert differing(old, new, "me") == "events.0.learn"


def test_keys_are_those_of_a_comparison_by_hand() -> None:
    assert keys_of(Dataset.from_dict({"question": ["a", "b"], "answer": ["c", "d"]}), "qa") == [("a", "c"), ("b", "d")]
    one, other = keys_of(rows(1, 2), "classes"), keys_of(rows(2, 1), "classes")
    assert (one[0], one[1]) == (other[1], other[0])
    assert one[0] != one[1]
