"""The probe of memorisation equals asking row by row and token by token, and leaves end tokens out where it says so."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from remanence.catalogue import build_probe
from remanence.data.encode import encode_rows
from remanence.errors import Mistake
from remanence.measure.memorisation import Memorisation
from remanence.models.load import load_model
from remanence.stream import Moment, Probe
from remanence.training.batches import Batches
from remanence.training.losses import nll
from remanence.training.memorisation import ids_of, read_tokens
from toy import toy_lm, toy_tokenizer

ROWS = Dataset.from_dict(
    {
        "id": [f"fact-{n}" for n in range(5)],
        "question": [f"where is {name}?" for name in ("ann", "bo", "cy", "dee", "ed")],
        "answer": ["oslo", "rome", "a", "lima", "quite a long one"],
        "perturbed_answers": [["bonn", "york"], ["riga"], None, [], ["a short one", "oslo"]],
    }
)
FAMILIES = ["llama", "gpt2", "qwen2", "stories260k"]


@pytest.fixture(scope="module", params=FAMILIES)
def taught(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    """A model that half knows the first three answers."""
    model: nn.Module = toy_lm(request.param) if request.param != "stories260k" else nn.Identity()
    tokenizer: Any = toy_tokenizer()
    if request.param == "stories260k":
        folder = Path(os.environ.get("REMANENCE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "stories260k"
        if not folder.is_dir():
            pytest.skip(f"the real model stories260k is not at {folder}; set REMANENCE_DATA")
        loaded = load_model(folder)
        model, tokenizer = loaded.model, loaded.processor
    batch = Batches(encode_rows(ROWS.select(range(3)), "qa", tokenizer), 3, shuffle=False)[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        nll(model, batch).backward()
        optimizer.step()
    return model.eval(), tokenizer


@torch.no_grad()
def ask(model: nn.Module, tokenizer: Any, question: str, answer: str) -> tuple[list[float], list[bool], list[float], list[float]]:
    """Return log-probability, hit, and moments of each answer token, one question at a time in fp64; the end token last."""
    row = encode_rows(Dataset.from_dict({"question": [question], "answer": [answer]}), "qa", tokenizer)[0]
    ids, start = row["input_ids"], row["labels"].count(-100)
    wide = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(start, len(ids))
    means = [float((wide[n - 1].exp() * wide[n - 1]).sum()) for n in places]
    squares = [float((wide[n - 1].exp() * wide[n - 1] ** 2).sum()) for n in places]
    spreads = [math.sqrt(square - mean**2) for square, mean in zip(squares, means)]
    return [float(wide[n - 1, ids[n]]) for n in places], [int(wide[n - 1].argmax()) == ids[n] for n in places], means, spreads


def test_every_row_equals_asking_it_alone(taught: tuple[nn.Module, Any]) -> None:
    model, tokenizer = taught
    probe = Memorisation(ROWS, batch_size=2)
    assert isinstance(probe, Probe)
    scores = probe.measure(model, Moment(processor=tokenizer))
    for item, question, answer, wrong in zip(scores.items, ROWS["question"], ROWS["answer"], ROWS["perturbed_answers"]):
        logp, hits, _, _ = ask(model, tokenizer, question, answer)
        inner = hits[:-1]  # without the end token
        assert item["exact_memorisation"] == pytest.approx(sum(inner) / len(inner))
        k = next((k for k in range(len(inner)) if all(inner[k:])), len(inner))
        assert item["extraction_strength"] == pytest.approx(1 - k / len(inner))
        if wrong:
            odds = [math.exp(np.mean(ask(model, tokenizer, question, other)[0])) for other in wrong]
            ratio = np.mean(odds) / math.exp(np.mean(logp))
            assert item["truth_ratio"] == pytest.approx(min(ratio, 1 / ratio), rel=1e-4)
        else:
            assert "truth_ratio" not in item
    assert [item["item"] for item in scores.items] == ROWS["id"][:]
    for name in ("exact_memorisation", "extraction_strength", "truth_ratio"):
        assert scores.values[name] == pytest.approx(np.mean([item[name] for item in scores.items if name in item]))


def test_tokens_and_their_moments_equal_asking_one_by_one(taught: tuple[nn.Module, Any]) -> None:
    model, tokenizer = taught
    tokens = read_tokens(model, Batches(encode_rows(ROWS, "qa", tokenizer), 1), 2, end=tokenizer.eos_token_id, moments=True)
    expected = [ask(model, tokenizer, question, answer) for question, answer in zip(ROWS["question"], ROWS["answer"])]
    lengths = [len(logp) for logp, *_ in expected]
    assert tokens.row.tolist() == np.repeat(np.arange(5), lengths).tolist()
    for found, column in ((tokens.logp, 0), (tokens.mean, 2), (tokens.deviation, 3)):
        np.testing.assert_allclose(found, [value for row in expected for value in row[column]], rtol=1e-3, atol=1e-4)
    assert tokens.top.tolist() == [value for row in expected for value in row[1]]
    assert tokens.end.tolist() == [place == length - 1 for length in lengths for place in range(length)]
    inner = tokens.without_end()
    assert np.bincount(inner.row).tolist() == [length - 1 for length in lengths]
    assert len(inner.mean) == len(inner.row)


def test_supervised_tokens_are_named_row_by_row() -> None:
    tokenizer = toy_tokenizer()
    rows = Batches(encode_rows(ROWS, "qa", tokenizer), 2, shuffle=False)
    assert tokenizer.batch_decode(ids_of(rows), skip_special_tokens=True) == [f" {answer}" for answer in ROWS["answer"]]


def test_padding_does_not_reach_a_score() -> None:
    model, tokenizer = toy_lm("llama"), toy_tokenizer()
    together = Memorisation(ROWS, batch_size=5).measure(model, Moment(processor=tokenizer))
    alone = Memorisation(ROWS, batch_size=1).measure(model, Moment(processor=tokenizer))
    for first, second in zip(together.items, alone.items):
        assert first == {key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for key, value in second.items()}


def test_texts_are_measured_by_block() -> None:
    rows = Dataset.from_dict({"text": ["abc def " * 9, "xyz"]})
    scores = Memorisation(rows, kind="text", length=16).measure(toy_lm("gpt2"), Moment(processor=toy_tokenizer()))
    assert set(scores.values) == {"exact_memorisation", "extraction_strength"}
    assert [item["item"] for item in scores.items] == list(range(len(scores.items)))
    assert len(scores.items) == math.ceil((72 + 1 + 3 + 1) / 16)


def test_the_recipe_finds_it_and_what_does_not_fit_is_refused() -> None:
    name, probe = build_probe({"probe": "memorisation", "mean": "losses"}, ROWS, "qa", {"batch_size": 7}, "probe")
    assert (name, probe.mean, probe.batch_size) == ("memorisation", "losses", 7)
    with pytest.raises(Mistake, match="losses"):
        Memorisation(ROWS, mean="loss")
    with pytest.raises(Mistake, match="cannot read kind"):
        build_probe("memorisation", Dataset.from_dict({"features": [[1.0]], "label": [0]}), "classes", {}, "probe")
