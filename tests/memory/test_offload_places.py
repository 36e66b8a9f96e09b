"""Where caches on disk lie: folders of their own that go with their last user, faults of the disk, other processes, threads, and language models."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from memory.test_caching import make, text
from memory.test_offload import files, same
from remanence.errors import Mistake
from remanence.memory import architectures
from remanence.memory.archive import Archive
from remanence.memory.lm import MemoryCachingForCausalLM
from remanence.memory.lm_config import MemoryCachingConfig
from remanence.memory.lm_state import LMState


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def test_a_temporary_folder_goes_with_the_last_state_and_a_named_one_is_left_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for offload, parent in (("disk", tmp_path / "temporary"), (tmp_path / "named" / "deep", tmp_path / "named" / "deep")):
        layer, x = make("delta", offload=offload), text(12)
        assert not parent.exists()  # nothing is made before there is a cache
        _, first = layer(x)
        _, second = layer(x, first)
        _, other = layer(x)
        assert len(files(parent)) == 2  # two texts
        assert all(path.parent.parent.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o777 == 0o600 for path in files(parent))
        del first, other
        gc.collect()
        assert len(files(parent)) == 1
        assert torch.equal(layer(x, second)[0], make("delta")(x, second)[0])
        del second
        gc.collect()
        assert parent.is_dir()
        assert not list(parent.iterdir())


def test_layers_that_name_one_folder_leave_each_other_alone(tmp_path):
    layers, x = [make("delta", seed=seed, offload=tmp_path) for seed in range(3)], text(27)
    plain = [make("delta", seed=seed) for seed in range(3)]
    states = [None] * 3
    for start in range(0, 27, 4):
        states = [layer(x[:, start : start + 4], state)[1] for layer, state in zip(layers, states, strict=True)]
    assert len({state.hold.archive.folder for state in states}) == 3
    for layer, state, other in zip(layers, states, plain, strict=True):
        assert torch.allclose(layer.recall(x, state), other.recall(x, other(x)[1]), atol=1e-12)


READER = """
import os, signal, sys, torch
from memory.test_caching import make, text
from memory.test_offload import same
torch.set_grad_enabled(False)
layer, x = make("delta", offload=sys.argv[1]), text(27)
_, state = layer(x)
print("ready", flush=True)
if sys.stdin.readline() == "die\\n":
    os.kill(os.getpid(), signal.SIGKILL)
assert same(layer(x, state)[1], make("delta")(x, make("delta")(x)[1])[1])
"""


def reader(folder: Path) -> subprocess.Popen:
    """Start a process that reads, says so, and waits to be told to die or to go on."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_share_a_folder_and_what_a_killed_one_left_is_removed_by_the_next(tmp_path):
    layer, x = make("delta", offload=tmp_path), text(27)
    killed, lives = reader(tmp_path), reader(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    killed.communicate("die\n")
    assert killed.returncode == -signal.SIGKILL
    assert len(files(tmp_path)) == 2
    _, state = layer(x)
    assert len(files(tmp_path)) == 2  # the one that lives, and ours
    lives.communicate("on\n")
    assert lives.returncode == 0
    assert len(files(tmp_path)) == 1  # its folder went with it
    assert same(state, make("delta")(x)[1])


def test_a_forked_process_is_told_to_take_a_saved_state(tmp_path):
    layer, x = make("delta", offload=tmp_path), text(27)
    _, state = layer(x)
    child = os.fork()
    if not child:
        code = 1
        try:
            layer(x, state)
        except Mistake as mistake:
            code = 0 if "another process" in str(mistake) else 2
            del state
            gc.collect()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(layer(x, state)[1], make("delta")(x, make("delta")(x)[1])[1])


def test_a_full_disk_is_one_sentence_and_leaves_everything_as_it_was(tmp_path):
    plain, layer, x = make("titans"), make("titans", offload=tmp_path), text(60)
    (_, wanted), (_, state) = plain(x[:, :12]), layer(x[:, :12])
    before = {path: path.read_bytes() for path in files(tmp_path)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(map(len, before.values())) * 3, limits[1]))
        with pytest.raises(Mistake, match="caches cannot be written .* name another folder in `offload`") as found:
            layer(x[:, 12:], state)
        assert "\n" not in str(found.value)
        small = layer(x[:, 12:17], state)[0]  # one more cache has room
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    del found
    gc.collect()
    assert torch.equal(small, plain(x[:, 12:17], wanted)[0])
    after = {path: path.read_bytes() for path in files(tmp_path)}
    assert after.keys() == before.keys()
    assert all(after[path][: len(data)] == data and not any(after[path][len(data) :]) for path, data in before.items())
    assert same(layer(x[:, 12:], state)[1], plain(x[:, 12:], wanted)[1])


