r"""Causal language models with a memory that learns while they read: one skeleton, of which Titans, Miras and Memory Caching are thin classes.

A Llama (RMSNorm, SwiGLU, rotary positions inside a window) whose blocks carry a memory in one of the ways of `blocks` (lmm, mac, mag, mal, hybrid); blocks
without one attend to a window. Learned, input-independent prefix vectors stand before every sequence: every window sees them, and the memory reads them first.
All that a model holds of what it read is an `LMState` of constant size; it is a value: reading returns another one, and asking leaves it as it is.

Titans (Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663), Miras (Behrouz et al. 2025, arXiv 2504.13173), Memory Caching (Behrouz et al. 2026, arXiv 2602.24281).

| symbol | here | default |
|--------|------|---------|
| C, segment of MAC | `segment` | 256 |
| W, window | `window` | 256 |
| N_p, persistent tokens | `n_persistent` | 4 |
| the memory's settings | `memory` (a dict, see the memory's class) | {} |

Differs from the paper: C, W and N_p are not given there; the prefix has no position; the memory's chunks are counted from the first prefix token.
A masked token (attention_mask 0) is not seen, not written, and predicts nothing of use; it keeps its place in windows, segments and chunks, so padding on the
right changes nothing at all, padding on the left moves the borders of chunks.

Cost: linear in T for a fixed window, segment and chunk; the state does not grow (but for Memory Caching, whose archive does).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_outputs import CausalLMOutputWithPast

from remanence.errors import Mistake
from remanence.memory.asking import continued, copies, tokens_of
from remanence.memory.blocks import Block, BlockState
from remanence.memory.lm_config import MemoryCachingConfig, MemoryConfig, MirasConfig, TitansConfig
from remanence.memory.lm_state import LMCache, LMState, beside


class MemoryModel(nn.Module):
    """Embedding, prefix, blocks and the last norm."""

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.persistent = nn.Embedding(config.n_persistent, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, config.variant_of(layer)) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def begin(self, batch: int) -> LMState:
        """Return the state behind the prefix, the same for every row (it is read once)."""
        x = self.persistent.weight[None]
        states = []
        for layer in self.layers:
            x, state = layer(x, BlockState(), None, True)
            states.append(state)
        state = LMState(self.config.model_type, beside(self.config), tuple(states))
        return state.rows(torch.zeros(batch, dtype=torch.int64, device=x.device))

    def forward(
        self, x: Float[Tensor, "B T d"], state: LMState | None, mask: Bool[Tensor, "B T"] | None
    ) -> tuple[list[Float[Tensor, "B T d"]], LMState]:
        """Read embedded tokens: the hidden states behind the embedding and every block (the last one normed), and the state."""
        state = state if state is not None else self.begin(len(x))
        hidden, states = [x], []
        for layer, held in zip(self.layers, state.blocks, strict=True):
            x, after = layer(x, held, mask, False)
            hidden.append(x)
            states.append(after)
        hidden[-1] = self.norm(x)
        return hidden, dataclasses.replace(state, blocks=tuple(states), seen=state.seen + x.shape[1])


class MemoryForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose memory learns while it reads; use `TitansForCausalLM`, `MirasForCausalLM` or `MemoryCachingForCausalLM`."""

    config_class = MemoryConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (names and forms that transformers looks for)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _is_stateful = True  # no assisted decoding: a memory cannot take back what it read

    def __init__(self, config: MemoryConfig):
        config.check()
        super().__init__(config)
        self.model = MemoryModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, nn.Embedding) and self.config.embedding_range is not None:
            initialization.normal_(module.weight, mean=0.0, std=self.config.embedding_range)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        cache: LMCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        """Read tokens and return logits (B, T, V), with the loss where labels are given and the cache where one is asked for.

        Args:
            input_ids: tokens.
            attention_mask: (B, T), or (B, all tokens since the cache was made); 0 marks tokens that are neither seen nor written.
            inputs_embeds: embedded tokens instead.
            labels: tokens to predict, -100 where nothing is asked (shifted here).
            cache: what was read before; it is carried on.
            use_cache: return a cache.
            logits_to_keep: only for the last so many tokens, or for those of these numbers.
            output_hidden_states: return the stream behind the embedding and each block.

        Raises:
            Mistake: a mask or a state that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise Mistake("input_ids", "expected either tokens or embeddings", "give one of input_ids and inputs_embeds")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        state = cache.state if cache is not None else None
        hidden, state = self._read(x, state, attention_mask)
        if cache is None and use_cache:
            cache = LMCache()
        if cache is not None:
            cache.state = state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[-1][:, kept])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **rest)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache, hidden_states=tuple(hidden) if output_hidden_states else None)

    def _read(self, x: Tensor, state: LMState | None, mask: Tensor | None) -> tuple[list[Tensor], LMState]:
        if state is not None:
            state.check(self.config, len(x))
        return self.model(x, state, write_mask(mask, x))

    @torch.no_grad()
    def remember(
        self,
        text: str | Int[Tensor, "..."] | list[int],
        processor: Any = None,
        state: LMState | None = None,
        *,
        piece: int = 1024,
    ) -> LMState:
        """Read a text and return the state behind it.

        Args:
            text: a string, or tokens (T,) or (B, T).
            processor: the tokenizer, for a string.
            state: to go on from; it is left as it is.
            piece: tokens read at a time, which bounds the working memory and changes nothing else.

        Raises:
            Mistake: nothing to read, or a string without a tokenizer.
        """
        ids = tokens_of(text, processor, self.device)
        for part in ids.split(piece, 1):
            state = self._read(self.model.embed_tokens(part), state, None)[1]
        assert state is not None
        return state

    @torch.no_grad()
    def ask(
        self, prompt: str | Int[Tensor, "..."] | list[int], state: LMState | None = None, processor: Any = None, **generation: Any
    ) -> Any:
        """Continue a prompt from a state, which is left as it is; return the new text, or the new tokens where there is no processor.

        Args:
            prompt: a string, or tokens.
            state: what was remembered.
            processor: the tokenizer.
            generation: keywords of `generate` (max_new_tokens, do_sample, num_beams and so on).

        Raises:
            Mistake: nothing to read, a string without a tokenizer, or a state of another model.
        """
        ids = tokens_of(prompt, processor, self.device)
        if state is not None:
            state.check(self.config, len(ids))
            index = copies(len(ids), generation)
            state = state.rows(index) if len(index) > len(ids) else state  # one continuation needs no copy
        return continued(self, ids, LMCache(state), processor, generation)

    @torch.no_grad()
    def watch(
        self, text: str | Int[Tensor, "..."] | list[int], state: LMState | None = None, processor: Any = None
    ) -> dict[int, dict[str, Float[Tensor, "B H T"]]]:
        """Return what happened at each token in each block with a memory, by the block's number (see `Memory.watch`: surprise, write, forget).

        Raises:
            Mistake: nothing to read, or a string without a tokenizer.
        """
        ids = tokens_of(text, processor, self.device)
        state = state if state is not None else self.model.begin(len(ids))
        parts: dict[int, list[dict[str, Tensor]]] = {}
        hooks = []
        for number, layer in enumerate(self.model.layers):
            if layer.variant != "swa":

                def before(memory: nn.Module, given: tuple[Any, ...], number: int = number) -> None:
                    parts.setdefault(number, []).append(memory.watch(*given))  # type: ignore[operator]

                hooks.append(layer.memory.register_forward_pre_hook(before))
        try:
            self._read(self.model.embed_tokens(ids), state, None)
        finally:
            for hook in hooks:
                hook.remove()
        return {number: {name: torch.cat([part[name] for part in seen], -1) for name in seen[0]} for number, seen in parts.items()}


class TitansForCausalLM(MemoryForCausalLM):
    """Titans as a language model (arXiv 2501.00663)."""

    config_class = TitansConfig


class MirasForCausalLM(MemoryForCausalLM):
    """Miras as a language model: lmm, or hybrid for its "-H" models (arXiv 2504.13173)."""

    config_class = MirasConfig


class MemoryCachingForCausalLM(MemoryForCausalLM):
    """A recurrent model that keeps checkpoints of its memory, as a language model (arXiv 2602.24281)."""

    config_class = MemoryCachingConfig


def write_mask(mask: Tensor | None, x: Float[Tensor, "B T d"]) -> Bool[Tensor, "B T"] | None:
    """Return which of the T tokens are real, from a mask of them or of everything since the cache was made; `None`: all.

    Raises:
        Mistake: it has another shape.
    """
    if mask is None:
        return None
    if mask.ndim != 2 or len(mask) != len(x) or mask.shape[1] < x.shape[1]:
        raise Mistake("attention_mask", f"expected {tuple(x.shape[:2])}, got {tuple(mask.shape)}", "give 1 for real tokens, 0 for padding")
    mask = mask[:, mask.shape[1] - x.shape[1] :].bool()
    return None if bool(mask.all()) else mask
