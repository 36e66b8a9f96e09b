"""ConvoMem: the same questions over growing histories, for any memory, model and judge; every answer is kept, so a run that was stopped goes on.

Pakhomov, Nijkamp and Xiong, "Convomem Benchmark: Why Your First 150 Conversations Don't Need RAG", 2025, arXiv:2511.10523.

Usage: `bench = ConvoMemBench(items, fillers, sizes=(1, 10, 30), folder=...)`, then `bench.run(memory, model, judge, helper)` for each memory, and
`convomem_crossover.crossovers(...)` for the sizes from which on one pays. Accuracy at a size uses only items whose evidence fits into it.

Differs from the official code: tokens, time and cost include helper calls; answers whose judge gave no verdict are counted, not guessed; items of all ks
share a list of sizes, and an item enters from its own k on.

Cost: one answer and one judge call per (item, size) not answered before, in batched packing a few more; memory is one history.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from remanence.data.convomem import SIZES, Conversation, EvidenceItem
from remanence.data.convomem_models import Model, Priced
from remanence.errors import Mistake
from remanence.measure.convomem_judge import Judge
from remanence.measure.convomem_packing import PACKINGS, Case, Packer
from remanence.measure.convomem_policies import Answering, Memory, MemoryPolicy
from remanence.measure.convomem_results import Results, Row


@dataclass
class ConvoMemBench:
    """Questions, fillers, sizes and a packing: what every policy is asked alike.

    Args:
        items: the questions.
        fillers: conversations without evidence, with their persons.
        sizes: numbers of conversations in a history.
        packing: standard (one history per question) | batched (questions share histories: far fewer to index; not comparable with standard).
        seed: of the histories.
        folder: where answers are kept; `None`: nowhere, and a run that was stopped starts anew.
        anybody: let an item without a person draw filler of a random person; otherwise it is refused.
        spill: fill up with other persons' conversations where a person's own run out (off for LongMemEval and LoCoMo, whose histories share sessions).
    """

    items: Sequence[EvidenceItem]
    fillers: Sequence[Conversation]
    sizes: Sequence[int] = SIZES
    packing: str = "standard"
    seed: int = 0
    folder: str | Path | None = None
    anybody: bool = False
    spill: bool = True

    def __post_init__(self) -> None:
        if not self.items:
            raise Mistake("items", "there are none", "load or generate some")
        if not self.sizes or min(self.sizes) < 1:
            raise Mistake("sizes", "name at least one size, each at least 1", "for example 1,10,30")
        if self.packing not in PACKINGS:
            raise Mistake("packing", f"there is no packing '{self.packing}'", f"choose {' or '.join(PACKINGS)}")
        least = min(item.k for item in self.items)
        if max(self.sizes) < least:
            raise Mistake("sizes", f"no item's evidence fits: the least is {least}", f"ask for {least} or more")
        self.sizes = tuple(sorted(set(self.sizes)))
        self.packer = Packer(self.items, self.fillers, seed=self.seed, anybody=self.anybody, spill=self.spill)

    def cases(self) -> Iterator[Case]:
        """Yield all histories, small ones first; sizes that no item's evidence fits are left out."""
        least = min(item.k for item in self.items)
        for size in self.sizes:
            if size >= least:
                yield from self.packer.cases(size, self.packing)

    def run(self, memory: Memory, model: Model, judge: Judge, helper: Model | None = None, budget_usd: float | None = None) -> Results:
        """Ask everything of a memory with the shared prompt and return the results.

        Args:
            memory: what hands over the context.
            model: answers.
            judge: decides; its cost counts against the budget, not as a question's.
            helper: reads for extraction and blocks; the model itself if `None`.
            budget_usd: stop before the next question once so much was spent in this run; what is left out lowers n.
        """
        names = (model_name(model), model_name(helper or model))
        return self.run_policy(Answering(memory, model, helper), judge, names=names, budget_usd=budget_usd)

    def run_policy(
        self, policy: MemoryPolicy, judge: Judge, *, names: tuple[str, str] = ("own", "own"), budget_usd: float | None = None
    ) -> Results:
        """Ask everything of a whole system, which answers by itself; `names` of its model and helper stand in the tables and the cache."""
        if budget_usd is not None and budget_usd <= 0:
            raise Mistake("budget_usd", f"{budget_usd} buys nothing", "name a positive amount or none")
        identity = {"policy": policy.name, "model": names[0], "helper": names[1], "judge": judge.name}
        cache = _Cache(self.folder, identity | {"packing": self.packing, "seed": self.seed})
        rows: list[Row] = []
        spent, stopped = 0.0, False
        try:
            for case in self.cases():
                key = case.id if self.folder is None else _digest(case)
                missing = [item for item in case.items if (key, item.id) not in cache]
                if missing and not stopped:
                    policy.clear()
                    policy.add(case.conversations)
                for item in case.items:
                    found = cache.get(key, item.id)
                    if found is None and not stopped:
                        found, cost = self._ask(policy, judge, case, item, identity)
                        cache.put(key, item.id, found)
                        spent += cost
                        stopped = budget_usd is not None and spent >= budget_usd
                    if found is not None:
                        rows.append(found)
        finally:
            cache.close()
            policy.clear()
        return Results(tuple(rows), stopped)

    def _ask(self, policy: MemoryPolicy, judge: Judge, case: Case, item: EvidenceItem, identity: dict[str, str]) -> tuple[Row, float]:
        answer = policy.answer(item.question)
        verdict = judge(item, answer.text)
        wanted = {one.id for one in item.conversations}
        found = Row(
            policy=identity["policy"],
            model=identity["model"],
            helper=identity["helper"],
            judge=identity["judge"],
            packing=case.packing,
            size=case.size,
            case=case.id,
            item=item.id,
            category=item.category,
            k=item.k,
            right=verdict.right,
            judge_calls=verdict.calls,
            judge_cost=verdict.cost,
            evidence_used=len(wanted.intersection(answer.used_ids)),
            text=answer.text,
            calls=answer.calls,
            input_tokens=answer.input_tokens,
            output_tokens=answer.output_tokens,
            cached_tokens=answer.cached_tokens,
            final_tokens=answer.final_tokens,
            seconds=answer.seconds,
            cost=answer.cost,
        )
        return found, answer.cost + verdict.cost


