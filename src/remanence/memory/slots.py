"""The slots of the hippocampus: a key and a value each, and, where asked for, the tokens that the slot was made of (see `hippocampus`).

    write   a candidate whose best cosine to a slot exceeds `merge` goes into that slot's value; any other takes the slot of least strength * decay^age
    spans   the s tokens that end at the written position, kept with the slot, so that it can be encoded anew (`TRC2ForCausalLM.refresh_slots`) and found again

A merge leaves the slot's key as it is, so the span that stays is the slot's own: the key must go on being what the span encodes to. What a merge added to
the value has no span; it is given up when the slot is encoded anew.
Cost: M (2 d + 3) numbers, and M (s + 1) more with spans.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.memory.spans import Spans
from remanence.storage import load_tree, save_tree
from remanence.training.memory import WINDOW, shares_window, window_hashes

if TYPE_CHECKING:
    from remanence.stream import Request
    from remanence.training.trainer import Trainer

NOTHING = -1  # fills rows up where they are searched: the number of no token


class SlotMemory(nn.Module):
    """Slots of keys and values: buffers, saved with the model and trained by nobody.

    Args:
        slots: M.
        dim: d.
        merge: cosine from which a candidate is merged into its nearest slot.
        keep: share of the old value in a merge.
        age_decay: of a slot's strength per flush.
        span: s, tokens kept with a slot; 0 keeps none.
    """

    keys: Tensor
    values: Tensor
    strength: Tensor
    written: Tensor
    filled: Tensor
    time: Tensor
    span_ids: Tensor
    span_length: Tensor

    def __init__(self, slots: int, dim: int, merge: float = 0.9, keep: float = 0.9, age_decay: float = 0.999, span: int = 0):
        super().__init__()
        self.merge, self.keep, self.age_decay, self.span = merge, keep, age_decay, span
        self.register_buffer("keys", torch.zeros(slots, dim))
        self.register_buffer("values", torch.zeros(slots, dim))
        self.register_buffer("strength", torch.zeros(slots))
        self.register_buffer("written", torch.zeros(slots, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros(slots, dtype=torch.bool))
        self.register_buffer("time", torch.zeros((), dtype=torch.int64))
        if span:  # else a saved file holds what it always held
            self.register_buffer("span_ids", torch.zeros(slots, span, dtype=torch.int64))
            self.register_buffer("span_length", torch.zeros(slots, dtype=torch.int64))

    def read(self, query: Float[Tensor, "B T d"], k: int, sharpness: float) -> Float[Tensor, "B T d"]:
        """Return the softmax mixture of the k nearest filled slots; exactly zero where none is filled."""
        score = (query @ self.keys.mT).masked_fill(~self.filled, -torch.inf)
        best, index = score.sort(dim=-1, descending=True, stable=True)  # equal scores: the lower index, in every precision
        best, index = best[..., :k], index[..., :k]
        live = self.filled[index]
        weight = torch.where(
            live, torch.exp(sharpness * (best.masked_fill(~live, -1.0) - best[..., :1].masked_fill(~live[..., :1], 0.0))), 0.0
        )
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
        return torch.einsum("btk,btkd->btd", weight, self.values[index])

    @torch.no_grad()
    def write(
        self, key: Float[Tensor, "N d"], value: Float[Tensor, "N d"], surprise: Float[Tensor, " N"], span: Spans | None = None
    ) -> None:
        """Merge each candidate into the slot that it resembles, or give it the slot of least strength * decay^age.

        A merge keeps the slot's span: its key stays, and must go on being what its span encodes to.
        """
        self.time += 1
        order = surprise.sort(descending=True, stable=True).indices
        key, value, surprise = key[order], value[order], surprise[order]
        best, slot = (key @ self.keys.mT).masked_fill(~self.filled, -torch.inf).max(-1)
        near = best > self.merge
        if bool(near.any()):
            total = torch.zeros_like(self.values).index_add_(0, slot[near], value[near])
            count = torch.zeros_like(self.strength).index_add_(0, slot[near], torch.ones_like(surprise[near]))
            hit = count > 0
            merged = self.keep * self.values + (1 - self.keep) * total / count.clamp(min=1)[:, None]
            self.values.copy_(torch.where(hit[:, None], merged, self.values))
            self.written.masked_fill_(hit, int(self.time))
        fresh = ~near
        copies = torch.tril((key @ key.mT > self.merge) & fresh[None], diagonal=-1).any(1)  # of a more surprising candidate
        chosen = torch.nonzero(fresh & ~copies)[: len(self.keys), 0]
        score = self.strength * self.age_decay ** (self.time - self.written)
        place = (
            score.masked_fill(~self.filled, -1.0).masked_fill(self.written == self.time, torch.inf).sort(stable=True).indices[: len(chosen)]
        )
        self.keys[place], self.values[place] = key[chosen], value[chosen]
        self.strength[place] = torch.sigmoid(surprise[chosen])  # positive, and rising with surprise
        self.written[place], self.filled[place] = self.time, True
        if self.span:
            self.span_ids[place], self.span_length[place] = (part[order][chosen] for part in span) if span is not None else (0, 0)

    @torch.no_grad()
    def forget(self, mask: Bool[Tensor, " M"]) -> int:
        """Empty the slots of a mask, nothing of them stays; return how many held something.

        Raises:
            Mistake: the mask is not one boolean per slot.
        """
        if mask.dtype != torch.bool or mask.shape != self.filled.shape:
            raise Mistake(
                "slot memory", f"expected {len(self.filled)} booleans, got {mask.dtype} {tuple(mask.shape)}", "True marks a slot to empty"
            )
        gone = int((mask & self.filled).sum())
        for buffer in (self.keys, self.values, self.strength, self.written, self.filled, *self._spans().values()):
            buffer[mask] = 0
        return gone

    def clear(self) -> None:
        """Empty all slots."""
        self.forget(torch.ones_like(self.filled))

    def with_span(self) -> Int[Tensor, " n"]:
        """Return the numbers of the filled slots whose span is known.

        Raises:
            Mistake: the slots keep no spans.
        """
        if not self.span:
            raise Mistake("slot memory", "keeps no tokens with its slots", "build the model with slot_span above 0")
        return torch.nonzero(self.filled & (self.span_length > 0))[:, 0]

    @torch.no_grad()
    def spans_in(self, rows: Int[Tensor, "N T"]) -> Bool[Tensor, " M"]:
        """Mark the filled slots whose whole span occurs in one of the rows; `NOTHING` (-1) may fill them up.

        Raises:
            Mistake: the slots keep no spans.
        """
        known = self.with_span()
        found = torch.zeros_like(self.filled)
        for length in self.span_length[known].unique().tolist():
            slots = known[self.span_length[known] == length]
            if length <= rows.shape[1]:
                mine = window_hashes(self.span_ids[slots, :length].cpu(), length)[:, 0]
                found[slots] = torch.isin(mine, window_hashes(rows.cpu(), length)).to(found.device)
        return found

    def spans_of(self, request: Request, trainer: Trainer) -> Bool[Tensor, " M"]:
        """Mark the filled slots whose span comes from the rows that a request asks to forget.

        The whole span must occur in such a row, encoded as the trainer encodes it and padded. Of kind text, where rows are cut from joined texts, a span goes too
        that shares `WINDOW` consecutive tokens with a text (or the whole of a shorter one), as rows of replay memories do.

        Raises:
            Mistake: the slots keep no spans.
        """
        known, tokenizer = self.with_span(), trainer.processor
        if request.kind in ("classes", "images"):
            return torch.zeros_like(self.filled)
        if request.kind == "text":
            rows = tokenizer(list(request.forget["text"]), add_special_tokens=False, verbose=False)["input_ids"]
            end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        else:
            rows, end = list(trainer.encode(request.forget, request.kind)["input_ids"]), []
        behind = [*end, *[getattr(tokenizer, "pad_token_id", None) or 0] * self.span, NOTHING]
        found = self.spans_in(torch.tensor([token for row in rows for token in (*row, *behind)], dtype=torch.int64)[None])
        if request.kind == "text" and len(known):
            place = torch.arange(self.span, device=known.device)
            spans = torch.where(place < self.span_length[known, None], self.span_ids[known], NOTHING)
            found[known] |= shares_window(spans, rows, WINDOW).to(found.device)
        return found

    def save(self, path: str | Path) -> None:
        """Write the slots as one safetensors file, whole or not at all."""
        save_tree(path, {"kind": "trc2 slots", "slots": dict(self.state_dict())})

    def load(self, path: str | Path) -> None:
        """Take over what `save` wrote.

        Raises:
            Mistake: the file holds no slots, or slots of another number or width, or with spans of another length.
        """
        tree = load_tree(path)
        if not isinstance(tree, dict) or tree.get("kind") != "trc2 slots":
            raise Mistake(path, "holds no slots", "name a file that SlotMemory.save wrote")
        found = tree["slots"]["keys"].shape
        if found != self.keys.shape:
            raise Mistake(path, f"holds slots {tuple(found)}, this memory {tuple(self.keys.shape)}", "load it into a model of its settings")
        spans = tree["slots"].get("span_ids")
        if self.span and spans is not None and spans.shape[1] != self.span:
            raise Mistake(
                path, f"holds spans of {spans.shape[1]} tokens, this memory of {self.span}", "load it into a model of its slot_span"
            )
        self.load_state_dict(tree["slots"])

    def _spans(self) -> dict[str, Tensor]:
        return {"span_ids": self.span_ids, "span_length": self.span_length} if self.span else {}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take slots from a memory that kept spans into one that does not, and the other way round: their spans are unknown then."""
        for name in ("span_ids", "span_length"):
            if not self.span:
                state_dict.pop(prefix + name, None)
            elif prefix + name not in state_dict:
                state_dict[prefix + name] = torch.zeros_like(getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *rest)
