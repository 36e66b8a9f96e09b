"""A model that is sharded over two processes (FSDP2, below Accelerate) does what a whole one does with twice the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run, torchrun
from sharded_worker import TRAINED, work
from transformers import AutoModelForCausalLM

from remanence.models.load import load_model, weights_hash
from remanence.storage import load_tree


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes did the work."""
    folder = tmp_path_factory.mktemp("sharded")
    ended = run(torchrun(str(Path(__file__).with_name("sharded_worker.py")), str(folder)), folder)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def sharded(place: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return [load_tree(place / f"rank-{number}.safetensors") for number in range(2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process with twice the batch found."""
    return work(tmp_path_factory.mktemp("whole"))


def near(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, rtol: float = 0.0, atol: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_losses_norms_and_weights_equal_those_of_one_process(sharded: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    steps = sharded[0]["steps"]
    assert [metric for metric, _ in steps] == [metric for metric, _ in whole["steps"]]
    assert {metric for metric, _ in steps} == {"loss", "rate", "norm"}
    assert [value for _, value in steps] == pytest.approx([value for _, value in whole["steps"]], abs=1e-5)
    assert not sharded[1]["steps"]  # the main process alone records
    near(sharded[0]["weights"], whole["weights"])


def test_clipping_was_at_work(whole: dict[str, Any]) -> None:
    assert min(value for metric, value in whole["steps"] if metric == "norm") > 0.5


def test_gradient_equals_that_of_one_process(sharded: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    for found in sharded:
        near(found["gradient"], whole["gradient"])


def test_saved_folder_is_an_ordinary_model_with_the_same_logits(place: Path, sharded: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    from sharded_worker import ROWS, trainer

    probe = trainer().batches(ROWS, "qa", size=12, shuffle=False)[0]
    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    with torch.no_grad():
        logits = model(input_ids=probe["input_ids"]).logits
    for found in sharded:
        torch.testing.assert_close(logits, found["logits"], rtol=0, atol=1e-6)


def test_hash_is_that_of_the_whole_model(place: Path, sharded: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    for found in sharded:
        assert found["start"] == whole["start"]
        assert found["end"] == weights_hash(load_model(str(place / "model")).model)
        assert found["end"] == found["hash after the Fishers"]
        assert found["end"] != found["start"]


def test_killed_and_resumed_ends_with_the_same_bits(sharded: list[dict[str, Any]]) -> None:
    for found in sharded:
        assert found["points"] == ["point-0000-000000002.safetensors"]
        assert found["resumed"] == found["end"]


@pytest.mark.parametrize("definition", ["empirical", "sampled", "exact", "batched", "label_free"])
def test_fisher_equals_that_of_one_process(sharded: list[dict[str, Any]], whole: dict[str, Any], definition: str) -> None:
    wanted = whole["fishers"][definition]
    for found in sharded:
        got = found["fishers"][definition]
        assert got["count"] == wanted["count"]
        assert got["trace"] == pytest.approx(wanted["trace"], rel=1e-3)
        largest = max(tensor.max().item() for tensor in wanted["values"].values())
        near(got["values"], wanted["values"], rtol=1e-3, atol=1e-5 * largest)


def test_only_the_named_parameters_move_and_flags_come_back(sharded: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    near(sharded[0]["some"], whole["some"])
    assert {row["weight"] for row in sharded[0]["moved"]} == {row["weight"] for row in whole["moved"]}
    assert all(sharded[0]["flags"])
    from sharded_worker import fresh

    for name, weight in fresh().named_parameters():
        assert torch.equal(weight, sharded[0]["some"][name]) == (name not in TRAINED)


def test_penalty_on_sharded_weights_equals_that_on_whole_ones(sharded: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    near(sharded[0]["pulled"], whole["pulled"])


def test_nan_in_one_process_stops_both_with_the_same_sentence(place: Path) -> None:
    sentences = [json.loads((place / f"rank-{number}.json").read_text()) for number in range(2)]
    assert sentences == ["tuesday, step 1: the loss is nan; lower the learning rate (now 0.001) or clip gradients harder"] * 2
