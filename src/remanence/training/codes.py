"""Codes of a sparse autoencoder: which latents tell two groups apart, and how far one group of codes is from another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.models.roles import blocks
from remanence.models.taps import output_of
from remanence.training.batches import IGNORED, Batch
from remanence.training.processes import sum_over_processes

GAPS = ("mmd", "sliced")
MOST, SLICES = 500, 64  # codes of a group that are compared with; directions of the sliced distance

if TYPE_CHECKING:
    from remanence.models.sae import SparseAutoencoder
    from remanence.training.trainer import Trainer


def firing(codes: Float[Tensor, "B N"]) -> Float[Tensor, "N"]:
    """Return f_i, the share of rows in which a latent is above 0."""
    return (codes > 0).double().mean(0)


def separating(
    first: Float[Tensor, "N"], second: Float[Tensor, "N"], count: int | None, allowed: Bool[Tensor, "N"] | None = None
) -> Int[Tensor, "m"]:
    """Return the `count` latents with the largest |s_i|, s = f_first - f_second, in their order; `None`: all that are allowed (Ferrando et al., section 4)."""
    score = (first - second).abs()
    if allowed is not None:
        score = score.masked_fill(~allowed, -1.0)
    ranked = score.argsort(descending=True, stable=True)
    possible = int((score >= 0).sum())
    return ranked[: possible if count is None else min(count, possible)].sort().values


def own_latents(target: Float[Tensor, "N"], others: Float[Tensor, "N"], count: int | None, ratio: float = 3.0) -> Int[Tensor, "m"]:
    """Return the latents that fire at least `ratio` times as often for the targets as for others, at most `count`, by f_target - f_others (CRISP)."""
    return separating(target, others, count, (target > 0) & (target >= ratio * others))


def common_latents(model: nn.Module, sae: SparseAutoencoder, number: int, path: str, share: float, trainer: Trainer) -> Bool[Tensor, "N"]:
    """Say which latents fire on more than a share of the tokens of a text file, behind a block.

    Raises:
        Mistake: the file cannot be read.
    """
    from remanence.data.sources import load_rows

    names, rows = blocks(model), trainer.batches(load_rows(path, kind="text", place="text"), "text", shuffle=False)
    above = names[number + 1] if number + 1 < len(names) else None
    hits, tokens = torch.zeros(sae.latents, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def count(model: nn.Module, batch: Batch) -> Tensor:
        inside = batch["labels"] != IGNORED
        codes = sae.encode(output_of(model, batch, names[number], before=above)[inside].to(sae.b_dec.device))
        hits.add_((codes > 0).sum(0))
        tokens.add_(inside.sum().cpu())
        return inside.sum(1)

    trainer.over_rows(model, rows, count)
    hits, tokens = sum_over_processes(hits), sum_over_processes(tokens)
    if tokens.item() == 0:
        raise Mistake(path, "holds no tokens", "name another text")
    return hits / tokens > share


def mmd(first: Float[Tensor, "B m"], second: Float[Tensor, "N m"], width: float) -> Float[Tensor, ""]:
    """Return the squared maximum mean discrepancy (biased, so never below 0) with the kernel exp(-||x - y||^2 / (2 width^2)) (Gretton et al. 2012)."""

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (-torch.cdist(one, other).square() / (2 * width**2)).exp().mean()

    return kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)


def sliced(first: Float[Tensor, "B m"], second: Float[Tensor, "N m"], directions: Float[Tensor, "S m"]) -> Float[Tensor, ""]:
    """Return the squared sliced 2-Wasserstein distance: along each direction the mean squared gap between the sorted first rows and the second's quantiles."""
    ordered = (first @ directions.T).sort(0).values  # (B, S)
    places = (torch.arange(len(first), device=first.device, dtype=first.dtype) + 0.5) / len(first)
    return (ordered - torch.quantile(second @ directions.T, places, dim=0)).square().mean()


def gap_to(kind: str, goal: Float[Tensor, "N m"], others: Float[Tensor, "M m"], chance: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Return the distance of codes (B, m) to a group, mmd or sliced, in units of that of another group."""
    few, rest = goal[:: -(-len(goal) // MOST)], others[:: -(-len(others) // MOST)]
    width = median_distance(torch.cat([few, rest])) if kind == "mmd" else 0.0
    drawn = torch.randn(SLICES, goal.shape[1], generator=chance).to(goal)
    directions = drawn / drawn.norm(dim=1, keepdim=True)

    def gap(codes: Tensor) -> Tensor:
        return mmd(codes, few, width) if kind == "mmd" else sliced(codes, few, directions)

    unit = gap(rest)
    return lambda codes: gap(codes) / unit


def median_distance(codes: Float[Tensor, "N m"]) -> float:
    """Return the median distance between two rows, the usual width of a kernel."""
    return torch.pdist(codes).median().item()
