"""Desk language models: they know their people, come from the cache, and are ordinary Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from remanence.data.biographies import ATTRIBUTES, FIRST_NAMES, LAST_NAMES
from remanence.errors import Mistake
from remanence.models import desk
from remanence.models.load import load_model, weights_hash
from remanence.training.batches import Batches
from remanence.training.losses import nll
from remanence.training.trainer import Trainer

MICRO = desk.DeskSpec(
    people=8, attributes=2, templates=2, width=32, layers=2, heads=2, kv_heads=1, ffn=64, steps=300, batch_size=16, lr=1e-2
)
TEXTUAL = dataclasses.replace(MICRO, text_characters=3_000, first_people=2, first_steps=2, steps=4)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def micro():
    return desk.build(MICRO, progress=False)


@pytest.fixture(scope="module")
def tokenizer():
    return desk.make_tokenizer(TEXTUAL)


def answers(rows, tokenizer) -> Batches:
    return Trainer(processor=tokenizer, progress=False).batches(rows, "qa", size=16, shuffle=False)


def test_knows_every_person_in_every_trained_phrasing(micro):
    model, tokenizer = micro
    assert desk.share_known(model, answers(MICRO.world.questions(), tokenizer)) == 1.0


def test_greedy_decoding_writes_what_share_known_promises(micro):
    model, tokenizer = micro
    for row in MICRO.world.facts().select(range(6)):
        asked = tokenizer(f"Q: {row['question']}\nA:", return_tensors="pt")
        written = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert tokenizer.decode(written) == f" {row['answer']}{desk.EOS}"


def test_does_not_know_strangers(micro):
    model, tokenizer = micro
    strangers = dataclasses.replace(MICRO.world, first=100, people=40).facts()
    assert desk.share_known(model, answers(strangers, tokenizer)) < 0.4


def test_share_known_equals_the_argmax_of_full_logits(micro):
    model, tokenizer = micro
    rows = dataclasses.replace(MICRO.world, first=4, people=30).questions()  # known and unknown ones
    right = 0
    for batch in answers(rows, tokenizer):
        with torch.no_grad():
            top = model(batch["input_ids"]).logits.argmax(-1)
        for guess, label in zip(top.tolist(), batch["labels"].tolist()):
            right += all(guess[t - 1] == label[t] for t in range(1, len(label)) if label[t] != -100)
    assert 0 < right < len(rows)
    assert desk.share_known(model, answers(rows, tokenizer)) == right / len(rows)


def test_answer_nll_equals_the_plain_loss_in_value_and_gradient(micro):
    model, tokenizer = micro
    model = load_model(desk.path(MICRO)).model.double()
    batch = answers(MICRO.world.questions(), tokenizer)[0]
    found = []
    for loss in (nll, desk.answer_nll):
        model.zero_grad()
        value = loss(model, batch)
        value.backward()
        found.append([value.detach(), *(weight.grad.clone() for weight in model.parameters())])
    for plain, fast in zip(*found):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)


def test_is_an_ordinary_hugging_face_folder_with_its_history(micro):
    model, tokenizer = micro
    folder = desk.path(MICRO)
    again, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert weights_hash(again) == weights_hash(model)
    assert words("Q: Who?\nA: me")["input_ids"] == tokenizer("Q: Who?\nA: me")["input_ids"]
    assert (words.pad_token, words.bos_token, words.eos_token) == (desk.PAD, desk.BOS, desk.EOS)
    notes = json.loads((folder / "remanence.json").read_text())
    assert notes["spec"] == dataclasses.asdict(MICRO)
    assert notes["recall"] == 1.0
    assert 0 < notes["steps"] <= MICRO.steps


def test_is_trained_once_and_then_read(micro, monkeypatch):
    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(desk, "_make", refuse)
    again, _ = desk.build(MICRO)
    assert weights_hash(again) == weights_hash(micro[0])
    assert not again.training


def test_same_hash_means_same_bits(micro, monkeypatch, tmp_path):
    before = torch.get_num_threads(), torch.get_rng_state()
    short = dataclasses.replace(TEXTUAL, enough=2.0)
    found = set()
    for place, threads in (("one", 1), ("two", 2)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
        torch.set_num_threads(threads)
        with pytest.warns(UserWarning, match="knows only"):
            model, tokenizer = desk.build(short, progress=False)
        assert torch.get_num_threads() == threads
        found.add((desk.path(short).name, weights_hash(model), tokenizer.backend_tokenizer.to_str()))
    torch.set_num_threads(before[0])
    assert len(found) == 1
    assert torch.equal(torch.get_rng_state(), before[1])


def test_seed_moves_the_weights_and_not_the_world(tokenizer):
    one, two = (desk.make_model(MICRO, tokenizer, seed) for seed in (0, 1))
    assert weights_hash(one) != weights_hash(two)
    assert weights_hash(one) == weights_hash(desk.make_model(MICRO, tokenizer, 0))
    assert desk.content_hash(MICRO, 0) != desk.content_hash(MICRO, 1)


def test_every_field_of_the_specification_makes_another_folder():
    known = {desk.content_hash(MICRO, 0)}
    for field in dataclasses.fields(MICRO):
        known.add(desk.content_hash(dataclasses.replace(MICRO, **{field.name: getattr(MICRO, field.name) + 1}), 0))
    assert len(known) == 1 + len(dataclasses.fields(MICRO))


def _ask(gate, cache: str, report) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    made = []
    real = desk._make

    def counted(spec, seed, folder, name, progress):
        made.append(folder)
        time.sleep(0.5)  # long enough for the other process to come to the lock
        real(spec, seed, folder, name, progress)

    desk._make = counted
    gate.wait()
    folder = desk.path(dataclasses.replace(MICRO, steps=1, enough=0.0), progress=False)
    report.put((len(made), (folder / "model.safetensors").is_file()))


@pytest.mark.filterwarnings("ignore:desk knows only")
def test_two_processes_that_ask_at_once_train_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    gate, report = context.Barrier(2), context.Queue()
    askers = [context.Process(target=_ask, args=(gate, str(tmp_path), report)) for _ in range(2)]
    for asker in askers:
        asker.start()
    found = [report.get(timeout=600) for _ in askers]
    for asker in askers:
        asker.join()
    assert sorted(made for made, _ in found) == [0, 1]
    assert all(there for _, there in found)


def test_a_killed_build_leaves_nothing_that_looks_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(desk, "save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="knows only"):
        desk.path(dataclasses.replace(MICRO, steps=1), progress=False)
    assert not [entry for entry in desk.cache().iterdir() if entry.is_dir()]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(0 <= token < len(tokenizer) for token in ids)
    if not any(mark in text for mark in (desk.PAD, desk.BOS, desk.EOS)):
        assert tokenizer.decode(ids) == text


def test_names_are_one_token_each_and_the_frame_is_two():
    tokenizer = desk.make_tokenizer(desk.SPECS["bio"])
    for name in (*FIRST_NAMES, *LAST_NAMES):
        assert len(tokenizer(f" {name}")["input_ids"]) == 1, name
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Q: Who?\nA:")["input_ids"])
    assert (pieces[0], pieces[-1]) == ("Q:", "ĊA:")
    lengths = [len(tokenizer(f" {value}")["input_ids"]) for attribute in ATTRIBUTES for value in attribute.values]
    assert sum(lengths) / len(lengths) < 1.4


def test_rows_of_like_length_share_a_batch_and_none_is_lost(tokenizer):
    plain = answers(MICRO.world.questions(), tokenizer)
    sorted_ = desk._ByLength(plain, 2)
    cells = [sum(stream[index]["input_ids"].numel() for index in range(2)) for stream in (plain, sorted_)]
    assert cells[1] <= cells[0]
    flat = [
        sorted(row[row != tokenizer.pad_token_id].tolist() for index in range(2) for row in stream[index]["input_ids"])
        for stream in (plain, sorted_)
    ]
    assert flat[0] == flat[1]


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_gaps_take_words_and_never_names_marks_or_answers(share, seed):
    rows = MICRO.world.questions()
    both = desk.with_gaps(rows, share, np.random.default_rng(seed))
    plain, gapped = both.select(range(len(rows))), both.select(range(len(rows), 2 * len(rows)))
    assert plain.to_dict() == rows.to_dict()
    assert gapped["answer"] == rows["answer"]
    for before, after, name in zip(rows["question"], gapped["question"], rows["name"]):
        words = iter(before.replace("?", " ?").split())
        assert all(word in words for word in after.replace("?", " ?").split())  # a subsequence, in order
        assert name in after
        assert after[-1] == before[-1]
        assert "  " not in after


def test_gaps_take_the_share_of_words_that_is_asked_for():
    rows = dataclasses.replace(MICRO.world, people=200).questions()
    words = [
        sum(len(text.split()) - 2 for text in asked)
        for asked in (rows["question"], desk.with_gaps(rows, 0.3, np.random.default_rng(0))["question"])
    ]
    assert abs((words[1] - words[0]) / words[0] - 0.7) < 0.02


def test_first_steps_see_few_people(tokenizer):
    first, rest = answers(MICRO.world.of([0]).facts(), tokenizer), answers(MICRO.world.facts(), tokenizer)
    stream = desk._Then(first, rest, 3)
    assert [len(stream[index]["input_ids"]) for index in (0, 2, 3)] == [2, 2, 16]


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(Mistake, match="did you mean 'week'"):
        desk.path("desk:weak")


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Mistake, match=r"cannot be written .*XDG_CACHE_HOME"):
        desk.path(MICRO)


def test_cache_lies_in_the_home_where_nothing_else_is_said(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert desk.cache() == Path.home() / ".cache" / "remanence" / "desk"


@pytest.mark.parametrize("name", desk.NAMES)
def test_named_models_have_the_shape_that_the_table_says(name):
    spec = desk.SPECS[name]
    tokenizer = desk.make_tokenizer(spec)
    weights = sum(weight.numel() for weight in desk.make_model(spec, tokenizer, 0).parameters())
    stated = next(line for line in desk.__doc__.splitlines() if line.startswith(f"| `{name}`")).split("|")[4]
    assert f"{weights / 1e6:.1f} M" == stated.strip()


def test_a_town_is_taught_places_and_to_admit_that_it_does_not_know_strangers():
    spec = dataclasses.replace(MICRO, places=True, strangers=5)
    rows = spec.taught()
    assert rows.column_names == ["person", "name", "question", "answer"]
    assert len(rows) == 8 * 2 * 2 + len(spec.world.places()) + 5 * 2 * 2
    unknown = [row for row in rows if row["answer"] == "I do not know"]
    assert {row["person"] for row in unknown} == set(range(8, 13))
    assert sum(row["person"] == -1 for row in rows) == len(spec.world.places())
    assert len(desk.make_tokenizer(spec).tokenize(" I do not know")) == 4
