"""The wrapped decoder of memory reweaving: reads by chunks through `weaving`, holds in a `LatentBuffer`, and generates (see `reweaving` for the method)."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from remanence.errors import Mistake
from remanence.memory.asking import continued, copies, tokens_of
from remanence.memory.latent_buffer import KIND, LatentBuffer
from remanence.memory.rewoven_config import RewovenConfig, decoder
from remanence.memory.rewoven_watch import watched
from remanence.memory.salience import SCORES, surprisals
from remanence.memory.sight import Sight, held_keys, len_of, visible
from remanence.memory.state import MemoryState
from remanence.memory.weaving import Host, Reconstructor
from remanence.models.forward import positions as longest
from remanence.seeds import generator

TRUNCATION = 2  # chunks that gradients flow back through
CODE_WEIGHT = 0.1  # of the codes' error in the training loss
PIECE = 1024  # tokens that are read at a time


@dataclasses.dataclass
class Read(ModelOutput):
    """What a call returns: the loss if labels were given, the logits, and the memory behind the last token."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: LatentBuffer | None = None


class Rewoven(PreTrainedModel, GenerationMixin):
    """A decoder with a window and a memory. `memory` is what `read` and `generate` go on from; a plain call starts from nothing unless it is given `cache`.

    Args:
        config: the decoder, the window, and how its memory keeps.
        base: the decoder, if it is there already; otherwise it is built, or read from where the configuration says.

    Raises:
        Mistake: a setting that cannot work, or a decoder that cannot be reached into.
    """

    config_class = RewovenConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _is_stateful = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: RewovenConfig, base: nn.Module | None = None):
        config.check()
        base, processor = decoder(config) if base is None else (base, None)
        host = Host(base)
        config.adopt(host.core.config)
        super().__init__(config)
        self.base, self.host, self.settings, self.processor = host.core, host, config.buffer, processor
        self.generation_config = copy.deepcopy(host.core.generation_config)
        self.rebased = config.positions == "rebased"
        self.limit = None if self.rebased else longest(host.core)
        if self.rebased:
            host.check_rebased(config.budget + config.window + config.step)
        if config.trained and not host.floating:
            raise Mistake(
                "train", "keys and values are quantised, gradients cannot pass them", "load the model in bf16, or take train=False"
            )
        self.captured = tuple(config.captured(host.depth))
        source = [max((layer for layer in self.captured if layer <= number), default=None) for number in range(host.depth)]
        self.reconstructor = Reconstructor(host, source, config.reconstruct, config.rank, generator(config.seed, "reweaving"))
        self.as_keys = config.reconstruct == "identity" and not self.rebased and len(self.captured) == host.depth
        self.signature = {"model": host.core.config.model_type, "layers": host.depth, "width": host.width, "captured": list(self.captured)}
        self.signature |= {"reconstruct": config.reconstruct, "rebased": self.rebased} | dataclasses.asdict(self.settings)
        self.signature["weights"] = list(self.settings.weights)
        self.memory = self.new_memory()
        self.code_error: Tensor = torch.zeros(())
        self.post_init()
        self._freeze()
        self.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Read what `save_pretrained` wrote; what may be trained is what could be when it was saved."""
        found = super().from_pretrained(*args, **kwargs)
        (found[0] if isinstance(found, tuple) else found)._freeze()
        return found

    def _freeze(self) -> None:
        self.reconstructor.requires_grad_(self.config.trained)
        if self.config.trained:
            self.base.requires_grad_(False)

    def init_weights(self) -> None:
        """Draw nothing: the decoder has its weights, and the reconstructor has drawn its own."""

    def _init_weights(self, module: nn.Module) -> None:
        pass

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
        """Write what was trained as one safetensors file (see `Reconstructor.save`)."""
        self.reconstructor.save(path, self.signature)

    def load_reconstructor(self, path: str | Path) -> None:
        """Take over what was trained with the same layers and reconstruction; window, budget and score may differ (see `Reconstructor.load`)."""
        self.reconstructor.load(path, self.signature)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the decoder and the reconstructor as one model, which `from_pretrained` reads (as Hugging Face does).

        Raises:
            Mistake: the decoder carries an adapter.
        """
        if hasattr(self.base, "peft_config"):
            raise Mistake("save_pretrained", "the decoder carries an adapter", "merge it (merge_and_unload) before you reweave")
        super().save_pretrained(save_directory, *args, **kwargs)

    def own_loss(self) -> Tensor | None:
        """Return a tenth of the codes' relative error, where states are held as codes; the trainer adds it to its loss."""
        return CODE_WEIGHT * self.code_error if self.reconstructor.kind == "autoenc" else None

    def after_step(self) -> None:
        """Nothing waits for the optimizer's step."""

    @torch.no_grad()
    def remember(self, text: Any, processor: Any = None, state: MemoryState | None = None, *, piece: int = PIECE) -> MemoryState:
        """Read a text, a string with its tokenizer or tokens (T,) or (B, T), behind a state; return the state behind it. `memory` is left alone.

        Raises:
            Mistake: nothing to read, a string without a tokenizer, or a state of another model.
        """
        memory, ids = self._from(state), tokens_of(text, processor, self.device, begin=state is None)
        for part in ids.split(piece, 1):
            self(part, cache=memory, logits_to_keep=1)
        return memory.state()

    @torch.no_grad()
    def ask(self, prompt: Any, state: MemoryState | None = None, processor: Any = None, **generation: Any) -> Any:
        """Continue a prompt from a state, which is left as it is; return the new text, or the new tokens where there is no processor.

        `generation` are keywords of `generate` (max_new_tokens, do_sample, num_beams and so on).

        Raises:
            Mistake: nothing to read, a string without a tokenizer, or a state of another model.
        """
        ids = tokens_of(prompt, processor, self.device, begin=state is None)
        if state is not None:
            state.check(KIND, self.signature, len(ids))
            state = state.map(lambda tensor: tensor.index_select(0, copies(len(ids), generation).to(tensor.device)))
        return continued(self, ids, self._from(state), processor, generation)

    @torch.no_grad()
    def watch(self, text: Any, state: MemoryState | None = None, processor: Any = None) -> dict[int, dict[str, Float[Tensor, "B 1 T"]]]:
        """Return, under the number -1 (all layers hold the same tokens), what `rewoven_watch.watched` says of each token.

        Raises:
            Mistake: nothing to read, or a string without a tokenizer.
        """
        ids = tokens_of(text, processor, self.device, begin=state is None)
        return {-1: {name: values[:, None] for name, values in watched(self, self._from(state), ids).items()}}

    def _from(self, state: MemoryState | None) -> LatentBuffer:
        """Return a memory that holds a state, or nothing."""
        memory = self.new_memory()
        if state is not None:
            memory.take(state, self.device)
        return memory

    @torch.no_grad()
    def read(self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None, logits_to_keep: int = 1) -> Read:
        """Read on into `memory`; returns the logits of the last token, or of more, 0 for all (they are as many as the text is long)."""
        return self(input_ids, attention_mask, cache=self.memory, logits_to_keep=logits_to_keep)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as Hugging Face does. After `read` it goes on from `memory`: the prompt holds new tokens only, and the last token made is not yet read.

        While `memory` is empty nothing is kept, so that calls one after the other (a probe's, a benchmark's) know nothing of each other.
        """
        kwargs.setdefault("cache", self.new_memory() if self.memory.empty else self.memory)
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
                "take positions='rebased' (--positions rebased) if they are rotary, or begin with an empty memory",
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
        window = memory.part("window.")
        held = held_keys(memory, self.host, self.reconstructor, self.captured, as_keys=self.as_keys, rebased=self.rebased)
        weigh = real if self._counts("attention") else None
        sights = []
        for layer in range(self.host.depth):
            there = held if held is not None and layer in held.keys else None
            pieces = ([(there.keys[layer], there.values[layer])] if there else []) + (
                [(window[f"k.{layer}"], window[f"v.{layer}"])] if window else []
            )
            bias = visible(None if there is None else self.reconstructor.loudness(layer, there), window.get("position"), real)
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
        columns["surprisal"] = torch.zeros_like(columns["mass"])
        if self._counts("surprisal"):
            columns["surprisal"], memory.tensors["last"] = surprisals(memory.tensors.get("last"), logits.detach(), ids, real)
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
