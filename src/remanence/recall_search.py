"""The product's own conversation memory as a searcher of the ConvoMem benchmark: rooms do not import each other, so the two meet here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from remanence.data.convomem import Conversation
from remanence.measure.convomem_search import Passage
from remanence.recall.items import NewMessage, Selection

if TYPE_CHECKING:
    from remanence.recall.service import Recall


@dataclass
class RecallSearch:
    """A conversation memory, asked for chunks; what it holds in `space` is removed by `clear`.

    Args:
        recall: the memory, as it is set up.
        space: its own, so that nothing else of the store is touched.
    """

    recall: Recall
    space: str = "convomem"

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Store every message."""
        for one in conversations:
            messages = [NewMessage(message.speaker.lower(), message.text, one.person) for message in one.messages if message.text.strip()]
            if messages:
                self.recall.add_many(messages, space=self.space, conversation=one.id)

    def search(self, question: str, k: int) -> list[Passage]:
        """Return the best chunks."""
        if self.space not in self.recall.spaces():
            return []
        found = self.recall.search(question, k, Selection(space=self.space))
        return [
            Passage(f"{hit.chunk.role.title()}: {hit.chunk.text}", hit.chunk.conversation, hit.score, float(hit.chunk.id)) for hit in found
        ]

    def clear(self) -> None:
        """Remove the space."""
        if self.space in self.recall.spaces():
            self.recall.store.drop_space(self.space)
