"""ConvoMem's memories: what each hands to the one prompt that all of them share.

A memory takes conversations and makes a `Context` for a question; `Answering` puts it into the shared prompt and asks the main model. So model, prompt and
instructions are the same for full context, extraction, blocks, retrieval and their hybrid, by construction. Helper calls are counted with the answer's: the
official token columns leave them out.

Cost of a question, n conversations of t tokens: full context n t; extraction 2 n t at most; blocks n t over n / size calls in parallel; retrieval k messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from remanence.data.convomem import Conversation
from remanence.data.convomem_check import levenshtein
from remanence.data.convomem_models import Model, Reply
from remanence.errors import Mistake, nearest

INSTRUCTIONS = """Rules for the answer:
- Be complete: give everything that is known and that the question asks for, and respect what the user has said about themselves.
- Where only a part is known, give that part and say which part is not known.
- Never invent or guess. If nothing is known, say: I don't have any information about that."""
PROMPT = """You answer a question of a user from earlier conversations between that user and their assistant.

{instructions}

{kind}
<memory>
{context}
</memory>

Question: {question}

Answer:"""
EXTRACT = """Copy out everything in the conversations below that may help to answer the question, as exact quotes.
Write one line per quote, as `Speaker: quote`. Do not answer the question. If nothing helps, write exactly: {nothing}

<memory>
{context}
</memory>

Question: {question}

Quotes:"""
NOTHING = "No information is relevant."
NO_ANSWER = "I don't have any information to answer this question."


@dataclass(frozen=True)
class Context:
    """What a memory knows for a question.

    Args:
        text: for the prompt; `None`: nothing, so the fixed refusal is the answer and no call is made.
        used: ids of the conversations it drew on.
        calls: of the helper.
        parallel: whether these ran side by side: then the longest counts as latency.
        seconds: of the search itself.
    """

    text: str | None
    used: tuple[str, ...] = ()
    calls: tuple[Reply, ...] = ()
    parallel: bool = False
    seconds: float = 0.0


class Memory(Protocol):
    """Conversations in, context out."""

    name: str

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Take conversations in order."""
        ...

    def context(self, question: str, helper: Model) -> Context:
        """Return what is known for a question."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...


