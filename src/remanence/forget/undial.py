r"""UNDIAL: distil from the model as it was, with the forgotten token's logit lowered by a fixed amount. The target stands still, so training has an end.

The student learns softmax(z_0 - beta onehot(y)) at every forget token, z_0 the logits before. What the model would otherwise have said gains in its old
proportions; nothing is pushed without bound.

Paper: Dong, Lin, Belkin, Huerta and Vulic 2024, "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
arXiv 2402.10052 (NAACL 2025). Objective: L = gamma CE(softmax(z_0 - beta onehot(y)), softmax(z))(D_f) [+ alpha R(D_r)].

| paper | here | shape | default |
|---|---|---|---|
| teacher's logits | z_0, `frozen_copy(model)` at the start | (N, V) | |
| strength of the penalty | beta | scalar | 10 |
| (ours) retain term; the paper has none | alpha, retain | scalar, name | 1, none |
| (ours) strength | gamma | scalar | 1 |

Differs from the paper: prompts and padding do not count, as in the paper, but not in OpenUnlearning, whose loss is over all positions, with a token at the end of
the vocabulary lowered where there is no label. The paper trains with LoRA (rank 8, alpha 16) at lr 1e-4 for 10 epochs of the forget rows; here steps and rate
are the trainer's. Cost: one forward and backward pass and one forward pass of the copy per step; memory: a copy of the trained parameters (under LoRA, of the
adapter).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remanence.stream import Request
from remanence.training.batches import Batch
from remanence.training.losses import answer_tokens
from remanence.training.reference import frozen_copy
from remanence.training.requests import check_numbers, check_terms, retain_batches, scalarised
from remanence.training.trainer import Trainer
from remanence.training.unlearning import undial_loss


@dataclass(frozen=True)
class UNDIAL:
    """Distil from the model's own logits, with the forgotten tokens' lowered.

    Args:
        beta: nats by which the true token's logit is lowered in the target; 0 changes nothing.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        retain: nll | kl | none.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    beta: float = 10.0
    gamma: float = 1.0
    alpha: float = 1.0
    retain: str = "none"

    def __post_init__(self) -> None:
        check_terms("undial", self.gamma, self.alpha, self.retain)
        check_numbers("undial", beta=self.beta)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma L_UNDIAL(forget) + alpha R(retain) for the trainer's steps.

        Raises:
            Mistake: the request has no retain set and the retain term needs one.
        """
        reference = frozen_copy(model).to(trainer.accelerator.device)

        def undial(model: nn.Module, rows: Batch) -> Tensor:
            with torch.no_grad():
                before, _ = answer_tokens(reference, rows)
            now, targets = answer_tokens(model, rows)
            return undial_loss(now, before, targets, self.beta).sum() / rows.tokens

        retain = retain_batches(request, trainer, "UNDIAL", self.retain)
        pairs = trainer.pairs(trainer.batches(request.forget, request.kind, stream="forget"), retain)
        loss = scalarised(undial, self.retain, self.gamma, self.alpha, model, trainer)
        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))
