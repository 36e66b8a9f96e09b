"""The product's conversation memory under the benchmark: what is added is found, in its own space, and removed by clear."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from remanence.data.convomem_templates import template_fillers, template_items
from remanence.measure.convomem import ConvoMemBench
from remanence.measure.convomem_desk import DeskReader, desk_judge
from remanence.measure.convomem_judge import Judge
from remanence.measure.convomem_search import Retrieved
from remanence.recall.service import Recall
from remanence.recall_search import RecallSearch


def test_the_own_memory_is_asked_like_any_other_and_touches_no_other_space(tmp_path: Path) -> None:
    from remanence.data.convomem_models import Priced

    with Recall.open(tmp_path / "store", embedder="hashing", retrieval="hybrid", compact=False, forgetting=False) as recall:
        recall.add("Something else of mine.")
        item = next(one for one in template_items(("user_facts",), (1,), each=1, persons=1))
        bench = ConvoMemBench([item], template_fillers(persons=1, each=3), (3,))
        memory = Retrieved(RecallSearch(recall), "recall", 40)
        results = bench.run(memory, Priced(DeskReader(), "perfect"), Judge(Priced(desk_judge, "desk judge")))
        assert results.accuracy() == 1.0
        assert results.rows[0].evidence_used == 1
        assert recall.spaces() == ["default"]
        assert len(recall.messages()) == 1


def test_passages_carry_their_speaker_conversation_and_order(tmp_path: Path) -> None:
    with Recall.open(tmp_path / "store", embedder="hashing") as recall:
        search = RecallSearch(recall)
        assert search.search("anything", 3) == []
        talks = template_fillers(persons=1, each=2)
        search.add(talks)
        found = search.search(talks[1].messages[0].text, 5)
        assert f"{talks[1].messages[0].speaker}: {talks[1].messages[0].text}" in [one.text for one in found]
        assert {one.conversation for one in found} <= {one.id for one in talks}
        assert np.all([one.place is not None for one in found])
        search.clear()
        assert search.search("anything", 3) == []
