"""The one training loop. Every method calls `Trainer.fit`; none copies it.

`fit` takes micro-batches by number, so a step is a pure function of (weights, optimizer state, seed, step): a run that was killed goes on from its last
checkpoint and ends with the same bits. Each call of `fit` inside an event is a numbered stage; on resume, finished stages put back the weights they ended
with, and the running one continues in the middle.

Accelerate gives device, precision, processes and sharding. Replicated gradients are averaged here, once per step (not by wrapping the model), because
methods take more than one forward or backward pass per step; sharded models (FSDP2) reduce their own.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remanence.data.encode import TEMPLATE, encode_rows, feature_columns
from remanence.errors import Mistake, nearest
from remanence.models.forward import evaluating, unwrapped
from remanence.seeds import derive, generator
from remanence.training.batches import Batch, Batches, Counted, Numbered, Pairs
from remanence.training.checkpoint import (
    Checkpoints,
    Recorder,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from remanence.training.losses import nll
from remanence.training.processes import (
    average_gradients,
    by_main,
    gathered,
    is_sharded,
    keep_sharded,
    rank,
    shared_accelerator,
    sum_over_processes,
    world_size,
)
from remanence.training.scoring import walk

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from remanence.stream import Task

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Settings:
    """How to train. One field = one recipe key under `training:`.

    Args:
        steps: optimizer steps of a stage; `None` takes `epochs`.
        epochs: passes over the data, where `steps` is not given.
        batch_size: rows per micro-batch and process.
        accumulate: micro-batches per optimizer step.
        optimizer: adamw | sgd.
        lr: learning rate.
        weight_decay: of weights with two or more dimensions; vectors (biases, norms) are not decayed.
        beta1: of AdamW.
        beta2: of AdamW.
        eps: of AdamW.
        momentum: of SGD.
        schedule: constant | linear | cosine, all behind the warm-up; linear and cosine end at zero.
        warmup: below 1 the share of the steps, from 1 on their number, over which the rate rises linearly.
        clip: largest norm of the trained parameters' gradient; `None` does not clip.
        length: tokens per row.
        template: of questions and answers.
        precision: fp32 | bf16 (autocast) | auto (what `accelerate launch` says).
        gradient_checkpointing: recompute activations in the backward pass.
        log_every: steps between two readings of the loss, which is also when a NaN is noticed.
        checkpoint_every: steps between two checkpoints inside a stage; 0: only at its end.
        trackers: of Accelerate (tensorboard, wandb).
    """

    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 16
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    schedule: str = "constant"
    warmup: float = 0.0
    clip: float | None = 1.0
    length: int = 256
    template: str = TEMPLATE
    precision: str = "auto"
    gradient_checkpointing: bool = False
    log_every: int = 10
    checkpoint_every: int = 0
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def need(name: str, good: bool, what: str) -> None:
            if not good:
                raise Mistake(f"training.{name}", f"must be {what}, got {getattr(self, name)!r}", "correct the value")

        need("steps", self.steps is None or self.steps >= 0, "0 or more")
        for name in ("batch_size", "accumulate", "log_every"):
            need(name, getattr(self, name) >= 1, "1 or more")
        for name in ("epochs", "lr", "weight_decay", "warmup", "checkpoint_every", "momentum"):
            need(name, 0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        for name in ("beta1", "beta2"):
            need(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        need("eps", self.eps > 0, "above 0")
        need("clip", self.clip is None or self.clip > 0, "above 0, or null")
        need("length", self.length >= 2, "2 or more")
        for name, known in (("optimizer", ("adamw", "sgd")), ("schedule", tuple(SCHEDULES)), ("precision", ("auto", "fp32", "bf16"))):
            if getattr(self, name) not in known:
                raise Mistake(f"training.{name}", f"unknown value {getattr(self, name)!r}", nearest(str(getattr(self, name)), known))

    def changed(self, place: str, changes: dict[str, Any]) -> Settings:
        """Return the settings with some keys changed.

        Raises:
            Mistake: an unknown key, or a value of the wrong type.
        """
        from pydantic import TypeAdapter, ValidationError

        known = {field.name for field in fields(self)}
        for key in changes:
            if key not in known:
                raise Mistake(f"{place}.{key}", "unknown key", nearest(key, known))
        try:
            return TypeAdapter(Settings).validate_python({field.name: getattr(self, field.name) for field in fields(self)} | changes)
        except ValidationError as error:
            first = error.errors()[0]
            raise Mistake(
                ".".join([place, *map(str, first["loc"])]), f"{first['msg']}, got {first['input']!r}", "correct the value"
            ) from None


SCHEDULES: dict[str, Callable[[float], float]] = {  # multiplier of the rate after the share x of the steps behind the warm-up
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


@dataclass(frozen=True)
class Step:
    """What a callback is told: the number of the optimizer step in its stage (from 0), and the step's micro-batches in this process."""

    number: int
    batches: Sequence[Batch]


