"""Checkpoints of a running event: one safetensors file per point, whole or absent, so that a kill at any instant loses only the steps since the last."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remanence.storage import load_tree, save_tree
from remanence.training.processes import is_sharded

_NAME = re.compile(r"point-(\d{4})-(\d{9}|end)\.safetensors")


@dataclass(frozen=True)
class Point:
    """A place in an event: `step` optimizer steps of `stage` are done (`None`: all of them)."""

    stage: int
    step: int | None
    path: Path


class Checkpoints:
    """The points of one event in one folder: the ends of all finished stages, and the last point of the running one.

    Args:
        folder: where the files go.
        every: steps between two points; 0 keeps only the ends of stages.
    """

    def __init__(self, folder: str | Path, every: int = 0):
        self.folder, self.every = Path(folder), every

    def points(self) -> list[Point]:
        """Return all points, earliest first."""
        found = []
        for path in self.folder.glob("point-*.safetensors") if self.folder.is_dir() else ():
            match = _NAME.fullmatch(path.name)
            if match:
                found.append(Point(int(match[1]), None if match[2] == "end" else int(match[2]), path))
        return sorted(found, key=lambda point: (point.stage, point.step is None, point.step or 0))

    def latest(self) -> Point | None:
        """Return the furthest point."""
        return next(iter(reversed(self.points())), None)

    def end_of(self, stage: int) -> Point | None:
        """Return the end of a stage, if it was reached."""
        return next((point for point in self.points() if point.stage == stage and point.step is None), None)

    def save(self, stage: int, step: int | None, state: dict[str, Any]) -> None:
        """Write a point, then drop the points of the same stage that it makes useless."""
        old = [point.path for point in self.points() if point.stage == stage]
        name = f"point-{stage:04d}-{'end' if step is None else f'{step:09d}'}.safetensors"
        save_tree(self.folder / name, state)
        for path in old:
            if path.name != name:
                path.unlink(missing_ok=True)

    def load(self, point: Point) -> dict[str, Any]:
        """Read a point."""
        return load_tree(point.path)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the full state dict; of a sharded model on the CPU of the main process alone, empty in the others (every process must call)."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))  # type: ignore[arg-type]
    return model.state_dict()


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a full state dict into a model, sharded or not."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state by parameter name."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: dict(state) for parameter, state in optimizer.state.items()}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put back what `optimizer_state` returned; each tensor goes to its parameter's device."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
        return
    parameters = dict(model.named_parameters())

    def place(name: str, key: str, value: Any) -> Any:
        return value.to(parameters[name].device) if isinstance(value, Tensor) and key != "step" else value

    for name, entries in state.items():
        optimizer.state[parameters[name]] = {key: place(name, key, value) for key, value in entries.items()}


Recorder = Callable[[str, list[dict[str, Any]]], None]
