"""Every formula of an audit equals brute force in float64, and where the definition is public its documented conventions."""

from __future__ import annotations

import itertools
import math
import statistics
import zlib

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from remanence.errors import Mistake
from remanence.forget.audit.extraction import entropy, fluency, prompts_of
from remanence.forget.audit.intervals import auc, auc_interval, bootstrap
from remanence.forget.audit.membership import min_k, min_k_plus_plus, priv_leak, zlib_score, zlib_sizes
from remanence.forget.audit.quality import kl
from remanence.forget.audit.quantization import round_weights
from remanence.forget.audit.relearning import area, half_way, shared_out
from remanence.forget.audit.truth_ratio import forget_quality
from remanence.forget.audit.utility import harmonic_interval, harmonic_mean
from remanence.training.memorisation import (
    alternatives,
    exact_memorisation,
    extraction_strength,
    truth_ratio,
    truth_ratio_forget,
    truth_ratio_keep,
)
from remanence.training.scoring import vocabulary_moments

LENGTHS = [1, 2, 3, 7, 1, 12, 63]
ROW = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
DRAWS = np.random.default_rng(0)


def rows_of(values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(LENGTHS)[:-1])


# Memorisation.


def test_exact_memorisation_is_the_share_of_right_argmaxes() -> None:
    top = DRAWS.random(len(ROW)) < 0.6
    expected = [sum(map(bool, hits)) / len(hits) for hits in rows_of(top)]
    np.testing.assert_array_equal(exact_memorisation(top, ROW, len(LENGTHS)), expected)


