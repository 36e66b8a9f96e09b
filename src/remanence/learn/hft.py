"""Half fine-tuning (HFT): in each round train a random half of the weight matrices and freeze the other half; draw anew for the next round.

"HFT: Half Fine-Tuning for Large Language Models", Hui et al., ACL 2025, arXiv 2404.18466. Resetting half of a tuned model's matrices to their old values brings
much of the old knowledge back (*Half-Reset*, `half_reset` here); so freeze them in advance. A round is one task, or one stage such as SFT or DPO.

    theta <- theta - eta M o grad L(theta),    M in {0, 1} per matrix, drawn per round

| paper | here | default |
|---|---|---|
| share of trained parameters | `ratio` | 0.5 |
| category-, layer-, model-level selection | `level` | category |
| M of a round | `Mask.trained`, names of parameters | |
| fine-tuning it is put on | `inner`, any learner | Sequential |

Units are matrices with their biases (and the norms of queries and keys with theirs), in three categories of a block: attention {q, k, v, o}, MLP {gate, up, down},
norms. *category*: of n units the block trains floor or ceil of ratio n, such that the network's total is ratio n L, rounded at random without bias: 2 of 4,
{1, 2} of 3 in half of the layers each, 1 of 2. *layer*: whole blocks. *model*: one pool of all matrices and one of all norms, without balance. A fused qkv cannot be
split by tensors: {qkv, o} is a pair, as {gate_up, down} and {up, down}. Weights outside the blocks are not counted in the half: embeddings and head as switched,
the last norm with the head.

Frozen tensors get no gradient and no optimizer state, so neither decay nor momentum moves them. Clipping measures the trained parameters alone.
Differs from the paper: rules for ratios other than 1/2, odd layers, and families without gate are ours. Cost: gradients and moments for about half of the
matrices; activations as ever.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from remanence.errors import Mistake, nearest
from remanence.learn.sequential import Sequential
from remanence.models.forward import unwrapped
from remanence.seeds import derive, generator
from remanence.storage import write_text
from remanence.stream import Checking, Learner, Remembering, Request, Task
from remanence.training.half_units import divided, drawn, refuse, refuse_optimizer, shares
from remanence.training.trainer import Trainer

LEVELS = ("category", "layer", "model")


@dataclass(frozen=True)
class Mask:
    """What one round trains: enough to draw it again, and the names themselves."""

    round: int
    seed: int
    level: str
    ratio: float
    trained: tuple[str, ...]


@dataclass
class HalfTuning:
    """Confine any learner to a random half of the matrices, a new half each round.

    Args:
        ratio: share of the blocks' matrices that a round trains; 1 is full fine-tuning.
        level: category | layer | model.
        train_embeddings: train the embeddings (and positions) outside the half.
        train_head: train the output head and the last norm; `None`: as the embeddings.
        inner: the learner at work inside.
    """

    ratio: float = 0.5
    level: str = "category"
    train_embeddings: bool = True
    train_head: bool | None = None
    inner: Learner = field(default_factory=Sequential)
    rounds: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    flags: dict[str, bool] = field(default_factory=dict, init=False, repr=False)
    _model: nn.Module | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise Mistake("hft.level", f"unknown level '{self.level}'", nearest(self.level, LEVELS))
        if not 0 <= self.ratio <= 1:
            raise Mistake("hft.ratio", f"is {self.ratio}", "give a share from 0 to 1")
        if self.ratio == 0 and not self.train_embeddings and not self.train_head:
            raise Mistake("hft.ratio", "is 0 and the embeddings are frozen, so nothing is trained", "give a ratio above 0")

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Draw the round's mask and let the inner learner train what it names.

        Raises:
            Mistake: a layout without known blocks, an adapter, quantised weights, or tied embeddings that are to be frozen on one side only.
        """
        mask = self.draw(model, derive(trainer.seed, "hft"))
        trainer.note("mask", asdict(mask) | shares(model, mask.trained))
        with trainer.only(mask.trained):
            model = self.inner.learn(model, task, trainer)
        self.rounds.append(asdict(mask))
        return model

    def check(self, model: nn.Module, event: Task | Request) -> None:
        """Refuse a model that cannot be halved, before a life begins.

        Raises:
            Mistake: as `learn`.
        """
        refuse(model)
        divided(model, self.train_embeddings, self.train_head)
        if isinstance(self.inner, Checking):
            self.inner.check(model, event)

    def erase(self, request: Request, trainer: Trainer) -> int:
        """Make the inner learner let go of the forgotten rows, if it keeps any."""
        return self.inner.erase(request, trainer) if isinstance(self.inner, Remembering) else 0

    def state_dict(self) -> dict[str, Any]:
        """Return the masks of the rounds so far, and the inner learner's state."""
        return {"rounds": list(self.rounds), "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.rounds = list(state["rounds"])
        self.inner.load_state_dict(state["inner"])

    # Outside of `learn`, for other training loops.

    def draw(self, model: nn.Module, seed: int) -> Mask:
        """Draw the mask of the next round; the seed and the model's layout alone decide it, on any device."""
        refuse(model)
        inside, outside = divided(model, self.train_embeddings, self.train_head)
        chosen = drawn(inside, self.ratio, self.level, generator(seed, "mask"))
        trained = tuple(name for name, _ in model.named_parameters() if name in chosen or name in outside)
        return Mask(len(self.rounds), seed, self.level, self.ratio, trained)

    def begin_round(
        self, model: nn.Module, seed: int = 0, *, mask: Mask | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> Mask:
        """Freeze what the round does not train, until `end_round`; make the optimizer after this.

        Args:
            model: to train.
            seed: of the mask.
            mask: one to replay (see `load_mask`) instead of drawing.
            optimizer: one that exists already is checked: it must not hold frozen weights.

        Raises:
            Mistake: a round is under way, or the optimizer was made before the mask; else as `learn`.
        """
        if self._model is not None:
            raise Mistake("hft", "a round is under way", "end it first (end_round)")
        mask = mask or self.draw(model, seed)
        refuse_optimizer(model, mask.trained, optimizer)
        self._model, self.flags = model, {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.flags[name] and name in mask.trained)
            if not parameter.requires_grad:
                parameter.grad = None
        self.rounds.append(asdict(mask))
        return mask

    def end_round(self) -> None:
        """Give every weight the flag back that it had before the round."""
        model, self._model = self._model, None
        for name, parameter in model.named_parameters() if model is not None else ():
            parameter.requires_grad_(self.flags[name])

    @contextlib.contextmanager
    def round(self, model: nn.Module, seed: int = 0, *, mask: Mask | None = None) -> Iterator[Mask]:
        """Hold a round open: `with tuning.round(model, seed): ...` around any training loop."""
        yield_mask = self.begin_round(model, seed, mask=mask)
        try:
            yield yield_mask
        finally:
            self.end_round()


class HalfTuningCallback(TrainerCallback):
    """One round of half fine-tuning in a Hugging Face `Trainer` or one of TRL's; give it to the constructor (`callbacks=[...]`).

    Args:
        tuning: what to draw.
        seed: of the mask.
        mask: one to replay, when a run goes on from a checkpoint that has a `mask.json`.
    """

    def __init__(self, tuning: HalfTuning, seed: int = 0, mask: Mask | None = None):
        self.tuning, self.seed, self.mask = tuning, seed, mask
        self._begun = False

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **given: Any) -> None:
        """Freeze the other half before the trainer makes its optimizer."""
        if model is None:
            raise Mistake("HalfTuningCallback", "the trainer has no model yet", "give it one instead of model_init")
        self.mask = self.tuning.begin_round(model, self.seed, mask=self.mask, optimizer=given.get("optimizer"))
        self._begun = True
        if args.gradient_checkpointing and not self.tuning.train_embeddings:
            unwrapped(model).enable_input_require_grads()  # type: ignore[operator]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **given: Any) -> None:
        """Refuse to train without the mask."""
        if not self._begun or self.mask is None or model is None:
            raise Mistake("HalfTuningCallback", "the optimizer was made before the mask", "give the callback to the trainer's constructor")
        refuse_optimizer(model, self.mask.trained, given.get("optimizer"))

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write `mask.json` into the checkpoint."""
        if self.mask is not None and state.is_world_process_zero:
            save_mask(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "mask.json", self.mask)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """End the round."""
        self.tuning.end_round()
        self._begun = False


def save_mask(path: str | Path, mask: Mask) -> None:
    """Write a mask as JSON: round, seed, level, ratio, names."""
    write_text(path, json.dumps(asdict(mask), indent=1) + "\n")


def load_mask(path: str | Path, model: nn.Module) -> Mask:
    """Read a mask for a model.

    Raises:
        Mistake: the file is missing, is no mask, or names parameters that the model lacks.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        mask = Mask(**(content | {"trained": tuple(content["trained"])}))
    except FileNotFoundError:
        raise Mistake(path, "does not exist", "name the mask.json beside a checkpoint") from None
    except (ValueError, KeyError, TypeError):
        raise Mistake(path, "is no mask", "name a file that save_mask wrote") from None
    named = dict(model.named_parameters())
    strange = next((name for name in mask.trained if name not in named), None)
    if strange is not None:
        raise Mistake(path, f"names '{strange}', which the model lacks", "use the model that the mask was drawn for")
    return mask


def half_reset(
    tuned: nn.Module,
    base: nn.Module | Mapping[str, Tensor],
    ratio: float = 0.5,
    seed: int = 0,
    level: str = "category",
    *,
    train_embeddings: bool = True,
    train_head: bool | None = None,
) -> nn.Module:
    """Return `tuned`, in place, with the weights outside a fresh mask put back to `base`: theta = M o theta + (1 - M) o theta_0 (Half-Reset).

    Args:
        tuned: the tuned model.
        base: the model, or its named parameters, before tuning.
        ratio: share of the matrices that stay tuned.
        seed: of the mask.
        level: category | layer | model.
        train_embeddings: keep the tuned embeddings.
        train_head: keep the tuned head and last norm; `None`: as the embeddings.

    Raises:
        Mistake: the two models do not have the same weights; else as `HalfTuning.learn`.
    """
    if level not in LEVELS or not 0 <= ratio <= 1:
        raise Mistake("half_reset", f"level {level!r}, ratio {ratio}", f"levels are {', '.join(LEVELS)}; the ratio lies in [0, 1]")
    refuse(tuned)
    inside, outside = divided(tuned, train_embeddings, train_head)
    kept = drawn(inside, ratio, level, generator(seed, "mask")) | outside
    old = dict(base.named_parameters()) if isinstance(base, nn.Module) else base
    named = dict(tuned.named_parameters())
    strange = next((name for name in named if name not in old or old[name].shape != named[name].shape), None)
    if strange is not None:
        raise Mistake("half_reset", f"the base has no '{strange}' of this shape", "give the model that was tuned, as it was before")
    with torch.no_grad():
        for name, parameter in named.items():
            if name not in kept:
                parameter.copy_(old[name])
    return tuned