@dataclass(frozen=True)
class Answer:
    """An answer with all that it took, helper calls included; `final_tokens` are the input of the last call alone (the official column)."""

    text: str
    used_ids: tuple[str, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    final_tokens: int = 0
    calls: int = 0
    seconds: float = 0.0
    cost: float = 0.0


class MemoryPolicy(Protocol):
    """A whole system: conversations in, answers out."""

    name: str

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Take conversations in order."""
        ...

    def answer(self, question: str) -> Answer:
        """Answer a question from what was added."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...


@dataclass
class Answering:
    """A memory with a main model and a helper, as a `MemoryPolicy`."""

    memory: Memory
    model: Model
    helper: Model | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.memory.name

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Take conversations in order."""
        self.memory.add(conversations)

    def clear(self) -> None:
        """Forget everything."""
        self.memory.clear()

    def answer(self, question: str) -> Answer:
        """Ask the memory for its context and the main model for the answer."""
        if not question.strip():
            raise Mistake("question", "it is empty", "ask something")
        found = self.memory.context(question, self.helper or self.model)
        calls = list(found.calls)
        took = (max if found.parallel else sum)([call.seconds for call in calls] or [0.0]) + found.seconds
        text, last = NO_ANSWER, 0
        if found.text is not None:
            reply = self.model(answer_prompt(question, found.text))
            text, last, took = reply.text, reply.input_tokens, took + reply.seconds
            calls.append(reply)
        return Answer(
            text,
            found.used,
            sum(call.input_tokens for call in calls),
            sum(call.output_tokens for call in calls),
            sum(call.cached_tokens for call in calls),
            last,
            len(calls),
            took,
            sum(call.cost for call in calls),
        )


def answer_prompt(question: str, context: str) -> str:
    """Return the prompt that every memory's answer comes from."""
    kind = "What is known from the conversations:" if context else "Nothing is known from the conversations."
    return PROMPT.format(instructions=INSTRUCTIONS, kind=kind, context=_untagged(context), question=_untagged(question))


def shown(conversations: Sequence[Conversation]) -> str:
    """Return conversations as text, numbered, with their ids."""
    return "\n\n".join(
        f"Conversation {number} (ID: {one.id}):\n" + "\n".join(f"{message.speaker}: {message.text}" for message in one.messages)
        for number, one in enumerate(conversations, start=1)
    )


def says_nothing(text: str) -> bool:
    """Say whether a helper's reply is the fixed sentence, five edits apart at most, letters and digits alone compared."""
    kept, fixed = (re.sub(r"[^a-z0-9]", "", part.lower()) for part in (text, NOTHING))
    return levenshtein(kept, fixed, 5) <= 5


Reading = Callable[[Sequence[Conversation], str, Model], Context]  # (conversations, question, helper) -> context


@dataclass
class History:
    """Conversations kept in order, and how they are read for a question: `full_context`, `extracted`, `blocks()`, `nothing`."""

    read: Reading
    name: str
    conversations: list[Conversation] = field(default_factory=list, init=False)

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Keep conversations in order."""
        self.conversations += conversations

    def clear(self) -> None:
        """Forget everything."""
        self.conversations.clear()

    def context(self, question: str, helper: Model) -> Context:
        """Return what the reading makes of them."""
        return self.read(self.conversations, question, helper)


def full_context(conversations: Sequence[Conversation], question: str, helper: Model) -> Context:
    """Read all conversations in one call (`long_context`)."""
    return Context(shown(conversations), tuple(one.id for one in conversations))


def extracted(conversations: Sequence[Conversation], question: str, helper: Model) -> Context:
    """Let the helper read everything once and copy out what matters (`extracted_context`)."""
    reply = helper(_extract(question, conversations))
    return Context("" if says_nothing(reply.text) else reply.text, tuple(one.id for one in conversations), (reply,))


def blocks(size: int = 10, threads: int = 8) -> Reading:
    """Let the helper read blocks of `size` conversations side by side (`block_based`); no quotes in any block: the fixed refusal, no last call."""
    if size < 1:
        raise Mistake("blocks", f"a block of {size} conversations holds nothing", "name at least 1")

    def read(conversations: Sequence[Conversation], question: str, helper: Model) -> Context:
        parts = [conversations[start : start + size] for start in range(0, len(conversations), size)]
        prompts = [_extract(question, part) for part in parts]
        if threads > 1 and len(prompts) > 1:
            with ThreadPoolExecutor(min(threads, len(prompts))) as pool:
                replies = list(pool.map(helper, prompts))
        else:
            replies = [helper(prompt) for prompt in prompts]
        kept = [(reply.text, part) for reply, part in zip(replies, parts) if reply.text.strip() and not says_nothing(reply.text)]
        text = "\n\n".join(f"Block {number}:\n{quotes}" for number, (quotes, _) in enumerate(kept, start=1))
        return Context(text if kept else None, tuple(one.id for _, part in kept for one in part), tuple(replies), parallel=True)

    return read


def nothing(conversations: Sequence[Conversation], question: str, helper: Model) -> Context:
    """Know nothing: the floor, 0 on facts and everything on abstention."""
    return Context("")


def plain_memory(name: str) -> History:
    """Return a memory that needs nothing from outside: `full-context`, `extracted`, `blocks` (of ten) or `nothing`."""
    readings: dict[str, Reading] = {"full-context": full_context, "extracted": extracted, "blocks": blocks(), "nothing": nothing}
    if name not in readings:
        raise Mistake("policy", f"there is no policy '{name}'", nearest(name, readings))
    return History(readings[name], name)


def _extract(question: str, conversations: Sequence[Conversation]) -> str:
    return EXTRACT.format(nothing=NOTHING, context=_untagged(shown(conversations)), question=_untagged(question))


def _untagged(text: str) -> str:
    """Keep a conversation's text from closing or opening the prompt's own part."""
    return re.sub(r"<(?=\s*/?\s*memory\b)", "&lt;", text, flags=re.IGNORECASE)
