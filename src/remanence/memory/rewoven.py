"""The wrapped decoder of memory reweaving: reads by chunks through `weaving`, holds in a `LatentBuffer`, and generates (see `reweaving` for the method)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from remanence.errors import Mistake
from remanence.memory.latent_buffer import BufferSettings, LatentBuffer
from remanence.memory.salience import SCORES
from remanence.memory.weaving import Host, Reconstructor, Sight
from remanence.models.forward import positions as longest
from remanence.seeds import generator
from remanence.storage import load_tree, save_tree

TRUNCATION = 2  # chunks that gradients flow back through


@dataclasses.dataclass
class Read(ModelOutput):
    """What a call returns: the loss if labels were given, the logits, and the memory behind the last token."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: LatentBuffer | None = None


class Rewoven(PreTrainedModel, GenerationMixin):
    """A decoder with a window and a memory. `memory` is what `read` and `generate` go on from; a plain call starts from nothing unless it is given `cache`.

    Args:
        host: the decoder.
        settings: how its memory keeps.
        captured: layers whose states are held.
        reconstruct: how they become states again.
        rebased: whether held tokens move up to the window.
        trained: whether the reconstructor learns.
        rank: of its adapters.
    """

    base_model_prefix = "base"
    _is_stateful = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self, host: Host, settings: BufferSettings, captured: Sequence[int], reconstruct: str, rebased: bool, trained: bool, rank: int
    ):
        config = type(host.core.config).from_dict(host.core.config.to_dict())
        if rebased:
            config.max_position_embeddings = 2**31  # no text is too long
        super().__init__(config)
        self.base, self.host, self.settings = host.core, host, settings
        self.generation_config = copy.deepcopy(host.core.generation_config)
        self.rebased, self.limit = rebased, None if rebased else longest(host.core)
        source = [max((layer for layer in captured if layer <= number), default=None) for number in range(host.depth)]
        self.reconstructor = Reconstructor(host, source, reconstruct, rank, generator(settings.seed, "reweaving"))
        self.reconstructor.requires_grad_(trained)
        if trained:
            self.base.requires_grad_(False)
        self.captured, self.as_keys = tuple(captured), reconstruct == "identity" and not rebased and len(captured) == host.depth
        self.signature = {"model": config.model_type, "layers": host.depth, "width": host.width, "captured": list(captured)}
        self.signature |= {"reconstruct": reconstruct, "rebased": rebased} | dataclasses.asdict(settings)
        self.signature["weights"] = list(settings.weights)
        self.memory = self.new_memory()
        self.code_error: Tensor = torch.zeros(())
        self.eval()

    def new_memory(self) -> LatentBuffer:
        """Return an empty memory for this model."""
        return LatentBuffer(self.settings, self.signature)

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's."""
        return self.base.get_output_embeddings()

    def train(self, mode: bool = True) -> Rewoven:
        """Set the mode of the reconstructor; the frozen decoder stays in evaluation mode, without dropout."""
        super().train(mode)
        self.base.eval()
        return self

    def save_reconstructor(self, path: str | Path) -> None:
        """Write what was trained as one safetensors file.

        Raises:
            Mistake: the file cannot be written.
        """
        save_tree(path, {"signature": self.signature, "weights": self.reconstructor.state_dict()})

    def load_reconstructor(self, path: str | Path) -> None:
        """Take over what was trained with the same layers and reconstruction; window, budget and score may differ.

        Raises:
            Mistake: the file is missing or damaged, or made for another reconstruction.
        """
        tree = load_tree(path)
        if not isinstance(tree, dict) or tree.keys() != {"signature", "weights"}:
            raise Mistake(path, "is no reconstructor", "name a file that save_reconstructor wrote")
        for key in ("model", "layers", "width", "captured", "reconstruct"):
            if tree["signature"][key] != self.signature[key]:
                raise Mistake(path, f"was made for {key}={tree['signature'][key]}, this is {self.signature[key]}", "reweave with the same")
        self.reconstructor.load_state_dict(tree["weights"])

    @torch.no_grad()
    def read(self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None, logits_to_keep: int = 1) -> Read:
        """Read on into `memory`; returns the logits of the last token, or of more, 0 for all (they are as many as the text is long)."""
        return self(input_ids, attention_mask, cache=self.memory, logits_to_keep=logits_to_keep)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as Hugging Face does, going on from `memory`: the prompt holds new tokens only; the last token made is not yet read."""
        kwargs.setdefault("cache", self.memory)
        return super().generate(inputs, **kwargs)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        cache: LatentBuffer | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> Read:
        """Read tokens behind those of `cache` (changed in place), or from nothing; positions are counted, not given."""
        memory = self.new_memory() if cache is None else cache
        memory.begin(len(input_ids), input_ids.device)
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:  # of generate's, which covers all tokens since its prompt, the last are these
            real = attention_mask[:, -input_ids.shape[1] :].bool()
        ending = int((memory.seen + real.sum(1)).max())
        if self.limit is not None and ending > self.limit:
            raise Mistake(
                "positions",
                f"reach {ending}, the model knows {self.limit}",
                "take positions='rebased' if they are rotary, or clear() the memory",
            )
        logits, errors, chunks = [], [], 0
        with self.host.woven():
            for first, last in memory.boundaries(real):
                made, error = self._read(memory, input_ids[:, first:last], real[:, first:last])
                logits.append(made)
                if (
                    isinstance(logits_to_keep, int) and logits_to_keep > 0 and labels is None
                ):  # no more than asked for, however long the text
                    logits = [torch.cat(logits[-logits_to_keep:], 1)[:, -logits_to_keep:]]
                errors.append(error)
                chunks += 1
                if self.training and chunks % TRUNCATION == 0:
                    memory.detach()
        whole = torch.cat(logits, 1)
        by_layer = torch.stack(errors).sum(0) / real.sum().clamp_min(1)  # (captured layers,)
        self.code_error = by_layer.mean()
        if self.reconstructor.kind == "autoenc":
            memory.error = dict(zip(self.captured, by_layer.tolist()))
        loss = None if labels is None else F.cross_entropy(whole[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return Read(loss=loss, logits=whole[:, kept], cache=memory)

    def _read(self, memory: LatentBuffer, ids: Int[Tensor, "B T"], real: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """Read the tokens of one chunk, or a part of it; returns logits, and the summed error of the codes per captured layer."""
        position = (memory.seen[:, None] + real.cumsum(1) - 1).clamp_min(0)
        window, held = memory.part("window."), self._held(memory)
        weigh = real if self._counts("attention") else None
        sights = []
        for layer in range(self.host.depth):
            there = held if held is not None and layer in held.keys else None
            pieces = ([(there.keys[layer], there.values[layer])] if there else []) + (
                [(window[f"k.{layer}"], window[f"v.{layer}"])] if window else []
            )
            bias = visible(None if there is None else self._loudness(layer, there), window.get("position"), real)
            sights.append(
                Sight([key for key, _ in pieces], [value for _, value in pieces], bias, weigh if layer in self.captured else None)
            )
        logits, states = self.host.forward(ids, position, sights)
        columns: dict[str, Tensor] = {
            "position": position.masked_fill(~real, -1),
            "id": ids,
            "mass": torch.zeros_like(real, dtype=torch.float64),
        }
        if weigh is not None:
            mass = (
                torch.stack([sight.mass[:, -len_of(window) - ids.shape[1] :] for sight in sights if sight.mass is not None])
                .double()
                .mean(0)
            )
            columns["mass"] = mass[:, -ids.shape[1] :]
            if window:
                memory.tensors["window.mass"] = window["mass"] + mass[:, : -ids.shape[1]]
        surprised = self._counts("surprisal")
        columns["surprisal"] = self._surprisal(memory, logits.detach(), ids, real) if surprised else torch.zeros_like(columns["mass"])
        for layer, sight in enumerate(sights):
            assert sight.own_keys is not None
            assert sight.own_values is not None
            columns |= {f"k.{layer}": sight.own_keys, f"v.{layer}": sight.own_values}
        errors = []
        for layer in self.captured:
            code, error = self.reconstructor.code(layer, states[layer])
            errors.append((error * real).sum())
            if not self.as_keys and self.settings.budget:
                columns[f"h.{layer}"] = code
        memory.append(columns, real)
        return logits, torch.stack(errors)

    def _counts(self, feature: str) -> bool:
        """Say whether a feature decides about what is held."""
        return bool(self.settings.budget) and self.settings.weights[SCORES.index(feature)] != 0

    def _held(self, memory: LatentBuffer) -> Held | None:
        """Return keys and values of what is held for every layer, made once per change."""
        if memory.woven is None and "held.position" in memory.tensors and memory.tensors["held.position"].shape[1]:
            held = memory.part("held.")
            valid, place = held["position"] >= 0, held["position"].clamp_min(0)
            made = Held({}, {}, valid, memory.salience())
            if self.as_keys:
                made.keys = {layer: held[f"k.{layer}"] for layer in self.captured}
                made.values = {layer: held[f"v.{layer}"] for layer in self.captured}
            else:
                if self.rebased:
                    start = (memory.seen // self.settings.chunk * self.settings.chunk - self.settings.window).clamp_min(0)
                    place = (start[:, None] - valid.sum(1, keepdim=True) + torch.arange(valid.shape[1], device=valid.device)).clamp_min(0)
                for layer, states in self.reconstructor({layer: held[f"h.{layer}"] for layer in self.captured}):
                    made.keys[layer], made.values[layer] = self.host.project(layer, states, place)
            memory.woven = made
        return memory.woven

    def _loudness(self, layer: int, held: Held) -> Float[Tensor, "B H M"]:
        """Return log gamma + tau s for every head, -inf where nothing is held."""
        gamma, tau = self.reconstructor.gamma[layer], self.reconstructor.tau[layer]
        loud = gamma.clamp_min(0).log()[:, None] + tau[:, None] * held.salience.to(tau.dtype)[:, None]
        return loud.masked_fill(~held.valid[:, None], -math.inf)

    def _surprisal(self, memory: LatentBuffer, logits: Float[Tensor, "B T V"], ids: Tensor, real: Tensor) -> Float[Tensor, "B T"]:
        """Return -log p(x_t | x_<t), log V for a first token; the last logits are kept for the token that comes next."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        B, T, V = wide.shape
        last = memory.tensors.get("last", wide.new_zeros(B, V))  # all equal: -log p is log V
        column = torch.arange(1, T + 1, device=ids.device) * real
        before = torch.cat([column.new_zeros(B, 1), column.cummax(1).values[:, :-1]], 1)  # 0: `last`; j: column j - 1
        rows = torch.arange(B, device=ids.device)
        own = wide[rows[:, None], (before - 1).clamp_min(0), ids].where(before > 0, last.gather(1, ids))
        surprisal = torch.cat([last.logsumexp(-1)[:, None], wide.logsumexp(-1)], 1).gather(1, before) - own
        ending = column.amax(1)
        memory.tensors["last"] = wide[rows, (ending - 1).clamp_min(0)].where((ending > 0)[:, None], last)
        return surprisal.double() * real


@dataclasses.dataclass
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