def test_a_call_that_is_broken_off_takes_no_place(tmp_path, monkeypatch):
    layer, x = make("titans", offload=tmp_path), text(60)
    _, state = layer(x[:, :12])
    size, write, calls = [path.stat().st_size for path in files(tmp_path)], Archive._write, []

    def broken(self: Archive, name: str, places: np.ndarray, data: np.ndarray) -> None:
        calls.append(name)
        if name == "W1" and calls.count("W1") == 1:
            raise KeyboardInterrupt
        write(self, name, places, data)

    monkeypatch.setattr(Archive, "_write", broken)
    with pytest.raises(KeyboardInterrupt):
        layer(x[:, 12:], state)
    assert [path.stat().st_size for path in files(tmp_path)] == size
    assert same(layer(x[:, 12:], state)[1], make("titans")(x[:, 12:], state)[1])


def test_a_first_cache_that_has_no_room_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(Mistake, match="caches cannot be written"):
            make("titans", offload=tmp_path)(text(12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_and_one_that_went_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/caches")):
        with pytest.raises(Mistake, match="caches cannot be put there .* name another folder"):
            make("delta", offload=folder)(text(12))
    layer, x = make("delta", offload=tmp_path / "caches"), text(12)
    _, state = layer(x)
    shutil.rmtree(tmp_path / "caches")
    for use in (
        lambda: layer(x, state),
        lambda: layer.recall(x, state),
        lambda: state.save(tmp_path / "state"),
        lambda: layer.forget(state, [0]),
    ):
        with pytest.raises(Mistake, match="removed while a state holds them|cannot be written"):
            use()
    assert not (tmp_path / "state").exists()
    del state
    _, state = layer(x)  # begins anew
    assert same(state, make("delta")(x)[1])


@pytest.mark.parametrize(
    ("offload", "words"), [("dsk", "did you mean 'disk'"), ("caches", "'./caches'"), (5, "there is no 5"), ("", "there is no ''")]
)
def test_a_word_that_is_no_place_is_refused(offload, words):
    with pytest.raises(Mistake, match=words):
        make("delta", offload=offload)


def test_threads_go_on_from_one_state_each_with_its_own(tmp_path):
    plain, layer = make("delta", rule="ssc"), make("delta", rule="ssc", offload=tmp_path)
    _, state = layer(text(12))
    _, wanted = plain(text(12))

    def go_on(seed: int) -> bool:
        with torch.no_grad():
            own, other, x = state, wanted, text(40, seed=seed)
            for start in range(0, 40, 5):
                (a, own), (b, other) = layer(x[:, start : start + 5], own), plain(x[:, start : start + 5], other)
                if not torch.equal(a, b):
                    return False
            return same(layer.forget(own, [1, 3]), plain.forget(other, [1, 3])) and same(own, other)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(go_on, range(12)))
    assert same(state, wanted)


def language_model(**memory) -> MemoryCachingForCausalLM:
    """Return a small model; the same weights whatever the settings."""
    architectures.register()
    torch.manual_seed(0)
    config = MemoryCachingConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        variant="mac",
        segment=8,
        n_persistent=6,
        memory={"base": {"name": "titans", "chunk": 4}, "rule": "ssc", "top_k": 2, "segment": 4, "heads": 2} | memory,
    )
    return MemoryCachingForCausalLM(config).double().eval()


@pytest.mark.parametrize("offload", ["disk", "folder"])
def test_a_language_model_reads_asks_and_searches_with_beams(offload, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = str(tmp_path / "caches") if offload == "folder" else offload
    plain, model, ids = language_model(), language_model(offload=place), torch.randint(0, 50, (2, 40))
    state, wanted = model.remember(ids, piece=7), plain.remember(ids, piece=7)
    assert all(block.memory.hold is not None for block in state.blocks)
    assert all(same(a.memory, b.memory) and same(a.opened, b.opened) for a, b in zip(state.blocks, wanted.blocks, strict=True))
    state.save(tmp_path / "state.safetensors")
    loaded = LMState.load(tmp_path / "state.safetensors")
    assert all(same(a.memory, b.memory) for a, b in zip(loaded.blocks, wanted.blocks, strict=True))
    prompt = torch.randint(0, 50, (2, 3))
    for how in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        answer = plain.ask(prompt, wanted, max_new_tokens=12, **how)
        assert torch.equal(model.ask(prompt, state, max_new_tokens=12, **how), answer)
        assert torch.equal(model.ask(prompt, loaded, max_new_tokens=12, **how), answer)
        assert torch.equal(plain.ask(prompt, state, max_new_tokens=12, **how), answer)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    assert again.model.layers[0].memory.offload == place
    assert torch.equal(
        again.remember(ids, piece=7).blocks[1].memory.gathered().tensors["cache.W0"], wanted.blocks[1].memory.tensors["cache.W0"]
    )
    model.train()
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
        plain.train()
        plain(ids, labels=ids).loss.backward()
    assert all(
        torch.equal(one.grad, other.grad)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True)
        if other.grad is not None
    )
    del state, loaded
    gc.collect()
    assert not [path for path in files(tmp_path) if "remanence-caches" in str(path)]
