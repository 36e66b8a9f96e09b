"""Which retain row meets which forget row: lengths, exposures and draws of every strategy, batches by number, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import Mistake
from remanence.training.batches import Batches
from remanence.training.pairing import DIRECT, GENERAL, INDIRECT, STRATEGIES, Pairing, labels_of, pair, table

KINDS = ["entity", "domain", "general"]


def sets(forget: str, retain: str) -> tuple[Dataset, Dataset]:
    """Rows from words such as `a a b` and `a/entity b/domain x/general`."""
    titles = forget.split()
    pairs = [word.split("/") for word in retain.split()]
    rows = {"title": [title for title, _ in pairs], "type": [kind for _, kind in pairs]}
    asked = [f"r{n}" for n in range(len(pairs))]
    return (
        Dataset.from_dict({"title": titles, "question": [f"f{n}" for n in range(len(titles))], "answer": ["x"] * len(titles)}),
        Dataset.from_dict({"question": asked, "answer": ["y"] * len(pairs)} | rows),
    )


FORGET, RETAIN = sets(
    "a a b b b c",
    "a/entity a/domain b/entity a/domain x/general c/domain c/entity y/general b/domain b/domain a/domain c/domain c/domain b/domain",
)
N, M = len(FORGET), len(RETAIN)
OWN, TITLES, TYPES = FORGET["title"][:], RETAIN["title"][:], RETAIN["type"][:]


def plan(strategy: str, **options) -> Pairing:
    return pair(FORGET, RETAIN, strategy, **options)


def all_pairs(pairing: Pairing, seed: int = 0, epoch: int = 0) -> list[tuple[int, int]]:
    return sorted(map(tuple, pairing.epoch(epoch, seed).tolist()))


def slow_melu(forget: list[str], retain: list[str], kinds: list[str]) -> list[tuple[int, int]]:
    """The paper's loop, without the general rows."""
    out = []
    for entity in dict.fromkeys(forget):
        f = [n for n, title in enumerate(forget) if title == entity]
        r = [n for n, title in enumerate(retain) if title == entity and kinds[n] != "general"]
        if f and r:
            out += [(f[i % len(f)], r[i % len(r)]) for i in range(max(len(f), len(r)))]
    return out


# Faithful means 1 to 5.


def test_builder_lengths_are_those_of_the_paper() -> None:
    assert (N, M) == (6, 14)
    lengths = {strategy: len(plan(strategy)) for strategy in STRATEGIES}
    assert lengths["one_to_one_seq"] == lengths["one_to_one_random"] == N
    assert lengths["cyclic"] == max(N, M)
    assert lengths["direct"] == max(N, 3 + 2)
    assert lengths["indirect"] == 9 + 2
    assert lengths["balanced"] == 3 + 3 + 2
    assert lengths["melu"] == max(2, 4) + max(3, 4) + max(1, 4) + 2
    assert all(len(plan(strategy).epoch(0)) == length for strategy, length in lengths.items())
    more = pair(*sets("a a a b", "a/entity b/entity b/domain"), "melu")  # more to forget than to retain
    assert len(more) == 3 + 2
    assert len(pair(*sets("a a a b", "a/entity b/entity b/domain"), "cyclic")) == 4


def test_every_strategy_is_its_definition() -> None:
    retain = np.arange(M)
    kinds = np.array(TYPES)
    cycle = lambda rows: sorted((i % N, int(rows[i % len(rows)])) for i in range(max(N, len(rows))))  # noqa: E731
    assert all_pairs(plan("one_to_one_seq")) == [(n, n) for n in range(N)]
    assert all_pairs(plan("cyclic")) == cycle(retain)
    assert all_pairs(plan("direct")) == cycle(retain[kinds != "domain"])
    assert all_pairs(plan("indirect")) == cycle(retain[kinds != "entity"])


