"""How a model hangs on some rows: the gradient with respect to their input embeddings, and what each layer adds to their likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remanence.models.blocks import blocks, bypassed
from remanence.models.forward import unwrapped
from remanence.models.taps import tap
from remanence.training.batches import IGNORED, Batch, Batches
from remanence.training.preference import summed_nll

if TYPE_CHECKING:
    from remanence.training.trainer import Trainer


def nll_and_tokens(model: nn.Module, batch: Batch) -> Float[Tensor, "B 2"]:
    """Return each row's summed negative log-likelihood and the number of its supervised tokens."""
    tokens = (batch["labels"][:, 1:] != IGNORED).sum(1)
    return torch.stack([summed_nll(model, batch).double(), tokens.double()], 1)


def gradient_and_tokens(model: nn.Module, batch: Batch) -> Float[Tensor, "B 2"]:
    """Return each row's || d s / d E ||_F^2 and its supervised tokens: s its summed NLL, E its input embeddings, all of its tokens.

    One forward and backward pass; no parameter gets a gradient.
    """
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1]

    hook = unwrapped(model).get_input_embeddings().register_forward_hook(cut)  # type: ignore[operator]
    try:
        with torch.enable_grad():
            total = summed_nll(model, batch).sum()
        (gradient,) = torch.autograd.grad(total, leaves)  # (B, T, D): rows do not see each other
    finally:
        hook.remove()
    tokens = (batch["labels"][:, 1:] != IGNORED).sum(1)
    return torch.stack([gradient.double().square().sum((1, 2)), tokens.double()], 1)


def importance(sums: Float[Tensor, "N R 2"]) -> Float[Tensor, " N"]:
    """Return IMP = ||d NLL / d E||_F of N sets of R rows from each row's (||d s / d E||^2, tokens): NLL is the mean over all tokens of the set."""
    return sums[..., 0].sum(-1).sqrt() / sums[..., 1].sum(-1).clamp(min=1)


def nll_without_each(model: nn.Module, batch: Batch) -> Float[Tensor, "B 1+L"]:
    """Return each row's summed NLL under the whole model, then with each of the L blocks left out.

    What reaches block l is kept from the first pass, so the blocks below it are not computed again: half the cost of 1 + L passes.
    """
    names = blocks(model)
    with tap(model, names, side="input") as seen:
        found = [summed_nll(model, batch)]
    for layer, name in enumerate(names):
        with bypassed(model, names[: layer + 1], seen[name][0]):
            found.append(summed_nll(model, batch))
    return torch.stack(found, 1)


def layer_effects(trainer: Trainer, model: nn.Module, batches: Batches) -> Float[Tensor, " L"]:
    """Return s_l = |NLL without block l - NLL| for every block, means over all supervised tokens of the rows (FIT, arXiv 2601.21682)."""
    nlls = trainer.over_rows(model, batches, nll_without_each, (1 + len(blocks(model)),)).sum(0)
    return (nlls[1:] - nlls[0]).abs() / max(1, sum(batch.own_tokens() for batch in batches))
