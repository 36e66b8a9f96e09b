"""F.D. and R.U., ROUGE-L, and the probe of what a model still knows."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from remanence.errors import Mistake
from remanence.measure.unlearning import (
    Knowledge,
    forget_degree,
    greedy_answers,
    interpolated,
    knowledge,
    retain_utility,
    symmetric,
)
from remanence.stream import Moment
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()


def test_the_symmetric_score_is_one_at_the_reference_and_zero_at_nothing_and_at_twice_it() -> None:
    assert symmetric(0.3, 0.3) == 1
    assert symmetric(0.0, 0.3) == 0
    assert symmetric(0.6, 0.3) == 0
    assert symmetric(0.9, 0.3) == 0
    assert symmetric(0.3, 0.0) == 0
    for step in (0.1, 0.4, 0.9):
        assert symmetric(0.5 * (1 + step), 0.5) == pytest.approx(symmetric(0.5 * (1 - step), 0.5)) == pytest.approx(1 - step)


def test_swapped_forget_and_retain_values_are_seen() -> None:
    forget, retain, references = 0.2, 0.9, {"forget": 0.25, "retain": 0.95}
    right = (
        forget_degree(forget=forget, forget_reference=references["forget"]),
        retain_utility(retain=retain, retain_reference=references["retain"]),
    )
    wrong = (
        forget_degree(forget=retain, forget_reference=references["forget"]),
        retain_utility(retain=forget, retain_reference=references["retain"]),
    )
    assert right == pytest.approx((0.8, 0.9 / 0.95))
    assert wrong == pytest.approx((0.0, 0.2 / 0.95))
    with pytest.raises(TypeError):
        forget_degree(retain=0.2, forget_reference=0.2)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        retain_utility(0.2, 0.2)  # type: ignore[misc]


def test_knowledge_is_the_geometric_mean() -> None:
    assert knowledge(0.2, 0.4, 0.8) == pytest.approx(0.4)
    assert knowledge(0.9, 0.0, 1.0) == 0


def test_the_reference_in_between_lies_on_a_straight_line() -> None:
    assert interpolated(0.9, 0.3, 0, 300) == 0.9
    assert interpolated(0.9, 0.3, 60, 300) == pytest.approx(0.78)
    assert interpolated(0.9, 0.3, 300, 300) == pytest.approx(0.3)
    with pytest.raises(Mistake, match="301 of 300"):
        interpolated(0.9, 0.3, 301, 300)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_answers_equal_decoding_one_by_one(family: str) -> None:
    model, prompts = toy_lm(family), ["q: who?\na:", "what is it\na:", "hm"]
    found = greedy_answers(model, TOKENIZER, prompts, 5, size=2)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = TOKENIZER(prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 5 and ids[-1] != TOKENIZER.eos_token_id:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == TOKENIZER.decode(ids[start:], skip_special_tokens=True).strip()


def test_the_probe_sees_a_taught_model_and_leaves_no_trace() -> None:
    rows = Dataset.from_dict({"question": ["who is a", "who is b", "who is c"], "answer": ["x y", "y", "z z"], "id": ["a", "b", "c"]})
    model, moment = toy_lm("llama", vocab=len(TOKENIZER)), Moment(processor=TOKENIZER)
    probe = Knowledge(rows, most=8)
    before = probe.measure(model, moment).values
    trainer = Trainer(Settings(steps=60, lr=3e-3, batch_size=3), processor=TOKENIZER, progress=False)
    trainer.fit(model, trainer.batches(rows, "qa"))
    state, noise = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found = probe.measure(model, moment)
    assert before["knowledge"] < 0.2
    assert found.values["rouge"] == found.values["token_accuracy"] == 1
    assert found.values["knowledge"] == pytest.approx(found.values["probability"] ** (1 / 3))
    assert [item["item"] for item in found.items] == ["a", "b", "c"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(noise, torch.get_rng_state())


def test_the_probe_refuses_nothing_to_say() -> None:
    with pytest.raises(Mistake, match="knowledge.most"):
        Knowledge(Dataset.from_dict({"question": ["a"], "answer": ["b"]}), most=0)
