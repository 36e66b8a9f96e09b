r"""Fisher forgetting: drown what the forget rows wrote in noise, with little of it where the rows that stay need a weight to be what it is.

A weight that the retain rows hold tightly (large Fisher information on D_r) gets little noise, one that only the forget rows cared for gets much.

Paper: Golatkar, Achille and Soatto 2020, "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks", arXiv 1911.04933, eq. 8 and section 3.
Update: theta_u = theta + alpha (F + eps)^(-1/4) n, n ~ N(0, I), F the diagonal of the Fisher information on D_r.

| paper | here | shape | default |
|---|---|---|---|
| (lambda sigma_h^2)^(1/4) | alpha | scalar | 1e-3 |
| F, the Hessian on D_r by its Levenberg-Marquardt diagonal | `diagonal_fisher`, definition: empirical, sampled, exact | (P,) | empirical |
| (ours) floor under F, which bounds the noise | eps | scalar | 1e-6 |

Differs from the paper: one noise level for all weights, no search for the best one. It takes no look at D_f. Cost: one backward pass per retain row, no step;
memory: a copy of the trained weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import ByName
from remanence.stream import Request
from remanence.training.fisher import diagonal_fisher
from remanence.training.memory import with_mask
from remanence.training.processes import is_sharded
from remanence.training.requests import retain_of
from remanence.training.trainer import Trainer

DEFINITIONS = ("empirical", "sampled", "exact")


@dataclass(frozen=True)
class FisherForgetting:
    """Add noise to every weight, less where the retain rows need it.

    Args:
        alpha: of the noise; 0 changes nothing.
        definition: empirical | sampled | exact.
        eps: floor under the Fisher information.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    alpha: float = 1e-3
    definition: str = "empirical"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise Mistake("fisher_forgetting.alpha", f"must be 0 or more, and finite, got {self.alpha!r}", "correct the value")
        if not 0 < self.eps < math.inf:
            raise Mistake("fisher_forgetting.eps", f"must be above 0, and finite, got {self.eps!r}", "correct the value")
        if self.definition not in DEFINITIONS:
            raise Mistake("fisher_forgetting.definition", f"unknown value {self.definition!r}", nearest(self.definition, DEFINITIONS))

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Measure the Fisher information of the retain rows and add the noise.

        Raises:
            Mistake: the request has no retain set, or the model is sharded.
        """
        if is_sharded(model):
            raise Mistake("fisher_forgetting", "cannot add noise to a sharded model", "run it in one process, or replicated")
        model.to(trainer.accelerator.device)
        batches = map(with_mask, trainer.batches(retain_of(request, "Fisher forgetting"), request.kind, shuffle=False))
        fisher = diagonal_fisher(ByName(model), batches, definition=self.definition, generator=trainer.generator("fisher labels"))
        drawn = trainer.generator("noise")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if f"model.{name}" in fisher:
                    weight.add_(noise(fisher[f"model.{name}"], self.alpha, self.eps, drawn).to(weight.dtype))
        trainer.note("fisher forgetting", {"alpha": self.alpha, "trace": fisher.trace, "rows": fisher.count, "definition": self.definition})
        return model


def noise(fisher: Float[Tensor, "..."], alpha: float, eps: float, drawn: torch.Generator) -> Float[Tensor, "..."]:
    """Return alpha (F + eps)^(-1/4) n (eq. 8)."""
    plain = torch.randn(fisher.shape, generator=drawn, dtype=torch.float32)  # drawn on the CPU: the same on any device
    return alpha * (fisher + eps).pow(-0.25) * plain.to(fisher)
