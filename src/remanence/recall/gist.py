"""The compact memory: a gist of the whole conversation in one line, in two levels so that it does not drift, or flat.

HEMA gives the cadence of its summary of summaries (every 100 turns); the concrete form is ours:

- level 1: segment j covers turns period * (j - 1) + 1 .. period * j. While it is open it has a running sentence r_t = Summarizer(r_{t-1}, u_t), started empty. At
  its end Z_j = r_t is frozen.
- level 2: G_J = Summarizer("", Z_1 .. Z_J), made anew from all frozen ones, never from the last G. If they do not fit the summariser's window, groups of up to 100
  are shortened first, and so on.
- visible: G_J and r_t in one line.

What turn i said passes through as many rewrites as turns are left in its segment, and one per level of G. Flat (`sos=False`) is S_t = Summarizer(S_{t-1}, u_t):
t - i rewrites. `Gist.rewrites` counts them for a gist's first turn. Everything here is a function of the gists that stand and of messages: no hidden state.

Cost: one summariser call per turn, and one per level at the end of a segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from remanence.recall.items import Gist, Message, NewMessage
from remanence.recall.protocols import Summarizer, Tokenizer

GROUP = 100  # frozen summaries that are shortened together where all do not fit


@dataclass(frozen=True)
class Compact:
    """The compact memory's rules.

    Args:
        summarizer: what shortens.
        tokenizer: what counts.
        tokens: of one level.
        period: turns of a segment.
        sos: two levels, or flat.
    """

    summarizer: Summarizer
    tokenizer: Tokenizer
    tokens: int = 60
    period: int = 100
    sos: bool = True

    def shorten(self, earlier: str, new: str) -> str:
        """Return the summariser's answer as one line of at most `tokens` tokens, whatever it answers."""
        return self.tokenizer.cut(" ".join(self.summarizer(earlier, new, self.tokens).split()), self.tokens).rstrip()

    def segment(self, turn: int) -> int:
        """Return j of the segment that a turn is in."""
        return (turn - 1) // self.period + 1

    def covered(self, gists: Iterable[Gist]) -> int:
        """Return the last turn that the gists know of, 0 if none."""
        kind = "running" if self.sos else "flat"
        return next((gist.last for gist in gists if gist.kind == kind), 0)

    def fits(self, gists: Iterable[Gist]) -> bool:
        """Return whether frozen gists have this period; if not, all are to be made anew."""
        return all(gist.segment == self.segment(gist.last) == self.segment(gist.first) for gist in gists if gist.kind == "segment")

    def visible(self, gists: Iterable[Gist]) -> str:
        """Return the line that enters a prompt."""
        kinds = ("whole", "running") if self.sos else ("flat",)
        texts = {gist.kind: gist.text for gist in gists if gist.kind in kinds}
        return " ".join(filter(None, map(texts.get, kinds)))

    def advance(self, gists: Sequence[Gist], conversation: str, turn: int, text: str) -> list[Gist]:
        """Return all gists after one more turn (turns may be left out, they never go back)."""
        if not self.sos:
            before = next((gist for gist in gists if gist.kind == "flat"), Gist(conversation, "flat", 0, turn, turn - 1, ""))
            return [self._longer(before, turn, text)]
        frozen = [gist for gist in gists if gist.kind == "segment"]
        rest = [gist for gist in gists if gist.kind == "whole"]
        running = next((gist for gist in gists if gist.kind == "running"), None)
        ended = False
        if running is not None and running.last >= running.first and self.segment(running.last) < self.segment(turn):
            frozen, running, ended = [*frozen, self._freeze(running)], None, True  # the turn that ends the segment was left out
        if running is None or running.last < running.first:
            running = Gist(conversation, "running", 0, turn, turn - 1, "")
        running = self._longer(running, turn, text)
        if turn % self.period == 0:
            frozen, ended = [*frozen, self._freeze(running)], True
            running = Gist(conversation, "running", 0, turn + 1, turn, "")
        return [*frozen, *([self.whole(frozen)] if ended else rest), running]

    def whole(self, frozen: Sequence[Gist]) -> Gist:
        """Return G of all frozen summaries."""
        texts, levels = [gist.text for gist in frozen], 1
        size = max(2, min(GROUP, self.summarizer.window // self.tokens))
        while len(texts) > 1 and self.tokenizer.count(" ".join(texts)) > self.summarizer.window:
            texts = [self.shorten("", " ".join(texts[first : first + size])) for first in range(0, len(texts), size)]
            levels += 1
        first = frozen[0]
        return Gist(
            first.conversation, "whole", 0, first.first, frozen[-1].last, self.shorten("", " ".join(texts)), first.rewrites + levels
        )

    def replay(self, gists: Sequence[Gist], conversation: str, messages: Iterable[Message]) -> list[Gist]:
        """Return the gists after more messages."""
        for message in messages:
            gists = self.advance(gists, conversation, message.turn, spoken(message))
        return list(gists)

    def rebuild(self, gists: Sequence[Gist], conversation: str, messages: Sequence[Message], touched: Iterable[int]) -> list[Gist]:
        """Return the gists without what was erased: segments of the touched turns, the running one and G are made anew from what remains.

        Args:
            gists: that stood before.
            conversation: theirs.
            messages: all that remain of the conversation, in order.
            touched: turns that were erased or edited.

        The flat gist saw everything since its beginning, so it is replayed from the first turn.
        """
        if not self.sos:
            return self.replay([], conversation, messages)
        touched_segments = {self.segment(turn) for turn in touched}
        kept = {gist.segment: gist for gist in gists if gist.kind == "segment" and gist.segment not in touched_segments}
        held: dict[int, list[Message]] = {}
        for message in messages:
            held.setdefault(self.segment(message.turn), []).append(message)
        frozen, running = [], Gist(conversation, "running", 0, 1, 0, "")
        for j, own in held.items():
            if j < max(held) or own[-1].turn == j * self.period:
                frozen.append(kept[j] if j in kept else self._freeze(self._level_one(conversation, own)))
                running = Gist(conversation, "running", 0, own[-1].turn + 1, own[-1].turn, "")
            else:  # its last turns are gone: it is open again, and the next ones belong to it
                running = self._level_one(conversation, own)
        return [*frozen, *([self.whole(frozen)] if frozen else []), *([running] if held else [])]

    def _level_one(self, conversation: str, messages: Sequence[Message]) -> Gist:
        """Return the running sentence of one segment's messages."""
        running = Gist(conversation, "running", 0, messages[0].turn, messages[0].turn - 1, "")
        for message in messages:
            running = self._longer(running, message.turn, spoken(message))
        return running

    def _longer(self, gist: Gist, turn: int, text: str) -> Gist:
        """Return a gist with one more turn in it."""
        fresh = gist.last < gist.first
        return replace(gist, last=turn, text=self.shorten(gist.text, text), rewrites=0 if fresh else gist.rewrites + 1)

    def _freeze(self, running: Gist) -> Gist:
        return replace(running, kind="segment", segment=self.segment(running.last))


def spoken(message: Message | NewMessage) -> str:
    """Return a message as the summariser reads it: the user's words plain, those of others with their role."""
    return message.text if message.role == "user" else f"{message.role}: {message.text}"
