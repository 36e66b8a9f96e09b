"""Caches on disk: bit for bit those in memory, values for every branch, and as little in memory as a read needs."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memory.test_caching import BASES, HEADS, make, text
from remanence.errors import Mistake
from remanence.memory import shelved
from remanence.memory.archive import Archive
from remanence.memory.caching import MemoryCache
from remanence.memory.state import MemoryState
from remanence.storage import load_tree

RULES = ("grm", "residual", "soup", "ssc", "average")


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def same(one: MemoryState, other: MemoryState) -> bool:
    """Return whether two states hold the same bits, wherever they rest."""
    one, other = one.gathered(), other.gathered()
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(value, other.tensors[name]) for name, value in one.tensors.items()
    )


def pieces(layer: MemoryCache, x: Tensor, cuts: list[int], state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
    """Read a text in pieces that end at `cuts`."""
    read = []
    for start, end in itertools.pairwise([0, *cuts]):
        y, state = layer(x[:, start:end], state)
        read.append(y)
    return torch.cat(read, 1), state


def files(folder: Path) -> list[Path]:
    """Return the files of caches below a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]


def written(folder: Path) -> bytes:
    """Return all that they hold."""
    return b"".join(path.read_bytes() for path in files(folder))


def raw(tensor: Tensor) -> bytes:
    """Return a tensor's bytes."""
    return tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("init", ["independent", "checkpoint"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base", list(BASES))
def test_caches_on_disk_are_those_in_memory_bit_for_bit(base, rule, init, tmp_path, monkeypatch):
    x = text(23)
    plain, disk = (make(base, rule=rule, init=init, offload=offload) for offload in (None, tmp_path / "caches"))
    for cuts, piece in (([23], 1 << 26), ([3, 5, 10, 11, 16, 21, 23], 1), (list(range(1, 24)), 1 << 26)):
        monkeypatch.setattr(shelved, "PIECE", piece)  # bytes at a time: everything, or one cache
        (wanted, last), (found, held) = pieces(plain, x, cuts), pieces(disk, x, cuts)
        assert torch.equal(found, wanted)
        assert held.hold is not None
        assert not {"cache.M", "cache.W0"} & held.tensors.keys()
        assert same(held, last)
        assert held.bytes == last.bytes + held.tensors["cache.place"].nbytes
        assert torch.equal(disk.recall(x, held), plain.recall(x, last))


@pytest.mark.parametrize("evict", ["oldest", "lowest_gate"])
@pytest.mark.parametrize("rule", RULES)
def test_an_evicting_cache_on_disk_is_bounded_and_wipes_what_goes(rule, evict, tmp_path):
    settings = {"rule": rule, "evict": evict, "max_segments": 2, "u": "query", "temperature": 8.0}
    plain, disk, x = make("delta", **settings), make("delta", offload=tmp_path, **settings), text(91)
    cuts = [*list(range(3, 92, 3)), 91]
    (wanted, last), (found, held) = pieces(plain, x, cuts), pieces(disk, x, cuts)
    assert torch.equal(found, wanted)
    assert same(held, last)
    gc.collect()
    (file,) = files(tmp_path)
    unit = HEADS * 9 * 8
    assert file.stat().st_size <= 4 * 2 * unit  # of two rows: two caches, the new one before the old goes, and the state before
    kept = {raw(held.gathered().tensors["cache.M"][row, :, cache]) for row in range(2) for cache in range(2)}
    units = [file.read_bytes()[at : at + unit] for at in range(0, file.stat().st_size, unit)]
    assert {one for one in units if any(one)} == kept


def test_a_state_is_a_value_and_its_branches_see_nothing_of_each_other(tmp_path):
    plain, disk, x = make("titans", rule="ssc"), make("titans", rule="ssc", offload=tmp_path), text(40)
    left, right = x[:, 12:26], text(14, seed=2)
    _, trunk = disk(x[:, :12])
    _, wanted = plain(x[:, :12])
    copied, twin = trunk.clone(), copy.deepcopy(trunk)
    size = sum(path.stat().st_size for path in files(tmp_path))
    with pytest.raises(Mistake, match="write it with its `save`"):
        pickle.dumps(trunk)
    branches, expected = [], []
    for part in (left, right):
        branches.append(disk(part, trunk))
        expected.append(plain(part, wanted))
    for (y, state), (y_wanted, state_wanted) in zip(branches, expected, strict=True):
        assert torch.equal(y, y_wanted)
        assert same(state, state_wanted)
    assert same(trunk, wanted)
    assert same(copied, wanted)
    assert same(twin, wanted)
    grown = sum(path.stat().st_size for path in files(tmp_path))
    assert (grown - size) * 2 == size * 6  # two caches were there: each branch wrote its own three, and nothing twice
    del branches, state
    gc.collect()
    assert torch.equal(disk(right, trunk)[0], expected[1][0])  # where the branches lay, another one lies now
    assert sum(path.stat().st_size for path in files(tmp_path)) == grown
    assert same(trunk, wanted)


@pytest.mark.parametrize("base", ["linear", "titans"])
def test_a_forgotten_segment_is_wiped_and_older_values_still_have_it(base, tmp_path):
    plain, disk, x = make(base), make(base, offload=tmp_path), text(27)
    (_, wanted), (_, state) = plain(x[:, :22]), disk(x[:, :22])
    branch = disk(text(5, seed=3), state)[1]
    branch_wanted = plain(text(5, seed=3), wanted)[1]
    weights = [value for name, value in wanted.tensors.items() if name in ("cache.M", "cache.W0", "cache.W1")]
    for weight in weights:
        assert all(raw(weight[row, :, cache]) in written(tmp_path) for row in range(2) for cache in range(4))
    rest, rest_wanted = disk.forget(state, [1, 2]), plain.forget(wanted, [1, 2])
    for weight in weights:
        assert not any(raw(weight[row, head, cache]) in written(tmp_path) for row in range(2) for head in range(HEADS) for cache in (1, 2))
        assert all(raw(weight[row, :, cache]) in written(tmp_path) for row in range(2) for cache in (0, 3))
    assert same(rest, rest_wanted)
    assert torch.equal(disk(x[:, 22:], rest)[0], plain(x[:, 22:], rest_wanted)[0])
    assert same(state, wanted)
    assert same(branch, branch_wanted)
    assert torch.equal(disk.recall(x, branch), plain.recall(x, branch_wanted))
    again = disk.forget(branch, [1])  # its own deletion, of what is in memory now
    assert same(again, plain.forget(branch_wanted, [1]))
    assert same(state, wanted)
    archive = state.hold.archive
    del state, branch, again
    gc.collect()
    assert archive._forgotten == {}
    with pytest.raises(Mistake, match="no segment 1 is held"):
        disk.forget(rest, [1])
    nothing = disk.forget(rest, [0, 3])
    assert same(nothing, plain.forget(rest_wanted, [0, 3]))
    assert not any(raw(weight[0, :, cache]) in written(tmp_path) for weight in weights for cache in range(4))
    assert torch.equal(disk(x[:, 22:], nothing)[0], plain(x[:, 22:], plain.forget(rest_wanted, [0, 3]))[0])


def test_a_segment_that_only_some_rows_hold_is_wiped_in_those(tmp_path):
    settings = {"evict": "lowest_gate", "max_segments": 3, "u": "query", "temperature": 8.0}
    plain, disk, x = make("delta", **settings), make("delta", offload=tmp_path, **settings), text(41, rows=6)
    (_, wanted), (_, state) = plain(x), disk(x)
    ids = wanted.tensors["cache.id"]
    some = next(number for number in ids.unique().tolist() if 0 < int((ids == number).any(1).sum()) < 6)
    before = wanted.tensors["cache.M"]
    wanted, state = plain.forget(wanted, [some]), disk.forget(state, [some])
    assert same(state, wanted)
    assert torch.equal(disk.recall(x, state), plain.recall(x, wanted))
    for row, cache in itertools.product(range(6), range(3)):
        assert (raw(before[row, :, cache]) in written(tmp_path)) == (int(ids[row, cache]) != some)
    assert torch.equal(disk(x, state)[0], plain(x, wanted)[0])


@pytest.mark.parametrize("base", ["swla", "dla"])
def test_a_saved_state_is_the_one_of_memory_and_goes_on_anywhere(base, tmp_path):
    x, layers = text(30), [make(base, rule="ssc", offload=offload) for offload in (None, "cpu", "disk", tmp_path / "caches")]
    states = [layer(x[:, :17])[1] for layer in layers]
    for number, state in enumerate(states):
        state.save(tmp_path / f"{number}.safetensors")
        loaded = MemoryState.load(tmp_path / f"{number}.safetensors")
        assert loaded.hold is None
        assert same(loaded, states[0])
        tree = load_tree(tmp_path / f"{number}.safetensors")
        assert "cache.place" not in tree["tensors"]
    wanted = layers[0](x[:, 17:], states[0])
    for layer, state in itertools.product(layers, [*states, MemoryState.load(tmp_path / "3.safetensors")]):
        y, after = layer(x[:, 17:], state)
        assert torch.equal(y, wanted[0])
        assert same(after, wanted[1])
        assert (after.hold is None) == (layer.offload in (None, "cpu"))


def test_rows_are_repeated_and_reordered_without_touching_the_disk(tmp_path, monkeypatch):
    plain, disk, x = make("delta"), make("delta", offload=tmp_path), text(30)
    (_, wanted), (_, state) = plain(x[:, :13]), disk(x[:, :13])
    beams = torch.tensor([1, 0, 0, 1, 1])
    before = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files(tmp_path)]
    monkeypatch.setattr(Archive, "_read", None)
    wanted, state = wanted.rows(beams), state.rows(beams).detach()
    monkeypatch.undo()
    assert [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files(tmp_path)] == before
    assert same(state, wanted)
    y = text(17, rows=5, seed=4)
    (a, wanted), (b, state) = plain(y, wanted), disk(y, state)
    assert torch.equal(a, b)
    assert same(state.rows(torch.tensor([2])), wanted.rows(torch.tensor([2])))
    gone, gone_wanted = disk.forget(state, [0]), plain.forget(wanted, [0])
    assert same(gone, gone_wanted)


def test_gradients_flow_through_caches_that_stay_in_memory_for_it(tmp_path):
    x, grads = text(23), []
    with torch.enable_grad():
        for offload in (None, tmp_path):
            layer = make("titans", rule="ssc", offload=offload)
            y, state = layer(x[:, :17])
            assert state.hold is None
            y, state = layer(x[:, 17:], state)
            grads.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())))
        assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert not files(tmp_path)
    y, after = layer(x, state.detach())
    assert after.hold is not None
    plain = make("titans", rule="ssc")
    with torch.enable_grad():  # an open segment: what is on disk is a constant to it
        inner = text(2, seed=7).requires_grad_()
        y, late = layer(inner, _kept(layer, x[:, :16]))
        assert late.hold is not None
        (found,) = torch.autograd.grad(y.sum(), inner)
        other = inner.detach().clone().requires_grad_()
        (wanted,) = torch.autograd.grad(plain(other, _kept(plain, x[:, :16]))[0].sum(), other)
        assert torch.equal(found, wanted)
        y, closed = layer(text(9, seed=8), late)  # new caches with a graph: all come into memory
        assert closed.hold is None
        assert closed.tensors["cache.W0"].requires_grad


