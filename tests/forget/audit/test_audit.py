"""An audit of small models whose truth is known: the oracle beside itself, the untouched original, a refusing one, and what cannot be measured."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.forget.audit import AuditReport, AuditSettings, audit
from remanence.forget.audit.picture import check_output, write_report
from remanence.forget.audit.quantization import by_bitsandbytes, by_torchao, matrices, plain_copy, round_model
from remanence.models.adapters import add_lora
from remanence.models.load import load_model
from remanence.stream import Request
from remanence.training.trainer import Settings, Trainer
from remanence.training.writing import continuations
from toy import toy_classifier, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)
NAMES = [f"{a}{b}" for a in "abcdefghij" for b in "klmnop"]
WORDS = ["oslo", "rome", "bern", "lima", "kiev", "bonn", "riga", "york"]
QUICK = AuditSettings(relearn_steps=6, relearn_points=(2, 4), new_tokens=8, resamples=200, length=128, prefixes=("quiz: ",), shots=1)
PARTS = ("memory", "quality", "membership", "utility")


def people(first: int, count: int) -> Dataset:
    draws = np.random.default_rng(first)
    told = [WORDS[n] for n in draws.integers(0, len(WORDS), count)]
    return Dataset.from_dict(
        {
            "question": [f"where is {name}?" for name in NAMES[first : first + count]],
            "answer": told,
            "paraphrases": [[f"{name} is where?"] for name in NAMES[first : first + count]],
            "perturbed_answers": [[word for word in WORDS if word != answer][:3] for answer in told],
            "group": [number // 2 for number in range(count)],
        }
    )


FORGET, RETAIN, HOLDOUT = people(0, 16), people(16, 16), people(32, 16)
REQUEST = Request("gone", FORGET, RETAIN, people(16, 6), HOLDOUT)


def both(*parts: Dataset) -> Dataset:
    return Dataset.from_dict({name: [value for part in parts for value in part[name]] for name in ("question", "answer")})


def taught(rows: Dataset, *, steps: int = 150, lr: float = 1e-2, model: nn.Module | None = None) -> nn.Module:
    trainer = Trainer(Settings(steps=steps, batch_size=32, lr=lr, schedule="linear"), processor=TOKENIZER, progress=False)
    return trainer.fit(model or toy_lm("llama", vocab=V), trainer.batches(rows, "qa"), steps=steps)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return taught(both(FORGET, RETAIN))


@pytest.fixture(scope="module")
def oracle() -> nn.Module:
    return taught(RETAIN)


def examine(model: nn.Module, request: Request = REQUEST, settings: AuditSettings = QUICK, **options: Any) -> AuditReport:
    return audit(model, request, processor=options.pop("processor", TOKENIZER), settings=settings, progress=False, **options)


@pytest.fixture(scope="module")
def of_original(original: nn.Module, oracle: nn.Module) -> AuditReport:
    return examine(original, original=original, oracle=oracle)


@pytest.fixture(scope="module")
def of_oracle(original: nn.Module, oracle: nn.Module) -> AuditReport:
    return examine(oracle, original=original, oracle=oracle)


def test_the_oracle_beside_itself_has_forget_quality_one_and_privleak_zero(of_oracle: AuditReport) -> None:
    assert of_oracle["forget_quality"].value == 1
    assert of_oracle["privleak"].value == 0
    assert of_oracle["agreement"].value == 1
    assert of_oracle["kl_to_oracle"].value == 0
    assert of_oracle.verdict == "forgotten"
    assert all(f.value == f.reference for f in of_oracle.findings if f.against == "the oracle")  # attacks included


def test_the_untouched_original_has_a_low_p_and_a_strongly_negative_privleak(of_original: AuditReport) -> None:
    assert of_original["forget_quality"].value < 1e-3
    assert of_original["privleak"].value < -80
    assert of_original["probability"].value > 0.8
    assert of_original["rouge"].value == 1
    assert of_original.verdict == "not forgotten"
    assert all(f.value == f.original for f in of_original.findings if f.original is not None and f.group in ("memory", "membership"))


def test_every_number_states_direction_reference_rows_and_interval(of_original: AuditReport) -> None:
    assert of_original.seed == 0
    assert of_original.rows == {"forget": 16, "retain": 16, "neighbours": 6, "holdout": 16}
    for f in of_original.findings:
        assert f.better in ("higher", "lower", "reference")
        assert f.rows > 0
        assert f.reference is not None
        assert f.against
        assert f.low - 1e-9 <= f.value <= f.high + 1e-9, f
    assert {f.group for f in of_original.findings} == {"memory", "quality", "membership", "robustness", "utility"}
    assert {curve.name for curve in of_original.curves} == {"relearning/shown", "relearning/watched"}
    assert of_original.curves[0].steps == (0, 2, 4, 6)


def test_a_model_that_only_refuses_is_found_out(original: nn.Module, oracle: nn.Module) -> None:
    refusals = Dataset.from_dict({"question": FORGET["question"], "answer": ["no idea"] * len(FORGET)})
    model = taught(both(refusals, RETAIN), steps=30, lr=1e-3, model=copy.deepcopy(original))
    found = examine(model, original=original, oracle=oracle)
    assert found["rouge"].value < 0.2
    assert found["relearning/shown"].value > found["relearning/shown"].reference + 0.1  # type: ignore[operator]
    assert found.verdict == "hidden"


def test_without_an_oracle_forget_quality_is_refused_and_the_holdout_gives_the_reference(original: nn.Module) -> None:
    found = examine(original, original=original)
    with pytest.raises(KeyError, match="there is no oracle, and nothing else can stand for it"):
        found["forget_quality"]
    assert {"agreement", "kl_to_oracle", "auc/reference"} <= set(found.skipped)
    assert found["probability"].against == found["relearning/shown"].against == "the original on the holdout"
    assert found["auc/loss"].against == "chance"
    assert found["privleak"].against == "an AUC of 0.5"
    assert {curve.who for curve in found.curves} == {"the audited model", "the original, on the holdout"}
    assert found.verdict == "not forgotten"


def test_what_the_rows_lack_is_skipped_with_a_reason(original: nn.Module) -> None:
    found = examine(original, Request("bare", both(FORGET)))
    assert "no holdout" in found.skipped["membership"]
    assert "no perturbed_answers" in found.skipped["truth_ratio"]
    assert "no perturbed_answers" in found.skipped["forget_quality"]
    assert "no paraphrases" in found.skipped["paraphrase"]
    assert "neither retain rows nor neighbours" in found.skipped["utility"]
    assert "nothing to be compared with" in found.skipped["relearning reference"]
    assert found["probability"].reference is None
    assert found["probability"].better == "lower"
    assert found.verdict == "not forgotten"
    assert "no attack had a reference: hidden memory cannot be excluded" in found.reasons


def test_parts_can_be_left_out(original: nn.Module) -> None:
    found = examine(original, settings=dataclasses.replace(QUICK, parts=("memory", "utility")), original=original)
    assert {f.group for f in found.findings} == {"memory", "utility", "quality"}  # the NLL is read with the memory
    assert found.skipped["relearning"] == "not asked for"


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_an_audit_leaves_no_trace_and_repeats_itself(original: nn.Module, oracle: nn.Module, of_original: AuditReport) -> None:
    before, noise = state(original), torch.get_rng_state()
    again = examine(original, original=original, oracle=oracle)
    assert again.as_dict() == of_original.as_dict()
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert torch.equal(torch.get_rng_state(), noise)
    assert not original.training
    assert all(weight.grad is None and weight.requires_grad for weight in original.parameters())


def test_a_report_is_plain_json_markdown_and_a_page(of_original: AuditReport, tmp_path: Path) -> None:
    whole = json.loads(json.dumps(of_original.as_dict(), allow_nan=False))
    assert whole["verdict"] == "not forgotten"
    assert {item["name"] for item in whole["findings"]} == {f.name for f in of_original.findings}
    told = of_original.markdown()
    assert told.startswith("# Audit of 'gone': not forgotten")
    assert all(f"| {f.name} |" in told for f in of_original.findings)
    nasty = dataclasses.replace(of_original, request="<script>|$x$")
    page = nasty.html()
    assert "<script>" not in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )  # nothing is fetched; namespaces are names
    for name, start in (("a.json", b"{"), ("a.md", b"# Audit"), ("a.html", b"<section"), ("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        assert write_report(of_original, tmp_path / name).read_bytes().startswith(start)


def test_a_report_that_cannot_be_written_is_refused_before_the_work(of_original: AuditReport, tmp_path: Path) -> None:
    for output, settings, word in (
        (tmp_path / "a.txt", QUICK, "ends in .json"),
        (tmp_path / "no" / "a.md", QUICK, "folder that exists"),
        (tmp_path / "a.png", dataclasses.replace(QUICK, parts=("memory",)), "no curve"),
    ):
        with pytest.raises(Mistake, match=word):
            check_output(output, settings)
    with pytest.raises(Mistake, match="no relearning attack"):
        write_report(dataclasses.replace(of_original, curves=[]), tmp_path / "a.png")


# Refusals.


def test_a_holdout_that_was_trained_on_is_refused(original: nn.Module) -> None:
    for part in ("forget", "retain"):
        with pytest.raises(Mistake, match=f"1 rows of the holdout stand in the {part} set"):
            examine(original, Request("r", FORGET, RETAIN, holdout=(FORGET if part == "forget" else RETAIN).select([3])))


def test_models_that_do_not_fit_are_refused(original: nn.Module) -> None:
    with pytest.raises(Mistake, match="audit, oracle: knows 50 tokens"):
        examine(original, oracle=toy_lm("llama", vocab=50))
    with pytest.raises(Mistake, match="audit, original: is a classifier"):
        examine(original, original=toy_classifier())
    with pytest.raises(Mistake, match="no tokenizer"):
        examine(original, processor=None)
    with pytest.raises(Mistake, match="no column 'person'; did you mean|no column 'person'"):
        examine(original, settings=dataclasses.replace(QUICK, parts=("relearning",), relearn_together="person"))


def test_a_model_that_gives_no_numbers_is_refused(original: nn.Module) -> None:
    broken = copy.deepcopy(original)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(Mistake, match="gives no numbers"):
        examine(broken)


# Families, adapters, precisions, kinds.


def stories() -> tuple[nn.Module, Any]:
    folder = Path(os.environ.get("REMANENCE_DATA", Path(__file__).resolve().parents[4] / "shared" / "data")) / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"the real model stories260k is not at {folder}; set REMANENCE_DATA")
    loaded = load_model(folder)
    return loaded.model, loaded.processor


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "stories260k"])
def test_runs_on_every_family(family: str) -> None:
    model, processor = stories() if family == "stories260k" else (toy_lm(family, vocab=V), TOKENIZER)
    small = Request("few", FORGET.select(range(4)), RETAIN.select(range(4)), None, HOLDOUT.select(range(4)))
    settings = dataclasses.replace(QUICK, relearn_steps=2, relearn_together="group")
    found = examine(model, small, settings, original=model, oracle=model, processor=processor)
    assert found["forget_quality"].value == 1
    assert found["relearning/shown"].rows == 2
    assert {"quantization/int8", "quantization/int4", "paraphrase", "prefix"} <= {f.name for f in found.findings}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_continuations_are_those_of_each_prompt_alone(family: str) -> None:
    model, prompts = toy_lm(family, vocab=V), TOKENIZER([f"q: {'ab' * (n % 3 + 1)}\na:" for n in range(7)])["input_ids"]
    together = continuations(model, prompts, 6, size=2, processor=TOKENIZER)
    for prompt, said in zip(prompts, together):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()
        assert said == (whole[: whole.index(1)] if 1 in whole else whole)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_under_lora_is_attacked_as_its_merged_self(family: str) -> None:
    adapted = add_lora(toy_lm(family, vocab=V), rank=2)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.05
    before = state(adapted)
    merged = plain_copy(adapted)
    small = Request("few", FORGET.select(range(4)), RETAIN.select(range(4)), None, HOLDOUT.select(range(4)))
    settings = dataclasses.replace(QUICK, relearn_steps=2)
    found, plain = (examine(model, small, settings, oracle=merged) for model in (adapted, merged))
    for name in ("probability", "quantization/int4", "auc/min_k"):
        assert found[name].value == pytest.approx(plain[name].value, abs=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_a_row_that_is_longer_than_the_models_positions_is_refused() -> None:
    long = Dataset.from_dict({"question": ["why " * 40], "answer": ["so"]})
    with pytest.raises(Mistake, match="the longest allowed is 128"):
        examine(toy_lm("gpt2", vocab=V), Request("long", long), dataclasses.replace(QUICK, length=1000))


def test_rounding_spares_embeddings_and_head() -> None:
    for family in ("llama", "gpt2", "qwen2"):
        model = toy_lm(family, vocab=V)
        before = state(model)
        round_model(model, 4, 0)
        after = model.state_dict()
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == {f"{name}.weight" for name, _ in matrices(model)}
        assert not any("embed" in name or "wte" in name or "lm_head" in name for name in moved)


@pytest.mark.parametrize(("library", "rounder"), [("torchao", by_torchao), ("bitsandbytes", by_bitsandbytes)])
def test_a_library_of_quantization_is_tried_where_it_is(library: str, rounder: Any) -> None:
    model = toy_lm("llama", vocab=V, width=64)
    if importlib.util.find_spec(library) is None:
        found = examine(model, Request("few", both(FORGET.select(range(4)))), dataclasses.replace(QUICK, parts=("quantization",)))
        assert any(f"{library} is not installed" in why for why in found.skipped.values())
        return
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        moved = (rounder(copy.deepcopy(model))(input_ids=ids).logits - model(input_ids=ids).logits).abs()
    assert 0 < moved.max() < 2


def test_bf16_weights_can_be_audited() -> None:
    model = toy_lm("llama", vocab=V, dtype=torch.bfloat16)
    found = examine(model, Request("few", FORGET.select(range(4)), RETAIN.select(range(4))), dataclasses.replace(QUICK, relearn_steps=2))
    assert next(model.parameters()).dtype == torch.bfloat16
    shown = next(curve for curve in found.curves if curve.name == "relearning/shown")
    assert shown.values[-1] > shown.values[0]


def test_texts_are_continued_from_their_first_tokens() -> None:
    texts = Dataset.from_dict({"text": [f"{name} lives in {word} by the sea" for name, word in zip(NAMES, WORDS)]})
    other = Dataset.from_dict({"text": [f"{name} works in {word} for a baker" for name, word in zip(NAMES, WORDS)]})
    trainer = Trainer(Settings(steps=120, batch_size=8, lr=1e-2, length=32), processor=TOKENIZER, progress=False)
    model = trainer.fit(toy_lm("llama", vocab=V), trainer.batches(texts, "text"))
    settings = dataclasses.replace(QUICK, length=32, relearn_steps=2, prompt_tokens=8, new_tokens=40)
    found = examine(model, Request("lines", texts, None, None, other, kind="text"), settings, original=model)
    assert found["verbmem"].value > 0.4
    assert found["privleak"].value < -60
    assert "of kind text" in found.skipped["prefix"]
    assert "of kind text" in found.skipped["truth_ratio"]


def test_chats_are_audited_on_the_assistants_turns() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    rows = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": n}, {"role": "assistant", "content": w}] for n, w in zip(NAMES, WORDS)]}
    )
    found = examine(
        toy_lm("llama", vocab=V), Request("chat", rows, kind="chat"), dataclasses.replace(QUICK, relearn_steps=2), processor=tokenizer
    )
    assert {"verbmem", "probability", "relearning/shown"} <= {f.name for f in found.findings}


# Classifiers.


def pictures(labels: list[int], count: int, seed: int) -> Dataset:
    draws = np.random.default_rng(seed)
    label = draws.choice(labels, count)
    return Dataset.from_dict({"features": (draws.normal(size=(count, 8)) + 2 * np.eye(8)[label]).tolist(), "label": label.tolist()})


def test_a_classifier_gets_the_part_that_fits_it() -> None:
    forget, retain = pictures([3], 30, 0), pictures([0, 1, 2], 60, 1)
    request = Request("threes", forget, retain, None, pictures([3], 30, 2), kind="classes")

    def learned(rows: Dataset) -> nn.Module:
        trainer = Trainer(Settings(steps=80, batch_size=32, lr=1e-2), progress=False)
        return trainer.fit(toy_classifier(), trainer.batches(rows, "classes"))

    everything = Dataset.from_dict({name: [*forget[name], *retain[name]] for name in ("features", "label")})
    original, oracle = learned(everything), learned(retain)
    settings = AuditSettings(relearn_steps=4, resamples=200)
    untouched = audit(original, request, processor=None, original=original, oracle=oracle, settings=settings, progress=False)
    assert untouched.verdict == "not forgotten"
    assert untouched["accuracy"].value > 0.9
    assert untouched["agreement"].value < 0.2
    itself = audit(oracle, request, processor=None, original=original, oracle=oracle, settings=settings, progress=False)
    assert itself.verdict == "forgotten"
    assert (itself["kl_to_oracle"].value, itself["agreement"].value, itself["privleak"].value) == (0, 1, 0)
    names = {f.name for f in untouched.findings}
    assert {"auc/loss", "auc/entropy", "auc/reference", "quantization/int4", "relearning/shown", "retain/accuracy", "utility"} <= names
    assert {"truth_ratio", "forget_quality", "paraphrase", "prefix"} <= set(untouched.skipped)
    json.dumps(untouched.as_dict(), allow_nan=False)
