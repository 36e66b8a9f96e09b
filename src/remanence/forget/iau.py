r"""Influence approximation (IAU): forget by one step of gradient, uphill on the rows that go and downhill on the rows that stay. No Hessian, no training.

Deleting a row z moves the optimum by (1/n) H^-1 grad l(z); adding a "negative" row with the opposite gradient has the same effect to first order, and learning
a new row is commonly done by a gradient step rather than by inverting H. So one step is taken on the negated loss of the forget rows (incremental approximation),
with the gradient of the remaining rows added so that it does not go too far (gradient correction). `learn/gradient_restriction.py` trains a model for it.

Paper: Liu, Wu, Lian and Chen 2025, "Efficient Machine Unlearning via Influence Approximation", arXiv 2507.23257.
Update: G = c grad L(D_r) - gamma grad L(D_f), theta_u = Step(theta, G), with both gradients at theta.

| paper | here | shape | default |
|---|---|---|---|
| L(D), the mean over rows (over supervised tokens of a language model), or their sum (ours) | weighting: mean, sum | | mean |
| optimiser step: the first of a fresh Adam, lr G / (\|G\| + 1e-8) (released code); or lr G | step: adam, sgd | (P,) | adam |
| eta | lr | scalar | 1e-3 |
| weight of the correction (0: IA alone), of the negative rows (1 in the paper; 0: a step of fine-tuning) | correction, gamma | scalars | 1, 1 |
| grad of all of D, kept in a file (ours) | total_gradient: grad_r = grad_D - grad_f, so a request costs only its own rows | (P,) | |

Differs from the paper: gradients are taken in evaluation mode, in any batches. Beware: Adam's step has the length lr sqrt(P) however many rows go and however
small their gradients are, and in `mean` one row weighs as much as all the rest; `scaled` multiplies lr by |D_f|/|D|. It is an approximation far from the influence
direction (see the claim); the membership of the rows must be measured afterwards. Cost: a pass with gradients over D_f and D_r (with the file: over D_f alone)
and two forward passes over the guard rows; memory: two gradients, and a copy of the weights if `reversible`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import logits_of
from remanence.stream import Request
from remanence.training.batches import IGNORED, Batch, Batches
from remanence.training.gradients import Gradient, cosine, gradient_of, load_total_gradient, norm_of
from remanence.training.processes import is_sharded
from remanence.training.requests import retain_of
from remanence.training.trainer import Trainer

STEPS, WEIGHTINGS = ("adam", "sgd"), ("mean", "sum")
FAR, LOST = 0.1, 0.02  # displacement over the norm of the weights, and share of the guard rows' hits, above which there is a warning


@dataclass
class IAU:
    """Take one step away from the forget rows and towards the retain rows.

    Args:
        step: adam (lr for every weight, in the direction of the sign) | sgd (lr times the gradient).
        lr: rate of the step.
        weighting: mean | sum.
        correction: weight of the retain rows' gradient; 0 needs none.
        gamma: weight of the forget rows' gradient.
        scaled: multiply lr by |D_f|/|D|, so that a request moves the weights in proportion to its size.
        total_gradient: file of the gradient of all training rows (`save_total_gradient`) instead of the request's retain rows.
        most: largest share of the training rows that a request may take.
        guard: number of rows whose hits are compared before and after (the request's neighbours, or retain rows); 0: none.
        batch_size: rows per pass; `None`: the trainer's.
        reversible: keep the weights before the last request, for `undo`.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    step: str = "adam"
    lr: float = 1e-3
    weighting: str = "mean"
    correction: float = 1.0
    gamma: float = 1.0
    scaled: bool = False
    total_gradient: str | None = None
    most: float = 0.5
    guard: int = 256
    batch_size: int | None = None
    reversible: bool = False
    log: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False, compare=False)
    before: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def need(name: str, good: bool, what: str) -> None:
            if not good:
                raise Mistake(f"iau.{name}", f"must be {what}, got {getattr(self, name)!r}", "correct the value")

        for name in ("lr", "correction", "gamma"):
            need(name, 0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        need("most", 0 < self.most <= 1, "in (0, 1]")
        need("guard", self.guard >= 0, "0 or more")
        need("batch_size", self.batch_size is None or self.batch_size >= 1, "1 or more")
        for name, known in (("step", STEPS), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise Mistake(f"iau.{name}", f"unknown value {getattr(self, name)!r}", nearest(str(getattr(self, name)), known))

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Take both gradients at the weights as they are, step once, note and log what was done.

        Raises:
            Mistake: no retain rows and no file, a file that does not belong to this model and these rows, too large a request, or a gradient that is
                not finite; nothing was changed.
        """
        begun = time.monotonic()
        if is_sharded(model):
            raise Mistake("iau", "cannot step a sharded model", "run it in one process, or replicated")
        forget = gradient_of(model, request.forget, request.kind, trainer, self.batch_size)
        retain, kept = self._retain(model, request, trainer, forget)
        share = len(request.forget) / (len(request.forget) + kept) if kept is not None else math.nan
        if share > self.most or share == 1:
            problem = f"asks to forget {share:.0%} of the training rows, where one step says nothing (at most {self.most:.0%})"
            raise Mistake(f"request '{request.name}'", problem, "retrain, ask for fewer rows at a time, or raise iau.most")
        if self.scaled and kept is None:
            raise Mistake("iau.scaled", "needs to know how many rows there are", "add retain rows to the request, or name a total_gradient")
        lr = self.lr * (share if self.scaled else 1.0)
        moves = displacement(combined(forget, retain, self.weighting, self.gamma, self.correction), self.step, lr)
        guards = self._guards(request, trainer)
        hits_before = trainer.over_rows(model, guards, hits).mean().item() if guards else None
        weights = {name: weight for name, weight in model.named_parameters() if name in moves}
        self.before = {name: weight.detach().cpu().clone() for name, weight in weights.items()} if self.reversible else {}
        size = norm_of({name: weight.detach() for name, weight in weights.items()})
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(moves[name].to(weight.dtype))
        found = {
            "request": request.name,
            "step": self.step,
            "weighting": self.weighting,
            "lr": lr,
            "rows_forget": len(request.forget),
            "rows_retain": kept,
            "norm_forget": norm_of(forget.total) / forget.units,
            "norm_retain": norm_of(retain.total) / retain.units if retain else None,
            "cosine": cosine(forget.total, retain.total) if retain else None,
            "displacement": norm_of(moves),
            "weights_norm": size,
            "guard_before": hits_before,
            "guard_after": trainer.over_rows(model, guards, hits).mean().item() if guards else None,
            "from_file": self.total_gradient is not None,
        }
        self._warn(found)
        self.log.append(found | {"seconds": time.monotonic() - begun})
        trainer.note("iau", found | {"requests": len(self.log)})  # a note is the same in every run; the ledger's event has the time
        return model

    def _retain(self, model: nn.Module, request: Request, trainer: Trainer, forget: Gradient) -> tuple[Gradient | None, int | None]:
        """Return the gradient of the rows that stay (measured, or that of all rows less that of the forget rows), and their number if it is known."""
        if self.total_gradient is not None:
            total, rows = load_total_gradient(self.total_gradient, model, request, trainer)
            kept = {name: total.total[name].to(value) - value for name, value in forget.total.items()}
            return Gradient(kept, total.units - forget.units), rows - len(request.forget)
        if self.correction == 0:
            return None, None if request.retain is None else len(request.retain)
        stay = retain_of(request, "IAU", "add retain rows to the request, name a total_gradient, or set correction: 0")
        return gradient_of(model, stay, request.kind, trainer, self.batch_size), len(stay)

    def _guards(self, request: Request, trainer: Trainer) -> Batches | None:
        """Return rows that should stay known: neighbours where the request has some, else retain rows."""
        rows = request.neighbours if request.neighbours is not None else request.retain
        if rows is None or self.guard == 0:
            return None
        chosen = torch.randperm(len(rows), generator=trainer.generator("guard"))[: self.guard]
        return trainer.batches(rows.select(sorted(chosen.tolist())), request.kind, size=self.batch_size, shuffle=False)

    def _warn(self, found: dict[str, Any]) -> None:
        place, remedy = f"request '{found['request']}'", f"undo it, and lower lr (now {found['lr']:g}, try {found['lr'] / 2:g})"
        far = found["displacement"] / found["weights_norm"] if found["weights_norm"] else math.inf
        if far > FAR:
            warnings.warn(f"{place}: the weights moved by {far:.0%} of their norm; {remedy}", stacklevel=3)
        lost = found["guard_before"] - found["guard_after"] if found["guard_before"] is not None else 0.0
        if lost > LOST:
            warnings.warn(f"{place}: rows that should stay lost {100 * lost:.1f} points; {remedy}", stacklevel=3)

    def undo(self, model: nn.Module) -> nn.Module:
        """Put the weights before the last request back, bit for bit.

        Raises:
            Mistake: they were not kept.
        """
        if not self.before:
            raise Mistake("iau", "the weights before the last request were not kept", "set reversible: true before forgetting")
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.before.items():
                weights[name].copy_(value)
        self.before = {}
        self.log.pop()
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return the log of requests, and the weights before the last one."""
        return {"log": self.log, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.log, self.before = list(state["log"]), dict(state["before"])


def combined(forget: Gradient, retain: Gradient | None, weighting: str, gamma: float, correction: float) -> dict[str, Float[Tensor, "..."]]:
    """Return G = c grad L(D_r) - gamma grad L(D_f), each a mean or a sum."""

    def part(of: Gradient, weight: float) -> float:
        return weight / of.units if weighting == "mean" else weight

    found = {name: -part(forget, gamma) * value for name, value in forget.total.items()}
    if retain is None or correction == 0:
        return found
    return {name: torch.add(value, retain.total[name], alpha=part(retain, correction)) for name, value in found.items()}


def displacement(gradient: Mapping[str, Tensor], step: str, lr: float) -> dict[str, Tensor]:
    """Return -lr G (sgd), or -lr G / (|G| + 1e-8), which is what the first step of a fresh Adam does to every weight."""
    return {name: -lr * (value if step == "sgd" else value / (value.abs() + 1e-8)) for name, value in gradient.items()}


def hits(model: nn.Module, batch: Batch) -> Float[Tensor, " B"]:
    """Return whether each row's class is right, or the share of its supervised tokens that are."""
    guess, labels = logits_of(model, batch).argmax(-1), batch["labels"]
    if labels.dim() == 1:
        return (guess == labels).double()
    marked = labels[:, 1:] != IGNORED
    return ((guess[:, :-1] == labels[:, 1:]) & marked).sum(1) / marked.sum(1).clamp(min=1).double()
