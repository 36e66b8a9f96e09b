"""How histories are packed around questions: ConvoMem's standard and batched rules.

Standard: one history per (item, size), filled with conversations of the same person, the item's own at random places in their order. Batched: shuffled items
share a history as long as their conversations fit. Histories of the two kinds differ (in a batch, other items' evidence stands where filler would), so
results carry the packing's name and are never compared across it.

Differs from the official code: a history has exactly the size asked for (theirs is smaller where a person's filler runs out, larger where a batch overflows);
where a person's own filler runs out, that of others follows; the extra histories that bring a batch to ten are reshuffles that keep to the size.

Cost: O(size) per history, plus one permutation of the other persons' filler where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from remanence.data.convomem import Conversation, EvidenceItem, flagged
from remanence.data.convomem_check import Leaks
from remanence.errors import Mistake
from remanence.seeds import numpy_generator

PACKINGS = ("standard", "batched")
BATCH, HAYSTACKS = 100, 10  # at most so many items share a history, and at least so many histories per size


@dataclass(frozen=True)
class Case:
    """A history and the questions that are asked of it, each independently."""

    id: str
    size: int
    packing: str
    conversations: tuple[Conversation, ...]
    items: tuple[EvidenceItem, ...]


class Packer:
    """Make cases out of items and fillers, the same for the same seed whatever else was packed before.

    Args:
        items: questions with their conversations.
        fillers: conversations that hold no evidence, each with its person.
        seed: of every random choice.
        anybody: let an item without a person draw filler of a random person; otherwise it is refused.
        spill: fill up with other persons' conversations where a person's own run out; without it, items are left out of the sizes that theirs do not reach
            (histories of LongMemEval and LoCoMo share sessions, so they must not be mixed).

    Raises:
        Mistake: a filler without a person or with an evidence message in it, two conversations with one id, an item without a person.
    """

    def __init__(
        self, items: Sequence[EvidenceItem], fillers: Sequence[Conversation], *, seed: int = 0, anybody: bool = False, spill: bool = True
    ):
        self.items = [flagged(item) for item in items]
        self.seed, self.spill = seed, spill
        self.fillers: dict[str, list[Conversation]] = {}
        seen = {one.id for item in self.items for one in item.conversations}
        if len(seen) < sum(item.k for item in self.items):
            raise Mistake("items", "two evidence conversations have the same id", "give each its own")
        if len({item.id for item in self.items}) < len(self.items):
            raise Mistake("items", "two items have the same id", "remove the double")
        for one in fillers:
            if one.id in seen:
                raise Mistake(f"filler {one.id}", "its id is taken by another conversation", "give each conversation its own")
            if one.person is None:
                raise Mistake(f"filler {one.id}", "it belongs to nobody", "set its person")
            if one.evidence:
                raise Mistake(f"filler {one.id}", "it is flagged as evidence", "remove it from the fillers")
            seen.add(one.id)
            self.fillers.setdefault(one.person, []).append(one)
        for item in self.items:
            if item.person is None and not anybody and fillers:
                problem = "it has no personId, so its filler would be somebody's at random"
                raise Mistake(f"item {item.id}", problem, "set personId, or allow it with anybody=True")
        self.people = sorted(self.fillers)
        owners: dict[str, list[EvidenceItem]] = {}
        for item in self.items:
            for person in self.people if item.person is None else [item.person]:
                owners.setdefault(person, []).append(item)
        for person, theirs in owners.items():
            Leaks(theirs).refuse(self.fillers.get(person, ()))

    def cases(self, size: int, packing: str = "standard") -> Iterator[Case]:
        """Yield the cases of one size; items with more evidence than that are left out."""
        if packing not in PACKINGS:
            raise Mistake("packing", f"there is no packing '{packing}'", f"choose {' or '.join(PACKINGS)}")
        if size < 1:
            raise Mistake("sizes", f"a history of {size} conversations holds nothing", "name sizes of at least 1")
        if packing == "batched" and not self.spill:
            raise Mistake("packing", "these histories share sessions and cannot be batched", "use standard")
        fitting = [item for item in self.items if item.k <= size]
        if not fitting:
            raise Mistake("sizes", f"no item's evidence fits into {size} conversations", f"ask for {min(i.k for i in self.items)} or more")
        if not self.spill:
            fitting = [item for item in fitting if len(self.fillers.get(item.person or "", ())) >= size - item.k]
        yield from self._standard(fitting, size) if packing == "standard" else self._batched(fitting, size)

    def case(self, item: EvidenceItem, size: int) -> Case:
        """Return the standard case of one item; a size below its number of evidence messages is refused."""
        if size < item.k:
            raise Mistake(
                f"item {item.id}", f"{item.k} evidence messages do not fit into {size} conversations", f"ask for {item.k} or more"
            )
        draw = numpy_generator(self.seed, "standard", item.id, size)
        person = item.person if item.person is not None or not self.people else self.people[draw.integers(len(self.people))]
        filler = self._filler([item], [person], size - item.k, draw)
        return Case(f"{item.id}@{size}", size, "standard", _mixed([item], filler, draw), (item,))

    def _standard(self, items: Sequence[EvidenceItem], size: int) -> Iterator[Case]:
        return (self.case(item, size) for item in items)

    def _batched(self, items: Sequence[EvidenceItem], size: int) -> Iterator[Case]:
        number = 0
        turn = 0
        while number < HAYSTACKS or turn == 0:
            draw = numpy_generator(self.seed, "batched", size, turn)
            for batch in _batches([items[place] for place in draw.permutation(len(items))], size):
                if turn and number >= HAYSTACKS:
                    break
                people = [item.person for item in batch]
                filler = self._filler(batch, people, size - sum(item.k for item in batch), draw)
                yield Case(f"batch{number}@{size}", size, "batched", _mixed(batch, filler, draw), tuple(batch))
                number += 1
            turn += 1

    def _filler(
        self, items: Sequence[EvidenceItem], people: Sequence[str | None], count: int, draw: np.random.Generator
    ) -> list[Conversation]:
        """Return filler shared out by person; that of others, without evidence of these items, only where theirs runs out."""
        named = list(dict.fromkeys(person for person in people if person is not None))
        piles = [list(draw.permutation(len(self.fillers.get(person, ())))) for person in named]
        chosen: list[Conversation] = []
        while len(chosen) < count and any(piles):
            for person, pile in zip(named, piles):
                if pile and len(chosen) < count:
                    chosen.append(self.fillers[person][pile.pop()])
        if len(chosen) < count and self.spill:
            others = [one for person in self.people if person not in named for one in self.fillers[person]]
            leaks = Leaks(items)
            for place in draw.permutation(len(others)):
                if len(chosen) < count and leaks.found(others[place]) is None:
                    chosen.append(others[place])
        if len(chosen) < count:
            raise Mistake(
                "fillers", f"{count} fillers are needed and {len(chosen)} are there", "give more of them or ask for smaller sizes"
            )
        return chosen


def _batches(items: Sequence[EvidenceItem], size: int) -> Iterator[list[EvidenceItem]]:
    batch: list[EvidenceItem] = []
    taken = 0
    for item in items:
        if batch and (taken + item.k > size or len(batch) == BATCH):
            yield batch
            batch, taken = [], 0
        batch.append(item)
        taken += item.k
    if batch:
        yield batch


def _mixed(items: Sequence[EvidenceItem], filler: Sequence[Conversation], draw: np.random.Generator) -> tuple[Conversation, ...]:
    """Put conversations at random places; those of one item keep their order."""
    owners = [number for number, item in enumerate(items) for _ in item.conversations] + [-1] * len(filler)
    queues = [iter(item.conversations) for item in items]
    rest = iter(filler)
    return tuple(next(rest if owners[place] < 0 else queues[owners[place]]) for place in draw.permutation(len(owners)))