def model_name(model: Model) -> str:
    """Return a model's name for tables and cache: that of a `Priced` one, else its function's or class's."""
    return model.name if isinstance(model, Priced) else str(getattr(model, "__qualname__", type(model).__qualname__))


def rejudge(results: Results, items: Iterable[EvidenceItem], judge: Judge) -> Results:
    """Return the same answers judged by another judge."""
    by_id = {item.id: item for item in items}
    rows = []
    for row in results.rows:
        if row.item not in by_id:
            raise Mistake(f"item {row.item}", "it is not among the items", "give the items that the answers were for")
        verdict = judge(by_id[row.item], row.text)
        rows.append(row.judged(verdict.right, judge.name, verdict.calls, verdict.cost))
    return Results(tuple(rows), results.stopped)


def _digest(case: Case) -> str:
    """Return a hash of everything in a case: an answer is taken from the cache only for the very same history."""
    total = sha256(f"{case.id}|{case.packing}|{case.size}".encode())
    for one in case.conversations:
        total.update(json.dumps([one.id, [[message.speaker, message.text] for message in one.messages]]).encode())
    for item in case.items:
        total.update(json.dumps([item.id, item.question, item.answer]).encode())
    return total.hexdigest()[:24]


class _Cache:
    """Answers of one run, one JSON line each; a line that a kill cut short is dropped when the file is opened again."""

    def __init__(self, folder: str | Path | None, identity: dict[str, Any]):
        self.rows: dict[tuple[str, str], Row] = {}
        self.file: IO[str] | None = None
        if folder is None:
            return
        name = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(folder) / f"{name}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read(path)
            self.file = path.open("r+" if path.exists() else "w", encoding="utf-8")
            self.file.seek(whole)
            self.file.truncate()
        except OSError as error:
            raise Mistake(path, f"cannot be written ({error.strerror or error})", "name another folder") from error

    def _read(self, path: Path) -> int:
        """Take the whole lines and return where they end."""
        end = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                try:
                    key, item, row = json.loads(line)
                    self.rows[key, item] = Row(**row)
                except (ValueError, TypeError) as error:
                    raise Mistake(path, f"is no list of answers ({error})", "remove the file; its questions are asked again") from error
                end += len(line)
        return end

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.rows

    def get(self, case: str, item: str) -> Row | None:
        return self.rows.get((case, item))

    def put(self, case: str, item: str, row: Row) -> None:
        self.rows[case, item] = row
        if self.file is not None:
            try:
                self.file.write(json.dumps([case, item, asdict(row)], ensure_ascii=False) + "\n")
                self.file.flush()
            except OSError as error:
                raise Mistake(self.file.name, f"cannot be written ({error.strerror or error})", "free the disk and run again") from error

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
