"""What caches on disk cost: what a read, a closed segment, a save and a load bring into memory, counted and not timed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from memory.test_caching import HEADS, make, text
from memory.test_offload import files, same
from remanence.memory import shelved
from remanence.memory.archive import Archive
from remanence.memory.caching import MemoryCache
from remanence.memory.state import MemoryState


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


def test_a_token_of_ssc_brings_the_same_bytes_into_memory_however_long_the_text_was(tmp_path, monkeypatch):
    layer, read = MemoryCache(16, "titans", rule="ssc", segment=4, top_k=2, offload=tmp_path).double(), []
    plain = Archive._read

    def counted(self: Archive, name: str, rows: np.ndarray) -> np.ndarray:
        read.append(len(rows) * self.forms[name].bytes)
        return plain(self, name, rows)

    monkeypatch.setattr(Archive, "_read", counted)
    one = 2 * 16 * 32 * 8  # W0 and W1
    x, state, costs = torch.randn(1, 404, 16, dtype=torch.float64), None, {}
    for t in range(404):
        read.clear()
        size = sum(path.stat().st_size for path in files(tmp_path))
        with Largest() as largest:
            _, state = layer(x[:, t : t + 1], state)
        costs[t] = (sum(read), sum(path.stat().st_size for path in files(tmp_path)) - size, largest.bytes)
    assert state.tensors["cache.place"].shape[1] == 100
    for t in range(16, 404):  # from three caches on
        assert costs[t][0] == 2 * one
        assert costs[t][1] == (one if t % 4 == 0 else 0)  # a closed segment writes itself and nothing else
    pools = 100 * 16 * 8  # what the scores are made of grows: a key for each segment
    assert max(costs[t][2] for t in range(300, 404)) <= max(2 * one, pools)
    assert pools < one * 4
    assert max(costs[t][2] for t in range(300, 404)) < state.bytes / 20


def test_rules_that_read_everything_do_it_in_pieces(tmp_path, monkeypatch):
    layer, x, read = make("linear", rule="grm", offload=tmp_path), text(101), []
    _, state = layer(x)
    one = 2 * HEADS * 9 * 8
    monkeypatch.setattr(shelved, "PIECE", 3 * one)
    plain = Archive.read

    def counted(self: Archive, places: Tensor, heads: Tensor, device: torch.device) -> dict[str, Tensor]:
        read.append(len(places) * 9 * 8)
        return plain(self, places, heads, device)

    monkeypatch.setattr(Archive, "read", counted)
    layer.recall(x, state)
    assert sum(read) == 20 * one
    assert max(read) == 3 * one


def test_a_state_is_saved_and_taken_up_piece_by_piece(tmp_path, monkeypatch):
    layer, x = make("titans", rule="ssc", offload=tmp_path / "caches"), text(301)
    plain, read, once = Archive._read, [], 2 * HEADS * 3 * 6 * 8  # one cache of W0, of both rows

    def counted(self: Archive, name: str, rows: np.ndarray) -> np.ndarray:
        read.append(len(rows) * self.forms[name].bytes)
        return plain(self, name, rows)

    _, state = layer(x)
    wanted = state.gathered()
    wanted.save(tmp_path / "memory.safetensors")
    state = layer.forget(state, [7])
    monkeypatch.setattr(Archive, "_read", counted)
    monkeypatch.setattr("remanence.memory.archive.PIECE", 3 * once)
    monkeypatch.setattr(shelved, "PIECE", 3 * once)
    with Largest() as largest:
        state.save(tmp_path / "disk.safetensors")
    rest = max(tensor.nbytes for tensor in state.tensors.values())
    assert sum(read) == 59 * 2 * once
    assert max(read) == 3 * once
    assert largest.bytes <= max(3 * once, rest)
    loaded = MemoryState.load(tmp_path / "disk.safetensors")
    assert same(loaded, layer.forget(wanted, [7]))
    assert same(loaded, state)
    read.clear()
    written: list[int] = []
    write = Archive._write
    monkeypatch.setattr(Archive, "_write", lambda self, name, places, data: (written.append(data.nbytes), write(self, name, places, data)))
    _, after = layer(x[:, :1], loaded)
    assert sum(written) == 59 * 2 * once  # all that was loaded
    assert max(written) == 3 * once
    assert same(after, layer(x[:, :1], state)[1])
