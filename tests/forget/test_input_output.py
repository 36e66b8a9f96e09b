"""ICUL and the guardrail: what they put in front and what they answer, token by token; that weights stay; and that the gate is saved with the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from remanence.data.biographies import Biographies
from remanence.errors import Mistake
from remanence.forget.guardrail import Guardrail, blocked_runs
from remanence.forget.icul import ICUL, turned
from remanence.measure.recall import Recall
from remanence.models.adapters import add_lora
from remanence.models.forward import logits_of
from remanence.models.guarded import GuardedForCausalLM, answer_starts, holds, nearest_examples, run_hashes, spliced
from remanence.models.load import load_model, save_model
from remanence.stream import Forgetter, Moment, Request
from remanence.training.preference import summed_nll
from remanence.training.questions import marker_of
from remanence.training.trainer import Settings, Trainer
from toy import toy_classifier, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)
FORGET = Dataset.from_dict({"question": [f"who is ab{n}?" for n in range(3)], "answer": ["x", "y", "xy"]})
RETAIN = Dataset.from_dict({"question": [f"who is cd{n}?" for n in range(6)], "answer": ["z", "y", "zz", "x", "yy", "x"]})
REQUEST = Request("gone", FORGET, RETAIN)
FAMILIES = ["llama", "gpt2", "qwen2"]


def trainer(**options: Any) -> Trainer:
    return Trainer(Settings(steps=1), processor=TOKENIZER, seed=4, progress=False, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def tokens(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def asked(question: str) -> Tensor:
    return torch.tensor([tokens(f"Q: {question}\nA:")])


def said(model: nn.Module, question: str, count: int = 12) -> str:
    ids = asked(question)
    found = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return TOKENIZER.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_icul_puts_turned_forget_rows_and_correct_rows_in_front(family: str) -> None:
    model = toy_lm(family, vocab=V)
    before, inner = state(model), copy.deepcopy(model)
    method, event = ICUL(correct=2, shown=3), trainer()
    gated = method.forget(model, REQUEST, event)
    assert isinstance(gated, GuardedForCausalLM)
    assert all(torch.equal(value, before[name]) for name, value in gated.inner.state_dict().items())
    chance = trainer().generator("icul")
    wrong = turned(REQUEST, chance)
    assert all(new != old for new, old in zip(wrong, FORGET["answer"], strict=True))
    chosen = torch.randperm(6, generator=chance)[:2].tolist()
    pairs = [*zip(FORGET["question"], wrong), *((RETAIN["question"][n], RETAIN["answer"][n]) for n in chosen)]
    context = tokens("".join(f"Q: {question}\nA: {answer}\n" for question, answer in pairs))
    ids = asked("who is ab1?")
    whole = logits_of(inner, {"input_ids": torch.tensor([[*context, *ids[0].tolist()]])})
    torch.testing.assert_close(logits_of(gated, {"input_ids": ids}), whole[:, len(context) :], rtol=1e-4, atol=1e-5)


def test_icul_turns_to_a_perturbed_answer_where_there_are_some() -> None:
    rows = Biographies(people=2, attributes=3).facts()
    wrong = turned(Request("gone", rows), torch.Generator().manual_seed(0))
    assert all(new in others for new, others in zip(wrong, rows["perturbed_answers"], strict=True))
    with pytest.raises(Mistake, match="no wrong answer"):
        turned(Request("gone", Dataset.from_dict({"question": ["a", "b"], "answer": ["x", "x"]})), torch.Generator())


def test_a_question_is_shown_the_forget_rows_that_share_most_with_it() -> None:
    marker = [1]
    examples = [[5, 6, 7, 1, 2], [5, 6, 8, 1, 3], [5, 9, 9, 1, 7]]  # token 7 of the last stands in its answer
    ids = torch.tensor([[5, 6, 7, 1, 9], [5, 9, 0, 1, 7]])
    chosen = nearest_examples(ids, answer_starts(ids, marker), examples, marker, 1)
    assert chosen.tolist() == [[0], [2]]
    assert nearest_examples(ids, answer_starts(ids, marker), examples, marker, 2)[0].tolist() == [0, 1]  # in their own order
    assert nearest_examples(ids, answer_starts(ids, marker), examples, marker, 3).tolist() == [[0, 1, 2]] * 2


def test_context_goes_behind_padding_and_the_begin_token() -> None:
    ids, mask = torch.tensor([[9, 1, 5, 6], [1, 5, 6, 7], [5, 6, 7, 8]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    context, inside = torch.tensor([[3, 4], [3, 0], [3, 4]]), torch.tensor([[True, True], [True, False], [True, True]])
    whole, covered = spliced(ids, mask, context, inside, first=1)
    assert whole.tolist() == [[9, 1, 3, 4, 5, 6], [1, 1, 3, 5, 6, 7], [3, 4, 5, 6, 7, 8]]
    assert covered.tolist() == [[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_unequal_context_and_padding_give_what_each_gives_alone(family: str) -> None:
    forget = Dataset.from_dict({"question": ["who is ab?", "where lives a person called cd?"], "answer": ["x", "y"]})
    gated = ICUL(correct=0, shown=1).forget(toy_lm(family, vocab=V), Request("gone", forget), trainer())
    one, two = asked("who is ab?"), asked("where lives a person called cd?")
    longest = max(one.shape[1], two.shape[1])
    right = torch.cat([torch.cat([ids, torch.zeros(1, longest - ids.shape[1], dtype=torch.int64)], 1) for ids in (one, two)])
    together = logits_of(gated, {"input_ids": right})
    left = torch.cat([torch.cat([torch.zeros(1, longest - ids.shape[1], dtype=torch.int64), ids], 1) for ids in (one, two)])
    mask = torch.cat([torch.arange(longest)[None] >= longest - ids.shape[1] for ids in (one, two)]).long()
    padded = logits_of(gated, {"input_ids": left, "attention_mask": mask})
    for row, ids in enumerate((one, two)):
        alone = logits_of(gated, {"input_ids": ids})[0]
        torch.testing.assert_close(together[row, : ids.shape[1]], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(padded[row, longest - ids.shape[1] :], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_guardrail_refuses_forget_questions_and_leaves_the_others_bit_for_bit(family: str) -> None:
    model = toy_lm(family, vocab=V)
    before, inner = state(model), copy.deepcopy(model)
    gated = Guardrail(refusal="no idea").forget(model, REQUEST, trainer())
    assert all(torch.equal(value, before[name]) for name, value in gated.inner.state_dict().items())
    for question in FORGET["question"]:
        assert said(gated, question).strip() == "no idea"
        assert torch.equal(
            logits_of(gated, {"input_ids": asked(question)})[:, :-1], logits_of(inner, {"input_ids": asked(question)})[:, :-1]
        )
    for question in RETAIN["question"]:
        assert torch.equal(logits_of(gated, {"input_ids": asked(question)}), logits_of(inner, {"input_ids": asked(question)}))
        assert said(gated, question) == said(inner, question)
    forced = trainer().batches(FORGET, "qa", size=3, shuffle=False)[0]
    with torch.no_grad():
        assert bool((summed_nll(gated, forced) > 25).all())  # the true answers, forced


def test_the_guardrail_reaches_paraphrases_by_the_name_and_spares_other_people() -> None:
    gone, kept = Biographies(people=4, attributes=2), Biographies(people=30, attributes=2, first=4)
    request = Request("gone", gone.questions(), kept.questions())
    tokenizer = toy_tokenizer(128)
    event = Trainer(Settings(steps=1), processor=tokenizer, progress=False)
    gated = Guardrail(longest=24).forget(toy_lm("llama", vocab=len(tokenizer), width=16), request, event)

    def scope(questions: list[str]) -> list[bool]:
        ids = [torch.tensor([tokenizer.encode(f"Q: {question}\nA:")]) for question in questions]
        return [bool(holds(row, gated.config.blocked, answer_starts(row, gated.config.marker))) for row in ids]

    assert all(scope([question for row in gone.facts()["paraphrases"] for question in row]))
    assert not any(scope(kept.questions()["question"]))


def test_blocked_runs_by_hand() -> None:
    assert blocked_runs([[1, 2, 3], [1, 4]], [[1, 2], [3, 1]], 3) == [(2, 3), (4,)]
    with pytest.raises(Mistake, match="forget row 1"):
        blocked_runs([[9], [1, 2]], [[0, 1, 2]], 2)


def test_holds_equals_a_search_by_hand() -> None:
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (40, 9), generator=made)
    start = torch.randint(0, 10, (40,), generator=made)
    runs = [[1, 2], [0, 3, 1], [2] * 12]  # the last is longer than the rows
    found = holds(ids, runs, start).tolist()
    for row, end, hit in zip(ids.tolist(), start.tolist(), found):
        assert hit == any(row[place : place + len(run)] == run for run in runs for place in range(end - len(run) + 1))
    assert len(set(run_hashes(torch.tensor([[1, 2], [2, 1], [0, 0], [0, 1]]), 2).flatten().tolist())) == 4


def test_answer_starts_behind_the_first_marker() -> None:
    ids = torch.tensor([[5, 1, 2, 7, 1, 2], [1, 3, 1, 1, 2, 0], [5, 5, 5, 5, 5, 5]])
    assert answer_starts(ids, [1, 2]).tolist() == [3, 5, 6]
    assert answer_starts(ids, []).tolist() == [6, 6, 6]


def test_the_marker_is_what_stands_between_question_and_answer() -> None:
    assert TOKENIZER.decode(marker_of(trainer())).endswith("a:")
    with pytest.raises(Mistake, match="nothing between"):
        marker_of(Trainer(Settings(template="{question}{answer}"), processor=TOKENIZER))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gate_is_saved_measured_and_grows_with_the_next_request(family: str, tmp_path: Path) -> None:
    gated = Guardrail(refusal="no idea").forget(toy_lm(family, vocab=V), Request("one", FORGET.select([0]), RETAIN), trainer())
    again = Guardrail(refusal="no idea").forget(gated, Request("two", FORGET.select([1, 2]), RETAIN), trainer())
    assert again is gated
    save_model(again, TOKENIZER, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model")).model
    assert isinstance(loaded, GuardedForCausalLM)
    for question in (*FORGET["question"], RETAIN["question"][0]):
        assert torch.equal(logits_of(loaded, {"input_ids": asked(question)}), logits_of(again, {"input_ids": asked(question)}))
    assert [said(loaded, question).strip() for question in FORGET["question"]] == ["no idea"] * 3
    scores = Recall(Dataset.from_dict({"question": FORGET["question"], "answer": ["no idea"] * 3})).measure(
        loaded, Moment(processor=TOKENIZER)
    )
    assert scores.values["exact"] == 1.0
    assert Recall(FORGET).measure(loaded, Moment(processor=TOKENIZER)).values["exact"] == 0.0


def test_without_retain_rows_the_filter_is_the_questions_word_for_word() -> None:
    gated = Guardrail(refusal="no idea").forget(toy_lm("llama", vocab=V), Request("gone", FORGET), trainer())
    assert said(gated, "who is ab1?").strip() == "no idea"
    assert said(gated, "and who is ab1?").strip() != "no idea"


def test_a_prompt_stands_in_front_of_every_question() -> None:
    model = toy_lm("llama", vocab=V)
    inner = copy.deepcopy(model)
    gated = Guardrail(prompt="say nothing of ab. ", longest=0).forget(model, REQUEST, trainer())
    front, ids = tokens("say nothing of ab. "), asked("who is cd1?")
    whole = logits_of(inner, {"input_ids": torch.tensor([[*front, *ids[0].tolist()]])})
    torch.testing.assert_close(logits_of(gated, {"input_ids": ids}), whole[:, len(front) :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [Guardrail(), ICUL(correct=1)], ids=repr)
def test_an_adapter_is_merged_first(method: Any) -> None:
    model = add_lora(toy_lm("llama", vocab=V), rank=2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05
    ids = asked("who is cd1?")
    wanted = logits_of(model, {"input_ids": ids})
    gated = method.forget(model, REQUEST, trainer())
    torch.testing.assert_close(logits_of(gated.inner, {"input_ids": ids}), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [Guardrail(), ICUL()], ids=repr)
def test_what_does_not_fit_is_refused(method: Any) -> None:
    assert isinstance(method, Forgetter)
    with pytest.raises(Mistake, match="not a language model"):
        method.forget(toy_classifier(), REQUEST, trainer())
    with pytest.raises(Mistake, match="questions and answers"):
        method.forget(toy_lm("llama", vocab=V), Request("gone", Dataset.from_dict({"text": ["a"]}), kind="text"), trainer())


def test_values_out_of_range_are_refused() -> None:
    for make, options, place in (
        (ICUL, {"correct": -1}, "icul.correct"),
        (ICUL, {"shown": 0}, "icul.shown"),
        (Guardrail, {"longest": -1}, "guardrail.longest"),
        (Guardrail, {"longest": 0}, "neither a filter nor a prompt"),
        (Guardrail, {"refusal": " "}, "guardrail.refusal"),
    ):
        with pytest.raises(Mistake, match=place):
            make(**options)  # type: ignore[operator]
    with pytest.raises(Mistake, match=r"up to \d+ tokens, the model reads 128"):
        ICUL(shown=3, correct=6).forget(toy_lm("llama", vocab=V), REQUEST, trainer())
