"""ROUGE-L against the definition, the recursion and by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from remanence.errors import Mistake
from remanence.training.rouge import lcs, rouge_l, words


def slow_lcs(first: list, second: list) -> int:
    """The recursion of the definition, one cell at a time."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_lcs_equals_the_recursion() -> None:
    draws = np.random.default_rng(8)
    first, second = draws.integers(0, 4, (50, 9)), draws.integers(0, 4, (50, 13))
    assert lcs(first, second).tolist() == [slow_lcs(list(a), list(b)) for a, b in zip(first, second)]


def test_rouge_l_recall_and_f1_equal_the_definition_on_ragged_texts() -> None:
    draws = np.random.default_rng(9)
    true, said = ([" ".join("abcd"[n] for n in draws.integers(0, 4, draws.integers(0, 9))) for _ in range(60)] for _ in range(2))
    found = rouge_l(true, said)
    for number, (a, b) in enumerate(zip(true, said)):
        shared = slow_lcs(words(a), words(b))
        recall, precision = shared / max(1, len(words(a))), shared / max(1, len(words(b)))
        assert found.recall[number] == pytest.approx(recall)
        assert found.precision[number] == pytest.approx(precision)
        assert found.f1[number] == pytest.approx(2 * recall * precision / (recall + precision) if shared else 0)


def test_rouge_l_by_hand() -> None:
    found = rouge_l(["The Silver-Birch, company!", "x", ""], ["the birch COMPANY of old", "", "y"])
    assert found.recall.tolist() == [3 / 4, 0, 0]
    assert found.precision.tolist() == [3 / 5, 0, 0]
    assert found.f1[0] == pytest.approx(2 * 0.75 * 0.6 / 1.35)


def test_f1_by_hand() -> None:
    said = ["the cat sat", "the Cat sat.", "on the mat", "", "a b c d", "x"]
    true = ["the cat sat", "the cat sat", "the cat sat on the mat", "word", "a x c", "y"]
    assert rouge_l(true, said).f1 == pytest.approx([1, 1, 2 * 3 / 9, 0, 2 * 2 / 7, 0])
    assert rouge_l(["", "."], ["", ""]).f1.tolist() == [0, 0]
    with pytest.raises(Mistake, match="1 texts against 2"):
        rouge_l(["a", "b"], ["a"])


def slow_rouge(answer: str, said: str) -> float:
    true, other = words(answer), words(said)
    longest = 0
    for size in range(len(true), 0, -1):
        kept = {tuple(true[n] for n in chosen) for chosen in combinations(range(len(true)), size)}
        if any(tuple(other[n] for n in chosen) in kept for chosen in combinations(range(len(other)), size)):
            longest = size
            break
    return longest / max(1, len(true))


def test_rouge_is_the_longest_common_subsequence_over_the_answers_words() -> None:
    assert rouge_l(["the red fox", "red", "", "a b"], ["The fox, red!", "no", "x", ""]).recall.tolist() == pytest.approx([2 / 3, 0, 0, 0])
    draws = np.random.default_rng(0)
    texts = [[" ".join(draws.choice(list("abc"), size=draws.integers(0, 7))) for _ in range(40)] for _ in range(2)]
    assert rouge_l(*texts).recall.tolist() == pytest.approx([slow_rouge(*pair) for pair in zip(*texts)])
