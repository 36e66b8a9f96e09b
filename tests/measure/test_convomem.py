"""ConvoMem's runs: packing, shared prompts, limits, counts of tokens and money, caches, tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.data.convomem import CATEGORIES, Conversation, EvidenceItem, Utterance
from remanence.data.convomem_models import Priced, Reply
from remanence.data.convomem_templates import template_fillers, template_items
from remanence.errors import Mistake
from remanence.measure.convomem import ConvoMemBench, rejudge
from remanence.measure.convomem_desk import DeskReader, desk_judge
from remanence.measure.convomem_judge import Judge
from remanence.measure.convomem_memories import make_memory
from remanence.measure.convomem_packing import HAYSTACKS, Packer
from remanence.measure.convomem_policies import Answer, Answering
from remanence.measure.convomem_results import Results, read_results
from remanence.measure.convomem_search import Hybrid, Passages, Retrieved, bm25

ITEMS = template_items(each=1, persons=4, seed=7)
FILLERS = template_fillers(persons=4, each=24, seed=7)
READER = Priced(DeskReader(), "perfect desk reader", price_in=1.0, price_out=4.0)
JUDGE = Judge(Priced(desk_judge, "desk judge"), "desk judge")


def is_subsequence(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(one in rest for one in part)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, len(ITEMS) - 1), st.integers(0, 24))
def test_standard_packing_has_the_exact_size_keeps_order_and_fills_with_the_same_person(seed: int, number: int, extra: int) -> None:
    item = ITEMS[number]
    case = Packer(ITEMS, FILLERS, seed=seed).case(item, item.k + extra)
    ids = [one.id for one in case.conversations]
    assert len(ids) == case.size == item.k + extra
    assert len(set(ids)) == len(ids)
    assert is_subsequence([one.id for one in item.conversations], ids)
    assert {one.id for one in case.conversations if one.evidence} == {one.id for one in item.conversations}
    assert {one.person for one in case.conversations} == {item.person}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from((1, 2, 3, 6, 10, 25, 60)))
def test_batched_packing_has_the_exact_size_keeps_order_in_each_item_and_asks_every_item(seed: int, size: int) -> None:
    cases = list(Packer(ITEMS, FILLERS, seed=seed).cases(size, "batched"))
    assert len(cases) >= HAYSTACKS
    assert {item.id for case in cases for item in case.items} == {item.id for item in ITEMS if item.k <= size}
    for case in cases:
        ids = [one.id for one in case.conversations]
        assert len(ids) == size
        assert len(set(ids)) == size
        assert len(case.items) <= 100
        wanted = {one.id for item in case.items for one in item.conversations}
        assert {one.id for one in case.conversations if one.evidence} == wanted
        for item in case.items:
            assert is_subsequence([one.id for one in item.conversations], ids)
        own = {item.person for item in case.items}
        if size - len(wanted) <= 24 * len(own):
            assert {one.person for one in case.conversations} <= own


def test_other_persons_fillers_come_only_after_the_persons_own_and_never_with_evidence() -> None:
    item = ITEMS[0]
    leak = Conversation((item.evidence[0],), "leak", False, "stranger")
    case = Packer([item], [*FILLERS, leak], seed=1).case(item, item.k + 30)
    mine = [one for one in case.conversations if one.person == item.person]
    assert len(mine) == item.k + 24
    assert "leak" not in {one.id for one in Packer([item], [*FILLERS, leak], seed=1).case(item, item.k + 96).conversations}


def test_a_fixed_seed_gives_identical_cases_whatever_is_packed_besides() -> None:
    one, two = Packer(ITEMS, FILLERS, seed=3), Packer(ITEMS, FILLERS, seed=3)
    list(two.cases(5))
    assert list(one.cases(10)) == list(two.cases(10))
    assert list(one.cases(10, "batched")) == list(two.cases(10, "batched"))
    assert list(one.cases(10)) != list(Packer(ITEMS, FILLERS, seed=4).cases(10))
    few = Packer(ITEMS[:3], FILLERS, seed=3)
    assert few.case(ITEMS[2], 9) == one.case(ITEMS[2], 9)


@pytest.mark.parametrize(
    ("items", "fillers", "word"),
    [
        ([replace(ITEMS[0], person=None)], FILLERS, "personId"),
        (ITEMS[:1], [Conversation((Utterance("User", "x"),), "f", False, None)], "belongs to nobody"),
        (ITEMS[:1], [Conversation((ITEMS[0].evidence[0],), "f", False, ITEMS[0].person)], "holds an evidence message"),
        (ITEMS[:1], [FILLERS[0], FILLERS[0]], "id is taken"),
        ([ITEMS[0], ITEMS[0]], FILLERS, "same id"),
        (ITEMS[:1], [replace(FILLERS[0], evidence=True)], "flagged as evidence"),
    ],
)
def test_histories_that_would_mislead_are_refused(items: list[EvidenceItem], fillers: list[Conversation], word: str) -> None:
    with pytest.raises(Mistake, match=word):
        Packer(items, fillers)


def test_sizes_that_cannot_be_packed_are_refused() -> None:
    six = next(item for item in ITEMS if item.k == 6)
    with pytest.raises(Mistake, match="6 evidence messages do not fit into 5"):
        Packer([six], FILLERS).case(six, 5)
    with pytest.raises(Mistake, match="no item's evidence fits"):
        ConvoMemBench([six], FILLERS, (1, 5))
    with pytest.raises(Mistake, match="fillers are needed"):
        Packer([six], FILLERS[:3]).case(six, 20)
    with pytest.raises(Mistake, match="at least 1"):
        ConvoMemBench(ITEMS, FILLERS, ())
    with pytest.raises(Mistake, match="no packing 'batch'"):
        ConvoMemBench(ITEMS, FILLERS, (5,), packing="batch")
    with pytest.raises(Mistake, match="cannot be batched"):
        list(Packer([six], FILLERS, spill=False).cases(10, "batched"))


def test_accuracy_at_a_size_uses_only_items_whose_evidence_fits_and_every_row_prints_n_and_an_interval() -> None:
    results = ConvoMemBench(ITEMS, FILLERS, (1, 3, 6)).run(make_memory("full-context"), READER, JUDGE)
    assert {row.k for row in results.rows if row.size == 1} == {1}
    assert {row.k for row in results.rows if row.size == 3} == {1, 2, 3}
    table = results.table(by=("size",))
    assert [row["n"] for row in table] == [sum(item.k <= size for item in ITEMS) for size in (1, 3, 6)]
    for row in results.table():
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        assert row["n"] >= 1
    header = results.csv().splitlines()[0].split(",")
    assert {
        "category",
        "k",
        "policy",
        "model",
        "size",
        "packing",
        "accuracy",
        "low",
        "high",
        "n",
        "p50_s",
        "p90_s",
        "p99_s",
        "cost",
    } <= set(header)
    assert {"input_tokens", "output_tokens", "cached_tokens", "dropped"} <= set(header)


def test_size_equal_to_the_evidence_gives_full_context_the_ceiling() -> None:
    for item in ITEMS:
        bench = ConvoMemBench([item], FILLERS, (item.k,))
        assert bench.run(make_memory("full-context"), READER, JUDGE).accuracy() == 1.0, item.id


def test_a_memory_that_stores_nothing_scores_0_on_facts_and_100_percent_on_abstention() -> None:
    results = ConvoMemBench(ITEMS, FILLERS, (10,)).run(make_memory("nothing"), READER, JUDGE)
    for category in CATEGORIES:
        assert results.accuracy(category=category) == (1.0 if category == "abstention" else 0.0)


PERFECT = DeskReader()


def scripted(answer: Callable[[str], str] = PERFECT) -> tuple[list[str], Priced]:
    """Return a list that fills with prompts, and the model that fills it."""
    prompts: list[str] = []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return answer(prompt)

    return prompts, Priced(ask, "spy")


def test_all_policies_share_answer_prompt_model_and_judge() -> None:
    item = next(item for item in ITEMS if item.category == "user_facts" and item.k == 2)
    memories = [make_memory(name) for name in ("full-context", "extracted", "blocks", "nothing")]
    memories += [Retrieved(Passages(bm25), "bm25", 5), Hybrid(Retrieved(Passages(bm25), "bm25", 5), until=3)]
    frames = set()
    for memory in memories:
        prompts, spy = scripted()
        judged, judge = scripted(desk_judge)
        ConvoMemBench([item], FILLERS, (12,)).run(memory, spy, Judge(judge, "judge"), READER)
        assert len(prompts) == len(judged) == 1, memory.name
        before, _, rest = prompts[0].partition("<memory>")
        frames.add((before.split("\n\n")[:2][0], before.split("\n\n")[1], rest.partition("</memory>")[2]))
    assert len(frames) == 1


def test_tokens_latency_and_cost_include_helper_calls() -> None:
    def ask(prompt: str) -> Reply:
        return Reply("User: a quote" if prompt.endswith("Quotes:") else "an answer", 100, 10)

    model = Priced(ask, "m", price_in=1.0, price_out=2.0, seconds=lambda tokens, written: 1.0)
    helper = Priced(ask, "h", price_in=0.1, price_out=0.2, seconds=lambda tokens, written: 3.0)
    talks = [Conversation((Utterance("User", f"talk {n}"),), f"c{n}") for n in range(25)]
    for name, calls, seconds in (("full-context", 0, 1.0), ("extracted", 1, 4.0), ("blocks", 3, 4.0)):  # three blocks run side by side
        policy = Answering(make_memory(name), model, helper)
        policy.add(talks)
        answer = policy.answer("What?")
        assert (answer.calls, answer.input_tokens, answer.output_tokens) == (1 + calls, 100 * (1 + calls), 10 * (1 + calls))
        assert answer.final_tokens == 100
        assert answer.seconds == pytest.approx(seconds)
        assert answer.cost == pytest.approx((100 * 1.0 + 10 * 2.0 + calls * (100 * 0.1 + 10 * 0.2)) / 1e6)


def test_cached_tokens_cost_what_the_provider_takes_for_them() -> None:
    model = Priced(lambda prompt: Reply("x", 1000, 0, cached_tokens=800), "m", price_in=1.0, price_cached=0.25)
    assert model("?").cost == pytest.approx((200 * 1.0 + 800 * 0.25) / 1e6)


def test_a_run_that_was_cut_short_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    def bench() -> ConvoMemBench:
        return ConvoMemBench(ITEMS, FILLERS, (2, 6), folder=tmp_path)

    calls = 0

    def dies(prompt: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return DeskReader()(prompt)

    with pytest.raises(KeyboardInterrupt):
        bench().run(make_memory("full-context"), Priced(dies, "m"), JUDGE)
    (file,) = tmp_path.glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 19
    file.write_text(file.read_text()[:-30])  # the kill cut the last line short
    again, spy = scripted()
    spy.name = "m"
    whole = bench().run(make_memory("full-context"), spy, JUDGE)
    assert len(again) == len(whole.rows) - 18
    more, spy = scripted()
    spy.name = "m"
    assert bench().run(make_memory("full-context"), spy, JUDGE).rows == whole.rows
    assert more == []
    fresh = ConvoMemBench(ITEMS, FILLERS, (2, 6)).run(make_memory("full-context"), Priced(DeskReader(), "m"), JUDGE)
    assert [(row.item, row.text, row.right) for row in fresh.rows] == [(row.item, row.text, row.right) for row in whole.rows]


def test_an_answer_is_kept_only_for_the_same_history_policy_model_and_judge(tmp_path: Path) -> None:
    def asked(name: str, model: str, judge: str, seed: int) -> int:
        prompts, spy = scripted()
        spy.name = model
        bench = ConvoMemBench(ITEMS[:2], FILLERS, (3,), seed=seed, folder=tmp_path)
        bench.run(make_memory(name), spy, Judge(Priced(desk_judge, judge), judge))
        return len(prompts)

    assert [asked("full-context", "m", "j", 0), asked("full-context", "m", "j", 0)] == [2, 0]
    assert [asked("nothing", "m", "j", 0), asked("full-context", "n", "j", 0), asked("full-context", "m", "k", 0)] == [2, 2, 2]
    assert asked("full-context", "m", "j", 1) == 2


def test_a_damaged_cache_is_one_sentence(tmp_path: Path) -> None:
    bench = ConvoMemBench(ITEMS[:1], FILLERS, (3,), folder=tmp_path)
    bench.run(make_memory("nothing"), READER, JUDGE)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text('{"no": "row"}\n')
    with pytest.raises(Mistake, match="is no list of answers"):
        bench.run(make_memory("nothing"), READER, JUDGE)


def test_a_budget_ends_the_run_and_says_so() -> None:
    bench = ConvoMemBench(ITEMS, FILLERS, (6,))
    whole = bench.run(make_memory("full-context"), READER, JUDGE)
    each = sum(row.cost for row in whole.rows) / len(whole.rows)
    cut = bench.run(make_memory("full-context"), READER, JUDGE, budget_usd=5 * each)
    assert cut.stopped
    assert not whole.stopped
    assert 3 <= len(cut.rows) <= 8
    with pytest.raises(Mistake, match="buys nothing"):
        bench.run(make_memory("full-context"), READER, JUDGE, budget_usd=0)


def test_answers_without_a_verdict_are_dropped_and_counted() -> None:
    mute = Judge(Priced(lambda prompt: "hm", "mute"), "mute", tries=2)
    results = ConvoMemBench(ITEMS[:4], FILLERS, (6,)).run(make_memory("nothing"), READER, mute)
    (row,) = results.table(by=("size",))
    assert (row["n"], row["dropped"]) == (0, 4)
    assert all(one.judge_calls == 2 for one in results.rows)


def test_results_are_written_read_back_and_judged_again(tmp_path: Path) -> None:
    results = ConvoMemBench(ITEMS, FILLERS, (6,)).run(make_memory("full-context"), READER, JUDGE)
    results.write(tmp_path)
    assert read_results([tmp_path / "answers.jsonl"]).rows == results.rows
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(results.rows)
    harsh = rejudge(results, ITEMS, Judge(Priced(lambda prompt: "WRONG", "harsh"), "harsh"))
    assert harsh.accuracy() == 0.0
    assert {row.judge for row in harsh.rows} == {"harsh"}
    (tmp_path / "x.jsonl").write_text(json.dumps({"a": 1}))
    with pytest.raises(Mistake, match="line 1"):
        read_results([tmp_path / "x.jsonl"])


def test_a_whole_system_of_ones_own_is_asked_as_it_is() -> None:
    class Parrot:
        name = "parrot"

        def add(self, conversations) -> None:
            self.count = len(conversations)

        def answer(self, question: str) -> Answer:
            return Answer(f"{self.count} conversations", cost=1.0)

        def clear(self) -> None:
            self.count = 0

    results = ConvoMemBench(ITEMS[:1], FILLERS, (5,)).run_policy(Parrot(), JUDGE)
    assert [row.text for row in results.rows] == ["5 conversations"]
    assert isinstance(results, Results)
    assert not results.accuracy()
