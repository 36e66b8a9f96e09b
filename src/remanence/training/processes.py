"""What several processes share: one accelerator, averaged gradients, sharded parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


@functools.cache
def shared_accelerator() -> Accelerator:
    """Return this process's Accelerate object: device, precision and processes as `accelerate launch` set them."""
    from accelerate import Accelerator

    return Accelerator()


def is_sharded(model: nn.Module) -> bool:
    """Tell whether parameters are DTensors (FSDP2)."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        torch.distributed.barrier()


def from_main(value: Any) -> Any:
    """Return the main process's value in every process."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum over processes, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of replicated parameters over processes, in one all-reduce per dtype.

    The average is taken once per step, after the last backward pass, so that a method may run as many forward and backward passes as it needs.
    A parameter without a gradient here counts as zero: another process may have one.
    """
    by_type: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_type.setdefault(parameter.dtype, []).append(parameter)
    for group in by_type.values():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        torch.distributed.all_reduce(flat)
        flat /= world_size()
        first = 0
        for parameter, grad in zip(group, grads):
            parameter.grad = flat[first : first + grad.numel()].view_as(grad)
            first += grad.numel()
