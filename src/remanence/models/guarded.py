"""A language model behind a gate: text put in front of every question, and questions that get a fixed answer. The weights inside are untouched.

It is saved, loaded, measured and decoded like any other model; its logits are those of the given tokens alone, so probes and audits need not know of it.
What it guards stands in its configuration as tokens: whoever has the folder has the list, and the model without the gate (`model.inner`).

| part | what it does |
|---|---|
| prompt | tokens in front of every input |
| examples, shown | rows in front of every question: all of them, or those `shown` that share most (by inverse frequency) with its tokens |
| correct | rows behind the examples |
| blocked, refusal | a question that holds one of these runs of tokens is answered by the refusal, whatever the model says |
| marker | the run of tokens between question and answer; what stands before its first place is the question |

Cost: a forward pass over context and input; decoding runs the whole sequence again for each token (no cache).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from remanence.models.ensemble import SHARED, TOKENS, kept_logits, whole_inputs

SURE = 30.0  # nats between the refusal's next token and every other one

Runs = list[list[int]]


class GuardedConfig(PretrainedConfig):
    """The configuration `inner` of the model, and the parts of the gate (see the module's table), as token numbers."""

    model_type = "remanence-guarded"

    def __init__(
        self,
        inner: dict[str, Any] | None = None,
        prompt: list[int] | None = None,
        examples: Runs | None = None,
        shown: int = 0,
        correct: Runs | None = None,
        blocked: Runs | None = None,
        refusal: list[int] | None = None,
        marker: list[int] | None = None,
        **rest: Any,
    ):
        self.inner, self.prompt, self.examples, self.shown = inner or {}, prompt or [], examples or [], shown
        self.correct, self.blocked, self.refusal, self.marker = correct or [], blocked or [], refusal or [], marker or []
        super().__init__(**{name: self.inner[name] for name in (*SHARED, *TOKENS) if name in self.inner} | rest)


class GuardedForCausalLM(PreTrainedModel, GenerationMixin):
    """A model and its gate.

    Args:
        config: of both.
        inner: the model; built from the configuration where it is not given.
    """

    config_class = GuardedConfig
    main_input_name = "input_ids"

    def __init__(self, config: GuardedConfig, inner: nn.Module | None = None):
        super().__init__(config)
        made = inner if inner is not None else AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.inner), dtype=config.dtype)
        self.inner = made
        self.post_init()
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.generation_config.use_cache = False

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the model as it is."""

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"] | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutput:
        """Return the logits (B, T, V) behind the context, with the refusal's in place of those that answer a blocked question."""
        start = answer_starts(input_ids, self.config.marker)
        length = input_ids.shape[1]
        places = torch.arange(length, device=input_ids.device)
        places = places[-logits_to_keep:] if isinstance(logits_to_keep, int) else places[logits_to_keep]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        context, inside = self._context(input_ids, start)
        given = whole_inputs(input_ids, attention_mask)
        if context.shape[1]:
            given = whole_inputs(*spliced(input_ids, mask, context, inside, self.config.bos_token_id))
        logits = kept_logits(self.inner, given, places - length)  # named from the end, where the context in front does not move them
        if self.config.blocked:
            scope = holds(input_ids, self.config.blocked, start)
            logits = refused(logits, scope, places[None] - start[:, None] + 1, self.config.refusal)
        return CausalLMOutput(logits=logits)

    def _context(self, ids: Int[Tensor, "B T"], start: Int[Tensor, " B"]) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """Return what goes in front of each row, left-aligned, and which places of it are tokens."""
        config, device = self.config, ids.device
        parts = [padded([config.prompt], device)] if config.prompt else []
        if config.examples:
            rows, inside = padded(config.examples, device)
            chosen = nearest_examples(ids, start, config.examples, config.marker, config.shown)  # (B, shown)
            parts.append((rows[chosen].flatten(1), inside[chosen].flatten(1)))
        if config.correct:
            rows, inside = padded(config.correct, device)
            parts.append((rows.flatten()[None], inside.flatten()[None]))
        if not parts:
            return ids[:, :0], ids[:, :0].bool()
        tokens, inside = (torch.cat([part[n].expand(len(ids), -1) for part in parts], 1) for n in (0, 1))
        order = (~inside).to(torch.int8).argsort(dim=1, stable=True)  # tokens first, in their order
        length = int(inside.sum(1).max())
        return tokens.gather(1, order)[:, :length], inside.gather(1, order)[:, :length]

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> dict[str, Any]:
        """Take the whole sequence at every token."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def guarded(model: nn.Module, **parts: Any) -> GuardedForCausalLM:
    """Put a gate around a model; around one that has a gate, add to it (lists grow, the rest is replaced). An adapter is merged first.

    Args:
        model: a Hugging Face causal language model.
        parts: of the gate, as in `GuardedConfig`.
    """
    from peft import PeftModel

    from remanence.models.adapters import merge_lora

    plain: Any = merge_lora(model) if isinstance(model, PeftModel) else model
    if isinstance(plain, GuardedForCausalLM):
        for name, value in parts.items():
            old = getattr(plain.config, name)
            setattr(plain.config, name, [*old, *value] if name in ("prompt", "examples", "correct", "blocked") else value)
        return plain
    made = GuardedForCausalLM(GuardedConfig(inner=plain.config.to_dict(), dtype=plain.dtype, **parts), plain)
    made.generation_config = type(plain.generation_config).from_dict(plain.generation_config.to_dict() | {"use_cache": False})
    return made.train(plain.training)  # type: ignore[return-value]


def padded(rows: Runs, device: torch.device) -> tuple[Int[Tensor, "N L"], Bool[Tensor, "N L"]]:
    """Return rows of unequal length as one tensor, padded with 0 on the right, and which places are tokens."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    return tokens, torch.arange(longest, device=device) < torch.tensor([len(row) for row in rows], device=device)[:, None]


