"""What several processes share: one accelerator, averaged gradients, sharded parameters, and one sentence when something is wrong.

Nothing can ask for the rank too early: the first question builds the process group, if the environment announces one (`WORLD_SIZE`).
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from remanence.errors import Mistake

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


@functools.cache
def shared_accelerator() -> Accelerator:
    """Return this process's Accelerate object: device, precision and processes as `accelerate launch` (or `torchrun`) set them."""
    from accelerate import Accelerator

    return Accelerator(cpu=_announced() and not torch.accelerator.is_available())  # without `cpu`, Accelerate would build no group there


def _announced() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def several() -> bool:
    """Tell whether this process is one of a group; the first question builds the group."""
    if not torch.distributed.is_available():
        return False
    if not torch.distributed.is_initialized() and _announced():
        shared_accelerator()
    return torch.distributed.is_initialized()


def is_sharded(model: nn.Module) -> bool:
    """Tell whether parameters are DTensors (FSDP2)."""
    if not several():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def keep_sharded(model: nn.Module) -> None:
    """Bring a sharded model to rest, and make it go back there after every forward pass; any other model is left as it is.

    FSDP2 leaves the root's own parameters whole after a forward pass, as plain tensors that no optimizer holds. Methods look at weights
    between passes (penalties, masks, anchors), so here a parameter is always its shard.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if several() else 1


def rank() -> int:
    """Return the number of this process."""
    return torch.distributed.get_rank() if several() else 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        torch.distributed.barrier()


def from_main(value: T) -> T:
    """Return the main process's value in every process."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def by_main(work: Callable[[], T]) -> T:
    """Do something in the main process alone and return its result in every process.

    Raises:
        Mistake: the work raised it; every process does, so that none waits for another.
    """
    if world_size() == 1:
        return work()
    result: Any = None
    mistake: tuple[str, str, str] | None = None
    if rank() == 0:
        try:
            result = work()
        except Mistake as found:
            mistake = (found.place, found.problem, found.remedy)
    result, mistake = from_main((result, mistake))
    if mistake is not None:
        raise Mistake(*mistake)
    return result


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum over processes, on the device of `values`, which may be changed."""
    if world_size() == 1:
        return values
    moved = values.to(shared_accelerator().device)  # NCCL sums only what lies on its GPU
    torch.distributed.all_reduce(moved)
    return moved.to(values.device)


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


def exchanged(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of all processes in every process: the first of each in the order of ranks, then the second ones, and so on."""
    own = iter(batches)
    while True:
        found: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(found, next(own, None))
        present = [batch for batch in found if batch is not None]
        if not present:
            return
        yield from present


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, put together where it is sharded (then every process must call)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tree: Any) -> Any:
    """Return a nested state with every sharded tensor whole (every process must call)."""
    if isinstance(tree, Tensor):
        return whole(tree)
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value) for value in tree)
    return tree


def laid_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a value per weight laid out as the parameter is: on its device, and sharded where it is (every process must hold the whole value)."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def say_once(say: Callable[[], None]) -> None:
    """Let the first process that comes here speak; the others wait until it has, for a launcher ends all when one ends."""
    if not _announced():
        return say()
    try:
        several()  # a mistake may come before the group is built
        store = torch.distributed.distributed_c10d._get_default_store()
        first = store.add("remanence/mistakes", 1) == 1
        if first:
            say()
            store.set("remanence/said", "yes")
        else:
            store.wait(["remanence/said"], timedelta(seconds=10))
    except (RuntimeError, ValueError):  # the store's keeper is gone: it failed and spoke first
        return


def leave() -> None:
    """Leave the group, if there is one: its threads must have ended before the interpreter does, or the process may abort after its work is done."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start_missing() -> None:
    """Start the processes that `accelerate launch --cpu --num_processes N` only announces, wait for them, and exit with the first failure's code.

    Without an mpirun host file Accelerate starts a single process there, and says no word: N processes' work would be done by one on a part of the
    batch. The number stands only on the launcher's command line, which is read with Accelerate's own parser.
    """
    launched = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") and "MASTER_ADDR" in os.environ
    ranked = ("WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if not launched or any(name in os.environ for name in ranked):
        return
    count = _processes_asked_for()
    if count < 2:
        return
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves
    config = LaunchConfig(
        1, 1, count, run_id="remanence", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1
    )
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)
    sys.exit(0)


def _processes_asked_for() -> int:
    """Return N of the `accelerate launch` that started this process (1: it cannot be seen)."""
    import psutil
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return 1
    ends = ("launch", "launch.py")  # accelerate launch, accelerate-launch, -m accelerate.commands.launch
    place = next((number for number, word in enumerate(words) if word.endswith(ends)), None)
    if place is None:
        return 1
    args = launch_command_parser().parse_args(words[place + 1 :])
    if args.num_processes is None and args.config_file is not None:
        return int(load_config_from_file(args.config_file).num_processes)
    return int(args.num_processes or 1)
