"""What a rewoven layer attends to during a call: keys and values of what is held and of the window, and how loud each head hears them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from remanence.memory.latent_buffer import LatentBuffer
    from remanence.memory.weaving import Host, Reconstructor


@dataclass
class Sight:
    """What one layer's attention sees during a call, and what it saw.

    Args:
        keys: in front of the call's own, pieces along the token axis, each (B, G, N, dh).
        values: of those keys.
        bias: (B, 1 or H, T, all keys), added to the logits, -inf where nothing may be seen; `None`: nothing is attended to, keys and values are wanted.
        weigh: (B, T) queries whose attention is added up in `mass`; `None`: it is not.
    """

    keys: Sequence[Float[Tensor, "B G N dh"]] = ()
    values: Sequence[Float[Tensor, "B G N dh"]] = ()
    bias: Float[Tensor, "B H T N"] | None = None
    weigh: Bool[Tensor, "B T"] | None = None
    own_keys: Float[Tensor, "B G T dh"] | None = None
    own_values: Float[Tensor, "B G T dh"] | None = None
    mass: Float[Tensor, "B N"] | None = None


@dataclass
class Held:
    """Keys and values (B, G, M, dh) of what is held, by layer, which columns are there, and their salience (B, M)."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    valid: Bool[Tensor, "B M"]
    salience: Float[Tensor, "B M"]


def visible(loud: Float[Tensor, "B H M"] | None, window: Int[Tensor, "B N"] | None, real: Bool[Tensor, "B T"]) -> Float[Tensor, "B H T N"]:
    """Return what is added to the logits over [held ; window ; the call's tokens]: how loud, -inf for what is hidden, masked or yet to come."""
    B, T = real.shape
    itself = torch.eye(T, dtype=torch.bool, device=real.device)  # a masked token sees itself, so that it is finite; nobody sees it
    seen = real[:, None, :].expand(B, T, T).tril() | itself
    if window is not None:
        seen = torch.cat([(window >= 0)[:, None].expand(B, T, -1), seen], -1)
    bias = torch.zeros(seen.shape, device=real.device, dtype=torch.float32 if loud is None else loud.dtype).masked_fill(~seen, -math.inf)[
        :, None
    ]
    return bias if loud is None else torch.cat([loud[:, :, None].expand(-1, -1, T, -1), bias.expand(-1, loud.shape[1], -1, -1)], -1)


def len_of(window: Mapping[str, Tensor]) -> int:
    """Return the columns of a window."""
    return window["position"].shape[1] if window else 0


def held_keys(
    memory: LatentBuffer, host: Host, reconstructor: Reconstructor, captured: Sequence[int], *, as_keys: bool, rebased: bool
) -> Held | None:
    """Return keys and values of what is held for every layer, made once per change; `None` while nothing is.

    Args:
        memory: of the text.
        host: the decoder, which projects states.
        reconstructor: makes states of what was stored.
        captured: layers whose states are stored.
        as_keys: whether keys and values were stored as they are.
        rebased: whether positions move up to the window.
    """
    if memory.woven is None and "held.position" in memory.tensors and memory.tensors["held.position"].shape[1]:
        held = memory.part("held.")
        valid, place = held["position"] >= 0, held["position"].clamp_min(0)
        made = Held({}, {}, valid, memory.salience())
        if as_keys:
            made.keys = {layer: held[f"k.{layer}"] for layer in captured}
            made.values = {layer: held[f"v.{layer}"] for layer in captured}
        else:
            if rebased:
                start = (memory.seen // memory.settings.chunk * memory.settings.chunk - memory.settings.window).clamp_min(0)
                place = (start[:, None] - valid.sum(1, keepdim=True) + torch.arange(valid.shape[1], device=valid.device)).clamp_min(0)
            for layer, states in reconstructor({layer: held[f"h.{layer}"] for layer in captured}):
                made.keys[layer], made.values[layer] = host.project(layer, states, place)
        memory.woven = made
    return memory.woven  # type: ignore[no-any-return]
