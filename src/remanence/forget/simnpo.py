r"""SimNPO: negative preference optimisation without a reference model. The margin is the answer's mean NLL itself, so rows that are still likely get the push.

NPO's weight on a row compares it with the model before; a long answer, or one that was never known well, then gets as much of the ascent as any other.
SimNPO's weight 2 sigmoid(-beta (s/|y| - delta)) / |y| looks at what the model says now, per token.

Paper: Fan, Liu, Lin, Jia, Zhang, Mei and Liu 2024, "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", arXiv 2410.07163.
Objective: L = gamma L_SimNPO(D_f) + alpha R(D_r), L_SimNPO = -(2/beta) E log sigmoid(beta (s/|y| - delta)).

| paper | here | shape | default |
|---|---|---|---|
| -log pi(y \| x) | s, `summed_nll` | (B,) nats | |
| \|y\| | length, supervised tokens of the answer | (B,) | |
| beta | beta | scalar | 4.5 |
| margin gamma | beta * delta | scalar | delta 0 |
| weight of the forget term, of the retain term | gamma, alpha | scalars | 0.125, 1 |

Differs from the paper: nothing; the defaults are those of its run on TOFU forget10 (forget05: beta 2.5, gamma 0.1375). Steps and rate are the trainer's; an epoch is a pass over the forget rows.
Cost: two forward and backward passes per step, no second model (retain: kl holds a copy of the trained parameters).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from remanence.stream import Request
from remanence.training.batches import IGNORED, Batch
from remanence.training.preference import summed_nll
from remanence.training.requests import check_numbers, check_terms, retain_batches, scalarised
from remanence.training.trainer import Trainer
from remanence.training.unlearning import simnpo_loss


@dataclass(frozen=True)
class SimNPO:
    """Optimise the negative preference per token, without a reference, with a retain term.

    Args:
        beta: how soon the ascent on a row slows as its mean NLL passes delta.
        delta: mean NLL in nats per token around which it slows.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        retain: nll | kl | none.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    beta: float = 4.5
    delta: float = 0.0
    gamma: float = 0.125
    alpha: float = 1.0
    retain: str = "nll"

    def __post_init__(self) -> None:
        check_terms("simnpo", self.gamma, self.alpha, self.retain)
        check_numbers("simnpo", above=True, beta=self.beta)
        check_numbers("simnpo", delta=self.delta)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma L_SimNPO(forget) + alpha R(retain) for the trainer's steps.

        Raises:
            Mistake: the request has no retain set and the retain term needs one.
        """

        def simnpo(model: nn.Module, rows: Batch) -> Tensor:
            return simnpo_loss(summed_nll(model, rows), answer_lengths(rows), self.beta, self.delta).sum() / rows.rows

        retain = retain_batches(request, trainer, "SimNPO", self.retain)
        pairs = trainer.pairs(trainer.batches(request.forget, request.kind, stream="forget"), retain)
        loss = scalarised(simnpo, self.retain, self.gamma, self.alpha, model, trainer)
        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))


def answer_lengths(rows: Batch) -> Tensor:
    """Return |y|, the supervised tokens of each row, at least 1; 1 for a class."""
    labels = rows["labels"]
    return labels.new_ones(len(labels)) if labels.dim() == 1 else (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)
