"""Files are whole or absent; a state comes back bit for bit; what a killed writer left is swept away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remanence.errors import Mistake
from remanence.storage import Streamed, digest_tensors, load_tree, save_tree, sweep, whole_file, whole_folder, write_text

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Draw a tensor of any of our types, empty ones and transposed ones among them."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    found = (torch.randn(shape, generator=generator) * 3).to(draw(st.sampled_from(DTYPES)))
    return found.T if found.dim() == 2 and draw(st.booleans()) else found


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_a_state_comes_back_as_it_was(tree: Any, tmp_path: Path) -> None:
    save_tree(tmp_path / "state.safetensors", tree)
    assert same(tree, load_tree(tmp_path / "state.safetensors"))


def test_tied_and_viewed_tensors_come_back_each_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"a": base, "b": base, "row": base[1], "column": base[:, 2], 7: torch.nn.Parameter(base)}
    save_tree(tmp_path / "s", tree)
    found = load_tree(tmp_path / "s")
    assert all(torch.equal(tree[key], found[key]) for key in tree)
    found["a"].zero_()
    assert torch.equal(found["b"], base)


def test_an_object_that_would_need_pickling_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a state may hold"):
        save_tree(tmp_path / "s", {"a": object()})
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(1, 255)), max_size=3))
def test_a_damaged_state_is_read_or_refused_never_a_crash(cut: int, flips: list[tuple[int, int]], tmp_path: Path) -> None:
    path = tmp_path / "s"
    save_tree(path, {"a": torch.arange(5), "b": [1, "two", (3.0, None)]})
    content = bytearray(path.read_bytes())
    for where, mask in flips:
        content[where % len(content)] ^= mask
    path.write_bytes(bytes(content[: min(cut, len(content)) or None]))
    try:
        load_tree(path)
    except Mistake as mistake:
        assert str(path) in str(mistake)


def test_a_missing_state_and_a_folder_are_mistakes(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="does not exist"):
        load_tree(tmp_path / "none")
    with pytest.raises(Mistake):
        load_tree(tmp_path)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "f.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["f.txt"]


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with whole_folder(path) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), whole_folder(path) as temporary:
        (temporary / "b").write_text("2")
        raise ZeroDivisionError
    assert [item.name for item in path.iterdir()] == ["a"]
    with whole_folder(path) as temporary:
        (temporary / "c").write_text("3")
    assert [item.name for item in path.iterdir()] == ["c"]
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_a_folder_whose_last_rename_fails_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    with whole_folder(path) as temporary:
        (temporary / "a").write_text("1")
    replace, calls = os.replace, []

    def failing(one: Any, other: Any) -> None:
        calls.append(other)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(one, other)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(Mistake, match="No space left"), whole_folder(path) as temporary:
        (temporary / "b").write_text("2")
    assert (path / "a").read_text() == "1"
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_sweeping_puts_back_what_a_kill_took_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".model.abc123.old" / "old").mkdir(parents=True)
    (tmp_path / ".model.abc123.old" / "old" / "a").write_text("1")
    (tmp_path / ".model.xyz.part").mkdir()
    (tmp_path / ".recipe.yaml.17.part").write_text("half")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".other.1.part").write_text("of another run")
    sweep(tmp_path)
    assert (tmp_path / "model" / "a").read_text() == "1"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["kept", "model"]
    assert (tmp_path / "kept" / ".other.1.part").exists()
    sweep(tmp_path, below=True)
    assert list((tmp_path / "kept").iterdir()) == []


def test_the_digest_sees_names_types_shapes_and_bits() -> None:
    base = torch.zeros(4)
    others = [("b", base), ("a", base.to(torch.int32)), ("a", base.reshape(2, 2)), ("a", torch.tensor([0.0, 0, 0, 1e-45])), ("a", -base)]
    digests = {digest_tensors([pair]) for pair in [("a", base), *others]}
    assert len(digests) == 6
    assert digest_tensors([("a", base), ("b", base)]) == digest_tensors([("b", base), ("a", base.clone())])


def test_a_streamed_tensor_is_in_the_file_as_if_it_had_been_whole(tmp_path):
    def tensor(kind, *shape):
        return (torch.arange(torch.Size(shape).numel()) % 2).to(kind).view(shape)

    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    whole = {str(kind): tensor(kind, 3, number) for number, kind in enumerate(kinds)}
    tree = {
        "whole": whole,
        "streamed": {name: Streamed(each.dtype, each.shape, lambda each=each: iter(each.split(1))) for name, each in whole.items()},
    }
    save_tree(tmp_path / "state", tree)
    loaded = load_tree(tmp_path / "state")
    for name, each in whole.items():
        for part in ("whole", "streamed"):
            assert torch.equal(loaded[part][name], each)
            assert loaded[part][name].dtype == each.dtype
    before = (tmp_path / "state").read_bytes()
    with pytest.raises(ValueError, match="other values than its shape says"):
        save_tree(tmp_path / "state", {"short": Streamed(torch.float32, (4,), lambda: iter([torch.zeros(3)]))})
    assert (tmp_path / "state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
