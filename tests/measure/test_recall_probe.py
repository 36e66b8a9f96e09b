"""Recall equals asking one question at a time, and a teacher-forced match equals greedy generation."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from remanence.data.encode import encode_rows
from remanence.errors import Mistake
from remanence.measure.recall import Recall, answer_ranks
from remanence.models.forward import logits_of
from remanence.stream import Moment, Probe
from remanence.training import scoring as reading
from remanence.training.batches import Batches
from remanence.training.losses import nll
from toy import toy_lm, toy_tokenizer

PLACES = ["oslo", "rome", "bern", "lima", "kiev", "a quite long answer"]
ROWS = Dataset.from_dict(
    {
        "id": [f"fact-{n}" for n in range(6)],
        "question": [f"where is {name}?" + " now" * (n % 3) for n, name in enumerate(["ann", "bo", "cy", "dee", "ed", "flo"])],
        "answer": PLACES,
        "paraphrases": [["ann is where?", "tell: ann"], ["bo is where?"], [], ["where dee?"], None, ["flo?", "flo is?", "flo, where?"]],
        "perturbed_answers": [["bonn", "york"], ["riga", "oslo now"], ["linz"], [], None, ["bern", "rome", "lima"]],
    }
)
TAUGHT = 3  # the first three rows are trained on, the others are not
FAMILIES = ["llama", "gpt2", "qwen2", "stories260k"]


def stories() -> tuple[nn.Module, object]:
    root = Path(os.environ.get("REMANENCE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    if not (root / "stories260k").is_dir():
        pytest.skip(f"the real model stories260k is not under {root}; set REMANENCE_DATA")
    folder = root / "stories260k"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def taught(request) -> tuple[nn.Module, object]:
    """A model that knows the first three answers."""
    model, tokenizer = stories() if request.param == "stories260k" else (toy_lm(request.param), toy_tokenizer())
    batch = Batches(encode_rows(ROWS.select(range(TAUGHT)), "qa", tokenizer), TAUGHT, shuffle=False)[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nll(model, batch).backward()
        optimizer.step()
    return model.eval(), tokenizer


@torch.no_grad()
def ask(model: nn.Module, tokenizer, question: str, answer: str) -> dict[str, float]:
    """Ask one question, token by token, in fp64: the slow way."""
    row = encode_rows(Dataset.from_dict({"question": [question], "answer": [answer]}), "qa", tokenizer)[0]
    ids, start = row["input_ids"], row["labels"].count(-100)
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    logps = [float(logits[n - 1, ids[n]]) for n in range(start, len(ids))]
    first = logits[start - 1].tolist()
    rank = 1 + sum(value > first[ids[start]] for value in first)
    said = model.generate(torch.tensor([ids[:start]]), max_new_tokens=len(ids) - start, do_sample=False, pad_token_id=0)[0].tolist()
    return {
        "exact": float(said == ids),
        "probability": math.exp(sum(logps) / len(logps)),
        "likelihood": math.exp(sum(logps)),
        "loss": -sum(logps) / len(logps),
        "rank": rank,
        "reciprocal_rank": 1 / rank,
    }


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    expected = {key: value for key, value in expected.items() if key != "item"}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_every_value_equals_asking_one_question_at_a_time(taught):
    model, tokenizer = taught
    found = Recall(ROWS, batch_size=4).measure(model, Moment(processor=tokenizer))
    direct = [ask(model, tokenizer, row["question"], row["answer"]) for row in ROWS]
    assert [item["item"] for item in found.items] == ROWS["id"][:]
    for number, (item, expected) in enumerate(zip(found.items, direct)):
        close(item, expected)
        others = [ask(model, tokenizer, text, ROWS[number]["answer"]) for text in ROWS[number]["paraphrases"] or []]
        if others:
            close(item, {f"paraphrased/{key}": float(np.mean([other[key] for other in others])) for key in expected})
        wrong = [ask(model, tokenizer, ROWS[number]["question"], text)["probability"] for text in ROWS[number]["perturbed_answers"] or []]
        if wrong:
            rank = 1 + sum(value > expected["probability"] for value in wrong)
            close(item, {"answer_rank": rank, "answer_reciprocal_rank": 1 / rank})
        assert ("answer_rank" in item) == bool(wrong)
        assert ("paraphrased/exact" in item) == bool(others)
    for name, value in found.values.items():
        assert value == pytest.approx(np.mean([item[name] for item in found.items if name in item])), name


def test_a_teacher_forced_match_is_greedy_generation_of_the_answer_and_a_stop(taught):
    model, tokenizer = taught
    items = Recall(ROWS).measure(model, Moment(processor=tokenizer)).items
    exact = [item["exact"] for item in items]
    assert exact[:TAUGHT] == [1.0] * TAUGHT  # both outcomes occur, or the comparison would be empty
    assert 0.0 in exact
    for row, hit in zip(ROWS, exact):
        coded = encode_rows(Dataset.from_list([row]).select_columns(["question", "answer"]), "qa", tokenizer)[0]
        start = coded["labels"].count(-100)
        # Free to run on: the answer must end by the model's own end token.
        said = model.generate(torch.tensor([coded["input_ids"][:start]]), max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert hit == float(said[0].tolist() == coded["input_ids"])


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_the_batch_size_does_not_matter(taught, size):
    model, tokenizer = taught
    whole = Recall(ROWS).measure(model, Moment(processor=tokenizer))
    found = Recall(ROWS, batch_size=size).measure(model, Moment(processor=tokenizer))
    for one, other in zip(whole.items, found.items):
        assert one.keys() == other.keys()
        close(one, other)


def test_padding_does_not_matter(taught):
    model, tokenizer = taught
    long = {"id": "long", "question": "why " * 12, "answer": "because of this", "paraphrases": [], "perturbed_answers": []}
    padded = Dataset.from_list([*ROWS.to_list(), long])
    alone = Recall(ROWS).measure(model, Moment(processor=tokenizer)).items
    beside = Recall(padded).measure(model, Moment(processor=tokenizer)).items
    for one, other in zip(alone, beside):
        close(one, other)


@pytest.mark.parametrize("piece", [1, 1000])
def test_the_size_of_the_pieces_does_not_matter(taught, piece, monkeypatch):
    model, tokenizer = taught
    whole = Recall(ROWS).measure(model, Moment(processor=tokenizer)).values
    monkeypatch.setattr(reading, "PIECE", piece)
    assert Recall(ROWS).measure(model, Moment(processor=tokenizer)).values == pytest.approx(whole)


class Plain(nn.Module):
    """A language model that knows no `logits_to_keep` and puts `extra` positions in front, as a soft prompt does."""

    def __init__(self, core: nn.Module, extra: int = 0):
        super().__init__()
        self.core, self.extra = core, extra

    def forward(self, input_ids):
        logits = self.core(input_ids=input_ids).logits
        return torch.cat([torch.zeros_like(logits[:, : self.extra]), logits], 1)


@pytest.mark.parametrize("extra", [0, 3])
def test_models_that_give_all_logits_are_read_the_same(taught, extra):
    model, tokenizer = taught
    at = Moment(processor=tokenizer)
    assert Recall(ROWS).measure(Plain(model, extra), at).values == pytest.approx(Recall(ROWS).measure(model, at).values)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fresh_adapter_changes_nothing_and_a_soft_prompt_is_read_at_the_right_places(family):
    at = Moment(processor=toy_tokenizer())
    plain = Recall(ROWS).measure(toy_lm(family), at).values
    lora = get_peft_model(toy_lm(family), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    assert Recall(ROWS).measure(lora, at).values == pytest.approx(plain)
    soft = get_peft_model(toy_lm(family), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    alone = Recall(ROWS, batch_size=1, paraphrased=False).measure(soft, at)
    with torch.no_grad():
        coded = encode_rows(ROWS.select_columns(["question", "answer"]), "qa", at.processor)[0]
        ids, start = coded["input_ids"], coded["labels"].count(-100)
        logps = soft(input_ids=torch.tensor([ids])).logits[0, 3:].double().log_softmax(-1)
    expected = -sum(float(logps[n - 1, ids[n]]) for n in range(start, len(ids))) / (len(ids) - start)
    assert alone.items[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert Recall(ROWS).measure(soft, at).items[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_only_supervised_time_steps_reach_the_output_layer(taught):
    model, tokenizer = taught
    widths: list[tuple[int, int]] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: widths.append(output.shape[:2]))
    Recall(ROWS.select([0]), paraphrased=False).measure(model, Moment(processor=tokenizer))
    hook.remove()
    rows = Recall(ROWS.select([0]), paraphrased=False)._asked.rows
    coded = encode_rows(rows, "qa", tokenizer)
    needed = {n - 1 for labels in coded["labels"] for n, label in enumerate(labels) if label != -100}
    assert [tuple(width) for width in widths] == [(len(rows), len(needed))]


def test_the_model_is_left_as_it_was(taught):
    model, tokenizer = taught
    model.train()
    next(iter(model.children())).eval()  # a mixture of modes must survive
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = Recall(ROWS).measure(model, Moment(processor=tokenizer))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert model.training
    model.eval()
    assert Recall(ROWS).measure(model, Moment(processor=tokenizer)).values == first.values  # it looked in evaluation mode


def test_under_autocast_sums_stay_in_full_precision():
    model, at = toy_lm("llama"), Moment(processor=toy_tokenizer())
    plain = Recall(ROWS).measure(model, at)
    with torch.autocast("cpu", torch.bfloat16):
        assert logits_of(model, {"input_ids": torch.tensor([[3, 4]])}).dtype == torch.bfloat16
        rough = Recall(ROWS).measure(model, at)
    assert rough.values["loss"] != plain.values["loss"]
    assert rough.values["loss"] == pytest.approx(plain.values["loss"], rel=2e-2)
    model.to(torch.bfloat16)
    assert Recall(ROWS).measure(model, at).values["loss"] == pytest.approx(plain.values["loss"], rel=2e-2)


def test_rows_are_encoded_once_per_tokenizer(monkeypatch):
    calls = []
    monkeypatch.setattr(reading, "encode_rows", lambda *rest, **options: calls.append(rest[2]) or encode_rows(*rest, **options))
    probe, model, one, other = Recall(ROWS), toy_lm("llama"), toy_tokenizer(), toy_tokenizer()
    for tokenizer in (one, one, other, one):
        probe.measure(model, Moment(processor=tokenizer))
    assert calls == [one, other]


def test_a_limit_takes_a_fixed_choice_of_rows():
    many = Dataset.from_dict({"question": [f"q{n}" for n in range(50)], "answer": ["yes"] * 50})
    model = toy_lm("llama")
    picked = [
        [item["item"] for item in Recall(many, limit=8).measure(model, Moment(event=event, seed=event, processor=toy_tokenizer())).items]
        for event in range(2)
    ]
    assert picked[0] == picked[1] == sorted(picked[0])
    assert len(set(picked[0])) == 8
    assert picked[0] != list(range(8))
    whole = Recall(many).measure(model, Moment(processor=toy_tokenizer())).items
    few = Recall(many, limit=8).measure(model, Moment(processor=toy_tokenizer())).items
    for item in few:
        close(item, whole[item["item"]])


def test_paraphrases_can_be_left_out_and_may_be_absent():
    model, at = toy_lm("gpt2"), Moment(processor=toy_tokenizer())
    assert not any(name.startswith("paraphrased/") for name in Recall(ROWS, paraphrased=False).measure(model, at).values)
    bare = Recall(ROWS.select_columns(["question", "answer"])).measure(model, at)
    assert set(bare.values) == {"exact", "probability", "likelihood", "loss", "rank", "reciprocal_rank"}
    assert [item["item"] for item in bare.items] == list(range(6))


class Broken(nn.Module):
    """A language model whose logits are all one number."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, input_ids):
        return torch.full((*input_ids.shape, 64), self.value)


