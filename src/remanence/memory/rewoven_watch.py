"""What a rewoven decoder does with each token of a text: how much it surprised, and whether it is still in sight behind the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.memory.latent_buffer import LatentBuffer
from remanence.memory.salience import surprisals

if TYPE_CHECKING:
    from remanence.memory.rewoven import Rewoven

PIECE = 256  # tokens whose logits are there at a time


@torch.no_grad()
def watched(model: Rewoven, memory: LatentBuffer, ids: Int[Tensor, "B T"]) -> dict[str, Float[Tensor, "B T"]]:
    """Read tokens into a memory; return each one's `surprisal` in nats, and 0 or 1 for whether it is `held`, or in the `window` still, behind the last of them.

    A token counts as held if its own entry is, or one that it was merged into.
    """
    place = torch.arange(ids.shape[1], device=ids.device) + (ids.new_zeros(len(ids), 1) if memory.empty else memory.seen[:, None])
    last, found = None if memory.empty else memory.tensors.get("last"), []
    for part in ids.split(PIECE, 1):
        surprisal, last = surprisals(last, model(part, cache=memory).logits, part, torch.ones_like(part, dtype=torch.bool))
        found.append(surprisal)
    reach = (model.settings.group - 1) / 2  # an entry of several neighbours stands at their mean

    def among(positions: Float[Tensor, "B M"] | None, reach: float) -> Bool[Tensor, "B T"]:
        if positions is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        return (((place[..., None] - positions[:, None]).abs() <= reach) & (positions >= 0)[:, None]).any(-1)

    held, window = (memory.part(prefix).get("position") for prefix in ("held.", "window."))
    return {"surprisal": torch.cat(found, 1), "held": among(held, reach).double(), "window": among(window, 0).double()}
