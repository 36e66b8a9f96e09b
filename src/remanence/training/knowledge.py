"""Does the model know an entity? Seen inside: a linear probe between the states of entities that it knows and of entities that it does not.

The candidates are the entities of a request's retain and holdout rows (column `name`); the model's own answers say which are known and which are not (see
`asking`). Both groups are split by entity into train (60 %) and test (40 %). Block and place are those whose logistic probe has the best AUC in a 3-fold
cross-validation over the train entities (one small set to choose on would be a handful of people), and the AUC on test says whether there is a signal at all. Targets are only ever scored by it. After Ferrando et al. 2025, "Do I Know
This Entity?", arXiv 2411.14257.

Cost: the questions of all candidates, and one forward pass over all prompts, whose states at every block are kept on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.roles import blocks
from remanence.training.activations import PLACES, Probe, Prompts, collect, encode_prompts, fit_probe, separation
from remanence.training.asking import known_and_unknown, right, say

if TYPE_CHECKING:
    from datasets import Dataset

    from remanence.stream import Request
    from remanence.training.trainer import Trainer

GROUPS = ("known", "unknown", "target")
SHARE, FOLDS = 0.6, 3  # of each group's entities for the probe, the rest is for the test; parts of the cross-validation


@dataclass(frozen=True)
class Labels:
    """How candidates are labelled.

    Args:
        by: asked (the model's own answers say it) or given (retain entities are known, holdout entities unknown).
        samples: sampled answers per question, beside the greedy one.
        enough: right answers of these that make a question known.
        tokens: longest answer.
        fewest: entities that each group must have.
        place: for errors.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    by: str = "asked"
    samples: int = 4
    enough: int = 3
    tokens: int = 16
    fewest: int = 20
    place: str = "knowledge"

    def __post_init__(self) -> None:
        if self.by not in ("asked", "given"):
            raise Mistake(f"{self.place}.labels", f"unknown value {self.by!r}", nearest(self.by, ("asked", "given")))
        if self.samples < 0 or self.tokens < 1:
            raise Mistake(f"{self.place}.samples", f"{self.samples} samples of {self.tokens} tokens cannot be drawn", "correct the values")
        if not 1 <= self.enough <= 1 + self.samples:
            raise Mistake(f"{self.place}.enough", f"{self.enough} of {1 + self.samples} answers cannot be right", "raise `samples`")
        if self.fewest < 3:
            raise Mistake(f"{self.place}.fewest", f"is {self.fewest}, but some are trained on and some are tested", "give at least 3")


@dataclass(frozen=True)
class Knowledge:
    """Where the model tells known from unknown, and with what.

    Args:
        number: of the block.
        place: entity | prompt.
        train: group -> prompts of the train entities (of the targets: all).
        test: wording -> group -> prompts of the test entities and of the targets: `questions`, and `paraphrases` where the rows have them.
        hidden: group -> states of the train prompts at the chosen block and place, of the model as it was.
        candidates: states of all prompts of known and of unknown entities, there too.
        probe: fitted on the train states of known against unknown.
        report: counts and the table of AUCs; plain JSON.
    """

    number: int
    place: str
    train: Mapping[str, Prompts]
    test: Mapping[str, Mapping[str, Prompts]]
    hidden: Mapping[str, Float[Tensor, "N D"]]
    candidates: Mapping[str, Float[Tensor, "N D"]]
    probe: Probe
    report: Mapping[str, Any]

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""
        return self.hidden["target"].shape[1]


def read_knowledge(
    model: nn.Module,
    request: Request,
    trainer: Trainer,
    *,
    labels: Labels,
    number: int | None = None,
    place: str | None = None,
    least: float = 0.0,
) -> Knowledge:
    """Label the candidates, fit the probes, and choose block and place (the last block is never chosen by itself: nothing but the head reads it).

    Args:
        model: as it is.
        request: targets are its forget rows.
        trainer: encodes and runs.
        labels: how candidates are labelled.
        number: of the block; `None` chooses.
        place: entity | prompt; `None` chooses.
        least: AUC on the test entities that is needed.

    Raises:
        Mistake: no names, a target whose question does not hold its name or that is a candidate too, too few known or unknown entities, no signal.
    """
    rows = {"target": named(request.forget, "forget", request.name)}
    if any(not row["name"] for row in rows["target"]):
        raise Mistake(f"forget set of request '{request.name}'", "has a row without a name", "say in `name` which entity each row is about")
    groups, dropped = _groups(model, request, rows["target"], trainer, labels)
    rows |= groups
    parts = {group: _split(rows[group], trainer, group) for group in ("known", "unknown")}
    prompts = {group: _prompts(rows[group], trainer, request.name, group) for group in GROUPS}
    numbers = list(range(len(blocks(model)))) if number is None else [number]
    states = {group: collect(model, prompts[group], numbers, trainer) for group in GROUPS}

    def part(group: str, entities: Sequence[str], row: int, column: int) -> Tensor:
        return states[group][torch.from_numpy(np.isin(prompts[group].names, entities)), row, column]

    def judged(row: int, column: int, fit: Mapping[str, Sequence[str]], held: Mapping[str, Sequence[str]]) -> float:
        probe = fit_probe(*(part(group, fit[group], row, column) for group in fit))
        return separation(*(probe.score(part(group, held[group], row, column)) for group in held))

    table, best = [], (-1.0, 0, 0)
    for row, block in enumerate(numbers):
        for column, where in enumerate(PLACES):
            chosen = float(np.mean([judged(row, column, *fold) for fold in _folds({group: parts[group]["train"] for group in parts})]))
            tested = judged(row, column, *({group: parts[group][name] for group in parts} for name in ("train", "test")))
            table.append({"block": block, "place": where, "choice": round(chosen, 4), "test": round(tested, 4)})
            if where == (place or where) and (len(numbers) == 1 or block < numbers[-1]) and chosen > best[0]:
                best = (chosen, row, column)
    _, row, column = best
    train = {group: prompts[group].of(parts[group]["train"]) for group in parts} | {"target": prompts["target"]}
    candidates = {group: states[group][:, row, column] for group in parts}
    hidden = {group: part(group, parts[group]["train"], row, column) for group in parts} | {"target": states["target"][:, row, column]}
    asked = {group: set(parts[group]["test"]) for group in parts}
    left = {group: [item for item in rows[group] if item["name"] in asked[group]] for group in parts} | {"target": rows["target"]}
    report: dict[str, Any] = {
        "entities": {group: len(set(prompts[group].names)) for group in GROUPS} | {"neither": dropped},
        "table": table,
        "test": next(item["test"] for item in table if (item["block"], item["place"]) == (numbers[row], PLACES[column])),
    }
    if report["test"] < least:
        raise Mistake(
            labels.place,
            f"the probe behind block {numbers[row]} tells known from unknown with an AUC of {report['test']:.2f}, {least:g} is needed: "
            "there is no such state in the model",
            "take other unknown entities or another method",
        )
    test = {"questions": {group: prompts[group].of(parts[group]["test"]) for group in parts} | {"target": prompts["target"]}} | _reworded(
        left, trainer
    )
    probe = fit_probe(hidden["known"], hidden["unknown"])
    return Knowledge(numbers[row], PLACES[column], train, test, hidden, candidates, probe, report)


def internal_verdict(
    model: nn.Module, knowledge: Knowledge, trainer: Trainer, *, most: int | None = None, retrained: bool = True
) -> dict[str, float]:
    """Return AUCs of the test prompts' states in a model: target against unknown (0.5: they look alike), known against unknown, known against target.

    The probe is the one of the model as it was; `retrained/...` is another one, fitted on this model's states of the train prompts. `paraphrases/...` are
    the same numbers in other words than those that a method may have trained on.

    Args:
        model: as it was, or after any method.
        knowledge: from the model as it was.
        trainer: encodes and runs.
        most: prompts per group at most.
        retrained: fit the second probe too.
    """

    def states(prompts: Prompts) -> Tensor:
        return states_of(model, prompts if most is None else prompts.at_most(most), knowledge, trainer)

    probes = {"": knowledge.probe}
    if retrained:
        probes["retrained/"] = fit_probe(states(knowledge.train["known"]), states(knowledge.train["unknown"]))
    found = {}
    for wording, groups in knowledge.test.items():
        seen = {group: states(prompts) for group, prompts in groups.items()}
        for name, probe in probes.items():
            score = {group: probe.score(hidden) for group, hidden in seen.items()}
            front = name if wording == "questions" else f"{wording}/{name}"
            for first, second in (("target", "unknown"), ("known", "unknown"), ("known", "target")):
                found[f"{front}{first} vs {second}"] = separation(score[first], score[second])
    return found


def states_of(model: nn.Module, prompts: Prompts, knowledge: Knowledge, trainer: Trainer) -> Float[Tensor, "N D"]:
    """Return a model's states of prompts at the block and place of the knowledge."""
    return collect(model, prompts, [knowledge.number], trainer)[:, 0, PLACES.index(knowledge.place)]


def named(rows: Dataset, part: str, request: str) -> list[dict[str, Any]]:
    """Return rows as dicts with name ("" where there is none), question, answer and paraphrases.

    Raises:
        Mistake: there is no column `name`.
    """
    if "name" not in rows.column_names:
        raise Mistake(
            f"{part} set of request '{request}'", "has no column 'name'", "say which entity each row is about (columns: {name: ...})"
        )
    plain = rows.with_format(None)
    others = plain["paraphrases"] if "paraphrases" in plain.column_names else [None] * len(plain)
    columns = zip(plain["name"], plain["question"], plain["answer"], others)
    return [{"name": n or "", "question": q, "answer": a, "paraphrases": list(p or ())} for n, q, a, p in columns]


def _groups(
    model: nn.Module, request: Request, target: Sequence[Mapping[str, Any]], trainer: Trainer, labels: Labels
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Return the rows of known and of unknown entities, and how many entities are neither."""
    parts = {"retain": request.retain, "holdout": request.holdout}
    found = {part: [row for row in named(rows, part, request.name) if row["name"]] for part, rows in parts.items() if rows is not None}
    targets = {row["name"] for row in target}
    for part, rows in found.items():
        both = next((row["name"] for row in rows if row["name"] in targets), None)
        if both is not None:
            raise Mistake(
                f"{part} set of request '{request.name}'", f"holds rows about the target '{both}'", "leave them out, or empty their `name`"
            )
    candidates = [row for rows in found.values() for row in rows]
    names = [row["name"] for row in candidates]
    if labels.by == "given":
        known, unknown = (list(dict.fromkeys(row["name"] for row in found.get(part, ()))) for part in ("retain", "holdout"))
    else:
        said = say(model, [row["question"] for row in candidates], trainer, samples=labels.samples, tokens=labels.tokens)
        known, unknown = known_and_unknown(names, [right(texts, row["answer"], labels.enough) for texts, row in zip(said, candidates)])
    for group, entities in (("known", known), ("unknown", unknown)):
        if len(entities) < labels.fewest:
            remedy = {
                "known": "add rows about others that it knows to the retain set",
                "unknown": "add rows about strangers to the holdout set",
            }
            raise Mistake(
                f"request '{request.name}'",
                f"{len(entities)} of the {len(set(names))} entities in its retain and holdout rows are {group} to the model, {labels.fewest} are needed",
                remedy[group],
            )
    chosen = {"known": set(known), "unknown": set(unknown)}
    sorted_rows = {group: [row for row in candidates if row["name"] in inside] for group, inside in chosen.items()}
    return sorted_rows, len(set(names)) - len(known) - len(unknown)


def _split(rows: Sequence[Mapping[str, Any]], trainer: Trainer, group: str) -> dict[str, list[str]]:
    """Return the entities of each part, drawn by the event's seed."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    order = torch.randperm(len(names), generator=trainer.generator("knowledge", group)).tolist()
    mixed, first = [names[number] for number in order], round(SHARE * len(names))
    return {"train": mixed[:first], "test": mixed[first:]}


def _folds(groups: Mapping[str, Sequence[str]]) -> Iterator[tuple[dict[str, list[str]], dict[str, list[str]]]]:
    """Yield (entities to fit on, entities held out) of each fold."""
    for fold in range(min(FOLDS, *map(len, groups.values()))):
        held = {group: list(names[fold::FOLDS]) for group, names in groups.items()}
        yield {group: [name for name in names if name not in held[group]] for group, names in groups.items()}, held


def _prompts(rows: Sequence[Mapping[str, Any]], trainer: Trainer, request: str, group: str) -> Prompts:
    """Encode the questions of rows.

    Raises:
        Mistake: one of a target's does not hold its name.
    """
    questions, names = [row["question"] for row in rows], [row["name"] for row in rows]
    prompts, lacking = encode_prompts(questions, names, trainer)
    if len(lacking) and (group == "target" or not len(prompts)):
        number = int(lacking[0])
        raise Mistake(
            f"request '{request}'",
            f"the question {questions[number]!r} does not hold the name {names[number]!r}",
            "write the name as the question has it, aliases in rows of their own",
        )
    return prompts


def _reworded(rows: Mapping[str, Sequence[Mapping[str, Any]]], trainer: Trainer) -> dict[str, dict[str, Prompts]]:
    """Return each group's paraphrases that hold the name, under that word; nothing where a group has none."""
    other = {
        group: [(text, row["name"]) for row in part for text in row["paraphrases"] if row["name"] in text] for group, part in rows.items()
    }
    if not all(other.values()):
        return {}
    return {"paraphrases": {group: _encoded(pairs, trainer) for group, pairs in other.items()}}


def _encoded(pairs: Sequence[tuple[str, str]], trainer: Trainer) -> Prompts:
    """Return the prompts of (question, name), each once."""
    once = list(dict.fromkeys(pairs))
    return encode_prompts([question for question, _ in once], [name for _, name in once], trainer)[0]
