r"""Cross-entropy unlearning (CE-U): learn, at every forget token, what the model itself would say if that token were ruled out. A descent, not an ascent.

The target is the softmax of the model's own logits with the true token's at minus infinity, held fixed in each step. The gradient on the true token's logit is
its probability: neither weak where the model is sure nor large where it is not.

Paper: Bo Yang 2025, "CE-U: Cross Entropy Unlearning", arXiv 2503.01224. Objective: L = gamma CE(softmax(z with z_y = -inf), softmax(z))(D_f) [+ alpha R(D_r)].

| paper | here | shape | default |
|---|---|---|---|
| z, logits of the model | `answer_tokens` | (N, V) | |
| first answer tokens left out (footnote on the training settings) | skip | count | 1 |
| (ours) retain term; the paper has none | alpha, retain | scalar, name | 1, none |
| (ours) strength | gamma | scalar | 1 |

Differs from the paper: where the answers are a token or two, skip: 1 leaves hardly more than the end token, so choose 0 there; a step in which nothing is left has
the loss 0 (the released code: NaN). Steps and rate are the trainer's; an epoch is a pass over the forget rows.
Cost: one forward and backward pass per step, no second model, no retain rows; memory: two more tensors of the size of the answers' logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from remanence.stream import Request
from remanence.training.batches import Batch, Changed
from remanence.training.losses import answer_tokens
from remanence.training.requests import check_numbers, check_terms, retain_batches, scalarised
from remanence.training.trainer import Trainer
from remanence.training.unlearning import ceu_loss, without_first


@dataclass(frozen=True)
class CEU:
    """Descend towards the model's own predictions without the forgotten token.

    Args:
        skip: supervised tokens at the beginning of each answer that are left out, so that the model still begins to answer; classes are never left out.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        retain: nll | kl | none.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    skip: int = 1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: str = "none"

    def __post_init__(self) -> None:
        check_terms("ceu", self.gamma, self.alpha, self.retain)
        check_numbers("ceu", skip=self.skip)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma L_CEU(forget) + alpha R(retain) for the trainer's steps.

        Raises:
            Mistake: the request has no retain set and the retain term needs one.
        """

        def shortened(number: int, batch: Batch) -> Batch:
            rows = batch["forget"]
            labels = rows["labels"] if rows["labels"].dim() == 1 else without_first(rows["labels"], self.skip)
            return Batch(batch | {"forget": Batch(rows | {"labels": labels})})

        def ceu(model: nn.Module, rows: Batch) -> Tensor:
            return ceu_loss(*answer_tokens(model, rows)).sum() / rows.tokens

        retain = retain_batches(request, trainer, "CE-U", self.retain)
        pairs = Changed(trainer.pairs(trainer.batches(request.forget, request.kind, stream="forget"), retain), shortened)
        loss = scalarised(ceu, self.retain, self.gamma, self.alpha, model, trainer)
        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))
