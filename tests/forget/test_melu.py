"""MELU: any pairwise loss meets any strategy, its values are those of the papers, and the note says what was met how often."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from remanence.catalogue import build
from remanence.errors import Mistake
from remanence.forget.dpo import DPO
from remanence.forget.gradient_ascent import GradientAscent
from remanence.forget.gradient_difference import GradientDifference
from remanence.forget.kl import AscentKL
from remanence.forget.melu import MELU
from remanence.forget.npo import NPO
from remanence.models.adapters import add_lora
from remanence.stream import Request
from remanence.training.batches import IGNORED, Batch
from remanence.training.losses import nll
from remanence.training.pairing import STRATEGIES, PairedBatches
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
FORGET = Dataset.from_dict(
    {
        "title": ["a", "a", "b", "b", "b", "c"],
        "question": [f"who is {'ab' * n}" for n in range(1, 7)],
        "answer": ["x", "xy", "z", "xyz", "y", "zz"],
        "idk": ["no idea", "i do not know", "", "no", "ask", "who"],
    }
)
RETAIN = Dataset.from_dict(
    {
        "title": ["a", "a", "a", "b", "b", "b", "b", "c", "c", "u", "v"],
        "type": ["entity", "domain", "domain", "entity", "domain", "domain", "domain", "entity", "domain", "general", "general"],
        "question": [f"what is {n}" for n in range(11)],
        "answer": [f"{n * 7}" for n in range(11)],
    }
)
REQUEST = Request("gone", FORGET, RETAIN)
LOSSES = {"gradient-difference": GradientDifference, "kl": AscentKL, "npo": NPO, "npo-kl": lambda: NPO(retain="kl"), "dpo": DPO}


class Spy(Trainer):
    """Catches what a method would fit."""

    caught: tuple[Any, Any]

    def fit(self, model: nn.Module, batches: Any, loss: Any = nll, **_: Any) -> nn.Module:
        self.caught = (batches, loss)
        return model


class Bigram(nn.Module):
    """A model whose next-token logits depend on the last token alone: small enough to work out by hand."""

    def __init__(self, seed: int):
        super().__init__()
        noise = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(len(TOKENIZER), len(TOKENIZER), generator=noise, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def trainer(steps: int = 3, **options: Any) -> Trainer:
    chosen = {"steps": steps, "batch_size": 4, "lr": 1e-3} | options.pop("settings", {})
    return Trainer(Settings(**chosen), processor=TOKENIZER, seed=6, progress=False, **options)


def noted(method: MELU, steps: int | None = 3, request: Request = REQUEST, **settings: Any) -> dict[str, Any]:
    """Run a method and return its note."""
    found: list[dict[str, Any]] = []
    event = trainer(record=lambda table, rows: found.extend(rows) if table == "notes" else None, settings={"steps": steps} | settings)
    method.forget(toy_lm("llama", vocab=len(TOKENIZER)), request, event)
    return next(row["content"] for row in found if row["name"] == "pairs")


# Faithful means 6 and 7.


def two_token_example(inner: Any) -> tuple[dict[str, float], float, float]:
    """One forget and one retain row of one letter and the end token: summed NLLs by hand, now (x) and at the reference (x0), and the loss at both."""
    forget = Dataset.from_dict({"title": ["a"], "question": ["who"], "answer": ["x"], "idk": ["n"]})
    retain = Dataset.from_dict({"title": ["a"], "type": ["entity"], "question": ["what"], "answer": ["7"]})
    before, now = Bigram(0), Bigram(1)
    spy = Spy(Settings(batch_size=1, template="{question}:{answer}"), processor=TOKENIZER)
    MELU(inner).forget(before, Request("r", forget, retain), spy)
    batches, loss = spy.caught
    colon, end = (TOKENIZER.convert_tokens_to_ids(token) for token in (":", "<eos>"))

    def s(model: Bigram, letter: str) -> float:
        token, logp = TOKENIZER.convert_tokens_to_ids(letter), model.table.log_softmax(1)
        return -(logp[colon, token] + logp[token, end]).item()

    values = {f"{letter}{mark}": s(model, letter) for letter in ("x", "n", "7") for mark, model in (("", now), ("0", before))}
    return values, loss(now, batches[0]).item(), loss(before, batches[0]).item()


def test_gradient_difference_is_the_hand_value_on_two_tokens() -> None:
    s, now, _ = two_token_example(GradientDifference())
    assert now == pytest.approx((s["7"] - s["x"]) / 2, rel=1e-12)


def test_npo_is_the_hand_value_and_at_the_reference_2_over_beta_log_2() -> None:
    s, now, start = two_token_example(NPO(beta=0.1))
    assert now == pytest.approx(2 / 0.1 * math.log1p(math.exp(-0.1 * (s["x"] - s["x0"]))) + s["7"] / 2, rel=1e-12)
    assert start == pytest.approx(2 / 0.1 * math.log(2) + s["70"] / 2, rel=1e-12)


def test_idk_dpo_is_the_hand_value_and_at_the_reference_log_2() -> None:
    s, now, start = two_token_example(DPO(beta=0.1))
    margin = (s["n0"] - s["n"]) - (s["x0"] - s["x"])
    assert now == pytest.approx(math.log1p(math.exp(-0.1 * margin)) + s["7"] / 2, rel=1e-12)
    assert start == pytest.approx(math.log(2) + s["70"] / 2, rel=1e-12)


@pytest.mark.parametrize("inner", [GradientDifference(), NPO(), DPO()], ids=["graddiff", "npo", "dpo"])
def test_paired_losses_read_no_prompt_or_pad_targets_and_one_end_token(inner: Any) -> None:
    model = toy_lm("gpt2", vocab=len(TOKENIZER), dtype=torch.float64)
    spy = Spy(Settings(batch_size=4), processor=TOKENIZER)
    MELU(inner).forget(model, REQUEST, spy)
    batches, loss = spy.caught
    batch = batches[0]
    for side in ("forget", "retain"):
        for name in ("labels", "won_labels"):
            for labels in batch[side].get(name, []):
                said = labels[labels != IGNORED].tolist()
                assert said.count(TOKENIZER.eos_token_id) == 1
                assert said[-1] == TOKENIZER.eos_token_id
                assert TOKENIZER.pad_token_id not in said

    def longer(rows: Batch) -> Batch:
        wider = {
            name: nn.functional.pad(rows[name], (0, 3), value=IGNORED if name.endswith("labels") else 7)
            for name in rows
            if rows[name].dim() > 1
        }
        return Batch(rows | wider)

    wider = Batch({side: longer(batch[side]) for side in batch})
    assert loss(model, wider).item() == pytest.approx(loss(model, batch).item(), rel=1e-12)


# Faithful means 9.


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", LOSSES)
def test_any_pairwise_loss_runs_with_any_strategy_and_reports_exposures(name: str, strategy: str) -> None:
    rows = Request("gone", FORGET, RETAIN.select([0, 1, 3, 4, 7, 8, 9])) if strategy == "balanced" else REQUEST
    note = noted(MELU(LOSSES[name](), strategy), 3, rows)
    assert note["strategy"] == strategy
    assert note["updates"] == 3
    assert note["pairs"] == note["forget"]["exposures"] == note["retain"]["exposures"] == 12
    assert sum(own["forget"] for own in note["entities"].values()) == 12
    assert sum(kind["exposures"] for kind in note["types"].values()) == 12


def test_an_epoch_of_each_strategy_is_a_pass_over_its_pairs() -> None:
    updates = {
        strategy: noted(MELU(NPO(), strategy), None, epochs=2, batch_size=2)["updates"] for strategy in ("one_to_one_seq", "cyclic", "melu")
    }
    assert updates == {"one_to_one_seq": 2 * 3, "cyclic": 2 * 6, "melu": 2 * 6}
    once = noted(MELU(NPO()), None, epochs=1, batch_size=11)
    assert once["retain"] | {"exposures": 0} == {"rows": 11, "exposures": 0, "never": 0, "least": 1, "most": 1}
    assert {name: (own["entity"], own["domain"]) for name, own in once["entities"].items()} == {"a": (1, 2), "b": (1, 3), "c": (1, 1)}


def test_the_note_counts_accumulated_batches_and_resumed_steps(tmp_path: Path) -> None:
    from remanence.training.checkpoint import Checkpoints

    assert noted(MELU(), 3, batch_size=2, accumulate=2)["pairs"] == 12
    found: list[dict[str, Any]] = []

    def go(dies: int | None) -> None:
        def watch(model: nn.Module, step: int) -> None:
            if step == dies:
                raise KeyboardInterrupt

        points = Checkpoints(tmp_path / "points", every=2)
        method = MELU()
        event = trainer(
            6, owner=method, checkpoints=points, watch=watch, record=lambda table, rows: found.extend(rows) if table == "notes" else None
        )
        method.forget(toy_lm("llama", vocab=len(TOKENIZER)), REQUEST, event)

    with pytest.raises(KeyboardInterrupt):
        go(5)
    go(None)
    assert found[0]["content"]["updates"] == 6
    assert found[0]["content"]["pairs"] == 24


def test_the_pairs_are_those_of_the_strategy_and_the_rows_those_of_the_sets() -> None:
    spy = Spy(Settings(batch_size=4), processor=TOKENIZER, seed=3)
    MELU(DPO(), order="by_entity").forget(toy_lm("gpt2", vocab=len(TOKENIZER)), REQUEST, spy)
    batches: PairedBatches = spy.caught[0]
    plain, kept = spy.encode(FORGET, "qa")["input_ids"], spy.encode(RETAIN, "qa")["input_ids"]
    for index in range(3):
        batch, rows = batches[index], batches.numbers(index)
        for place, (forget, retain) in enumerate(rows):
            assert batch["forget"]["input_ids"][place][: len(plain[forget])].tolist() == plain[forget]
            assert batch["retain"]["input_ids"][place][: len(kept[retain])].tolist() == kept[retain]
            assert RETAIN["type"][int(retain)] == "general" or FORGET["title"][int(forget)] == RETAIN["title"][int(retain)]


def test_the_order_of_rows_outside_is_left_as_it_was() -> None:
    event = trainer()
    MELU().forget(toy_lm("llama", vocab=len(TOKENIZER)), REQUEST, event)
    forget, retain = (event.batches(rows, "qa", stream=name) for rows, name in ((FORGET, "forget"), (RETAIN, "retain")))
    assert torch.equal(event.pairs(forget, retain)[0]["forget"]["input_ids"], forget[0]["input_ids"])


def test_melu_under_lora_moves_the_adapter_alone() -> None:
    model = add_lora(toy_lm("llama", vocab=len(TOKENIZER)), rank=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    MELU(DPO()).forget(model, REQUEST, trainer())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_melu_runs_on_a_real_pretrained_model(real_data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(real_data / "stories260k") for kind in (AutoModelForCausalLM, AutoTokenizer))
    event = Trainer(Settings(steps=2, batch_size=2, lr=1e-4, length=64, precision="bf16"), processor=tokenizer, progress=False)
    MELU(DPO()).forget(model, REQUEST, event)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_the_state_of_the_inner_forgetter_is_kept() -> None:
    class Counting(NPO):
        count = 4

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            object.__setattr__(self, "count", state["count"])

    inner = Counting()
    assert MELU(inner).state_dict() == {"count": 4}
    MELU(inner).load_state_dict({"count": 9})
    assert inner.count == 9
    assert MELU().state_dict() == {}


def test_a_recipe_names_the_inner_forgetter() -> None:
    method = build({"method": "melu", "strategy": "cyclic", "inner": {"method": "dpo", "beta": 0.2}}, "forget", "forget")
    assert method == MELU(DPO(beta=0.2), "cyclic")
    with pytest.raises(Mistake, match="did you mean 'one_to_one_seq'"):
        build({"method": "melu", "strategy": "one_to_one_sq"}, "forget", "forget")


# Refusals.


def test_inner_forgetters_without_pairs_or_retain_rows_are_refused() -> None:
    for inner, words in ((GradientAscent(), "GradientAscent takes no pairs"), (NPO(retain="none"), "NPO has no retain term here")):
        with pytest.raises(Mistake, match=words):
            MELU(inner).forget(toy_lm("llama", vocab=len(TOKENIZER)), REQUEST, trainer())
    with pytest.raises(Mistake, match="has no retain set, and MELU needs one"):
        MELU().forget(toy_lm("llama", vocab=len(TOKENIZER)), Request("r", FORGET), trainer())


def test_held_out_rows_that_are_retained_are_refused() -> None:
    request = Request("gone", FORGET, RETAIN, holdout=RETAIN.select([10]).select_columns(["question", "answer"]))
    with pytest.raises(Mistake, match="1 questions of the holdout set stand in the retain set too"):
        MELU().forget(toy_lm("llama", vocab=len(TOKENIZER)), request, trainer())


def test_a_question_with_two_answers_on_both_sides_is_refused() -> None:
    retain = RETAIN.remove_columns("question").add_column("question", ["who is ab", *RETAIN["question"][1:]])
    with pytest.raises(Mistake, match="1 questions of the forget set stand in the retain set too"):
        MELU().forget(toy_lm("llama", vocab=len(TOKENIZER)), Request("gone", FORGET, retain), trainer())


def test_texts_have_no_entities() -> None:
    rows = [Dataset.from_dict({"text": [word * 40]}) for word in ("ab ", "cd ")]
    request = Request("t", *rows, kind="text")
    with pytest.raises(Mistake, match="texts are cut into blocks"):
        MELU().forget(toy_lm("llama", vocab=len(TOKENIZER)), request, trainer())
    note = noted(MELU(strategy="cyclic"), 2, request, length=16)
    assert note["retain"]["exposures"] == 8
    assert np.isclose(note["retain"]["rows"], 120 / 16, atol=1)
