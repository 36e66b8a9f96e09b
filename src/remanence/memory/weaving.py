"""Reach into any decoder: the hidden state in front of each block, keys and values of its own projections, attention over keys that it was not given.

Transformers lets every decoder call an attention function by name, with the queries, keys and values after all that the family does to them (fused
projections, norms of heads, rotations). `attend` is such a function: it puts what a `Sight` holds in front of the call's own keys, under one softmax. So no
line here knows a family; `models.roles` finds the norm and the attention of each block.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from remanence.errors import Mistake
from remanence.memory.sight import Held, Sight
from remanence.models.forward import positions as longest
from remanence.models.forward import unwrapped
from remanence.models.roles import blocks, pick
from remanence.storage import load_tree, save_tree

NAME = "remanence_reweaving"  # of the attention function, inside of Host.woven only
_ATTENTION = re.compile(r"^(.*\.(?:self_attn|attn|attention))\.")


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend over [what the module's sight holds ; the call's own keys] in one softmax; returns (B, T, H, dh)."""
    sight: Sight = module.reweaving  # type: ignore[assignment]
    sight.own_keys, sight.own_values = key, value
    if sight.bias is None:
        return torch.zeros_like(query).transpose(1, 2), None
    keys, values = torch.cat([*sight.keys, key], 2), torch.cat([*sight.values, value], 2)
    groups = query.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    bias = sight.bias.to(query.dtype)
    if sight.weigh is None:
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scaling)
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        weights = (query @ keys.transpose(2, 3) * scale + bias).softmax(-1)  # (B, H, T, N)
        sight.mass = (weights.detach() * sight.weigh[:, None, :, None]).sum((1, 2))
        out = weights @ values
    return out.transpose(1, 2).contiguous(), None