def test_a_model_that_says_nothing_is_not_taken_for_one_that_knows():
    at = Moment(processor=toy_tokenizer())
    flat = Recall(ROWS).measure(Broken(0.0), at).values
    assert flat["rank"] == (64 + 1) / 2  # all ranks are shared
    assert flat["probability"] == pytest.approx(1 / 64)
    assert flat["exact"] == 0
    lost = Recall(ROWS).measure(Broken(math.nan), at).values
    assert lost["exact"] == 0
    assert all(math.isnan(lost[name]) for name in ("rank", "loss", "probability", "answer_rank"))


def test_answer_ranks_by_hand():
    own, other = np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.5, 2.0, 1.0, 2.0])
    # Row 0 against 0.5 and 1.5: second. Row 1 against 2.0 (a tie), 1.0 and 2.0 (a tie): ranks 2, 3, 4 are shared. Row 2 alone: first.
    assert answer_ranks(own, other, np.array([0, 0, 1, 1, 1])).tolist() == [2.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": ["oslo", " "]}, "row 1 has an empty answer"),
        ({"answer": ["oslo", None]}, "row 1 has an empty answer"),
        ({"question": ["", "who"]}, "row 0 has an empty question"),
        ({"paraphrases": [["what"], [""]]}, "row 1 has an empty paraphrased question"),
        ({"perturbed_answers": [["\n"], []]}, "row 0 has an empty perturbed answer"),
    ],
)
def test_empty_texts_are_refused(change, problem):
    with pytest.raises(Mistake, match=problem):
        Recall(Dataset.from_dict({"question": ["what", "who"], "answer": ["oslo", "bo"]} | change))


@pytest.mark.parametrize("options", [{"limit": 0}, {"batch_size": 0}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(Mistake):
        Recall(ROWS, **options)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(Mistake, match="tokenizer"):
        Recall(ROWS).measure(toy_lm("llama"), Moment())


def test_recall_is_a_probe():
    assert isinstance(Recall(ROWS), Probe)
