"""`remanence remember`, `ask` and `watch`: a state is a file, and asking leaves it as it is."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from remanence import remembering
from remanence.cli import app
from remanence.errors import Mistake
from remanence.memory.lm import TitansForCausalLM
from remanence.memory.lm_config import TitansConfig
from remanence.memory.lm_state import LMState
from remanence.memory.reweaving import reweave
from remanence.memory.state import MemoryState
from remanence.models.forward import fresh_weights
from remanence.models.load import load_model, save_model
from toy import toy_lm, toy_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog\n" * 3
SHORT = TEXT[: len(TEXT) // 3 * 2]  # a toy knows 128 positions


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy model that has a memory, one that has none, and a text."""
    folder, tokenizer = tmp_path_factory.mktemp("remembering"), toy_tokenizer()
    memory = {"chunk": 8, "heads": 2}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "window": 16, "n_persistent": 2}
    with fresh_weights(0):
        model = TitansForCausalLM(TitansConfig(vocab_size=len(tokenizer), memory=memory, **shape)).eval()
    save_model(model, tokenizer, folder / "model")
    save_model(toy_lm("llama", vocab=len(tokenizer)), tokenizer, folder / "plain")
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    (folder / "short.txt").write_text(SHORT, encoding="utf-8")
    return folder


def command(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


def test_what_is_remembered_in_two_sittings_is_what_is_remembered_in_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("remember", place / "model", place / "book.txt", "--out", tmp_path / "one.safetensors", "--quiet")
    assert "tokens in" in capsys.readouterr().out
    lines = TEXT.splitlines(keepends=True)
    for number, part in enumerate((lines[0], "".join(lines[1:]))):
        (tmp_path / "part.txt").write_text(part)
        before = ["--state", tmp_path / "two.safetensors"] if number else []
        command("remember", place / "model", tmp_path / "part.txt", "--out", tmp_path / "two.safetensors", "--quiet", *before)
    one, two = (LMState.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.seen == two.seen
    for a, b in zip(one.blocks, two.blocks):
        assert a.memory is not None
        assert b.memory is not None
        for name, tensor in a.memory.tensors.items():
            torch.testing.assert_close(tensor, b.memory.tensors[name], rtol=0, atol=1e-5)


def test_asking_leaves_the_state_as_it_is_and_depends_on_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state.safetensors"
    command("remember", place / "model", place / "book.txt", "--out", state, "--quiet")
    before = state.read_bytes()
    capsys.readouterr()
    answers = []
    for _ in range(2):
        command("ask", place / "model", "the dog", "--state", state, "--tokens", 6, "--temperature", 1.0, "--seed", 3)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert state.read_bytes() == before
    loaded = remembering.load_reader(str(place / "model"))
    ids = torch.tensor([loaded.processor("the dog")["input_ids"]])
    held = LMState.load(state)
    with_state = loaded.model._read(loaded.model.model.embed_tokens(ids), held, None)[0][-1]
    without = loaded.model._read(loaded.model.model.embed_tokens(ids), None, None)[0][-1]
    assert (with_state - without).abs().max() > 1e-3


def test_sampling_leaves_the_global_generator_alone(place: Path) -> None:
    loaded = remembering.load_reader(str(place / "model"))
    before = torch.get_rng_state()
    remembering.ask(loaded, "the dog", tokens=3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_watch_writes_what_every_token_did(place: Path, tmp_path: Path) -> None:
    command("watch", place / "model", place / "book.txt", "--out", tmp_path / "w.csv")
    lines = (tmp_path / "w.csv").read_text().splitlines()
    loaded = remembering.load_reader(str(place / "model"))
    tokens = len(loaded.processor(TEXT, add_special_tokens=False)["input_ids"])
    assert lines[0].startswith("block,position,token,surprise,write")
    assert sum(line.startswith("1,") for line in lines) >= tokens


def test_pieces_are_cut_at_line_ends_and_are_the_whole_text() -> None:
    text = "one two\nthree four\n" + "x" * 40 + " five\nsix"
    cut = list(remembering.pieces(text, 20))
    assert "".join(cut) == text
    assert cut[0] == "one two\nthree four\n"
    assert max(map(len, cut)) <= 20


def test_mistakes_are_one_sentence(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="has no memory that learns"):
        command("remember", place / "plain", place / "book.txt", "--out", tmp_path / "s.safetensors")
    with pytest.raises(Mistake, match="does not exist"):
        command("remember", place / "model", place / "none.txt", "--out", tmp_path / "s.safetensors")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(Mistake, match="is empty"):
        command("watch", place / "model", tmp_path / "empty.txt", "--out", tmp_path / "w.png")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(Mistake, match="is not UTF-8"):
        command("remember", place / "model", tmp_path / "latin.txt", "--out", tmp_path / "s.safetensors")
    with pytest.raises(Mistake, match="must be 1 or more"):
        command("ask", place / "model", "x", "--tokens", 0)
    with pytest.raises(Mistake, match="must be 0 or more, and finite"):
        command("ask", place / "model", "x", "--temperature", "nan")
    with pytest.raises(Mistake, match="is damaged.*remanence remember"):
        command("ask", place / "model", "x", "--state", place / "book.txt")
    with pytest.raises(Mistake, match="is a folder"):
        command("remember", place / "model", place / "book.txt", "--out", tmp_path)
    loaded = remembering.load_reader(str(place / "model"))
    with pytest.raises(Mistake, match="at most 4 are watched"):
        remembering.watch(loaded, TEXT, limit=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "latin.txt"]


def test_a_model_without_a_memory_is_given_back_what_leaves_its_window(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, woven = tmp_path / "held.safetensors", ["--window", 16, "--budget", 12]
    command("remember", place / "plain", place / "short.txt", "--out", state, *woven, "--quiet")
    held = remembering.load_state(state)
    assert isinstance(held, MemoryState)
    loaded = remembering.load_reader(str(place / "plain"), held)  # the state says how it was woven
    assert (loaded.model.settings.window, loaded.model.settings.budget) == (16, 12)  # type: ignore[union-attr]
    assert held.seen == len(loaded.processor(SHORT, add_special_tokens=False)["input_ids"])
    before = state.read_bytes()
    capsys.readouterr()
    command("ask", place / "plain", "the dog", "--state", state, "--tokens", 6)
    model = reweave(load_model(str(place / "plain")).model, 16, 12)
    expected = model.ask("the dog", model.remember(SHORT, loaded.processor), loaded.processor, max_new_tokens=6, do_sample=False)
    assert capsys.readouterr().out.rstrip("\n") == str(expected).rstrip("\n")
    assert state.read_bytes() == before
    for ending in ("csv", "html", "png"):
        command("watch", place / "plain", place / "short.txt", "--out", tmp_path / f"w.{ending}", *woven)
    with (tmp_path / "w.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["block", "position", "token", "surprisal", "held", "window"]
    assert sum(float(row["held"]) for row in rows) == 12
    page = (tmp_path / "w.html").read_text()
    assert page.count("border-bottom:3px") == 12
    assert "Underlined tokens are held" in page


def test_mistakes_about_windows_are_one_sentence(place: Path, tmp_path: Path) -> None:
    state, out = tmp_path / "held.safetensors", ["--out", tmp_path / "s.safetensors"]
    command("remember", place / "plain", place / "short.txt", "--out", state, "--window", 16, "--quiet")
    with pytest.raises(Mistake, match="--budget: needs a window"):
        command("remember", place / "plain", place / "short.txt", "--budget", 4, *out)
    with pytest.raises(Mistake, match="without a memory of their own"):
        command("remember", place / "model", place / "short.txt", "--window", 4, *out)
    with pytest.raises(Mistake, match="unknown rule 'surprise'; did you mean 'surprisal'"):
        command("remember", place / "plain", place / "short.txt", "--window", 16, "--score", "surprise", *out)
    with pytest.raises(Mistake, match="--positions rebased"):
        command("remember", place / "plain", place / "book.txt", "--window", 16, *out)
    with pytest.raises(Mistake, match="budget=4, this memory has budget=6"):
        command("remember", place / "plain", place / "short.txt", "--window", 16, "--budget", 6, "--state", state, *out)
    with pytest.raises(Mistake, match="another kind of model"):
        command("ask", place / "model", "x", "--state", state)
    save_model(toy_lm("gpt2", vocab=len(toy_tokenizer())), toy_tokenizer(), tmp_path / "other")
    with pytest.raises(Mistake, match="another model"):
        command("ask", tmp_path / "other", "x", "--state", state)
    assert not (tmp_path / "s.safetensors").exists()
