"""What a model still says of the rows: probability, exact memorisation, extraction strength, and what it writes when it is asked.

ROUGE-L is on the longest common subsequence of words, lower case, letters and digits alone. `rouge` is TOFU's recall of the answer in a
greedy continuation, `knowmem` and `verbmem` are MUSE's F1 (2407.06460): of answers (kind qa), and of what follows the first tokens of a
text (text, chat). Differs from the packages behind both: words are not stemmed. A continuation ends at the end token, after `new_tokens`,
or when it is twice as long as the longest true one and 8.

Prompts of equal length are continued together, so nothing is padded and the words are those that each prompt alone would get. Cost: one
forward pass over the rows; then one step per generated token and batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from remanence.errors import Mistake
from remanence.forget.audit.case import Case
from remanence.models.forward import positions
from remanence.training.batches import IGNORED
from remanence.training.memorisation import exact_memorisation, extraction_strength
from remanence.training.rouge import Rouge, rouge_l, words
from remanence.training.writing import continuations


class Writings:
    """What a case's models write when they are asked about a set, each once."""

    def __init__(self, case: Case):
        self.case = case
        self._texts: dict[tuple[str, str], list[str]] = {}
        self._asked: dict[str, tuple[list[list[int]], list[list[int]]]] = {}

    def rouge(self, who: str, part: str) -> Rouge:
        """Return ROUGE-L of what a model writes about a set, against what is true."""
        return rouge_l(self.case.processor.batch_decode(self._prompts(part)[1], skip_special_tokens=True), self.texts(who, part))

    def texts(self, who: str, part: str) -> list[str]:
        """Return what a model writes about a set."""
        if (who, part) not in self._texts:
            case = self.case
            prompts, wanted = self._prompts(part)
            case.show(f"writes about {part}, {who}")
            longest = max(map(len, wanted))
            most = min(case.settings.new_tokens, 2 * longest + 8 if case.kind == "qa" else longest)
            most = min(most, positions(case.models[who]) - max(map(len, prompts)))
            said = continuations(case.models[who], prompts, most, size=case.settings.batch_size, processor=case.processor)
            if case.kind != "qa":  # texts go on for ever: compare what is as long as the truth
                said = [ids[: len(true)] for ids, true in zip(said, wanted)]
            self._texts[who, part] = case.processor.batch_decode(said, skip_special_tokens=True)
        return self._texts[who, part]

    def _prompts(self, part: str) -> tuple[list[list[int]], list[list[int]]]:
        if part not in self._asked:
            case = self.case
            rows, most = case.rows(part), case.settings.prompt_tokens if case.kind == "text" else None
            columns = [rows.columns[name].padded(np.arange(rows.count), IGNORED) for name in ("input_ids", "labels")]  # type: ignore[union-attr]
            self._asked[part] = prompts_of(columns[0].numpy(), columns[1].numpy(), most)
        return self._asked[part]


def measure_memory(case: Case, writings: Writings) -> None:
    """Add what the model still says of the forget rows."""

    def strength(who: str, part: str) -> np.ndarray:
        tokens = case.tokens(who, part).without_end()
        return extraction_strength(tokens.top, tokens.row, tokens.rows)

    case.compare("probability", "memory", case.probability)
    case.compare("exact_memorisation", "memory", lambda who, part: memorised(case, who, part))
    case.compare("extraction_strength", "memory", strength)
    case.compare("nll", "quality", lambda who, part: case.tokens(who, part).nll(), alone="higher", share=False)
    try:
        case.compare("rouge", "memory", lambda who, part: writings.rouge(who, part).recall)
    except Mistake as mistake:
        case.skipped["rouge"] = str(mistake)
        return
    case.compare("knowmem" if case.kind == "qa" else "verbmem", "memory", lambda who, part: writings.rouge(who, part).f1)


def memorised(case: Case, who: str, part: str) -> Float[np.ndarray, " N"]:
    """Return the exact memorisation of each row of a set."""
    tokens = case.tokens(who, part).without_end()
    return exact_memorisation(tokens.top, tokens.row, tokens.rows)


def prompts_of(
    ids: Int[np.ndarray, "B T"], labels: Int[np.ndarray, "B T"], most: int | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Split rows into prompt and what follows: the first run of supervised tokens, or (of text) all behind `most` tokens, half the row at most."""
    there = ids != IGNORED
    length = there.sum(1)
    if most is not None:
        first = np.minimum(most, length // 2)
        last = length
    else:
        supervised = labels != IGNORED
        supervised[:, 0] = False
        first = supervised.argmax(1)
        behind = ~supervised & (np.arange(ids.shape[1]) > first[:, None])
        last = np.where(behind.any(1), behind.argmax(1), ids.shape[1])
    rows = ids.tolist()
    return [row[:start] for row, start in zip(rows, first)], [row[start:stop] for row, start, stop in zip(rows, first, last)]


def fluency(texts: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Return RWKU's fluency of each text: (2/3 H_2 + 4/3 H_3) / 2, H_n the entropy in bits of its n-grams of words; NaN below three words."""
    found = np.full(len(texts), np.nan)
    for number, text in enumerate(texts):  # a text's n-grams are its own
        said = words(text)
        if len(said) >= 3:
            pairs, triples = list(pairwise(said)), list(zip(said, said[1:], said[2:]))
            found[number] = (2 / 3 * entropy(pairs) + 4 / 3 * entropy(triples)) / 2
    return found


def entropy(items: Sequence[Any]) -> float:
    """Return the entropy in bits of how often each item occurs."""
    odds = np.array(list(Counter(items).values())) / len(items)
    return float(-(odds * np.log2(odds)).sum())