def _kept(layer: MemoryCache, x: Tensor) -> MemoryState:
    with torch.no_grad():
        return layer(x)[1]


def test_a_half_precision_layer_has_the_same_caches_on_disk(tmp_path):
    x = text(23).bfloat16()
    for base, rule in itertools.product(("delta", "titans"), RULES):
        plain, disk = (make(base, rule=rule, offload=offload).bfloat16() for offload in (None, tmp_path))
        (wanted, last), (found, held) = pieces(plain, x, [9, 23]), pieces(disk, x, [9, 23])
        assert torch.equal(found, wanted)
        assert same(held, last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(disk.float()(x.float(), held)[0], plain.float()(x.float(), last)[0])


def test_a_state_in_another_precision_comes_into_memory_and_goes_back(tmp_path):
    plain, disk, x = make("delta").float(), make("delta", offload=tmp_path).float(), text(30).float()
    (_, wanted), (_, state) = plain(x[:, :15]), disk(x[:, :15])
    wider = state.to(torch.float64)
    assert wider.hold is None
    assert same(wider, wanted.to(torch.float64))
    assert state.to("cpu").hold is state.hold
    y, after = disk.double()(
        x[:, 15:].double(), state
    )  # from a segment's end on the layer may be wider: the caches are what `torch.cat` makes of them
    y_wanted, last = plain.double()(x[:, 15:].double(), wanted)
    assert after.gathered().tensors["cache.M"].dtype == torch.float64
    assert torch.equal(y, y_wanted)
    assert same(after, last)


def test_memories_of_width_one_are_written_too(tmp_path):
    settings = {"heads": 1, "segment": 2}
    for base in ("linear", "titans"):
        plain, disk = (MemoryCache(1, base, offload=offload, **settings) for offload in (None, tmp_path))
        disk.load_state_dict(plain.state_dict())
        x = torch.randn(1, 9, 1)
        (wanted, last), (found, held) = pieces(plain, x, [3, 4, 9]), pieces(disk, x, [3, 4, 9])
        assert torch.equal(found, wanted)
        held.save(tmp_path / "state")
        assert same(MemoryState.load(tmp_path / "state"), last)
