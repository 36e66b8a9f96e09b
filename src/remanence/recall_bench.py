"""What `remanence convomem` does: ConvoMem's questions asked of several memories, and from which number of conversations on which of them pays.

Rooms do not import each other: here the benchmark (measure), the importers (data) and the product's own memory (recall) meet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.errors import Mistake, nearest

if TYPE_CHECKING:
    from remanence.data.convomem import Conversation, EvidenceItem
    from remanence.data.convomem_models import Priced
    from remanence.measure.convomem_judge import Judge

SOURCES = ("templates", "convomem", "longmemeval", "locomo")
DESK = "desk"


def compare_memories(
    policies: Sequence[str],
    *,
    sizes: Sequence[int],
    output: Path,
    source: str = "templates",
    data: Path | None = None,
    fillers: Path | None = None,
    limit: int | None = None,
    packing: str = "standard",
    model: str = DESK,
    judge: str | None = None,
    helper: str | None = None,
    prices: tuple[float, float] = (0.0, 0.0),
    budget_usd: float | None = None,
    k: int = 20,
    until: int = 30,
    mem0: str | None = None,
    embedder: str = "sentence",
    seed: int = 0,
    progress: bool = True,
) -> tuple[str, list[dict[str, object]]]:
    """Ask every memory the same questions over growing histories; return the advice, and the table by size and memory.

    Answers are kept in `output/answers`, so that a run that was stopped goes on; `output` gets results.csv, answers.jsonl, and crossover.txt, .csv and .png.

    Args:
        policies: of `measure.convomem_memories.NAMES`; full-context is added, for everything is compared with it.
        sizes: numbers of conversations in a history.
        output: folder.
        source: templates (made here) | convomem | longmemeval | locomo (published files).
        data: file or folder of the published files.
        fillers: of conversations without evidence (convomem).
        limit: questions per category and number of evidence messages.
        packing: standard | batched.
        model, judge, helper: hf:FOLDER, openai:MODEL@URL, or desk (a declared model of a reader, for templates alone).
        prices: dollars per million tokens of input and output.
        budget_usd: stop once so much was spent.
        k, until, mem0, embedder: of the memories that have it.
        seed: of items and histories.
        progress: draw bars.

    Raises:
        Mistake: unknown names, missing files, or a desk reader for questions that it cannot read.
    """
    from remanence.measure.convomem import ConvoMemBench
    from remanence.measure.convomem_crossover import write_crossover
    from remanence.measure.convomem_memories import MemorySettings, make_memory
    from remanence.measure.convomem_results import Results
    from remanence.training.progress import watched

    if source not in SOURCES:
        raise Mistake("--source", f"there is no '{source}'", nearest(source, SOURCES))
    if source != "templates" and DESK in (model, judge, helper):
        raise Mistake("--model", "the desk reader reads questions made from templates alone", "name hf:FOLDER or openai:MODEL@URL")
    items, talk = _questions(source, data, fillers, limit, seed, max(sizes, default=1))
    with ExitStack() as held:
        settings = MemorySettings(k=k, until=until, url=mem0, **_own(policies, embedder, held))
        memories = [make_memory(name, settings) for name in dict.fromkeys(("full-context", *policies))]
        bench = ConvoMemBench(items, talk, sizes, packing, seed, folder=output / "answers", spill=source in ("templates", "convomem"))
        answers, judging = _model(model, prices), _judge(judge or model, prices)
        aid = _model(helper, prices) if helper else None
        found = Results(())
        for memory in watched(memories, "memories", len(memories)) if progress else memories:
            found += bench.run(memory, answers, judging, aid, budget_usd)
    found.write(output)
    return write_crossover(found, output), found.table(by=("size",))


def _questions(
    source: str, data: Path | None, fillers: Path | None, limit: int | None, seed: int, largest: int
) -> tuple[list[EvidenceItem], list[Conversation]]:
    """Return items and fillers of a source."""
    if source == "templates":
        from remanence.data.convomem_templates import template_fillers, template_items

        return template_items(each=limit or 3, seed=seed), template_fillers(each=max(largest, 8), seed=seed)
    if data is None:
        raise Mistake("--data", f"{source} is read from published files", "download them and name the file or folder")
    if source == "convomem":
        from remanence.data.convomem import load_convomem, load_fillers

        if fillers is None:
            raise Mistake("--fillers", "convomem needs conversations without evidence", "name the folder of the published fillers")
        return load_convomem(data, limit=limit), load_fillers(fillers)
    from remanence.data.convomem_import import load_locomo, load_longmemeval

    items, talk = (load_longmemeval if source == "longmemeval" else load_locomo)(data)
    return items[: limit or len(items)], talk


def _own(policies: Sequence[str], embedder: str, held: ExitStack) -> dict[str, Any]:
    """Return the encoder and the product's own memory, if a policy wants them."""
    given: dict[str, Any] = {}
    if any(name.endswith("dense") for name in policies):
        from remanence.recall.embedders import load_embedder

        given["encode"] = load_embedder(embedder)
    if any(name.endswith("own") for name in policies):
        from remanence.recall.service import Recall
        from remanence.recall_search import RecallSearch

        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="convomem-"))
        memory = held.enter_context(Recall.open(Path(folder) / "store", embedder=embedder, compact=False, forgetting=False))
        given["own"] = RecallSearch(memory)
    return given


def _model(name: str, prices: tuple[float, float]) -> Priced:
    """Return a model of a name."""
    from remanence.data.convomem_models import Priced, Reply, hf_model

    if name == DESK:
        from remanence.measure.convomem_desk import desk_reader

        return desk_reader("flash")
    if name.startswith("hf:"):
        return Priced(hf_model(name.removeprefix("hf:")), name, price_in=prices[0], price_out=prices[1])
    from remanence.recall.openai_client import OpenAIClient, split_endpoint

    model, url = split_endpoint(name)
    client = OpenAIClient(url)

    def ask(prompt: str) -> Reply:
        said = client.chat({"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0})
        used = said.get("usage") or {}
        cached = (used.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        text = str(said["choices"][0]["message"]["content"] or "")
        return Reply(text, int(used.get("prompt_tokens", 0)), int(used.get("completion_tokens", 0)), int(cached))

    return Priced(ask, name.partition("@")[0], price_in=prices[0], price_out=prices[1])


def _judge(name: str, prices: tuple[float, float]) -> Judge:
    """Return the judge of a name."""
    from remanence.data.convomem_models import Priced
    from remanence.measure.convomem_judge import Judge

    if name == DESK:
        from remanence.measure.convomem_desk import desk_judge

        return Judge(Priced(desk_judge, "desk judge"), "desk judge")
    return Judge(_model(name, prices), name.partition("@")[0])