def strength(hits: np.ndarray) -> float:
    """1 - k/T, k the smallest index from which every argmax to the end is right; by trying every k."""
    size = len(hits)
    return next((1 - k / size for k in range(size) if all(hits[k:])), 0.0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_extraction_strength_equals_trying_every_prefix(share: float) -> None:
    top = np.random.default_rng(1).random(len(ROW)) < share
    np.testing.assert_allclose(extraction_strength(top, ROW, len(LENGTHS)), [strength(hits) for hits in rows_of(top)], rtol=0, atol=1e-15)


def test_extraction_strength_is_zero_where_even_the_last_token_is_wrong() -> None:
    top, row = np.array([False] * 4 + [True, True, True, False]), np.repeat([0, 1], 4)
    assert extraction_strength(top, row, 2).tolist() == [0.0, 0.0]  # OpenUnlearning's code gives 1/4


def test_a_row_without_tokens_has_no_memorisation() -> None:
    found = extraction_strength(np.array([True]), np.array([1]), 3), exact_memorisation(np.array([True]), np.array([1]), 3)
    for values in found:
        assert math.isnan(values[0])
        assert math.isnan(values[2])
        assert values[1] == 1


# Truth ratio and forget quality.


def test_truth_ratio_in_both_conventions_by_hand() -> None:
    true, wrong, owner = np.log([2.0, 4.0, 1.0]), np.log([2.0, 8.0, 1.0]), np.array([0, 0, 1])
    # row 0: P(true) 1/2, P(wrong) 1/2 and 1/8; row 1: 1/4 and 1; row 2 has no wrong answers
    arithmetic = truth_ratio(true, wrong, owner)
    np.testing.assert_allclose(arithmetic[:2], [(1 / 2 + 1 / 8) / 2 / (1 / 2), 4.0])
    geometric = truth_ratio(true, wrong, owner, "losses")
    np.testing.assert_allclose(geometric[:2], [math.sqrt(1 / 2 * 1 / 8) / (1 / 2), 4.0])
    assert math.isnan(arithmetic[2])
    assert math.isnan(geometric[2])


def test_truth_ratio_scores_floor_at_zero_and_peak_at_one() -> None:
    ratio = np.array([0.0, 0.25, 1.0, 4.0, math.inf])
    np.testing.assert_allclose(truth_ratio_forget(ratio), [0, 0.25, 1, 0.25, 0])
    np.testing.assert_allclose(truth_ratio_keep(ratio), [1, 0.75, 0, 0, 0])


def test_an_impossible_true_answer_gives_an_infinite_ratio() -> None:
    assert truth_ratio(np.array([2000.0]), np.array([1.0]), np.array([0]))[0] == math.inf


def test_unknown_mean_is_refused() -> None:
    with pytest.raises(Mistake, match="probabilities"):
        truth_ratio(np.zeros(1), np.zeros(1), np.zeros(1, int), "probability")


def test_wrong_answers_are_paired_with_the_true_one_of_their_form() -> None:
    from datasets import Dataset

    columns = {"question": ["q", "r"], "answer": ["a", "b"], "perturbed_answers": [["x", "y"], None]}
    assert alternatives(Dataset.from_dict({"question": ["q"], "answer": ["a"]})) is None
    true, wrong, owner = alternatives(Dataset.from_dict(columns))  # type: ignore[misc]
    assert (true, wrong, owner.tolist()) == (["a", "b"], ["x", "y"], [0, 0])
    columns |= {"paraphrased_answer": ["an a", "a b"]}
    assert alternatives(Dataset.from_dict(columns))[:2] == (["an a", "a b"], ["x", "y"])  # type: ignore[index]
    columns |= {"perturbed_paraphrases": [["an x"], ["a z"]]}
    true, wrong, owner = alternatives(Dataset.from_dict(columns))  # type: ignore[misc]
    assert (true, wrong, owner.tolist()) == (["an a", "a b"], ["an x", "a z"], [0, 1])
    assert alternatives(Dataset.from_dict(columns), "plain")[:2] == (["a", "b"], ["x", "y"])  # type: ignore[index]


def distance(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    return max(abs(sum(a <= x for a in first) / len(first) - sum(b <= x for b in second) / len(second)) for x in first + second)


def test_forget_quality_is_the_exact_ks_test_by_enumeration() -> None:
    first, second = (0.1, 0.2, 0.35, 0.7), (0.3, 0.8, 0.9, 0.95, 0.99)
    pooled, observed = first + second, distance(first, second)
    splits = [set(split) for split in itertools.combinations(range(9), 4)]
    extreme = [distance(tuple(pooled[i] for i in s), tuple(pooled[i] for i in range(9) if i not in s)) >= observed - 1e-12 for s in splits]
    assert forget_quality(np.array(first), np.array(second)) == pytest.approx(sum(extreme) / len(splits), abs=1e-12)


def test_forget_quality_is_scipys_p_value_and_does_not_mind_a_monotone_change() -> None:
    draws = np.random.default_rng(2)
    first, second = draws.gamma(2, size=300), draws.gamma(2.4, size=300)
    assert forget_quality(first, second) == ks_2samp(first, second).pvalue
    assert forget_quality(np.log(first), np.log(second)) == pytest.approx(forget_quality(first, second), rel=1e-12)
    assert forget_quality(first, first) == 1.0


def test_a_ks_p_value_grows_when_rows_are_few() -> None:
    first, second = np.linspace(0, 1, 200), np.linspace(0.2, 1.2, 200)
    assert forget_quality(first, second) < 1e-3
    assert forget_quality(first[::20], second[::20]) > 0.5


# Membership.


@pytest.mark.parametrize("k", [0.05, 0.2, 0.4, 1.0])
def test_min_k_averages_the_floor_of_k_lowest_tokens_and_at_least_one(k: float) -> None:
    logp = np.random.default_rng(3).normal(size=len(ROW))
    expected = [float(np.mean(sorted(values)[: max(1, int(len(values) * k))])) for values in rows_of(logp)]
    np.testing.assert_allclose(min_k(logp, ROW, len(LENGTHS), k), expected, rtol=1e-13)


def test_min_k_plus_plus_standardises_first_and_sorts_then() -> None:
    draws = np.random.default_rng(4)
    logits = torch.from_numpy(draws.normal(size=(len(ROW), 11)) * 3)
    target = draws.integers(0, 11, len(ROW))
    standard = []
    for wide, right in zip(logits.tolist(), target):
        total = sum(math.exp(value) for value in wide)
        odds = [math.exp(value) / total for value in wide]
        mu = sum(p * math.log(p) for p in odds)
        sigma = math.sqrt(sum(p * math.log(p) ** 2 for p in odds) - mu**2)
        standard.append((math.log(odds[right]) - mu) / sigma)
    mean, deviation = vocabulary_moments(logits)
    logp = logits.log_softmax(1).numpy()[np.arange(len(ROW)), target]
    found = min_k_plus_plus(logp, mean.numpy(), deviation.numpy(), ROW, len(LENGTHS), 0.4)
    expected = [float(np.mean(sorted(values)[: max(1, int(len(values) * 0.4))])) for values in rows_of(np.array(standard))]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_what_the_model_rules_out_does_not_count_in_the_moments() -> None:
    mean, deviation = vocabulary_moments(torch.tensor([[0.0, 0.0, -math.inf], [5.0, -math.inf, -math.inf]], dtype=torch.float64))
    np.testing.assert_allclose(mean.numpy(), [-math.log(2), 0], atol=1e-15)
    np.testing.assert_allclose(deviation.numpy(), [0, 0], atol=1e-15)


def test_zlib_divides_the_loss_by_compressed_bytes() -> None:
    texts = ["", "aaaa" * 50, "Zürich"]
    sizes = zlib_sizes(texts)
    assert sizes.tolist() == [len(zlib.compress(text.encode("utf-8"))) for text in texts]
    np.testing.assert_allclose(zlib_score(np.array([1.0, 2.0, 3.0]), sizes), [-1 / sizes[0], -2 / sizes[1], -3 / sizes[2]])


@pytest.mark.parametrize("ties", [False, True])
def test_auc_equals_sklearns(ties: bool) -> None:
    draws = np.random.default_rng(5)
    inside, outside = draws.normal(0.5, size=37), draws.normal(size=61)
    if ties:
        inside, outside = inside.round(), outside.round()
    expected = roc_auc_score([1] * 37 + [0] * 61, np.concatenate([inside, outside]))
    assert auc(inside, outside) == pytest.approx(expected, abs=1e-15)


def test_auc_is_one_where_the_forget_rows_are_clearly_recognisable() -> None:
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert auc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 0
    assert auc(np.zeros(3), np.zeros(2)) == 0.5


def test_delong_interval_equals_its_definition() -> None:
    draws = np.random.default_rng(6)
    inside, outside = draws.normal(0.4, size=30).round(1), draws.normal(size=40).round(1)
    wins = (inside[:, None] > outside).astype(float) + (inside[:, None] == outside) / 2
    spread = statistics.variance(wins.mean(1)) / 30 + statistics.variance(wins.mean(0)) / 40
    half = statistics.NormalDist().inv_cdf(0.975) * math.sqrt(spread)
    value, low, high = auc_interval(inside, outside)
    assert value == pytest.approx(wins.mean())
    assert (low, high) == pytest.approx((wins.mean() - half, min(1, wins.mean() + half)))


def test_delong_interval_covers() -> None:
    draws, inside = np.random.default_rng(7), 0
    truth = statistics.NormalDist().cdf(0.8 / math.sqrt(2))
    for _ in range(400):
        _, low, high = auc_interval(draws.normal(0.8, size=40), draws.normal(size=50))
        inside += low <= truth <= high
    assert 0.9 <= inside / 400 <= 0.985


def test_an_auc_of_one_still_has_an_interval() -> None:
    value, low, high = auc_interval(np.arange(10.0) + 100, np.arange(20.0))
    assert (value, high) == (1, 1)
    assert low == pytest.approx(0.025 ** (1 / 10))
    assert auc_interval(np.zeros(1), np.ones(5))[1:] == (0.0, 1.0)


def test_privleak_signs() -> None:
    assert priv_leak(0.5) == 0
    assert priv_leak(1.0) == pytest.approx(-100)  # not forgotten
    assert priv_leak(0.25) == pytest.approx(50)  # over-forgotten
    assert priv_leak(0.6, 0.6) == 0
    assert priv_leak(0.7, 0.6) == pytest.approx(100 * (0.3 - 0.4) / 0.4)


def test_kl_equals_its_sum() -> None:
    theirs, ours = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = theirs.softmax(-1), ours.softmax(-1)
    torch.testing.assert_close(kl(theirs, ours), (p * (p / q).log()).sum(-1))
    assert kl(theirs, theirs).abs().max() == 0
    assert float(kl(torch.tensor([[0.0, -math.inf]]), torch.tensor([[1.0, 2.0]]))[0]) == pytest.approx(math.log(1 + math.e))


# ROUGE and fluency.


def test_fluency_falls_where_a_text_repeats_itself() -> None:
    assert entropy(["a", "a", "b", "c"]) == pytest.approx(1.5)
    found = fluency(["one two three four", "la la la la la", "short one"])
    assert found[0] == pytest.approx((2 / 3 * math.log2(3) + 4 / 3 * math.log2(2)) / 2)
    assert found[1] == 0
    assert math.isnan(found[2])


def test_prompts_end_before_the_answer_or_in_the_middle_of_a_text() -> None:
    ids = np.array([[5, 6, 7, 8], [5, 9, -100, -100]])
    labels = np.array([[-100, -100, 7, 8], [-100, 9, -100, -100]])
    assert prompts_of(ids, labels) == ([[5, 6], [5]], [[7, 8], [9]])
    assert prompts_of(ids, ids.copy(), 1) == ([[5], [5]], [[6, 7, 8], [9]])
    assert prompts_of(ids, ids.copy(), 64) == ([[5, 6], [5]], [[7, 8], [9]])  # half a text at most
    turns = np.array([[-100, 6, -100, 8]])  # the first of two answers
    assert prompts_of(ids[:1], turns) == ([[5]], [[6]])


# Utility, rounding, curves, intervals.


def test_harmonic_mean_equals_the_standard_library() -> None:
    values = [0.2, 0.9, 1.0, 0.55]
    assert harmonic_mean(values) == pytest.approx(statistics.harmonic_mean(values))
    assert harmonic_mean([0.9, 0.0, 1.0]) == 0
    assert math.isnan(harmonic_mean([]))


def test_harmonic_interval_holds_the_harmonic_mean() -> None:
    samples = [np.random.default_rng(n).random(80) for n in range(3)]
    low, high = harmonic_interval(samples, 0.95, 500, 0)
    assert low < harmonic_mean([values.mean() for values in samples]) < high
    assert harmonic_interval([np.zeros(5)], 0.95, 100, 0) == (0.0, 0.0)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 16), (4, 7), (2, 5)])
