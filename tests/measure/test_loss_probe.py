"""The loss equals one row at a time, whatever the batches."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from remanence.data.encode import encode_rows
from remanence.errors import Mistake
from remanence.measure.loss import Loss
from remanence.stream import Moment, Probe
from remanence.training import scoring as reading
from remanence.training.scoring import rank_of
from toy import toy_classifier, toy_lm, toy_tokenizer

TEXT = Dataset.from_dict({"text": ["the cat sat on the mat. " * 3, "a dog", "then it rained all day, and nobody came."]})
QA = Dataset.from_dict({"question": ["who?", "where is it now?"], "answer": ["bo", "in rome, i think"], "id": ["a", "b"]})
CLASSES = Dataset.from_dict(
    {"features": torch.randn(11, 8, generator=torch.Generator().manual_seed(0)).tolist(), "label": [n % 4 for n in range(11)]}
)


@torch.no_grad()
def slow(model, rows: Dataset) -> list[tuple[float, int]]:
    """Return (summed NLL, tokens) of each encoded row, alone and in fp64."""
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        logps = [float(logits[n - 1, label]) for n, label in enumerate(row["labels"]) if n and label != -100]
        found.append((-sum(logps), len(logps)))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(("rows", "kind"), [(TEXT, "text"), (QA, "qa")], ids=["text", "qa"])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_language_loss_equals_one_row_at_a_time(family, rows, kind, size):
    model, tokenizer = toy_lm(family), toy_tokenizer()
    expected = slow(model, encode_rows(rows, kind, tokenizer, length=48))
    found = Loss(rows, kind, batch_size=size, length=48).measure(model, Moment(processor=tokenizer))
    mean = sum(nll for nll, _ in expected) / sum(count for _, count in expected)
    assert found.values["loss"] == pytest.approx(mean, rel=1e-5)
    assert found.values["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert [item["tokens"] for item in found.items] == [count for _, count in expected]
    assert [item["loss"] for item in found.items] == pytest.approx([nll / count for nll, count in expected], rel=1e-5)
    assert [item["item"] for item in found.items] == (["a", "b"] if kind == "qa" else list(range(len(expected))))


def test_small_pieces_give_the_same_loss(monkeypatch):
    model, at = toy_lm("llama"), Moment(processor=toy_tokenizer())
    whole = Loss(TEXT).measure(model, at).values
    monkeypatch.setattr(reading, "PIECE", 200)
    assert Loss(TEXT).measure(model, at).values == pytest.approx(whole)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_class_loss_is_the_mean_cross_entropy(size):
    model = toy_classifier()
    with torch.no_grad():
        logp = model(torch.tensor(CLASSES["features"][:])).double().log_softmax(-1)
    expected = [-float(logp[row, label]) for row, label in enumerate(CLASSES["label"][:])]
    found = Loss(CLASSES, "classes", batch_size=size).measure(model, Moment())
    assert found.values == pytest.approx({"loss": sum(expected) / len(expected)}, rel=1e-5)
    assert [item["loss"] for item in found.items] == pytest.approx(expected, rel=1e-5)


def test_batch_statistics_are_neither_used_nor_moved():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), toy_classifier()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    values = [Loss(CLASSES, "classes", batch_size=size).measure(model, Moment()).values["loss"] for size in (1, 4)]
    assert values[0] == pytest.approx(values[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_perplexity_of_a_ruined_model_is_infinite_not_an_error():
    model = toy_lm("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    assert Loss(TEXT).measure(model, Moment(processor=toy_tokenizer())).values["perplexity"] == math.inf


def test_the_loss_of_a_model_with_nan_weights_is_nan():
    model = toy_lm("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    assert all(math.isnan(value) for value in Loss(TEXT).measure(model, Moment(processor=toy_tokenizer())).values.values())


def chat(*roles: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": role, "content": f"i am the {role}"} for role in roles]}


def test_a_chat_without_an_assistant_has_no_item_and_a_set_of_them_no_loss():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    model, at = toy_lm("llama"), Moment(processor=tokenizer)
    rows = Dataset.from_list([chat("user"), chat("user", "assistant"), chat("system", "user", "assistant")])
    expected = slow(model, encode_rows(rows, "chat", tokenizer))
    found = Loss(rows, "chat").measure(model, at)
    assert [item["item"] for item in found.items] == [1, 2]
    assert found.values["loss"] == pytest.approx(sum(nll for nll, _ in expected) / sum(count for _, count in expected), rel=1e-5)
    with pytest.raises(Mistake, match="supervised"):
        Loss(rows.select([0]), "chat").measure(model, at)


def test_rank_of_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 2.0], [0.0, math.nan, 1.0]])
    ranks = rank_of(logits, torch.tensor([1, 0, 2])).tolist()
    assert ranks[:2] == [3.0, 2.5]  # third; second and third shared
    assert math.isnan(ranks[2])


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_without_an_output_is_refused(label):
    rows = Dataset.from_dict({"features": [[0.0] * 8], "label": [label]})
    with pytest.raises(Mistake, match="labels"):
        Loss(rows, "classes").measure(toy_classifier(), Moment())


@pytest.mark.parametrize(
    "make", [lambda: Loss(TEXT, "qa"), lambda: Loss(TEXT.select([])), lambda: Loss(TEXT, "txt"), lambda: Loss(TEXT, batch_size=0)]
)
def test_unusable_rows_are_refused(make):
    with pytest.raises(Mistake):
        make()


def test_loss_is_a_probe():
    assert isinstance(Loss(TEXT), Probe)
