"""A reader and a judge for the template items, which need no model: the solver reads the prompt, and a declared curve says how often it reads on.

This is a model of a reader, not a reader. What it can answer from a prompt is exactly what the prompt says (`data.convomem_solver`); whether it does is drawn
once per question and solution and compared with p(t) = c exp(-t / tau), t the prompt's tokens, so a longer prompt fails wherever a shorter one did. c and tau are
fitted, for facts and for abstention apart, to the accuracies that the paper's authors released for gemini-2.5-flash and -flash-lite over histories of 1 to
300 conversations (user facts k = 1 and abstention k = 1, full context). A desk conversation has 130 words and theirs 1,766 tokens: a word counts as 13.6.

Fit: O(sizes). Reading: one look-up per line of the prompt.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from remanence.data.convomem import Utterance
from remanence.data.convomem_models import Priced
from remanence.data.convomem_solver import UNKNOWN, Solution, solve, values
from remanence.measure.convomem_policies import NOTHING
from remanence.seeds import derive

TOKENS = 13.6  # of the paper's per desk word
SIZES = (1, 2, 3, 4, 5, 6, 10, 20, 30, 50, 70, 100, 150, 200, 300)
RELEASED = {  # reader -> kind -> (input tokens in thousands, accuracy in %) per size, from the released result files
    "flash": {
        "facts": (
            (1.8, 3.1, 4.4, 5.4, 7.0, 8.1, 12.8, 26.0, 36.5, 64.2, 87.7, 125.3, 227.8, 320.3, 529.8),
            (94.7, 91.0, 91.7, 91.2, 88.2, 89.5, 89.5, 87.3, 87.5, 87.2, 86.0, 84.4, 82.0, 81.2, 83.6),
        ),
        "abstention": (
            (2.5, 4.4, 6.4, 8.4, 10.4, 12.4, 20.5, 40.1, 60.0, 99.5, 139.1, 198.7, 298.8, 395.9, 594.4),
            (99.7, 99.3, 99.0, 97.7, 98.7, 99.3, 96.7, 95.3, 95.0, 86.7, 87.3, 84.3, 79.7, 76.7, 76.3),
        ),
    },
    "flash-lite": {
        "facts": (
            (1.9, 3.3, 4.8, 6.2, 7.6, 8.9, 14.4, 28.4, 42.1, 69.8, 99.4, 139.8, 239.6, 338.5, 537.2),
            (88.8, 87.1, 86.1, 85.8, 87.2, 86.5, 87.2, 86.1, 84.0, 82.7, 75.8, 75.8, 65.0, 59.5, 50.6),
        ),
        "abstention": (
            (1.9, 3.3, 4.6, 6.1, 7.4, 8.8, 14.4, 28.2, 41.8, 69.0, 97.6, 137.8, 236.8, 336.8, 534.4),
            (97.6, 97.6, 97.9, 96.9, 97.4, 97.2, 96.8, 95.6, 93.9, 91.6, 89.4, 87.8, 86.6, 83.7, 80.2),
        ),
    },
}
PRICES = {"flash": (0.30, 2.50), "flash-lite": (0.10, 0.40)}  # dollars per million tokens in and out, list prices of 2025
SECONDS = {"flash": (0.9, 2.9e-5), "flash-lite": (0.85, 9.0e-6)}  # p50 of the released files: at once, and per input token


@dataclass(frozen=True)
class Curve:
    """p(t) = ceiling exp(-t / length), t in the paper's tokens."""

    ceiling: float
    length: float

    def __call__(self, tokens: float) -> float:
        return self.ceiling * math.exp(-tokens / self.length)


PERFECT = Curve(1.0, math.inf)


def fitted(tokens: tuple[float, ...], accuracy: tuple[float, ...]) -> Curve:
    """Fit log p = log c - t / tau by least squares; tokens in thousands, accuracy in percent."""
    slope, start = np.polyfit(np.array(tokens) * 1000, np.log(np.array(accuracy) / 100), 1)
    return Curve(min(1.0, float(np.exp(start))), float(-1 / slope))