def run_hashes(ids: Int[Tensor, "*B T"], length: int) -> Int[Tensor, "*B S"]:
    """Return a number for each run of `length` tokens (a polynomial modulo 2^64), S = T - length + 1."""
    runs = ids.unfold(-1, length, 1).long()  # (*B, S, length)
    total = torch.zeros_like(runs[..., 0])
    for place in range(length):
        total = total * 6364136223846793005 + runs[..., place] + 1
    return total


def answer_starts(ids: Int[Tensor, "B T"], marker: list[int]) -> Int[Tensor, " B"]:
    """Return the place behind the first marker of each row, T where there is none."""
    length, width = ids.shape[1], len(marker)
    if not width or length < width:
        return torch.full((len(ids),), length, device=ids.device)
    found = (ids.unfold(1, width, 1) == torch.tensor(marker, device=ids.device)).all(-1)  # (B, S)
    return torch.where(found.any(1), found.int().argmax(1) + width, length)


def holds(ids: Int[Tensor, "B T"], runs: Runs, start: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Say which rows hold one of the runs before `start`. O((B T + runs) log) for each length of runs."""
    found = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for length in {len(run) for run in runs if len(run) <= ids.shape[1]}:
        wanted = run_hashes(torch.tensor([run for run in runs if len(run) == length], device=ids.device), length)[:, 0]
        hit = torch.isin(run_hashes(ids, length), wanted)  # (B, S)
        ends = torch.arange(length, ids.shape[1] + 1, device=ids.device)
        found |= (hit & (ends <= start[:, None])).any(1)
    return found


def nearest_examples(
    ids: Int[Tensor, "B T"], start: Int[Tensor, " B"], examples: Runs, marker: list[int], shown: int
) -> Int[Tensor, "B shown"]:
    """Return the numbers of the examples whose questions share most with each row's: sum of log(1 + N / n_v) over the tokens v that both hold.

    In their own order; all of them where there are no more than `shown` (ours).
    """
    count, device = len(examples), ids.device
    if count <= shown:
        return torch.arange(count, device=device).expand(len(ids), -1)
    rows, inside = padded(examples, device)
    size = 1 + int(max(ids.max(), rows.max()))
    inside &= torch.arange(rows.shape[1], device=device) < answer_starts(rows, marker)[:, None]
    asked = torch.arange(ids.shape[1], device=device) < start[:, None]

    def bag(tokens: Tensor, there: Tensor) -> Float[Tensor, "B V"]:
        return torch.zeros(len(tokens), size, device=device).scatter_reduce_(1, tokens, there.float(), "amax")

    own = bag(rows, inside)  # (N, V)
    rare = torch.log1p(count / own.sum(0).clamp(min=1)) * (own.sum(0) > 0)
    return (bag(ids, asked) * rare @ own.T).topk(shown, dim=1).indices.sort(1).values


def spliced(
    ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"], context: Int[Tensor, "B P"], inside: Bool[Tensor, "B P"], first: int | None
) -> tuple[Int[Tensor, "B P+T"], Int[Tensor, "B P+T"]]:
    """Return rows with their context in front (behind padding on the left and a begin token), padded on the left to one length, and their mask.

    The last T places of the result predict what the T places of the row predicted.
    """
    size, length = context.shape[1], ids.shape[1]
    own = inside.sum(1, keepdim=True)  # (B, 1) tokens of context
    lead = (mask.cumsum(1) == 0).sum(1, keepdim=True).clamp(max=length - 1)
    if first is not None:
        lead = lead + (ids.gather(1, lead) == first).long()
    place = torch.arange(size + length, device=ids.device)[None] - (size - own)  # in the row with its context
    head, middle = place < lead, (place >= lead) & (place < lead + own)
    source = torch.where(head, place, place - own).clamp(0, length - 1)
    row, row_mask = ids.gather(1, source), mask.gather(1, source)
    said = context.gather(1, (place - lead).clamp(0, size - 1))
    return torch.where(middle, said, row), torch.where(middle, 1, row_mask) * (place >= 0)


def refused(
    logits: Float[Tensor, "B S V"], scope: Bool[Tensor, " B"], step: Int[Tensor, "B S"], refusal: list[int]
) -> Float[Tensor, "B S V"]:
    """Return the logits with those of blocked rows' answers (step 0 on) replaced: the refusal's token of that step is `SURE` nats ahead."""
    said = torch.tensor(refusal, device=logits.device)[step.clamp(0, len(refusal) - 1)]  # (B, S)
    fixed = torch.zeros_like(logits).scatter_(-1, said[..., None], SURE)
    return torch.where((scope[:, None] & (step >= 0))[..., None], fixed, logits)


def register() -> None:
    """Tell the Auto classes about guarded models, so that their folders load like any other; again is no harm."""
    AutoConfig.register(GuardedConfig.model_type, GuardedConfig, exist_ok=True)
    AutoModelForCausalLM.register(GuardedConfig, GuardedForCausalLM, exist_ok=True)
