"""Which tokens are worth holding: rules of salience, their z-scores by running moments, the best few, and neighbours merged into one. Functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.errors import Mistake, nearest
from remanence.seeds import derive

SCORES = ("surprisal", "attention", "recency")  # what a mix is made of
RULES: dict[str, dict[str, float]] = {
    "surprisal": {"surprisal": 1.0},
    "attention": {"attention": 1.0},
    "recency": {"recency": 1.0},
    "mix": {"surprisal": 1.0, "attention": 1.0, "recency": 0.0},
    "random": {},
    "uniform": {},
}
GOLDEN = (math.sqrt(5) - 1) / 2


def rule_of(score: str | Mapping[str, float]) -> tuple[str, tuple[float, float, float]]:
    """Return a rule's name and its weights of surprisal, received attention and recency.

    Raises:
        Mistake: there is no such rule or feature.
    """
    if isinstance(score, str):
        if score not in RULES:
            raise Mistake("score", f"unknown rule '{score}'", nearest(score, RULES))
        name, weights = score, RULES[score]
    else:
        stray = next((key for key in score if key not in SCORES), None)
        if stray is not None:
            raise Mistake("score", f"cannot weigh '{stray}'", nearest(stray, SCORES))
        name, weights = "weights", dict(score)
    surprisal, attention, recency = (float(weights.get(key, 0.0)) for key in SCORES)
    return name, (surprisal, attention, recency)


def best(score: Float[Tensor, "B N"], position: Float[Tensor, "B N"], budget: int, sinks: int) -> Int[Tensor, "B M"]:
    """Return the columns of the `budget` best tokens by (sink, score, newest), in the order of their positions, columns without a token (-1) last."""
    priority = score.masked_fill(position < sinks, math.inf).masked_fill(position < 0, -math.inf)
    newest = position.argsort(dim=1, descending=True, stable=True)
    order = newest.gather(1, priority.gather(1, newest).argsort(dim=1, descending=True, stable=True))[:, :budget]
    place = position.gather(1, order)
    return order.gather(1, place.masked_fill(place < 0, math.inf).argsort(dim=1, stable=True))


def merge_groups(gone: Mapping[str, Tensor], group: int, whole: int) -> dict[str, Tensor]:
    """Return the mean of each `group` neighbours, those before position `whole` alone: states, positions and scores are averaged, the first id stays."""
    position = gone["position"]
    valid = position >= 0
    number = torch.where(position < whole, position, whole + torch.div(position - whole, group, rounding_mode="floor"))
    lowest = number.masked_fill(~valid, math.inf).amin(1, keepdim=True)
    place = (
        (number - lowest).clamp_min(0).where(valid, 0.0).long()
    )  # (B, N): group of each column, from 0; what leaves at once is consecutive
    share = torch.nn.functional.one_hot(place, int(place.max()) + 1).to(position.dtype) * valid[..., None]  # (B, N, groups)
    share = share / share.sum(1, keepdim=True).clamp_min(1)
    merged = {
        name: torch.einsum("bng,bn...->bg...", share.to(tensor.dtype), tensor)
        for name, tensor in gone.items()
        if tensor.is_floating_point()
    }
    first = (share > 0).to(torch.int8).argmax(1)  # (B, groups)
    filled = share.sum(1) > 0
    merged["position"] = merged["position"].where(filled, torch.full_like(merged["position"], -1))
    return merged | {"id": gone["id"].gather(1, first)}


def hashed(position: Int[Tensor, "B N"], seed: int) -> Float[Tensor, "B N"]:
    """Return numbers in [0, 1) that depend on seed and position alone (xorshift-multiply rounds in wrapping int64)."""
    z = position * -7046029254386353131 + derive(seed, "reweaving")
    for factor in (-4658895280553007687, -7723592293110705685):
        z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * factor
    return ((z >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def add_moments(moments: Float[Tensor, "B F 3"], values: Float[Tensor, "B F N"], valid: Bool[Tensor, "B N"]) -> Float[Tensor, "B F 3"]:
    """Return count, mean and sum of squared deviations after more values (Chan et al. 1979)."""
    mask = valid[:, None].to(values.dtype)
    more = mask.sum(-1).expand(values.shape[:2])
    fresh = (values * mask).sum(-1) / more.clamp_min(1)
    spread = ((values - fresh[..., None]).square() * mask).sum(-1)
    count, mean, squares = moments.unbind(-1)
    total = (count + more).clamp_min(1)
    gap = fresh - mean
    return torch.stack([count + more, mean + gap * more / total, squares + spread + gap.square() * count * more / total], -1)


def standard(values: Float[Tensor, "B F N"], moments: Float[Tensor, "B F 3"]) -> Float[Tensor, "B F N"]:
    """Return z-scores by running moments; 0 where all values were equal."""
    count, mean, squares = (moment[..., None] for moment in moments.unbind(-1))
    deviation = (squares / count.clamp_min(1)).sqrt()
    return torch.where(deviation > 0, (values - mean) / deviation.clamp_min(1e-12), 0.0)


def surprisals(
    last: Float[Tensor, "B V"] | None, logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"], real: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B V"]]:
    """Return -log p(x_t | x_<t), log V for a first token, and the logits of the last real token, which are for the one that comes next."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    B, T, V = wide.shape
    last = wide.new_zeros(B, V) if last is None else last  # all equal: -log p is log V
    column = torch.arange(1, T + 1, device=ids.device) * real
    before = torch.cat([column.new_zeros(B, 1), column.cummax(1).values[:, :-1]], 1)  # 0: `last`; j: column j - 1
    rows = torch.arange(B, device=ids.device)
    own = wide[rows[:, None], (before - 1).clamp_min(0), ids].where(before > 0, last.gather(1, ids))
    surprisal = torch.cat([last.logsumexp(-1)[:, None], wide.logsumexp(-1)], 1).gather(1, before) - own
    ending = column.amax(1)
    return surprisal.double() * real, wide[rows, (ending - 1).clamp_min(0)].where((ending > 0)[:, None], last)
