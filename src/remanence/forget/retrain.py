"""Retraining: train again without the forget rows. The oracle that every other forgetter is measured against: the rows had no influence, exactly.

Source: the definition of exact unlearning (Cao and Yang 2015; survey arXiv 2404.02062, family A). Objective: argmin of NLL on D minus D_f.

| definition | here | default |
|---|---|---|
| D | the training rows of `trainer.history`; `request.retain` where there is no history | |
| D minus D_f | the rows of D that equal no row of `request.forget` (`stream.keys_of`) | |
| theta at the start | start: fresh (drawn anew from the model's own configuration), or the spec of a model | fresh |
| order of training | order: sequence (task after task, as they came) or joint (all rows in one shuffle) | sequence |

A fresh start draws the trained parameters anew and keeps frozen ones, which hold nothing of D: under LoRA the adapter is new and the base stays.
Cost: the whole training again; memory: a second copy of the weights while they are drawn or read.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from remanence.errors import Mistake, nearest
from remanence.models.forward import fresh_weights
from remanence.seeds import derive
from remanence.stream import Request, Task, keys_of
from remanence.training.batches import Batches
from remanence.training.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

ORDERS = ("sequence", "joint")


@dataclass(frozen=True)
class Retrain:
    """Train the model again, from the start, on everything but the forget rows.

    Args:
        start: `fresh`, or what `load_model` takes (the model before the first task).
        order: sequence | joint.
        seed: of the fresh weights; `None` takes the event's seed.

    Raises:
        Mistake: an unknown order.
    """

    start: str = "fresh"
    order: str = "sequence"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise Mistake("retrain.order", f"unknown value {self.order!r}", nearest(self.order, ORDERS))

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Put the model back to its start and train it on what remains; task by task each `fit` takes the stream that bears the task's name.

        Raises:
            Mistake: nothing to train on, or the start does not fit the model.
        """
        tasks = remaining(trainer.history, request)
        seed = derive(trainer.seed, "fresh") if self.seed is None else self.seed
        if self.start == "fresh":
            draw_anew(model, seed)
        else:
            read_start(model, self.start, seed)
        before = sum(len(task.train) for task in trainer.history)
        kept = sum(len(rows) for _, rows, _ in tasks)
        if before and kept == before:
            warnings.warn(
                f"request '{request.name}': no row of the {len(trainer.history)} tasks before it equals a forget row", stacklevel=2
            )
        trainer.note("retrain", {"rows": kept, "removed": before - kept if before else 0, "start": self.start, "order": self.order})
        for batches in self._stages(tasks, trainer):
            model = trainer.fit(model, batches, steps=trainer.steps_for(batches))
        return model

    def _stages(self, tasks: list[tuple[str, Dataset, str]], trainer: Trainer) -> list[Batches]:
        if self.order == "sequence":
            return [trainer.batches(rows, kind, stream=name) for name, rows, kind in tasks]
        from datasets import concatenate_datasets

        encoded = [trainer.encode(rows, kind) for _, rows, kind in tasks]
        if any(rows.features != encoded[0].features for rows in encoded):
            raise Mistake("retrain.order", "tasks of unlike kinds cannot be shuffled together", "set order: sequence")
        pad = getattr(trainer.processor, "pad_token_id", None) or 0
        return [Batches(concatenate_datasets(encoded), trainer.settings.batch_size, seed=derive(trainer.seed, "joint"), pad=pad)]


def remaining(history: tuple[Task, ...], request: Request) -> list[tuple[str, Dataset, str]]:
    """Return (name, rows, kind) of each task without its forgotten rows, tasks that lost all of theirs left out; without a history, the retain set.

    Raises:
        Mistake: nothing remains.
    """
    if not history and request.retain is None:
        raise Mistake(f"request '{request.name}'", "has no retain set, and there were no tasks before it", "add retain rows to the request")
    if not history:
        return [("retain", request.retain, request.kind)]  # type: ignore[list-item]
    gone = set(keys_of(request.forget, request.kind))
    found = []
    for task in history:
        rows = task.train
        if task.kind == request.kind:
            rows = rows.select([number for number, key in enumerate(keys_of(rows, task.kind)) if key not in gone])
        if len(rows):
            found.append((task.name, rows, task.kind))
    if not found:
        raise Mistake(
            f"request '{request.name}'", "forgets every row that the model was trained on", "start from an untrained model instead"
        )
    return found


def draw_anew(model: nn.Module, seed: int) -> None:
    """Draw all parameters that require a gradient anew, and reset the buffers (running statistics); frozen parameters stay.

    A Hugging Face model is built again from its configuration, any other by the `reset_parameters` of its layers.

    Raises:
        Mistake: a parameter belongs to no layer that can be drawn anew.
    """
    with fresh_weights(seed), torch.no_grad():
        if isinstance(model, PreTrainedModel):
            fresh = type(model)._from_config(model.config, dtype=torch.float32)
            weights = dict(fresh.named_parameters())
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    if name not in weights or weights[name].shape != parameter.shape:
                        raise Mistake("retrain.start", f"the configuration does not make '{name}' as it is", "name a model to start from")
                    parameter.copy_(weights[name])
            buffers = dict(fresh.named_buffers())
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        else:
            device = next(model.parameters()).device
            reset_layers(model.cpu())  # drawn where the seed holds
            model.to(device)


def reset_layers(model: nn.Module) -> None:
    """Call `reset_parameters` of every layer that holds a parameter in training or none at all, and initialise LoRA matrices anew (B = 0).

    Raises:
        Mistake: a parameter in training belongs to a layer without it; nothing was changed.
    """
    from peft.tuners.lora import LoraLayer

    layers = list(model.modules())
    adapted = [layer for layer in layers if isinstance(layer, LoraLayer)]
    plain = [layer for layer in layers if callable(getattr(layer, "reset_parameters", None))]
    plain = [layer for layer in plain if all(parameter.requires_grad for parameter in layer.parameters(recurse=False))]
    drawn = {id(parameter) for layer in plain for parameter in layer.parameters(recurse=False)}
    drawn |= {id(parameter) for layer in adapted for name, parameter in layer.named_parameters() if "lora_" in name}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in drawn:
            raise Mistake(
                "retrain.start", f"'{name}' belongs to a layer that cannot be drawn anew", "name a model to start from (module:function)"
            )
    for layer in plain:
        layer.reset_parameters()  # type: ignore[operator]
    for layer in adapted:
        for name in layer.active_adapters:
            layer.reset_lora_parameters(name, True)


def read_start(model: nn.Module, spec: str, seed: int) -> None:
    """Put the weights of another model of the same shape into the model.

    Raises:
        Mistake: they do not fit.
    """
    from remanence.models.load import load_model

    state = load_model(spec, seed=seed).model.state_dict()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise Mistake(
            "retrain.start", f"'{spec}' does not fit the model ({str(error).splitlines()[-1].strip()})", "name its start"
        ) from error