def test_rounding_equals_brute_force(bits: int, group: int) -> None:
    weight = torch.randn(5, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    found, top, size = round_weights(weight, bits, group), 2 ** (bits - 1) - 1, group or 60
    for out, row in enumerate(weight.tolist()):
        for first in range(0, 60, size):
            block = row[first : first + size]
            scale = max(map(abs, block)) / top
            expected = [round(value / scale) * scale if scale else 0.0 for value in block]
            np.testing.assert_allclose(found[out, first : first + size].tolist(), expected, atol=1e-15)
            assert len(set(np.round(np.array(expected) / (scale or 1)))) <= 2**bits - 1


def test_more_bits_round_less() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    errors = [float((round_weights(weight, bits, 32) - weight).abs().mean()) for bits in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_area_under_a_curve_by_hand() -> None:
    values = np.array([[0.0, 1.0], [0.5, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(area((0, 1, 4), values), [(0.25 + 3 * 0.75) / 4, 1])
    np.testing.assert_allclose(area((0,), values[:1]), [0, 1])


def test_the_window_ends_where_the_reference_is_half_way_back() -> None:
    assert half_way(np.array([0.1, 0.3, 0.6, 0.9]), 0.9) == 2
    assert half_way(np.array([0.1, 0.2, 0.3]), 1.0) == 2  # never: the last point
    assert half_way(np.array([1.0, 1.0]), 0.9) == 1
    assert half_way(np.array([0.4]), 1.0) == 0


def test_rows_are_shared_out_by_groups_and_none_is_lost() -> None:
    group = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    shown, watched = shared_out(group, 0.5, seed=3)
    assert sorted([*shown, *watched]) == list(range(8))
    assert len(shown) == 4
    assert not set(group[shown]) & set(group[watched])
    assert [part.tolist() for part in shared_out(np.array([0]), 0.5, 0)] == [[0], []]


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(10).random(400)
    low, high = bootstrap(values, seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)
    assert bootstrap(values, seed=1) == (low, high)
    assert bootstrap(values, seed=2) != (low, high)


def test_shares_that_are_all_equal_keep_a_doubt() -> None:
    assert bootstrap(np.zeros(10)) == (0.0, pytest.approx(1 - 0.025**0.1))
    assert bootstrap(np.ones(10)) == (pytest.approx(0.025**0.1), 1.0)
    assert bootstrap(np.zeros(10), share=False) == (0.0, 0.0)
    assert all(map(math.isnan, bootstrap(np.zeros(0))))