_AS_IT_IS: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

Callback = Callable[[nn.Module, Step], bool | None]  # of `after_step`: `True` ends the stage


@runtime_checkable
class Stateful(Protocol):
    """Something whose state travels with checkpoints."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Tending(Protocol):
    """A model with losses of its own (routers, critics) and a state that changes behind each optimizer step (a memory that is written)."""

    def own_loss(self) -> Tensor | None:
        """Return the losses of the forward passes since the last call."""
        ...

    def after_step(self) -> None:
        """Do what waited for the optimizer's step."""
        ...


class Trainer:
    """Train models; one object serves one event.

    Args:
        settings: how to train.
        processor: tokenizer or image processor that encodes rows.
        seed: every random stream of the event is derived from it.
        name: of the event, for messages and the progress bar.
        owner: the method at work; if it has a state, the state is saved with every checkpoint.
        history: the tasks before this event, without rows that were forgotten since (for methods that may look back: joint training, retraining).
        checkpoints: where to keep points of this event; `None` keeps none.
        record: takes (table, rows) for the ledger.
        watch: called as `watch(model, step)` after every optimizer step, `step` counted over the event's stages; `True` ends the stage.
        progress: draw a bar for whatever takes more than a second or two.
        accelerator: of Accelerate; by default this process's one.
        tracked: name of the run and folder, for trackers.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        processor: Any = None,
        seed: int = 0,
        name: str = "training",
        owner: object = None,
        history: Sequence[Task] = (),
        checkpoints: Checkpoints | None = None,
        record: Recorder | None = None,
        watch: Callable[[nn.Module, int], bool | None] | None = None,
        progress: bool = True,
        accelerator: Accelerator | None = None,
        tracked: tuple[str, Path] = ("remanence", Path("runs/trackers")),
    ):
        self.settings = settings or Settings()
        self.processor, self.seed, self.name, self.owner, self.history = processor, seed, name, owner, tuple(history)
        self.accelerator = accelerator or shared_accelerator()
        self.steps_done = 0
        self._tracked = tracked
        self._checkpoints, self._record, self._watch, self._progress = checkpoints, record, watch, progress
        self._stage = 0
        self._only: frozenset[str] | None = None
        self._pairing: Callable[[Batches, Batches | None], Counted] | None = None

    # What a method asks for.

    def encode(self, rows: Dataset, kind: str) -> Dataset:
        """Return rows as model inputs (see `encode_rows`), with the settings' length and template."""
        return encode_rows(rows, kind, self.processor, length=self.settings.length, template=self.settings.template)

    def batches(self, rows: Dataset, kind: str, *, stream: str = "task", size: int | None = None, shuffle: bool = True) -> Batches:
        """Return shuffled batches of rows; the order depends on the event's seed and the stream's name alone, so all methods see the same."""
        pad = getattr(self.processor, "pad_token_id", None) or 0
        plain = feature_columns(rows) if kind == "classes" else None
        return Batches(
            plain or self.encode(rows, kind), size or self.settings.batch_size, seed=derive(self.seed, stream), shuffle=shuffle, pad=pad
        )

    def pairs(self, forget: Batches, retain: Batches | None) -> Counted:
        """Return `{"forget": ..., "retain": ...}` batches: each stream in its own order, or as `paired` says."""
        return self._pairing(forget, retain) if self._pairing is not None else Pairs(forget, retain)

    @contextlib.contextmanager
    def paired(self, pairing: Callable[[Batches, Batches | None], Counted]) -> Iterator[None]:
        """Let a function decide which retain row meets which forget row in every `pairs` inside (a method that wraps another one)."""
        before, self._pairing = self._pairing, pairing
        try:
            yield
        finally:
            self._pairing = before

    def steps_for(self, batches: Counted) -> int:
        """Return the optimizer steps that the settings ask for on these batches."""
        if self.settings.steps is not None:
            return self.settings.steps
        pass_over = math.ceil(
            len(batches) / (self.settings.accumulate * world_size())
        )  # as many as one process with all of the batch takes
        return max(1, math.ceil(self.settings.epochs * pass_over))

    def first_seen(self, batches: Batches, step: Step) -> np.ndarray:
        """Return the numbers of the rows that a step is the first of its stage to train on, over all micro-batches and processes, in their order.

        For memories that take each row once: what they are shown does not depend on accumulation or processes.
        """
        share = self.settings.accumulate * world_size()
        first, last = step.number * share * batches.size, min((step.number + 1) * share * batches.size, batches.count)
        if first >= last:
            return np.zeros(0, np.int64)
        return np.concatenate([batches.numbers(step.number * share + part) for part in range(share)])[: last - first]

    def generator(self, *words: object) -> torch.Generator:
        """Return a generator of this event, named by words."""
        return generator(self.seed, *words)

    def note(self, name: str, content: Any) -> None:
        """Put something into the ledger under a name (a mask, a count, a receipt); the content must be plain JSON."""
        self.record("notes", [{"name": name, "content": content if isinstance(content, dict | list) else {"value": content}}])

    def record(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to a table of the ledger, if there is one."""
        if self._record is not None and self.is_main:
            self._record(table, rows)

    def track(self, values: dict[str, float], step: int) -> None:
        """Send numbers to the settings' trackers, under the event's name."""
        from remanence.training.trackers import open_tracker

        for kind in self.settings.trackers:
            run, folder = self._tracked
            open_tracker(kind, run, folder).log({f"{self.name}/{key}": value for key, value in values.items()}, step=step)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return rank() == 0

    @contextlib.contextmanager
    def only(self, names: Iterable[str]) -> Iterator[None]:
        """Confine every `fit` inside to these parameters (a method that wraps another one freezes the rest with it)."""
        before, names = self._only, frozenset(names)
        self._only = names if before is None else before & names
        try:
            yield
        finally:
            self._only = before

    @contextlib.contextmanager
    def settled(self, settings: Settings) -> Iterator[None]:
        """Train by other settings inside (a method that does an earlier event's training over again)."""
        before, self.settings = self.settings, settings
        try:
            yield
        finally:
            self.settings = before

    def gradient(self, model: nn.Module, loss: Loss, *batches: Batch) -> dict[str, Tensor]:
        """Return the mean gradient of a loss over all processes' batches for every parameter in training; `.grad` stays as it is.

        Of several batches (the micro-batches of a step) it is the gradient on all of them together, however unevenly rows or tokens are spread.
        """
        sharded, world = is_sharded(model), world_size()
        if sharded:
            keep_sharded(model)
        if world * len(batches) > 1:
            share_denominators(list(batches), world * len(batches))
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        kept = [parameter.grad for _, parameter in trained]
        for _, parameter in trained:
            parameter.grad = None
        for batch in batches:
            with self._autocast():
                value = loss(model, batch.to(self.accelerator.device)) / len(batches)
            value.backward()
        if world > 1 and not sharded:
            average_gradients(parameter for _, parameter in trained)
        found = {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for name, parameter in trained}
        for (_, parameter), grad in zip(trained, kept):
            parameter.grad = grad
        return found

    def over_rows(self, model: nn.Module, batches: Batches, function: Loss, shape: tuple[int, ...] = ()) -> Tensor:
        """Return a function's value for every row, float64 (N, *shape) on the CPU in the order of the rows; processes share the work.

        The model is in evaluation mode, without gradients, in the settings' precision, and is left as it was.

        Args:
            model: any module.
            batches: of the rows.
            function: of (model, batch), gives (B, *shape).
            shape: of the value of one row.
        """
        device, size = self.accelerator.device, batches.size
        world, turn = (1, 0) if is_sharded(model) else (world_size(), rank())  # a sharded model runs in all processes at once
        model.to(device)
        found = torch.zeros(batches.count, *shape, dtype=torch.float64, device=device)
        with evaluating(model), self._autocast():
            for first in range(turn * size, batches.count, world * size):
                rows = np.arange(first, min(first + size, batches.count))
                found[first : first + len(rows)] = function(model, batches.take(rows).to(device)).to(found.dtype)
        return (found if world == 1 else sum_over_processes(found)).cpu()

    def summed_gradient(self, model: nn.Module, batches: Batches, loss: Loss = nll) -> dict[str, Tensor]:
        """Return the gradient of a loss summed over all rows for every parameter in training, at least in fp32; processes share the work.

        The model is in evaluation mode, in the settings' precision, and is left as it was, `.grad` too. How the rows are batched does not matter.

        Args:
            model: any module that is not sharded.
            batches: of the rows.
            loss: of (model, batch), a mean that divides by `batch.rows` or `batch.tokens` alone: both are 1 here, so that it is a sum.
        """
        model.to(self.accelerator.device)
        chosen = self._chosen(model, None)
        names, weights = zip(*((name, parameter) for name, parameter in model.named_parameters() if name in chosen))
        totals = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
        with evaluating(model), torch.enable_grad():
            for _, batch in islice(walk(batches, batches.size, model), rank(), None, world_size()):
                batch._rows = batch._tokens = 1.0
                with self._autocast():
                    value = loss(model, batch)
                for total, slope in zip(totals, torch.autograd.grad(value, weights, allow_unused=True)):
                    if slope is not None:
                        total += slope
        return dict(zip(names, map(sum_over_processes, totals)))

    # The loop.

    def fit(
        self,
        model: nn.Module,
        batches: Numbered,
        loss: Loss = nll,
        *,
        steps: int | None = None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        schedule: Callable[[int], float] | None = None,
        parameters: Iterable[str] | None = None,
        after_backward: Callback | None = None,
        after_step: Callback | None = None,
        noise: int | None = None,
    ) -> nn.Module:
        """Minimise a loss over batches; the model is changed in place and returned.

        Args:
            model: any module.
            batches: gives micro-batch i for any i; process r of W takes numbers r, r+W, ... of each step.
            loss: a plain function of (model, batch); a mean that divides by `batch.rows` or `batch.tokens` is exact under accumulation and processes.
            steps: optimizer steps; by default as the settings say.
            optimizer: makes one from the list of trained parameters; by default as the settings say.
            schedule: multiplier of the rate at a step; by default as the settings say.
            parameters: names of those to train; the others get no gradient and no optimizer state. By default all that require a gradient.
            after_backward: called when gradients are averaged, before clipping.
            after_step: called after the optimizer's step; if it returns `True` the stage ends here (all processes must agree).
            noise: seed of what layers draw (dropout); by default that of the event and the stage. For a method that does an earlier stage over again.

        Raises:
            Mistake: nothing to train, or a loss that is not finite (nothing of the step is saved).
        """
        settings, stage = self.settings, self._stage
        steps = steps if steps is not None else self.steps_for(batches)  # type: ignore[arg-type]
        first, self._stage = self.steps_done, stage + 1
        point = self._checkpoints.latest() if self._checkpoints else None
        if self._checkpoints and point and (ended := self._checkpoints.end_of(stage)):
            state = self._checkpoints.load(ended)
            self._restore(model, None, state)
            self.steps_done = state["steps_done"]
            return model
        shard = str(self.accelerator.distributed_type).endswith("FSDP") and not is_sharded(model)
        if is_sharded(model):
            keep_sharded(model)
        elif not shard:  # what will be sharded may be too large for one device
            model.to(self.accelerator.device)
        chosen = self._chosen(model, parameters)
        modes = [(module, module.training) for module in model.modules()]
        flags = [parameter.requires_grad for parameter in model.parameters()]  # by place: sharding makes new parameters
        generators = _NoiseKept(self.accelerator.device)
        drawn = (derive(self.seed, "noise", stage) if noise is None else noise) >> 1
        known = isinstance(unwrapped(model), PreTrainedModel)  # a method's own small module cannot recompute its activations
        recomputing = settings.gradient_checkpointing and known
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        try:
            model.train()
            if recomputing:
                model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            descent = optimizer(trained) if optimizer else make_optimizer(settings, trained)
            if shard:
                model, wrapped = self.accelerator.prepare(model, descent)
                descent = wrapped.optimizer
                keep_sharded(model)
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            start = 0
            if self._checkpoints and point and point.stage == stage:
                self._restore(model, descent, self._checkpoints.load(point))
                start = point.step or 0
            rate = schedule or make_schedule(settings, steps)
            numbers = range(start, steps)
            done = self._loop(model, batches, loss, descent, rate, trained, numbers, first, stage, drawn, after_backward, after_step)
            descent.zero_grad(set_to_none=True)
        finally:
            generators.restore()
            for module, training in modes:
                module.training = training
            for parameter, flag in zip(model.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)
            if recomputing:
                model.gradient_checkpointing_disable()  # type: ignore[operator]
        self.steps_done = first + done
        self._save(model, None, stage, None)
        return model

    def _loop(
        self,
        model: nn.Module,
        batches: Numbered,
        loss: Loss,
        descent: torch.optim.Optimizer,
        rate: Callable[[int], float],
        trained: list[nn.Parameter],
        numbers: range,
        first: int,
        stage: int,
        noise: int,
        after_backward: Callback | None,
        after_step: Callback | None,
    ) -> int:
        """Do the steps and return the number of the last one, counted from 1."""
        settings, world, place, device = self.settings, world_size(), rank(), self.accelerator.device
        parts, replicated = settings.accumulate, world > 1 and not is_sharded(model)
        base = [group["lr"] for group in descent.param_groups]
        log = _Log(self, stage, numbers, first)
        core = unwrapped(model)
        tending = core if isinstance(core, Tending) else None
        with log:
            for number in numbers:
                micro = [batches[(number * parts + part) * world + place] for part in range(parts)]
                if parts * world > 1:
                    share_denominators(micro, parts * world)
                multiplier = rate(number)
                for group, lr in zip(descent.param_groups, base):
                    group["lr"] = lr * multiplier
                losses: list[Tensor] = []
                for part, batch in enumerate(micro):
                    seed_noise(noise + (number * parts + part) * world + place, device)  # dropout is a function of the micro-batch's number
                    with self._autocast():
                        here = batch.to(device)
                        value = loss(
                            model, here if tending is None else here.masked()
                        )  # what reads to remember must not take padding for text
                        if tending is not None and (own := tending.own_loss()) is not None:
                            value = value + own
                        if parts > 1:
                            value = value / parts
                    value.backward()
                    losses.append(value.detach())
                if replicated:
                    average_gradients(trained)
                step = Step(number, micro)
                if after_backward is not None:
                    after_backward(model, step)
                norm = nn.utils.clip_grad_norm_(trained, settings.clip) if settings.clip is not None else None
                descent.step()
                for group in descent.param_groups:  # what zero_grad does, without its profiler
                    for parameter in group["params"]:
                        parameter.grad = None
                if tending is not None:
                    tending.after_step()
                enough = after_step is not None and after_step(model, step) is True
                log.add(number, sum(losses[1:], losses[0]), base[0] * multiplier, norm)
                if self._watch is not None:
                    enough = self._watch(model, first + number + 1) is True or enough
                if enough:
                    return number + 1
                if (
                    self._checkpoints
                    and self._checkpoints.every
                    and (number + 1) % self._checkpoints.every == 0
                    and number + 1 < numbers.stop
                ):
                    log.flush()
                    self._save(model, descent, stage, number + 1)
        return numbers.stop

    def _chosen(self, model: nn.Module, parameters: Iterable[str] | None) -> frozenset[str]:
        """Return the names of the parameters to train."""
        named = dict(model.named_parameters())
        chosen = {name for name, parameter in named.items() if parameter.requires_grad} if parameters is None else set(parameters)
        for name in chosen:
            if name not in named:
                raise Mistake(f"parameters of {self.name}", f"there is no '{name}' in the model", nearest(name, named))
        if self._only is not None:
            chosen &= self._only
        if not chosen:
            raise Mistake(self.name, "there is nothing to train: every parameter is frozen", "free some parameters")
        return frozenset(chosen)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        precision = self.settings.precision if self.settings.precision != "auto" else self.accelerator.mixed_precision
        return torch.autocast(self.accelerator.device.type, torch.bfloat16) if precision == "bf16" else _AS_IT_IS

    def _save(self, model: nn.Module, descent: torch.optim.Optimizer | None, stage: int, step: int | None) -> None:
        """Write a checkpoint (every process gathers, the main one writes)."""
        if self._checkpoints is None:
            return
        state: dict[str, Any] = {"model": model_state(model), "steps_done": self.steps_done}
        if descent is not None:
            state["optimizer"] = optimizer_state(model, descent)
        if isinstance(self.owner, Stateful):
            state["owner"] = gathered(self.owner.state_dict())
        kept = self._checkpoints
        by_main(lambda: kept.save(stage, step, state))

    def _restore(self, model: nn.Module, descent: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
        load_model_state(model, state["model"])
        if descent is not None:
            load_optimizer_state(model, descent, state["optimizer"])
        if isinstance(self.owner, Stateful):
            self.owner.load_state_dict(state["owner"])


def share_denominators(micro: list[Batch], pieces: int) -> None:
    """Give every micro-batch of a step the average counts over the step's `pieces` (micro-batches x processes), so that means of means are exact.

    Streams of the same position are matched: batch["retain"] of one piece with batch["retain"] of the others.
    """
    columns = list(zip(*([*batch.parts()] for batch in micro), strict=True))
    counts = torch.tensor(
        [[sum(part.own_rows() for part in parts), sum(part.own_tokens() for part in parts)] for parts in columns], dtype=torch.float64
    )
    counts = sum_over_processes(counts)
    for parts, (rows, tokens) in zip(columns, (counts / pieces).tolist()):
        for part in parts:
            part._rows, part._tokens = rows, tokens or 1.0


def make_optimizer(settings: Settings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the settings' optimizer; weight decay touches only parameters with two or more dimensions."""
    wide, thin = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups = [{"params": wide, "weight_decay": settings.weight_decay}, {"params": thin, "weight_decay": 0.0}]
    if settings.weight_decay == 0:
        groups = [{"params": parameters, "weight_decay": 0.0}]  # one group, one kernel
    groups = [group for group in groups if group["params"]]
    fused = all(p.is_floating_point() and type(p.data) is Tensor for p in parameters) or None
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=fused)


def make_schedule(settings: Settings, steps: int, floor: float = 0.0) -> Callable[[int], float]:
    """Return the multiplier of the rate for each step from 0: (n+1)/warmup inside the warm-up, then the schedule's curve, ending at `floor` where it would at 0."""
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * steps
    curve = SCHEDULES[settings.schedule]

    def multiplier(number: int) -> float:
        if number < warmup:
            return min(1.0, (number + 1) / warmup)
        return floor + (1 - floor) * curve((number - warmup) / max(1.0, steps - warmup))

    return multiplier


def seed_noise(seed: int, device: torch.device) -> None:
    """Seed the global generators that layers draw from, of the CPU and of one device; `torch.manual_seed` would queue a call for every absent one."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class _NoiseKept:
    """The global generators as they were, so that a fit leaves no trace in them."""

    def __init__(self, device: torch.device):
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._device = device

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class _Log:
    """Losses, rates and norms of a stage: kept as tensors, read every few steps, written to the ledger, the trackers and the bar."""

    def __init__(self, trainer: Trainer, stage: int, numbers: range, first: int):
        self.trainer, self.stage, self.numbers, self.first = trainer, stage, numbers, first
        self.rows: list[tuple[int, Tensor, float, Tensor | None]] = []
        self.every = trainer.settings.log_every
        self.bar: Any = None
        self.begun = time.monotonic()

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            if self.bar is not None:
                self.bar.stop()

    def add(self, number: int, loss: Tensor, rate: float, norm: Tensor | None) -> None:
        self.rows.append((number, loss, rate, norm))
        if len(self.rows) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Read the losses since the last time.

        Raises:
            Mistake: one of them is not finite.
        """
        if not self.rows:
            return
        trainer = self.trainer
        losses = (sum_over_processes(_read([loss for _, loss, _, _ in self.rows])) / world_size()).tolist()
        norms = _read([norm for _, _, _, norm in self.rows if norm is not None]).tolist() or [None] * len(losses)
        rows = []
        for (number, _, rate, _), loss, norm in zip(self.rows, losses, norms):
            if not math.isfinite(loss):
                raise Mistake(
                    f"{trainer.name}, step {number + 1}",
                    f"the loss is {loss}",
                    f"lower the learning rate (now {rate:g}) or clip gradients harder",
                )
            for metric, value in (("loss", loss), ("rate", rate), ("norm", norm)):
                if value is not None:
                    rows.append({"stage": self.stage, "step": number, "metric": metric, "value": value})
        trainer.record("steps", rows)
        if trainer.settings.trackers and trainer.is_main:
            trainer.track({"loss": losses[-1], "rate": self.rows[-1][2]}, self.first + self.rows[-1][0] + 1)
        self._draw(self.rows[-1][0] + 1, losses[-1], self.rows[-1][2])
        self.rows.clear()

    def _draw(self, done: int, loss: float, rate: float) -> None:
        trainer = self.trainer
        if not trainer._progress or not trainer.is_main:
            return
        if self.bar is None:
            if time.monotonic() - self.begun < 1.0 or done >= self.numbers.stop:
                return
            from remanence.training.progress import bar

            self.bar = bar(trainer.name, self.numbers.stop)
        self.bar.show(done, f"loss {loss:.4g}  rate {rate:.3g}")


def _read(values: Sequence[Tensor]) -> Tensor:
    """Return scalars, sharded or not, as one float64 tensor on the CPU."""
    whole = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]
    return torch.stack(whole).to("cpu", torch.float64) if whole else torch.zeros(0, dtype=torch.float64)
