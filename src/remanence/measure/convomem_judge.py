"""ConvoMem's judge: four templates, a verdict of one word, and an audit that feeds it answers known to be wrong.

| template | categories | what it asks for |
|---|---|---|
| factual | assistant facts, changing facts, other benchmarks | the core facts complete; paraphrase is fine, a part is WRONG |
| user | user facts | the same, with the evidence shown; for k > 1 minor omissions are allowed |
| rubric | preferences, implicit connections | every criterion of the rubric |
| abstention | abstention | any clear refusal is RIGHT, any invented specific WRONG |

The judge sees the evidence for user facts alone, and is lenient there for k > 1: keep categories apart. The wording is ours, the rules the official code's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from remanence.data.convomem import EvidenceItem
from remanence.data.convomem_models import Model, Reply
from remanence.errors import Mistake
from remanence.report.interval import wilson_interval
from remanence.seeds import numpy_generator

TEMPLATE_OF = {
    "user_facts": "user",
    "preferences": "rubric",
    "implicit_connections": "rubric",
    "abstention": "abstention",
}  # others: factual
_HEAD = "You judge a reply to a question about earlier conversations. Decide by these rules:\n"
_TAIL = "\n\nReply with one word, RIGHT or WRONG, and nothing else.\n\nVerdict:"
TEMPLATES = {
    "factual": _HEAD
    + """- RIGHT if the reply gives all the facts of the correct answer that the question asks for. Other words and true additions are fine.
- WRONG if such a fact is missing, is only partly given, or is contradicted.

Question: {question}
Correct answer: {answer}
Reply: {reply}"""
    + _TAIL,
    "user": _HEAD
    + """- RIGHT if the reply conveys the core of the correct answer as the evidence states it. Other words and true additions are fine.
- WRONG if the core contradicts the correct answer, a critical fact of the evidence is missing or confused, or the question is not answered.{leniency}

Question: {question}
Evidence that was in the conversations:
{evidence}
Correct answer: {answer}
Reply: {reply}"""
    + _TAIL,
    "rubric": _HEAD
    + """- RIGHT only if the reply satisfies every criterion of the rubric.
- WRONG if any criterion is missed, or met in part.

Question: {question}
Rubric: {answer}
Reply: {reply}"""
    + _TAIL,
    "abstention": _HEAD
    + """- The answer was never said. RIGHT if the reply refuses, says that it does not know, that it was not mentioned, or asks for it; telling what is known
  while saying what is missing is RIGHT too.
- WRONG if the reply gives a specific answer that was not in the conversations, plausible or not.

Question: {question}
Expected: {answer}
Reply: {reply}"""
    + _TAIL,
}
LENIENT = "\n- Minor omissions are fine if most of the evidence is reflected."


def template_of(category: str) -> str:
    """Return the name of a category's template."""
    return TEMPLATE_OF.get(category, "factual")


def judge_prompt(item: EvidenceItem, reply: str) -> str:
    """Return what the judge reads."""
    name = template_of(item.category)
    evidence = "\n".join(f"- {message.speaker}: {message.text}" for message in item.evidence)
    leniency = LENIENT if item.k > 1 else ""
    fields = {"question": item.question, "answer": item.answer, "reply": reply}
    return TEMPLATES[name].format(**fields, evidence=evidence, leniency=leniency)


def read_verdict(text: str) -> bool | None:
    """Return True for RIGHT, False for WRONG or for both words, `None` where neither stands there."""
    found = set(re.findall(r"\b(RIGHT|WRONG)\b", text.upper()))
    return None if not found else found == {"RIGHT"}


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it took; `right` is `None` where no reply had one: counted as dropped, never guessed."""

    right: bool | None
    calls: int
    input_tokens: int
    output_tokens: int
    cost: float


@dataclass
class Judge:
    """A model with the four templates.

    Args:
        model: any.
        name: for the cache and the tables.
        tries: calls per answer until one has a verdict.
    """

    model: Model
    name: str = "judge"
    tries: int = 3

    def __call__(self, item: EvidenceItem, reply: str) -> Judgement:
        prompt = judge_prompt(item, reply)
        right: bool | None = None
        calls: list[Reply] = []
        while right is None and len(calls) < self.tries:
            calls.append(self.model(prompt))
            right = read_verdict(calls[-1].text)
        tokens = sum(call.input_tokens for call in calls), sum(call.output_tokens for call in calls)
        return Judgement(right, len(calls), *tokens, sum(call.cost for call in calls))


@dataclass(frozen=True)
class Audit:
    """How a judge did on answers whose truth is known: one row per (category, kind of answer)."""

    rows: tuple[dict[str, object], ...]

    @property
    def false_accept(self) -> float:
        """The share of wrong answers that were called RIGHT."""
        return self._share("wrong")

    @property
    def false_reject(self) -> float:
        """The share of right answers that were called WRONG."""
        return self._share("right")

    def _share(self, truth: str) -> float:
        chosen = [row for row in self.rows if row["truth"] == truth]
        total = sum(int(str(row["n"])) for row in chosen)
        return sum(int(str(row["errors"])) for row in chosen) / total if total else float("nan")


def wrong_answers(items: Sequence[EvidenceItem], *, seed: int = 0) -> list[tuple[EvidenceItem, str, str]]:
    """Return (item, kind, answer) of answers that are deliberately wrong.

    `other`: the answer of another item of the category (for abstention: of any fact); `refusal`: where something is known; `question`: the question given
    back; `none`: an empty reply of pleasantries.
    """
    found = []
    draw = numpy_generator(seed, "audit")
    facts = [item for item in items if template_of(item.category) in ("factual", "user")]
    for item in items:
        pool = facts if item.category == "abstention" else [one for one in items if one.category == item.category]
        pool = [
            one for one in pool if item.answer.strip().lower() not in one.answer.lower()
        ]  # an answer that holds the right one may be right
        if pool:
            found.append((item, "other", pool[int(draw.integers(len(pool)))].answer))
        if item.category != "abstention":
            found.append((item, "refusal", "I don't have any information about that."))
            found.append((item, "question", f"You asked: {item.question}"))
            found.append((item, "none", "Happy to help with that!"))
    return found


def audit(judge: Judge, items: Sequence[EvidenceItem], *, right: Sequence[tuple[EvidenceItem, str]] = (), seed: int = 0) -> Audit:
    """Feed a judge wrong answers, and the gold answers (facts and abstention) or `right` ones; count its errors, with 95 % Wilson intervals.

    Args:
        right: (item, answer) that are right, for rubrics above all: a rubric is no answer to itself.
    """
    if not items:
        raise Mistake("audit", "there are no items", "give some")
    known = [(item, "gold", item.answer) for item in items if template_of(item.category) != "rubric"]
    known += [(item, "given", answer) for item, answer in right]
    counts: dict[tuple[str, str, str], list[int]] = {}
    for truth, answers in (("wrong", wrong_answers(items, seed=seed)), ("right", known)):
        for item, kind, answer in answers:
            verdict = judge(item, answer).right
            cell = counts.setdefault((item.category, truth, kind), [0, 0, 0])
            cell[0] += verdict is not None
            cell[1] += verdict is not None and verdict == (truth == "wrong")
            cell[2] += verdict is None
    rows = []
    for (category, truth, kind), (n, errors, dropped) in counts.items():
        low, high = wilson_interval(errors, n)
        rows.append(
            {"category": category, "truth": truth, "kind": kind, "n": n, "errors": errors, "dropped": dropped, "low": low, "high": high}
        )
    return Audit(tuple(rows))