@dataclass(frozen=True)
class DeskReader:
    """The solver behind two curves; give it to `Priced`, or take `desk_reader`.

    Args:
        facts: how often it uses what the prompt says.
        abstention: how often it refuses where the prompt says nothing; otherwise it invents a value.
        window: words that it reads at most: the end of the prompt's memory; `None`: all.
        seed: of the draws; policies and sizes share them, so their differences are paired.
    """

    facts: Curve = PERFECT
    abstention: Curve = PERFECT
    window: int | None = None
    seed: int = 0

    def __call__(self, prompt: str) -> str:
        memory, question = parts(prompt)
        if self.window is not None:
            memory = _last(memory, self.window)
        tokens = TOKENS * min(words(prompt), self.window or 10**12)
        said, found = _understood(memory, question)
        if prompt.endswith("Quotes:"):
            reads = self._draw("quotes", question, *(said[n].text for n in found.used)) < self.facts(tokens)
            return "\n".join(f"{said[n].speaker}: {said[n].text}" for n in found.used) if found.used and reads else NOTHING
        if found.reply != UNKNOWN:
            return found.reply if self._draw("facts", question, found.reply) < self.facts(tokens) else UNKNOWN
        return UNKNOWN if self._draw("abstention", question) < self.abstention(tokens) else "I think it was the usual one."

    def _draw(self, *parts: object) -> float:
        return derive(self.seed, *parts) / 2**63


def desk_reader(name: str, *, seed: int = 0, window: int | None = None) -> Priced:
    """Return the reader whose curves, prices and times are those of `flash` or `flash-lite`; tokens are counted in the paper's."""
    facts, abstention = (fitted(*RELEASED[name][kind]) for kind in ("facts", "abstention"))
    at_once, each = SECONDS[name]
    price_in, price_out = PRICES[name]
    label = f"desk {name}" if window is None else f"desk {name}, window {window}"
    return Priced(
        DeskReader(facts, abstention, window, seed),
        f"{label}, seed {seed}",
        lambda text: round(TOKENS * words(text)),
        price_in,
        price_out,
        seconds=lambda tokens, written: at_once + each * tokens,
    )


def desk_judge(prompt: str) -> str:
    """Judge a reply to a template item by its values, as the four templates say."""
    found = re.search(r"\n(Correct answer|Rubric|Expected): (.*?)\nReply: (.*)\n\nReply with one word", prompt, re.DOTALL)
    if found is None:
        return "no prompt of a judge"
    kind, answer, reply = found.groups()
    if kind == "Expected":
        return "RIGHT" if reply.startswith("I don't have any information") or reply == answer else "WRONG"
    wanted = values(answer) if kind == "Rubric" else [part.strip() for part in answer.split(";")]
    return "RIGHT" if all(part in reply for part in wanted) else "WRONG"


@lru_cache(maxsize=1024)
def _understood(memory: str, question: str) -> tuple[tuple[Utterance, ...], Solution]:
    """Return the messages of a memory and what they say to the question; kept, since readers of different curves are asked the same prompts."""
    said = tuple(Utterance(speaker, text) for speaker, text in re.findall(r"^(User|Assistant): (.*)$", memory, re.MULTILINE))
    return said, solve(question, said)


def words(text: str) -> int:
    """Return the number of words between blanks."""
    return len(text.split())


def parts(prompt: str) -> tuple[str, str]:
    """Return the memory and the question of a prompt of the benchmark."""
    memory = re.search(r"<memory>\n(.*)\n</memory>", prompt, re.DOTALL)
    question = re.search(r"\n</memory>\n\nQuestion: (.*)\n\n\w+:$", prompt, re.DOTALL)
    return memory[1] if memory else "", question[1] if question else ""


def _last(memory: str, tokens: int) -> str:
    kept: list[str] = []
    for line in reversed(memory.split("\n")):
        tokens -= words(line)
        if tokens < 0:
            break
        kept.append(line)
    return "\n".join(reversed(kept))
