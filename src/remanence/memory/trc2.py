"""A decoder whose backbone stays slow while two side loops are fast: a thalamus that modulates queries, and a hippocampus that reads and writes events.

"Efficient Continual Learning in Language Models via Thalamically Routed Cortical Columns", Khadangi 2026, arXiv 2602.22479. The block of version 3 and later,
after the project page (trc2lm.github.io); version 1 describes another one, whose summaries of the sequence leak the future.

    H_0 = Drop(E[x])     column l: see `trc2_parts`;  C_l = W_L5 H_l  ->  thalamus  ->  Z_l, the side input of column l + 1 (column 1 has none)
    behind column `inject`: F_hip from the hippocampus;  th_l = Z_l + F_hip for all later columns; the stream H itself is untouched
    loss of its own: w_critic mean delta^2 + w_balance mean load balance

`Trainer.fit` adds that loss and calls `after_step`, which writes the slots; a loop of your own passes labels (or adds `own_loss()`) and calls `after_step()`.

| symbol | here | default |
|---|---|---|
| L, d, heads | `num_hidden_layers`, `hidden_size`, `num_attention_heads`, `num_key_value_heads` | 8, 512, 8, 4 |
| E, top-k | `num_experts`, `experts_per_token` | 8, 2 |
| l_inj | `inject_layer`, counted from 0, the column behind which memory is read | L//2 - 1 (that is L//2 counted from 1) |
| r, groups of TRN | `rank`, `trn_groups` | d/8, r/8 |
| N_slots, k, m; tokens kept with a slot | `slots`, `read_k`, `write_m`; `slot_span` | 512, 8, 4; 0 |

`thalamus` and `hippocampus` switch the loops; with both off this is the plain mixture-of-experts decoder. Replay is a learner's matter (`learn/replay_controller`),
which runs old rows inside `bypass()`.

Differs from the paper, of which versions 3 to 5 were read as abstract and page only: formulas of the side loops are ours (see `thalamus`, `hippocampus`). The
surprise of token t - 1 is known to a column only behind the injection; before it the gates are told 0, since anything else would need a second pass. Rows of
a batch read one common memory, which is constant during a forward pass.
Cost: the decoder, d^2 + 2 d r per token and column, and one product of T x d with the slots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from remanence.errors import Mistake
from remanence.memory.hippocampus import Hippocampus, Seen, td_loss
from remanence.memory.slots import SlotMemory
from remanence.memory.spans import Trail
from remanence.memory.thalamus import Silent, Thalamus
from remanence.memory.trc2_config import TRC2Cache, TRC2Config
from remanence.memory.trc2_parts import Column, Experts, angles, borders, masks
from remanence.models.forward import evaluating
from remanence.training.batches import IGNORED

if TYPE_CHECKING:
    from remanence.stream import Request
    from remanence.training.trainer import Trainer


class TRC2ForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; `memory` is its `SlotMemory`."""

    config_class = TRC2Config
    base_model_prefix = "trc2"
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"memory\.span_"]  # noqa: RUF012  a folder saved without spans: they are unknown
    _no_split_modules = ["Column"]  # noqa: RUF012
    supports_gradient_checkpointing = False

    def __init__(self, config: TRC2Config):
        super().__init__(config)
        config.check()
        dim, rank, count = config.hidden_size, config.side_rank, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, dim)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Column(config, layer) for layer in range(count))
        paths = count - 1 if config.thalamus else 0
        self.thalami = nn.ModuleList(Thalamus(dim, rank, config.groups, config.focal_width, config.diffuse_decay) for _ in range(paths))
        self.hippocampus: Hippocampus | None = None
        if config.hippocampus:
            slots = SlotMemory(config.slots, dim, config.merge_cosine, config.merge_keep, config.age_decay, config.slot_span)
            self.hippocampus = Hippocampus(
                dim, rank, slots, config.read_k, config.sharpness, config.write_m, config.discount, config.slow_rate, config.event_quantile
            )
        self.norm = nn.RMSNorm(dim, config.rms_norm_eps)
        self.lm_head = nn.Linear(dim, config.vocab_size, bias=False)
        self._bypassed = self._reading = False
        self._pending = 0  # forward passes whose backward pass has not come
        self._own: list[Tensor] = []
        self.post_init()

    @property
    def memory(self) -> SlotMemory:
        """The slots.

        Raises:
            Mistake: a model without a hippocampus.
        """
        if self.hippocampus is None:
            raise Mistake("trc2.hippocampus", "is switched off, so there is no memory", "build the model with hippocampus=True")
        return self.hippocampus.memory

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=module.kernel_size[0] ** -0.5)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up, std=std)
            nn.init.normal_(module.down, std=std)
        elif isinstance(module, Hippocampus):
            nn.init.zeros_(module.fast.weight)
            nn.init.zeros_(module.openness)
            for random in (module.to_key, module.to_value):
                nn.init.normal_(random.weight, std=random.in_features**-0.5)
            module.query.weight.copy_(module.to_key.weight)
        elif isinstance(module, SlotMemory) and module.span:
            nn.init.zeros_(module.span_ids)
            nn.init.zeros_(module.span_length)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.0 if isinstance(module, Silent) else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        cache: TRC2Cache | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (and a loss, given labels); in training, note what `after_step` will write.

        Raises:
            Mistake: writing in evaluation (`online`) without labels.
        """
        on = self.hippocampus is not None and not self._bypassed
        learns = on and (torch.is_grad_enabled() if self.training else self.config.online)
        if learns and not self.training and labels is None:
            raise Mistake("trc2.online", "slots are written in evaluation only behind a loss", "pass labels")
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = TRC2Cache()
        self._reading = True
        try:
            h, seen, balance = self._columns(input_ids, attention_mask, position_ids, cache)
        finally:
            self._reading = False
        logits = self.lm_head(self.norm(h))
        if self.training and torch.is_grad_enabled():
            self._own.append(self.config.balance_weight * balance)
        if seen is not None and learns:
            self._judge(logits, input_ids, seen)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
            own = self.own_loss()
            loss = loss if own is None else loss + own  # as other mixtures of experts do when they are given labels
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    def _columns(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None, cache: TRC2Cache | None, encoding: bool = False
    ) -> tuple[Tensor, Seen | None, Tensor]:
        """Return the last stream, what the critics saw at the injection, and the mean load balance; `encoding` ends with the stream at the injection."""
        batch, length = input_ids.shape
        past = cache.get_seq_length() if cache is not None else 0
        loops = encoding or not self._bypassed
        side_states = cache.side if cache is not None else {}
        real, mask, placed = masks(input_ids, attention_mask, past)
        positions = placed if positions is None else positions.expand(batch, length)
        first, side_states["document"] = borders(input_ids, self.config.reset_token_id, side_states.get("document"))
        trail = None
        if self.config.slot_span and self.hippocampus is not None and not encoding:
            trail = Trail.follow(input_ids, real, first, self.config.slot_span, side_states.get("trail"))
            if cache is not None:
                side_states["trail"] = trail.state()
        turn = angles(positions, self.config.hidden_size // self.config.num_attention_heads, self.config.rope_theta, self.dtype)
        h, side, hip, seen = self.drop(self.embed_tokens(input_ids)), None, None, None
        surprise, balances = torch.zeros_like(real, dtype=h.dtype), []
        for layer, column in enumerate(cast(list[Column], self.layers)):
            h, balance = column(h, turn, mask, side, cache)
            balances.append(balance)
            if encoding and layer == self.config.inject:
                break
            if not loops or layer == len(self.layers) - 1:
                continue
            if self.hippocampus is not None and layer == self.config.inject:
                value, ahead, surprise, known, state = self.hippocampus.judge(h, real, side_states.get("critics"))
                side_states["critics"] = state
                seen = Seen(h, value, ahead, surprise, known, trail)
                hip = self.hippocampus(h, surprise, known)
            z = None
            if column.deep is not None:
                name = f"thalamus {layer}"
                z, side_states[name] = self.thalami[layer](column.deep(h), surprise, real, first, side_states.get(name))
            side = z if hip is None else hip if z is None else z + hip  # the one sum node
        return h, seen, torch.stack(balances).mean()

    def _judge(self, logits: Tensor, input_ids: Tensor, noted: Seen) -> None:
        """Train the critics on what was observed, and stash what surprised."""
        assert self.hippocampus is not None
        h, value, ahead, surprise, known, trail = noted
        with torch.no_grad():
            seen = logits[:, :-1].flatten(0, 1).float() if logits.dtype != torch.float64 else logits[:, :-1].flatten(0, 1)
            reward = F.cross_entropy(seen, input_ids[:, 1:].flatten(), reduction="none").view(len(h), -1)
        if self.training:
            self._own.append(self.config.critic_weight * td_loss(value, ahead, reward, known[:, 1:], self.config.discount))
            if logits.requires_grad:
                self._pending += 1
                logits.register_hook(self._arrived)
        self.hippocampus.stash(h, surprise, known, trail)

    def _arrived(self, gradient: Tensor) -> None:
        del gradient
        self._pending = max(0, self._pending - 1)

    def own_loss(self) -> Tensor | None:
        """Return the critics' and routers' losses of the forward passes since the last call; the trainer adds them to its loss."""
        found, self._own = self._own, []
        return sum(found[1:], found[0]) if found else None

    def after_step(self) -> None:
        """Do what waits for the optimizer's step: write the slots."""
        self._own = []
        self.flush()

    def flush(self) -> None:
        """Write what the forward passes stashed.

        Raises:
            Mistake: inside a forward pass, or before its backward pass.
        """
        self._between_steps("trc2.flush")
        if self.hippocampus is not None:
            self.hippocampus.flush()

    def _between_steps(self, place: str) -> None:
        if self._reading:
            raise Mistake(place, "was called inside a forward pass, which would read its own writes", "call it behind the optimizer's step")
        if self._pending:
            raise Mistake(place, "was called before the backward pass", "call it behind the optimizer's step")

    def refresh_slots(self, batch: int = 64) -> int:
        """Encode each slot anew from the tokens kept with it (`slot_span`), by the weights of now; return how many slots that were.

        Key and value become what a forward pass over the span alone would stash: the text before the span, dropout, and what merges added to the value are not
        in them, so that a slot is then a function of its span and the weights. Slots of no known span stay as they are, and so does all else.

        Args:
            batch: spans that are encoded at a time.

        Raises:
            Mistake: the slots keep no spans; inside a training step; or writes wait for the step's end.
        """
        self._between_steps("trc2.refresh_slots")
        self.memory.with_span()
        assert self.hippocampus is not None
        self._reading = True
        try:
            with evaluating(self):
                return self.hippocampus.refresh(lambda ids: self._columns(ids, None, None, None, encoding=True)[0], batch)
        finally:
            self._reading = False

    def after_task(self) -> int:
        """Do what waits for the end of a task: encode the slots anew if they keep their spans; return how many were."""
        return self.refresh_slots() if self.hippocampus is not None and self.memory.span else 0

    def erase(self, request: Request, trainer: Trainer) -> int:
        """Empty the slots whose spans a request asks to forget, all being encoded anew first: what merges brought into a value has no span. Return their number."""
        if self.hippocampus is None or not self.memory.span:
            return 0
        self.hippocampus.waiting.clear()  # what no step has written may come from the forgotten rows
        self.refresh_slots()
        return self.memory.forget(self.memory.spans_of(request, trainer))

    @contextlib.contextmanager
    def bypass(self) -> Iterator[None]:
        """Run the columns alone inside: no thalamus, no hippocampus, nothing stashed (the path of replayed rows)."""
        before, self._bypassed = self._bypassed, True
        try:
            yield
        finally:
            self._bypassed = before

    def get_input_embeddings(self) -> nn.Module:
        """Return E."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any) -> bool:
        if model_kwargs.get("cache") is None and generation_config.use_cache:
            model_kwargs["cache"] = TRC2Cache()
        return True
