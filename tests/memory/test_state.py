"""The state of a memory: what is saved is what is loaded, and another's state is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from remanence.errors import Mistake
from remanence.memory.state import MemoryState, check_input
from remanence.storage import save_tree


def made() -> MemoryState:
    generator = torch.Generator().manual_seed(0)
    tensors = {"W1": torch.randn(2, 3, 4, generator=generator), "half": torch.randn(2, 5, generator=generator).bfloat16()}
    return MemoryState("titans", {**tensors, "position": torch.tensor([1, 2])}, seen=7, config={"dim": 4, "chunk": 16})


def test_saved_state_loads_bit_for_bit(tmp_path: Path) -> None:
    state = made()
    state.save(tmp_path / "state.safetensors")
    again = MemoryState.load(tmp_path / "state.safetensors")
    assert (again.kind, again.seen, again.config) == (state.kind, state.seen, state.config)
    assert all(
        again.tensors[name].dtype == tensor.dtype and torch.equal(again.tensors[name], tensor) for name, tensor in state.tensors.items()
    )
    assert again.tensors.keys() == state.tensors.keys()


def test_bytes_are_those_of_the_tensors_and_precision_moves_only_floats() -> None:
    state = made()
    assert state.bytes == 2 * 3 * 4 * 4 + 2 * 5 * 2 + 2 * 8
    half = state.to(torch.float64)
    assert half.tensors["W1"].dtype == torch.float64
    assert half.tensors["position"].dtype == torch.int64


def test_rows_are_repeated_and_dropped_in_order() -> None:
    picked = made().rows(torch.tensor([1, 1, 0]))
    assert picked.batch == 3
    assert torch.equal(picked.tensors["position"], torch.tensor([2, 2, 1]))


def test_a_clone_shares_no_storage_and_a_detached_state_no_graph() -> None:
    weight = torch.ones(1, 2, requires_grad=True)
    state = MemoryState("titans", {"W": weight * 2})
    assert not state.detach().tensors["W"].requires_grad
    copied = state.detach().clone()
    copied.tensors["W"].zero_()
    assert torch.equal(state.tensors["W"], torch.full((1, 2), 2.0))


@pytest.mark.parametrize(
    ("kind", "config", "batch", "words"),
    [
        ("miras", {"dim": 4, "chunk": 16}, 2, "made by 'titans'"),
        ("titans", {"dim": 4, "chunk": 32}, 2, "chunk=16"),
        ("titans", {"dim": 4, "chunk": 16}, 3, "holds 2 sequences"),
    ],
)
def test_another_memorys_state_is_refused(kind: str, config: dict[str, int], batch: int, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        made().check(kind, config, batch)


def test_a_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    save_tree(tmp_path / "other.safetensors", {"kind": "titans"})
    with pytest.raises(Mistake, match="is not the state of a memory"):
        MemoryState.load(tmp_path / "other.safetensors")
    with pytest.raises(Mistake, match="does not exist"):
        MemoryState.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("x", "mask", "words"),
    [
        (torch.zeros(2, 3), None, "expected input"),
        (torch.zeros(2, 3, 5), None, "expected input"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3), "boolean mask"),
        (torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool), "boolean mask"),
        (torch.full((2, 3, 4), float("nan")), None, "not finite"),
    ],
)
def test_input_that_a_memory_would_carry_on_is_refused(x: torch.Tensor, mask: torch.Tensor | None, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        check_input(x, 4, mask, "titans")
