"""How near the audited model is to the oracle on the forget rows, token by token (of classifiers: row by row).

`agreement` is the share of tokens or rows for which both have the same argmax, `kl_to_oracle` the mean KL(oracle || model) in nats; both
are means over rows of each row's mean. Cost: one forward pass over the forget rows of each of the two.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from remanence.forget.audit.case import Case, present
from remanence.forget.audit.report import Finding
from remanence.models.forward import evaluating
from remanence.training.batches import IGNORED
from remanence.training.losses import answer_tokens
from remanence.training.scoring import walk


def measure_distance(case: Case) -> None:
    """Add agreement with the oracle and divergence from it."""
    if "oracle" not in case.models:
        case.skipped["agreement"] = case.skipped["kl_to_oracle"] = "there is no oracle"
        return
    rows, model, oracle = case.rows("forget"), case.models["model"], case.models["oracle"]
    same, divergence = np.full(rows.count, np.nan), np.full(rows.count, np.nan)
    with evaluating(model), evaluating(oracle):
        for numbers, batch in walk(rows, case.settings.batch_size, model):
            labels = batch["labels"]
            row = (labels[:, 1:] != IGNORED).nonzero()[:, 0] if labels.dim() == 2 else torch.arange(len(labels), device=labels.device)
            theirs = answer_tokens(oracle, batch.to(next(oracle.parameters()).device))[0].to(labels.device)
            ours = answer_tokens(model, batch)[0]
            count = torch.bincount(row, minlength=len(numbers))
            for kept, values in ((same, (theirs.argmax(-1) == ours.argmax(-1)).double()), (divergence, kl(theirs, ours).double())):
                kept[numbers] = (
                    torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, row.cpu(), values.cpu()) / count.cpu()
                ).numpy()
    for name, column, better, best in (("agreement", same, "higher", 1.0), ("kl_to_oracle", divergence, "lower", 0.0)):
        found = present(column)
        low, high = case.interval(found, share=name == "agreement")
        case.findings.append(Finding(name, "quality", float(found.mean()), low, high, better, best, len(found), "the oracle itself"))


def kl(theirs: Float[Tensor, "N V"], ours: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Return KL(softmax(theirs) || softmax(ours)) of each position, in nats."""
    first, second = theirs.log_softmax(-1), ours.log_softmax(-1)
    odds = first.exp()
    return torch.where(odds > 0, odds * (first - second), 0).sum(-1)
