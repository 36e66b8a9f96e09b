r"""OFMU: climb the forget loss where that is orthogonal to what must stay, then descend the retain loss without leaving the place that was reached.

Forget and retain gradients share directions, so a weighted sum of the two losses is brittle. OFMU puts the goals in two levels: T inner steps raise the
forget loss less a penalty on the cosine of the two gradients; an outer step lowers the retain loss plus a growing penalty on the inner gradient's norm,
which holds the weights at a stationary point of the inner problem. The outer step starts where the inner steps ended: a round is T + 1 steps in a row.

Paper: Asif and Amiri 2025, "OFMU: Optimization-Driven Framework for Machine Unlearning", arXiv 2509.22483 (ICLR 2026).
Objective: min L_r(theta) subject to grad Phi(theta) = 0, Phi = L_f - beta cos(grad L_f, grad L_r); solved as min F = L_r + rho ||grad Phi||^2.

    inner, T times:  theta <- theta + eta_in clip(grad Phi(theta))
    outer:           theta <- theta - eta_out clip(grad L_r(theta) + 2 rho_k H_Phi grad Phi(theta)),   rho_k = rho_0 c^k

| paper | here | default |
|---|---|---|
| L_f on a forget batch | forget_loss: ce, ce_capped (each token's NLL counts up to log V), npo (minus the NPO loss) | ce_capped |
| L_r on a retain batch | `nll` | |
| beta | beta | 0.5 (ours) |
| T; outer steps per round (1 in the paper) | inner_steps, outer_steps | 5, 1 |
| K | outer_rounds; `None`: as many as hold the trainer's steps | None |
| rho_0, c | rho0, rho_growth | 1e-3, 1.1 (ours) |
| eta_in, eta_out | eta_in, eta_out; of unit-length steps, or rates of the trainer's optimizer | 0.15, 0.3; the trainer's rate (ours) |
| H_Phi v | hvp: fd, exact, gauss (see `training.bilevel`) | fd |

Differs from the paper, of which no code was found: where its constants are not known to us they are ours; unit steps, because on memorised rows the forget
gradient starts near zero; every pass is in evaluation mode (dropout would make each pass another function; batch norms use their running statistics) and
with plain attention. Each step draws a forget and a retain batch. Sequential requests are not covered by the paper. The loss in the ledger is L_f.
Cost: an inner step is two gradients and two double backward passes, 4 to 5 times a gradient-difference step (measured on the desk); an outer step 6 times
with gauss, 12 with fd, 18 with exact. Memory: about six vectors of the trained weights' size and the graph of one loss with its gradient; no second model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake, nearest
from remanence.models.attention import plain_attention
from remanence.models.forward import unwrapped
from remanence.stream import Request
from remanence.training.batches import Batch, Counted
from remanence.training.bilevel import HVP, Derivatives, apart, hvp, phi_gradient, trained, wide
from remanence.training.losses import answer_tokens, nll
from remanence.training.masks import check_pattern, matching
from remanence.training.preference import npo_loss, summed_nll
from remanence.training.processes import is_sharded, sum_over_processes, world_size
from remanence.training.projection import flatten
from remanence.training.requests import retain_of
from remanence.training.trainer import Loss, Settings, Step, Trainer, make_optimizer, make_schedule

LOSSES, STEPS = ("ce", "ce_capped", "npo"), ("unit", "trainer")
UNIT = (0.15, 0.3)  # eta_in, eta_out of unit steps
ONCE = ("is not implemented", "differentiate twice", "double backward")  # how torch says that there is no second derivative


@dataclass
class OFMU:
    """Alternate between decorrelated ascent on the forget rows and penalised descent on the retain rows.

    Args:
        forget_loss: ce | ce_capped | npo.
        beta: weight of the cosine; 0 is plain ascent.
        inner_steps: T, ascents per round.
        outer_steps: descents per round.
        outer_rounds: K; `None` takes as many whole rounds as hold the trainer's steps.
        step: unit (the direction of the gradient, eta long) | trainer (the trainer's optimizer).
        eta_in: length of an inner step, or its rate; `None`: 0.15, or the trainer's rate. The trainer's schedule multiplies it.
        eta_out: of an outer step; `None`: 0.3, or the trainer's rate.
        rho0: weight of the penalty in the first round; 0 is no penalty.
        rho_growth: factor of the weight per round.
        hvp: fd | exact | gauss.
        npo_beta: of the NPO loss.
        parameters: regular expression that a parameter's name must match (anywhere) to be trained; `None`: all that require a gradient.
        tolerance: end after the round whose last gradient of Phi is at most this long; `None`: all rounds.
        reference: L_f of a model retrained without the forget rows; end after the round in which it was reached. `None`: all rounds.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    forget_loss: str = "ce_capped"
    beta: float = 0.5
    inner_steps: int = 5
    outer_steps: int = 1
    outer_rounds: int | None = None
    step: str = "unit"
    eta_in: float | None = None
    eta_out: float | None = None
    rho0: float = 1e-3
    rho_growth: float = 1.1
    hvp: str = "fd"
    npo_beta: float = 0.1
    parameters: str | None = None
    tolerance: float | None = None
    reference: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def need(name: str, good: Callable[[Any], bool], what: str) -> None:
            value = getattr(self, name)
            if value is not None and not good(value):
                raise Mistake(f"ofmu.{name}", f"must be {what}, got {value!r}", "correct the value")

        for name, known in (("forget_loss", LOSSES), ("step", STEPS), ("hvp", HVP)):
            if getattr(self, name) not in known:
                raise Mistake(f"ofmu.{name}", f"unknown value {getattr(self, name)!r}", nearest(getattr(self, name), known))
        for name in ("beta", "eta_in", "eta_out", "rho0", "tolerance"):
            need(name, lambda value: 0 <= value < math.inf, "0 or more, and finite")
        need("rho_growth", lambda value: 1 < value < math.inf, "above 1, and finite")
        need("npo_beta", lambda value: 0 < value < math.inf, "above 0, and finite")
        for name in ("inner_steps", "outer_steps"):
            need(name, lambda value: value >= 1, "1 or more")
        need("outer_rounds", lambda value: value >= 0, "0 or more")
        check_pattern("ofmu.parameters", self.parameters)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Take K rounds of T ascents and a descent on pairs of forget and retain batches.

        Raises:
            Mistake: the request has no retain set, or the model cannot be differentiated twice.
        """
        refuse_unsuited(model, trainer.settings)
        retain = trainer.batches(retain_of(request, "OFMU"), request.kind, stream="retain")
        forget = trainer.batches(request.forget, request.kind, stream="forget")
        if self.forget_loss == "npo":
            forget = forget.with_column("reference_nll", trainer.over_rows(model, forget, summed_nll))
        losses: dict[str, Loss] = {"ce": nll, "ce_capped": capped_nll, "npo": lambda model, batch: -mean_npo(model, batch, self.npo_beta)}
        return self.solve(model, trainer.pairs(forget, retain), losses[self.forget_loss], nll, trainer)

    def solve(self, model: nn.Module, pairs: Counted, forget_loss: Loss, retain_loss: Loss, trainer: Trainer) -> nn.Module:
        """Solve the bi-level problem of any two losses of (model, batch) over `{"forget": ..., "retain": ...}` batches."""
        period, self.history = self.inner_steps + self.outer_steps, []
        values: dict[str, list[Tensor]] = {"forget": [], "retain": []}  # L_f and L_r of this step's micro-batches
        rounds = math.ceil(trainer.steps_for(pairs) / period) if self.outer_rounds is None else self.outer_rounds
        optimizer, rate = self._steps(trainer.settings, rounds * period)

        def watched(side: str, loss: Loss) -> Loss:
            def value(model: nn.Module, batch: Batch) -> Tensor:
                found = loss(model, batch)
                values[side].append(found.detach())
                return found

            return value

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            model.eval()  # fit puts the mode back
            return watched("forget", forget_loss)(model, batch["forget"])

        def compose(model: nn.Module, step: Step) -> None:
            """Put the gradient of -Phi or of F in the place of that of L_f."""
            weights, (number, inside) = trained(model), divmod(step.number, period)
            inner, rho = inside < self.inner_steps, self.rho0 * self.rho_growth**number
            forget = Derivatives(trainer, model, forget_loss, [batch["forget"] for batch in step.batches])
            retain = Derivatives(trainer, model, retain_loss, [batch["retain"] for batch in step.batches])
            g_f = flatten(wide(torch.zeros_like(weight) if weight.grad is None else weight.grad) for weight in weights)
            g_r = replace(retain, loss=watched("retain", retain_loss)).first()
            with refusing_once_differentiable(model):
                g_phi, cosine = phi_gradient(forget, retain, self.beta, g_f, g_r)
                total = -g_phi if inner else g_r
                if not inner and rho > 0:
                    total = g_r + 2 * rho * hvp(self.hvp, forget, retain, self.beta, g_phi, g_f, g_r)
            length = total.norm().item()
            if not math.isfinite(length):
                raise Mistake(f"{trainer.name}, step {step.number + 1}", f"the gradient's norm is {length}", "take smaller steps")
            for weight, part in zip(weights, apart(total / length if self.step == "unit" and length > 0 else total, weights)):
                weight.grad = part.to(weight.dtype)
            row = {"step": step.number, "round": number, "level": "inner" if inner else "outer", "rho": rho}
            row |= {"norm": g_phi.norm().item(), "cosine": cosine.item()} | {side: mean_value(found) for side, found in values.items()}
            self.history.append(row)
            values.update(forget=[], retain=[])

        def enough(model: nn.Module, step: Step) -> bool:
            last = self.history[-1]
            reached = self.reference is not None and last["forget"] >= self.reference
            still = self.tolerance is not None and last["norm"] <= self.tolerance
            return (step.number + 1) % period == 0 and (reached or still)

        names = matching(model, self.parameters, "ofmu.parameters")
        hooks: dict[str, Any] = {"after_backward": compose, "after_step": enough}
        with plain_attention(model):
            trainer.fit(model, pairs, loss, steps=rounds * period, optimizer=optimizer, schedule=rate, parameters=names, **hooks)
        trainer.note("ofmu", {"hvp": self.hvp, "outer": [row for row in self.history if row["level"] == "outer"]})
        return model

    def _steps(
        self, settings: Settings, steps: int
    ) -> tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], Callable[[int], float]]:
        """Return an optimizer of rate 1, and the rate of each step: eta_in or eta_out, times the trainer's schedule."""
        unit, curve, period = self.step == "unit", make_schedule(settings, steps), self.inner_steps + self.outer_steps
        usual = UNIT if unit else (settings.lr, settings.lr)
        eta_in, eta_out = (default if own is None else own for own, default in zip((self.eta_in, self.eta_out), usual))

        def optimizer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.SGD(weights, lr=1.0) if unit else make_optimizer(replace(settings, lr=1.0), weights)

        return optimizer, lambda number: curve(number) * (eta_in if number % period < self.inner_steps else eta_out)

    def state_dict(self) -> dict[str, Any]:
        """Return what was logged so far."""
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.history = list(state["history"])


def refuse_unsuited(model: nn.Module, settings: Settings) -> None:
    """Refuse what cannot be differentiated twice before anything is run.

    Raises:
        Mistake: sharded or quantised weights, or activations that are to be recomputed.
    """
    if is_sharded(model):
        raise Mistake("ofmu", "cannot differentiate a sharded model twice", "run it in one process, or replicated")
    if getattr(getattr(unwrapped(model), "config", None), "quantization_config", None) is not None or not all(
        weight.is_floating_point() for weight in model.parameters()
    ):
        raise Mistake("ofmu", "the model is quantised", "load it in a floating-point type")
    if settings.gradient_checkpointing:
        raise Mistake(
            "training.gradient_checkpointing",
            "does nothing for ofmu, whose passes are in evaluation mode",
            "switch it off, train fewer rows",
        )


@contextlib.contextmanager
def refusing_once_differentiable(model: nn.Module) -> Iterator[None]:
    """Turn torch's complaint about a missing second derivative into a Mistake; nothing has been changed by then."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ONCE):
            raise
        problem = f"cannot be differentiated twice ({str(error).splitlines()[0][:120]})"
        remedy = "use a model of plain layers without torch.compile, or beta: 0 with hvp: fd, which needs no second derivative"
        raise Mistake(type(unwrapped(model)).__name__, problem, remedy) from error


def capped_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean NLL in which each token (or row of a classifier) counts at most log V, that of a uniform guess (ours); beyond, it has no gradient."""
    logits, targets = answer_tokens(model, batch)
    each = F.cross_entropy(logits, targets, reduction="none").clamp(max=math.log(logits.shape[-1]))
    return each.sum() / (batch.rows if batch["labels"].dim() == 1 else batch.tokens)


def mean_npo(model: nn.Module, batch: Batch, beta: float) -> Tensor:
    """Return the NPO loss averaged over rows; L_f is minus it."""
    return npo_loss(summed_nll(model, batch), batch["reference_nll"], beta).sum() / batch.rows


def mean_value(values: list[Tensor]) -> float:
    """Return the mean of a loss over micro-batches and processes."""
    return float(sum_over_processes(torch.stack(values).mean()) / world_size())
