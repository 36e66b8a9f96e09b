"""HEMA: one conversation behind a frozen model: an always visible gist, searchable episodes, and prompts under a hard budget of tokens.

"HEMA: A Hippocampus-Inspired Extended Memory Architecture for Long-Context AI Conversations", Kwangseob Ahn, 2025, arXiv 2504.16754. Per turn: chunk and embed,
advance the gist, append, and every 100 turns maintain (`recall/turns.py`); then retrieve and compose (`recall/service.py`).

| paper | here | default | file |
|---|---|---|---|
| u_t, c | message, chunk of at most `chunk_tokens` | 256 | turns.py |
| Phi | embedder, d is its own | `sentence`, 384 | embedders.py |
| S_t = Summarizer(S_{t-1}, u_t) | flat gist, `summary_tokens` | 60 | gist.py |
| summary of summaries | segments Z_j, whole G, `period` | 100 | gist.py |
| R_t = argtopK cos | `pool`, then `top_k`, then the budget | 50, 10 | retrieval.py |
| B | `budget` | 3500 | compose.py |
| w_i = lam exp(-gamma (t - i)) + beta (...) | `lam`, `gamma`, `beta`, `salience` | 1, 0.002, 0.5, bonus | salience.py |
| prune 0.5 % every 100 turns | `prune_fraction`, `period` | 0.005, 100 | salience.py |

Differs from the paper: the sign of beta is the one of its text, not of its equation (`salience.py` says why, and keeps the other); the two levels of the gist, the
chunk's size, K and what gives way to the budget are ours, because it does not state them; a gist can be pinned down by facts; chunks carry dates.

This class is one conversation with the paper's names. `Recall` is the same for many spaces and conversations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remanence.recall.items import DEFAULT, Hit, Prompt, Selection
from remanence.recall.protocols import Embedder, Summarizer, Tokenizer
from remanence.recall.service import Recall
from remanence.recall.settings import POLICIES, HemaSettings, policy

__all__ = ["POLICIES", "HemaMemory", "HemaSettings", "policy"]


class HemaMemory:
    """Remember one conversation.

    Args:
        path: the store's folder.
        embedder: a name or an `Embedder`; `None`: the store's own, `sentence` for a new one.
        summarizer: a name or a `Summarizer`.
        tokenizer: a name or a `Tokenizer`.
        conversation: its name in the store.
        **settings: of `HemaSettings`: budget, summary_tokens, period, lam, gamma, beta, recent_window, prune_fraction, salience, sos, forgetting, ...
    """

    def __init__(
        self,
        path: str | Path,
        embedder: str | Embedder | None = None,
        summarizer: str | Summarizer = "extractive",
        tokenizer: str | Tokenizer = "sentence",
        *,
        conversation: str = DEFAULT,
        **settings: Any,
    ):
        self.conversation = conversation
        self.recall = Recall.open(path, embedder=embedder, summarizer=summarizer, tokenizer=tokenizer, **settings)

    def add_turn(self, role: str, text: str, ts: float | None = None, meta: Mapping[str, Any] | None = None) -> int:
        """Take a turn in and return its number."""
        return self.recall.add(text, role=role, at=ts, meta=meta, conversation=self.conversation).turn

    def compose(self, user_text: str, system: str = "") -> Prompt:
        """Compose the prompt of the user's turn."""
        return self.recall.compose(user_text, system=system, conversation=self.conversation, scope="conversation")

    def search(self, query: str, k: int = 10, selection: Selection | None = None) -> list[Hit]:
        """Return the best chunks."""
        return self.recall.search(query, k, Selection(conversation=self.conversation) if selection is None else selection)

    def gist(self) -> str:
        """Return the compact memory S_t."""
        return self.recall.gist(DEFAULT, self.conversation)

    def maintain(self, force: bool = False) -> dict[str, Any]:
        """Bring the gist up to date, and with `force` prune now; return counts."""
        return self.recall.maintain(DEFAULT, self.conversation, force)

    def forget(self, turns: Sequence[int] | Selection, *, reason: str = "") -> dict[str, Any]:
        """Erase turns by number, or a selection, with everything that was made of them; return the receipt."""
        if isinstance(turns, Selection):
            return self.recall.forget(turns, reason=reason)
        wanted = set(turns)
        messages = self.recall.messages(Selection(conversation=self.conversation))
        ids = tuple(message.id for message in messages if message.turn in wanted)
        return self.recall.forget(Selection(ids=ids), reason=reason)

    def stats(self) -> dict[str, Any]:
        """Return numbers of the store, and what is in use."""
        return self.recall.stats()

    def export(self, path: str | Path) -> int:
        """Write the conversation as JSON lines; return how many messages."""
        return self.recall.export(path, Selection(conversation=self.conversation))

    def load(self, path: str | Path) -> int:
        """Add the messages of a file that `export` wrote; return how many."""
        return self.recall.load(path, DEFAULT)

    def close(self) -> None:
        """Close the store."""
        self.recall.close()

    def __enter__(self) -> HemaMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