class Host:
    """A decoder seen as blocks: each with its norm, its attention and, where the family has one, the rotary embedding of positions.

    Args:
        model: any causal language model of a known family, plain or wrapped by PEFT.

    Raises:
        Mistake: it is no causal decoder, or its blocks, norms or projections are not known.
    """

    def __init__(self, model: nn.Module):
        core = unwrapped(model)
        name = type(core).__name__
        if not isinstance(core, PreTrainedModel) or core.config.is_encoder_decoder or not core.can_generate():
            raise Mistake(name, "is no causal language model", "give a decoder: an encoder sees no past that could leave its window")
        if getattr(core.config, "attn_logit_softcapping", None) is not None:
            raise Mistake(name, "caps its attention logits, which reweaving does not", "give a model without soft capping")
        if not getattr(core, "_supports_attention_backend", False):
            raise Mistake(
                name, "takes no attention function by name", "give a model of a known family (Llama, Qwen, Mistral, GPT-2, GPT-NeoX)"
            )
        self.core, self.config = core, core.config.get_text_config()
        self.blocks = [core.get_submodule(block) for block in blocks(core)]
        depth = range(len(self.blocks))
        norms = {weight.layer: weight.module for weight in pick(core, "attention_norm", kind="weight", strict=False)}
        inside = {weight.layer: _ATTENTION.match(weight.name) for weight in pick(core, ("key", "qkv"), kind="weight", strict=False)}
        lacking = next((layer for layer in depth if layer not in norms or not inside.get(layer)), None)
        if lacking is not None:
            raise Mistake(name, f"layer {lacking} shows no norm or no keys", "give a model of a known family (Llama, Qwen, Mistral, GPT-2)")
        self.norms = [core.get_submodule(norms[layer]) for layer in depth]
        self.attentions = [core.get_submodule(inside[layer][1]) for layer in depth]  # type: ignore[index]
        self.rotary = next((module for path, module in core.named_modules() if path.endswith("rotary_emb")), None)
        self.heads = int(self.config.num_attention_heads)
        self.width = int(self.config.hidden_size)
        self.floating = all(
            weight.is_floating_point() for attention in self.attentions for name, weight in attention.named_parameters() if "weight" in name
        )

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    def check_rebased(self, reach: int) -> None:
        """Refuse a decoder whose held tokens cannot be moved up to its window, or not so many that the farthest is `reach` away."""
        if self.rotary is None or pick(self.core, "position", strict=False):
            raise Mistake("positions", "cannot be rebased: this model adds absolute ones to its embeddings", "take positions='original'")
        if reach > longest(self.core):
            raise Mistake(
                "budget", f"with window and chunk it exceeds the {longest(self.core)} positions of the model", "lower one of them"
            )

    def project(self, layer: int, states: Float[Tensor, "B M d"], positions: Float[Tensor, "B M"]) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, G, M, dh) that a layer's own norm, projections and rotation make of hidden states in front of it."""
        attention, sight = self.attentions[layer], Sight()
        attention.reweaving = sight  # type: ignore[assignment]
        where = {} if self.rotary is None else {"position_embeddings": self.rotary(states, positions)}
        attention(self.norms[layer](states), attention_mask=None, **where)
        assert sight.own_keys is not None
        assert sight.own_values is not None
        return sight.own_keys, sight.own_values

    def forward(self, ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], sights: Sequence[Sight]) -> tuple[Tensor, list[Tensor]]:
        """Return the logits, and the hidden states in front of every block."""
        for attention, sight in zip(self.attentions, sights):
            attention.reweaving = sight  # type: ignore[assignment]
        self.states: list[Tensor] = []
        logits = self.core(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits, self.states

    @contextlib.contextmanager
    def woven(self) -> Iterator[None]:
        """Let the blocks attend by their sights inside; afterwards the model is as it was."""
        AttentionInterface.register(NAME, attend)
        configs = {id(config): config for config in (self.core.config, *(attention.config for attention in self.attentions))}
        before = {key: config._attn_implementation for key, config in configs.items()}  # type: ignore[union-attr]

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.states.append(args[0] if args else kwargs["hidden_states"])

        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
        try:
            for config in configs.values():
                config._attn_implementation = NAME  # type: ignore[union-attr]
            yield
        finally:
            for key, config in configs.items():
                config._attn_implementation = before[key]  # type: ignore[union-attr]
            for hook in hooks:
                hook.remove()
            for attention in self.attentions:
                attention.__dict__.pop("reweaving", None)
            self.states = []


class Reconstructor(nn.Module):
    """What of the memory may be trained: adapters bottom-up over the layers, codes, and how loud each head hears it.

    | paper | here | shape | start |
    |---|---|---|---|
    | U_l | `up` | (L, d, rank) | 0 |
    | V_l | `down` | (L, rank, 2d) | normal / sqrt(2d) |
    | g_l | `gain` | (L,) | 1 |
    | gamma_{l,h} | `gamma` | (L, H), per query head | 1 |
    | tau_{l,h} | `tau` | (L, H), per query head | 0 |
    | E_l | `encode` | (L, d/4, d) | rows orthonormal |
    | D_l | `decode` | (L, d, d/4) | E_l transposed |

    Args:
        host: the decoder.
        source: for each layer the captured layer it takes states from, `None` for none.
        kind: identity | lowrank | mean | autoenc.
        rank: of the adapters.
        draws: of the initial weights.
    """

    def __init__(self, host: Host, source: Sequence[int | None], kind: str, rank: int, draws: torch.Generator):
        super().__init__()
        L, H, d = host.depth, host.heads, host.width
        self.source, self.kind = tuple(source), kind
        self.gamma, self.tau = nn.Parameter(torch.ones(L, H)), nn.Parameter(torch.zeros(L, H))
        if kind == "lowrank":
            self.gain = nn.Parameter(torch.ones(L))
            self.up = nn.Parameter(torch.zeros(L, d, rank))
            self.down = nn.Parameter(torch.randn(L, rank, 2 * d, generator=draws) / (2 * d) ** 0.5)
        if kind == "autoenc":
            rows = torch.linalg.qr(torch.randn(L, d, d // 4, generator=draws))[0].mT  # (L, d/4, d)
            self.encode, self.decode = nn.Parameter(rows.clone()), nn.Parameter(rows.mT.clone())
        reference = next(host.core.parameters())
        self.to(reference.device, reference.dtype if reference.is_floating_point() else torch.float32)

    def save(self, path: str | Path, signature: Mapping[str, Any]) -> None:
        """Write the parameters, and what they were made for, as one safetensors file.

        Raises:
            Mistake: the file cannot be written.
        """
        save_tree(path, {"signature": dict(signature), "weights": self.state_dict()})

    def load(self, path: str | Path, signature: Mapping[str, Any]) -> None:
        """Take over what `save` wrote for the same layers and reconstruction.

        Raises:
            Mistake: the file is missing or damaged, or made for another reconstruction.
        """
        tree = load_tree(path)
        if not isinstance(tree, dict) or tree.keys() != {"signature", "weights"}:
            raise Mistake(path, "is no reconstructor", "name a file that save_reconstructor wrote")
        for key in ("model", "layers", "width", "captured", "reconstruct"):
            if tree["signature"][key] != signature[key]:
                raise Mistake(path, f"was made for {key}={tree['signature'][key]}, this is {signature[key]}", "reweave with the same")
        self.load_state_dict(tree["weights"])

    def code(self, layer: int, h: Float[Tensor, "B T d"]) -> tuple[Tensor, Tensor]:
        """Return what is stored of hidden states, and the relative squared error of decoding it again, per token (B, T)."""
        if self.kind != "autoenc":
            return h, h.new_zeros(h.shape[:-1])
        z = h @ self.encode[layer].mT
        return z, (z @ self.decode[layer].mT - h).square().sum(-1) / h.square().sum(-1).clamp_min(1e-12)

    def loudness(self, layer: int, held: Held) -> Float[Tensor, "B H M"]:
        """Return log gamma + tau s for every head, -inf where nothing is held."""
        gamma, tau = self.gamma[layer], self.tau[layer]
        loud = gamma.clamp_min(0).log()[:, None] + tau[:, None] * held.salience.to(tau.dtype)[:, None]
        return loud.masked_fill(~held.valid[:, None], -math.inf)

    def forward(self, held: dict[int, Float[Tensor, "B M c"]]) -> Iterator[tuple[int, Float[Tensor, "B M d"]]]:
        """Yield (layer, r^l), bottom-up: r^l = h^l + g_l |h^l| U_l V_l RMSNorm([h^l ; r^(l-1)]), r below the lowest captured layer being 0."""
        below: Tensor | None = None
        for layer, source in enumerate(self.source):
            if source is None:
                continue
            h = held[source]
            if self.kind == "autoenc":
                h = h @ self.decode[source].mT
            r = h
            if self.kind == "lowrank":
                both = torch.cat([h, torch.zeros_like(h) if below is None else below], -1)
                size = h.detach().square().mean(-1, keepdim=True).sqrt()  # a step of the rate means the same in every layer and model
                r = h + self.gain[layer] * size * (F.rms_norm(both, both.shape[-1:]) @ self.down[layer].mT @ self.up[layer].mT)
            yield layer, r
            below = r