def test_melu_pairs_share_their_entity_and_meet_every_retain_row() -> None:
    pairs = plan("melu").epoch(0)
    general = np.array(TYPES) == "general"
    inside = pairs[~general[pairs[:, 1]]]
    assert [OWN[f] for f, _ in inside] == [TITLES[r] for _, r in inside]
    assert set(pairs[:, 1]) == set(range(M))
    assert np.bincount(pairs[general[pairs[:, 1]], 1], minlength=M)[general].tolist() == [1, 1]  # once each, whoever they meet


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=12),
    st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(KINDS)), min_size=1, max_size=25),
)
def test_melu_equals_the_loop_of_the_paper_and_spreads_rows_evenly(forget: list[str], rows: list[tuple[str, str]]) -> None:
    retain, kinds = [title for title, _ in rows], [kind for _, kind in rows]
    pairing = Pairing("melu", len(forget), len(rows), labels_of(forget, retain, kinds), order="by_entity", allow_missing=True)
    pairs = pairing._built(0, 0)
    general = sum(kind == "general" for kind in kinds)
    inside = [tuple(row) for row in pairs[: len(pairs) - general].tolist()]
    assert inside == slow_melu(forget, retain, kinds)
    assert sorted(pairs[len(pairs) - general :, 1]) == [n for n, kind in enumerate(kinds) if kind == "general"]
    assert sorted(pairing.epoch(0).tolist()) == sorted(pairs.tolist())
    for entity in set(forget):
        own = [n for n, title in enumerate(forget) if title == entity]
        length = sum(forget[f] == entity for f, _ in inside)
        for row in own:
            assert sum(f == row for f, _ in inside) in (length // len(own), -(-length // len(own)))


def test_with_one_entity_and_no_general_rows_melu_is_cyclic() -> None:
    for forget, retain in (("a a", "a/entity a/domain a/domain a/entity a/domain"), ("a a a a a", "a/entity a/domain")):
        rows = sets(forget, retain)
        first, second = pair(*rows, "melu"), pair(*rows, "cyclic")
        for epoch in range(3):
            assert np.array_equal(first.epoch(epoch, seed=7), second.epoch(epoch, seed=7))


def test_random_pairs_are_redrawn_every_epoch_and_the_same_in_every_run() -> None:
    first, again = plan("one_to_one_random"), plan("one_to_one_random")
    assert all_pairs(first, 1, 0) != all_pairs(first, 1, 1)
    assert all_pairs(first, 1, 0) != all_pairs(first, 2, 0)
    assert [all_pairs(first, 1, epoch) for epoch in range(4)] == [all_pairs(again, 1, epoch) for epoch in range(4)]
    assert all(sorted(first.epoch(epoch)[:, 0]) == list(range(N)) for epoch in range(4))
    drawn = first.exposures(2000 * N)[1] / (2000 * N)
    assert np.allclose(drawn, 1 / M, atol=0.01)
    fixed = {strategy: all_pairs(plan(strategy), 1, 0) == all_pairs(plan(strategy), 9, 5) for strategy in STRATEGIES}
    assert fixed == {strategy: strategy != "one_to_one_random" for strategy in STRATEGIES}  # what is drawn once does not depend on the run


def test_balanced_has_as_many_indirect_as_direct_rows_of_each_entity() -> None:
    labels = labels_of(OWN, TITLES, TYPES)
    used = plan("balanced").exposures()[1] > 0
    for entity in range(3):
        own = (labels.retain == entity) & used
        assert (labels.types[own] == INDIRECT).sum() == (labels.types[own] == DIRECT).sum() > 0
    assert used[labels.types == GENERAL].all()
    assert used[labels.types == DIRECT].all()
    assert {tuple(plan("balanced", seed=seed).exposures()[1]) for seed in range(9)} != {tuple(plan("balanced").exposures()[1])}


# Order, batches, report.


def test_by_entity_keeps_entities_together_and_general_rows_last() -> None:
    for strategy in ("melu", "cyclic", "one_to_one_random"):
        pairs = plan(strategy, order="by_entity").epoch(3, seed=5)
        general = np.array(TYPES)[pairs[:, 1]] == "general"
        assert not np.any(general[:-1] & ~general[1:])
        titles = [OWN[f] for f in pairs[~general, 0]]
        assert titles == sorted(titles)
    shuffled = [plan("melu").epoch(epoch, seed=5).tolist() for epoch in (0, 1)]
    assert shuffled[0] != shuffled[1]
    assert sorted(shuffled[0]) == sorted(shuffled[1])


def encoded(count: int, size: int, first: int) -> Batches:
    return Batches(Dataset.from_dict({"input_ids": [[first + n] for n in range(count)]}), size)


def test_batches_walk_the_epochs_end_to_end() -> None:
    for strategy in STRATEGIES:
        pairing = plan(strategy)
        batches = pairing.batches(encoded(N, 4, 100), encoded(M, 4, 200), seed=3)
        assert len(batches) == -(-len(pairing) // 4)
        walked = np.concatenate([batches.numbers(index) for index in range(3 * len(pairing))])
        laid = np.concatenate([pairing.epoch(epoch, 3) for epoch in range(12)])
        assert np.array_equal(walked, laid[: len(walked)])
        batch = batches[1]
        assert batch["forget"]["input_ids"].flatten().tolist() == (100 + batches.numbers(1)[:, 0]).tolist()
        assert batch["retain"]["input_ids"].flatten().tolist() == (200 + batches.numbers(1)[:, 1]).tolist()


def test_a_batch_is_as_large_as_asked_even_where_one_side_is_small() -> None:
    pairing = pair(*sets("a", "a/entity a/entity a/domain a/domain a/domain"), "melu")
    batches = pairing.batches(encoded(1, 4, 0), encoded(5, 4, 0))
    assert batches.size == 4
    assert batches[0]["forget"]["input_ids"].tolist() == [[0]] * 4
    small = pair(*sets("a", "a/entity"), "melu").batches(encoded(1, 4, 0), encoded(1, 4, 0))
    assert small.size == len(small) == 1
    with pytest.raises(Mistake, match="1 forget and 5 retain rows were paired, 1 and 4"):
        pairing.batches(encoded(1, 4, 0), encoded(4, 4, 0))


def test_the_report_counts_what_a_slow_walk_counts() -> None:
    for strategy in STRATEGIES:
        pairing = plan(strategy)
        batches = pairing.batches(encoded(N, 4, 0), encoded(M, 4, 0), seed=8)
        rows = np.concatenate([batches.numbers(index) for index in range(11)])
        report = pairing.report(44, seed=8)
        assert report["pairs"] == report["forget"]["exposures"] == report["retain"]["exposures"] == 44
        assert report["retain"]["never"] == M - len(set(rows[:, 1]))
        for entity, own in report["entities"].items():
            assert own["forget"] == sum(OWN[f] == entity for f in rows[:, 0])
            for kind in ("entity", "domain"):
                assert own[kind] == sum((TITLES[r], TYPES[r]) == (entity, kind) for r in rows[:, 1])
        assert report["types"]["general"]["exposures"] == sum(TYPES[r] == "general" for r in rows[:, 1])
    assert set(plan("melu").report()["entities"]) == {"a", "b", "c"}  # general rows have titles of their own
    text = table(plan("melu").report())
    assert "melu, shuffled: 14 pairs" in text
    assert "a: forget " in text


def test_strategies_that_ignore_entities_do_without_the_columns() -> None:
    plain = FORGET.select_columns(["question", "answer"]), RETAIN.select_columns(["question", "answer"])
    for strategy in ("one_to_one_seq", "one_to_one_random", "cyclic"):
        assert all_pairs(pair(*plain, strategy)) == all_pairs(plan(strategy))
        assert "entities" not in pair(*plain, strategy).report()


# Refusals.


@pytest.mark.parametrize(
    ("forget", "retain", "options", "words"),
    [
        ("a", "a/entity", {"strategy": "mleu"}, "pairs.strategy: unknown value 'mleu'; did you mean 'melu'"),
        ("a", "a/entity", {"order": "by_entry"}, "did you mean 'by_entity'"),
        ("a", "a/entity", {"entity_key": "author"}, "forget set has no column 'author'"),
        ("a", "a/entity", {"type_key": "kind"}, "retain set has no column 'kind'"),
        ("a", "a/entity", {"type_key": "kind", "strategy": "cyclic", "order": "by_entity"}, "retain set has no column 'kind'"),
        ("a", "a/entity a/direct", {}, "retain row 1: unknown type 'direct'"),
        ("a", "a/entities", {"strategy": "cyclic"}, "did you mean 'entity'"),
        ("a b", "a/entity b/general", {}, "1 entities have no retain rows .the first is 'b'"),
        ("a", "a/entity c/domain", {}, "1 entities have no forget rows .the first is 'c'"),
        ("a a a", "a/entity a/domain", {"strategy": "one_to_one_seq"}, "2 retain rows for 3 forget rows"),
        ("a b", "a/entity a/domain b/entity", {"strategy": "balanced"}, "'b' has 1 direct and 0 indirect rows"),
        ("a", "a/domain", {"strategy": "direct"}, "no retain row is left for 'direct'"),
    ],
)
def test_what_cannot_be_paired_is_refused(forget: str, retain: str, options: dict, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        pair(*sets(forget, retain), **options)


def test_one_sided_entities_are_left_out_where_that_is_allowed() -> None:
    rows = sets("a b", "a/entity a/domain c/domain x/general")
    pairing = pair(*rows, "melu", allow_missing=True)
    assert len(pairing) == 2 + 1
    assert pairing.report()["retain"]["never"] == 1
    assert len(pair(*sets("a b", "a/entity a/domain b/entity"), "balanced", allow_missing=True)) == 3


def test_a_question_on_both_sides_is_refused() -> None:
    forget, retain = sets("a", "a/entity a/domain")
    both = retain.remove_columns("question").add_column("question", ["r0", "f0"])
    with pytest.raises(Mistake, match="1 questions of the forget set stand in the retain set too .the first is row 0"):
        pair(forget, both)


def test_a_row_of_no_entity_is_refused() -> None:
    with pytest.raises(Mistake, match="retain row 1: belongs to no entity"):
        labels_of(["a"], ["a", None, None], ["entity", "domain", "general"])
    assert labels_of(["a"], ["a", None], ["entity", "general"]).retain[0] == 0
