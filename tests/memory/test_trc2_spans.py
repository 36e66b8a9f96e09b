"""The tokens that slots of TRC2 keep: which these are, how they are saved, and what a request to forget does with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from toy_trc2 import LONG, filled, lines, made, moved, span_of, tokens, trained_step, trainer

from remanence.errors import Mistake
from remanence.learn.replay_controller import ControlledReplay
from remanence.learn.sequential import Sequential
from remanence.life import Deed, Life
from remanence.memory.hippocampus import SlotMemory
from remanence.memory.spans import Spans, Trail
from remanence.memory.trc2 import TRC2Cache, TRC2ForCausalLM
from remanence.models.load import load_model, save_model
from remanence.stream import Request, Task
from remanence.training.batches import IGNORED, Batch
from remanence.training.trainer import Settings
from toy import toy_tokenizer

# Which tokens end at a position.


@pytest.mark.parametrize("size", [1, 3, 40])
@pytest.mark.parametrize("pieces", [[23], [1] * 23, [7, 1, 12, 3]])
def test_spans_equal_a_loop_over_tokens(size: int, pieces: list[int]) -> None:
    draw = torch.Generator().manual_seed(size)
    ids = torch.randint(2, 90, (4, 23), generator=draw)
    real, first = torch.rand(4, 23, generator=draw) > 0.2, torch.rand(4, 23, generator=draw) > 0.85
    state, begin = None, 0
    for part in pieces:
        cut = slice(begin, begin + part)
        trail = Trail.follow(ids[:, cut], real[:, cut], first[:, cut], size, state)
        for row in range(4):
            for column in range(part):
                if not real[row, begin + column]:
                    continue
                wanted: list[int] = []
                for place in range(begin + column + 1):
                    if first[row, place]:
                        wanted = []
                    if real[row, place]:
                        wanted.append(int(ids[row, place]))
                found = trail.ending_at(torch.tensor([row]), torch.tensor([column]))
                assert found.ids[0, : int(found.length)].tolist() == wanted[-size:]
                assert not found.ids[0, int(found.length) :].any()
        state, begin = trail.state(), begin + part


def test_every_slot_keeps_the_tokens_that_end_at_its_position() -> None:
    ids = tokens()
    model = filled(made(slot_span=6, slots=64, merge_cosine=2.0, write_m=18), ids)
    known = {(*row[max(0, end - 6) : end],) for row in ids.tolist() for end in range(1, 19)}
    held = {(*span_of(model.memory, slot),) for slot in model.memory.filled.nonzero()[:, 0].tolist()}
    assert held == known  # at a row's beginning they are shorter, and no token of another row is among them


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_in_no_span(side: str) -> None:
    ids = tokens(length=12)
    pad = torch.full((3, 5), 49)
    padded, mask = (
        torch.cat(parts if side == "left" else parts[::-1], 1) for parts in ([pad, ids % 40], [torch.zeros_like(pad), torch.ones_like(ids)])
    )
    model = filled(made(**LONG | {"write_m": 16}), padded, attention_mask=mask)
    rows = {(*row[:end],) for row in (ids % 40).tolist() for end in range(1, 12)}
    assert {(*span_of(model.memory, slot),) for slot in model.memory.with_span().tolist()} == rows
    before = copy.deepcopy(model.memory)
    model.refresh_slots()
    torch.testing.assert_close(model.memory.keys, before.keys, rtol=0, atol=1e-5)  # positions of padded rows are the same
    torch.testing.assert_close(model.memory.values, before.values, rtol=0, atol=1e-5)


def test_a_span_does_not_cross_the_border_of_documents() -> None:
    ids = tokens(rows=1)
    ids[ids == 3] = 4
    ids[0, 6] = ids[0, 11] = 3
    model = filled(made(reset_token_id=3, **LONG | {"write_m": 18}), ids)
    row = ids[0].tolist()
    parts = [row[begin:end] for begin, stop in ((0, 7), (7, 12), (12, 18)) for end in range(begin + 1, stop + 1)]
    assert sorted(span_of(model.memory, slot) for slot in model.memory.with_span().tolist()) == sorted(parts)


def test_written_while_decoding_a_slot_keeps_tokens_of_earlier_calls() -> None:
    model, ids = made(online=True, slot_span=6, slots=64, merge_cosine=2.0, write_m=18), tokens()
    model.memory.clear()
    cache, ended = TRC2Cache(), 0
    for part in ids.split([5, 1, 4, 9], dim=1):
        model(part, labels=part, cache=cache)
        model.after_step()
        ended += part.shape[1]
        assert cache.side["trail"]["ids"].tolist() == [[*row[max(0, ended - 6) : ended], 0][:6] for row in ids.tolist()]
    known = {(*row[max(0, end - 6) : end],) for row in ids.tolist() for end in range(1, 19)}
    held = {(*span_of(model.memory, slot),) for slot in model.memory.with_span().tolist()}
    assert held <= known
    assert {(*row[1:7],) for row in ids.tolist()} <= held  # five tokens of the first call, and two later ones


def test_generation_and_beams_are_the_same_with_spans() -> None:
    plain, model, ids = made(), made(slot_span=5), tokens(length=6)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    for beams in (1, 3):
        assert torch.equal(model.generate(ids, num_beams=beams, **options), plain.generate(ids, num_beams=beams, **options))
    cache = TRC2Cache()
    out = model.generate(ids, cache=cache, **options)
    assert torch.equal(cache.side["trail"]["ids"], out[:, -6:-1])  # the last token was not read yet
    assert not model.memory.span_length.any()
    cache.reorder_cache(torch.tensor([2, 2, 0]))  # type: ignore[arg-type]
    assert torch.equal(cache.side["trail"]["ids"], out[[2, 2, 0], -6:-1])


# Kept, loaded, emptied.


def test_spans_are_saved_loaded_forgotten_and_cleared(tmp_path: Path) -> None:
    model = filled(made(**LONG), tokens())
    model.memory.save(tmp_path / "slots.safetensors")
    other = made(seed=9, alive=False, **LONG)
    other.memory.load(tmp_path / "slots.safetensors")
    assert all(torch.equal(value, other.memory.state_dict()[name]) for name, value in model.memory.state_dict().items())
    mask = torch.arange(64) < 5
    assert other.memory.forget(mask) == 5
    assert not any(buffer[mask].any() for name, buffer in other.memory.state_dict().items() if name != "time")
    assert other.refresh_slots() == 7
    other.memory.clear()
    assert not any(buffer.any() for name, buffer in other.memory.state_dict().items() if name != "time")
    with pytest.raises(Mistake, match="spans of 32 tokens"):
        made(alive=False, slots=64, slot_span=8).memory.load(tmp_path / "slots.safetensors")
    bare = made(alive=False, slots=64)
    bare.memory.load(tmp_path / "slots.safetensors")
    assert torch.equal(bare.memory.values, model.memory.values)
    assert "span_ids" not in bare.memory.state_dict()


def test_slots_saved_without_spans_are_loaded_and_left_alone_by_a_refresh(tmp_path: Path) -> None:
    old = filled(made(slots=64), tokens())
    old.memory.save(tmp_path / "old.safetensors")
    model = filled(made(**LONG), tokens(4))
    model.memory.load(tmp_path / "old.safetensors")
    assert not model.memory.span_ids.any()
    assert not model.memory.span_length.any()
    before = model.memory.keys.clone()
    assert moved(model).refresh_slots() == 0
    assert torch.equal(model.memory.keys, before)
    model.load_state_dict(old.state_dict())
    assert torch.equal(model.memory.values, old.memory.values)


def test_a_folder_with_and_without_spans_is_loaded(tmp_path: Path) -> None:
    model = filled(made(vocab_size=64, slot_span=6), tokens())
    save_model(model, toy_tokenizer(64), tmp_path / "with")
    loaded = load_model(str(tmp_path / "with")).model
    assert isinstance(loaded, TRC2ForCausalLM)
    assert torch.equal(loaded.memory.span_ids, model.memory.span_ids)
    old = filled(made(vocab_size=64), tokens())
    with torch.no_grad():
        old.hippocampus.query.weight.normal_()  # type: ignore[union-attr]
    save_model(old, toy_tokenizer(64), tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["slot_span"]  # as folders were saved before
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    same = load_model(str(tmp_path / "old"))
    assert not same.notes
    assert same.model.state_dict().keys() == old.state_dict().keys()
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | {"slot_span": 6}))
    begun = load_model(str(tmp_path / "old")).model  # spans from now on
    assert isinstance(begun, TRC2ForCausalLM)
    assert not begun.memory.span_length.any()
    assert all(torch.equal(value, begun.state_dict()[name]) for name, value in old.state_dict().items())


# Found again, and emptied.


def test_spans_are_found_in_rows() -> None:
    memory = SlotMemory(4, 2, span=3)
    keys = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), dim=-1)
    spans = Spans(torch.tensor([[5, 6, 7], [5, 0, 0], [7, 6, 5], [8, 9, 0]]), torch.tensor([3, 1, 3, 2]))
    memory.write(keys, keys, torch.tensor([4.0, 3.0, 2.0, 1.0]), spans)
    assert memory.spans_in(torch.tensor([[1, 5, 6, 7, 8]])).tolist() == [True, True, False, False]
    assert memory.spans_in(torch.tensor([[8, -1, 9, 7], [7, 6, 5, -1]])).tolist() == [False, True, True, False]
    assert memory.spans_in(torch.tensor([[8]])).tolist() == [False] * 4
    assert memory.spans_in(torch.tensor([[0, 0, 0, 0]])).tolist() == [False] * 4  # what fills a span up is none of it
    with pytest.raises(Mistake, match="keeps no tokens"):
        SlotMemory(4, 2).spans_in(torch.tensor([[8]]))


@pytest.mark.parametrize("kind", ["qa", "text"])
def test_spans_of_a_request_are_those_of_its_padded_rows(kind: str) -> None:
    words = toy_tokenizer(99)
    if kind == "text":
        rows, whole = Dataset.from_dict({"text": ["abcdefghijklmnop", "uvw"]}), words("abcdefghijklmnop")["input_ids"]
    else:
        rows, whole = Dataset.from_dict({"question": ["abcd?"], "answer": ["efgh"]}), words("Q: abcd?\nA: efgh")["input_ids"]
    end, other = [1, 0, 0], words("zzzzzzzzzzzzzz")["input_ids"]
    spans = [  # the tokens, and whether they go with a text, with an answer
        (whole[:3], True, True),
        (whole[-9:], True, True),
        (whole[-2:] + end, True, True),  # behind a row's end, in its padding
        (other[:6] + whole[:6], False, False),
        (other[:2] + whole[:8], True, False),  # a text that stood behind another one in a joined row
        (other[:2] + words("uvw")["input_ids"] + other[:2], True, False),  # the whole of a short text
        (other, False, False),
        (whole[:3] + whole[4:6], False, False),
    ]
    memory = SlotMemory(9, 8, span=14)  # one slot stays empty
    ids = torch.tensor([span + [0] * (14 - len(span)) for span, *_ in spans])
    length = torch.tensor([len(span) for span, *_ in spans])
    memory.write(torch.eye(8), torch.eye(8), -torch.arange(8.0), Spans(ids, length))
    wanted = [pair[0 if kind == "text" else 1] for _, *pair in spans]
    assert memory.spans_of(Request("go", rows, kind=kind), trainer()).tolist() == [*wanted, False]


def test_erasing_gives_up_what_merged_or_waits() -> None:
    model = filled(made(vocab_size=99, **LONG), tokens())
    own = model.memory.values.clone()
    model.memory.merge = 0.9
    span = Spans(torch.ones(3, 32, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
    model.memory.write(model.memory.keys[:3].clone(), torch.ones(3, 32), torch.ones(3), span)
    trained_step(model, tokens(5))
    assert model.hippocampus is not None
    assert model.hippocampus.waiting
    assert model.erase(Request("go", lines("unseen"), kind="text"), trainer()) == 0
    assert not model.hippocampus.waiting
    torch.testing.assert_close(model.memory.values, own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["qa", "text"])
def test_erasing_empties_the_slots_made_of_forgotten_rows(kind: str) -> None:
    if kind == "text":
        rows, other = lines("line", 6), lines("other words, index", 6)
    else:
        rows, other = (
            Dataset.from_dict({"question": [f"{word} {n}?" for n in range(6)], "answer": [f"{word}{'!' * (n % 3)}" for n in range(6)]})
            for word in ("who", "where")
        )
    both = Dataset.from_list([*rows, *other])
    model, learner = made(vocab_size=99, slot_span=12, slots=256, merge_cosine=2.0), ControlledReplay(ring=4, reservoir=8)
    learner.learn(model, Task("both", both, kind=kind), trainer(learner, steps=12))
    held = {slot: span_of(model.memory, slot) for slot in model.memory.with_span().tolist()}
    gone = model.erase(Request("go", rows, kind=kind), trainer())
    words = toy_tokenizer(99)
    texts = [words.decode(span) for span in held.values()]
    left = [words.decode(span_of(model.memory, slot)) for slot in model.memory.with_span().tolist()]
    assert 0 < gone < len(held)
    assert gone + len(left) == len(held)
    mark = "line number" if kind == "text" else "who"
    assert any(mark in text for text in texts)
    assert not any(mark in text for text in left)
    assert not model.memory.keys[~model.memory.filled].any()
    assert made(vocab_size=99).erase(Request("go", rows, kind=kind), trainer()) == 0
    assert made(hippocampus=False).erase(Request("go", rows, kind=kind), trainer()) == 0


def test_a_life_empties_the_slots_of_a_request() -> None:
    def lived(span: int) -> tuple[Life, TRC2ForCausalLM]:
        model, learner = made(vocab_size=99, slot_span=span), ControlledReplay(ring=4, reservoir=8)
        settings = Settings(steps=4, batch_size=4, length=24)
        deeds = [Deed(Task("lines", lines("line")), learner, settings), Deed(Request("go", lines("line", 6), kind="text"), None, settings)]
        life = Life(deeds, model, toy_tokenizer(99), progress=False)
        life.run()
        return life, model

    life, model = lived(12)
    assert life.ledger is not None
    (note,) = [row for row in life.ledger.rows("notes") if row["name"] == "erased from memories"]
    assert json.loads(note["content"])["TRC2ForCausalLM"] > 0
    forgotten = [f"line number {number} and what follows it" for number in range(6)]
    for slot in model.memory.with_span().tolist():
        assert not any(toy_tokenizer(99).decode(span_of(model.memory, slot)) in text for text in forgotten)
    plain, _ = lived(0)
    assert plain.ledger is not None
    (note,) = [row for row in plain.ledger.rows("notes") if row["name"] == "erased from memories"]
    assert json.loads(note["content"]).keys() == {"ControlledReplay"}


def test_padding_is_no_event() -> None:
    """Rows of unequal length: what stands behind a row's end is written into no slot, even where every token is."""
    model, helper = made(alive=False, slot_span=4, vocab_size=99, slots=64, write_m=40, merge_cosine=2.0), trainer(steps=1)
    rows = Dataset.from_dict({"question": ["abc", "is it"], "answer": ["d", "no"]})
    Sequential().learn(model, Task("animals", rows, kind="qa"), helper)
    pad = helper.processor.pad_token_id
    ends = model.memory.span_ids[model.memory.filled].gather(1, model.memory.span_length[model.memory.filled, None] - 1)
    assert len(ends) > 0
    assert not (ends == pad).any()


def test_a_batch_gets_masks_for_the_rows_that_lack_one() -> None:
    labels = torch.tensor([[IGNORED, 5, 6, IGNORED], [IGNORED, 7, 8, 9]])
    flat = Batch({"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": labels})
    flat._tokens = 11.0
    named = Batch({"new": flat, "old": Batch({"labels": labels[:1], "attention_mask": torch.ones(1, 4, dtype=torch.int64)})})
    masked = named.masked()
    assert masked["new"]["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert masked["old"]["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert masked["new"].tokens == 11.0
    assert "attention_mask" not in flat
