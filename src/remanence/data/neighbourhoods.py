"""Retain sets that know their neighbours: rows by the entity that they stand beside, direct, indirect or unrelated.

The columns are those of MELU (Bushipaka et al. 2025, arXiv 2509.05316): `title` (the entity that a row belongs to), `question`, `answer`, and `type`:

| type | is | in the world of `Biographies` |
|---|---|---|
| entity | DIRECT: about what the entity's own facts name | facts about a person's city and employer |
| domain | INDIRECT: about others of the same field | facts about people who share the city or the employer |
| general | unrelated | facts about people who share neither with anyone who is to be forgotten |

The names invite a swap: "entity" rows are not about the entity itself (those are to be forgotten) but about what it is tied to. `neighbours` reads other sets.
Cost: O(people to forget x people) comparisons, Arrow selections for the rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from remanence.data.biographies import PLACES, UNKNOWN, Biographies
from remanence.data.readers import read_rows
from remanence.errors import Mistake, nearest
from remanence.seeds import numpy_generator

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

TYPES = ("entity", "domain", "general")
Graph = Mapping[str, Mapping[str, Sequence[tuple[str, str]]]]  # entity -> type -> (question, answer)
COLUMNS = (
    "id",
    "name",
    "attribute",
    "question",
    "answer",
    "paraphrases",
    "paraphrased_answer",
    "perturbed_answers",
    "perturbed_paraphrases",
)


class Neighbourhood(NamedTuple):
    """Rows of kind qa: to forget (with `title` and `idk`), to retain (with `title` and `type`), and held out (as to retain)."""

    forget: Dataset
    retain: Dataset
    test: Dataset


def neighbourhood(world: Biographies, people: Iterable[int], *, general: int = 30, held_out: int = 2, seed: int = 42) -> Neighbourhood:
    """Return the rows that stand around people who are to be forgotten, each fact asked in its first phrasing.

    Every neighbour and every unrelated person keeps some facts for the test set; the others are retained. What is tied to two of the forgotten stands beside both,
    with a warning. Retain rows stand person by person, direct before indirect, unrelated ones last.

    Args:
        world: those that the model knows.
        people: numbers of those to forget.
        general: unrelated people, drawn at random.
        held_out: facts per person, drawn at random, that are tested and not retained.
        seed: of both draws.

    Raises:
        Mistake: nobody to forget or to keep, too few unrelated people, or no facts left to retain.
    """
    import pyarrow as pa
    from datasets import Dataset

    place = "neighbourhood"
    owners = [name for name in PLACES if name in world.attribute_names]
    if not 0 < held_out < world.attributes:
        raise Mistake(place, f"held_out is {held_out}", f"give a number from 1 to {world.attributes - 1}")
    gone, rest = world.of(people), world.without(people)
    tied = np.zeros((len(gone), len(rest)), bool)
    for owner in owners:
        tied |= np.array(gone.truth(owner))[:, None] == np.array(rest.truth(owner))
    related: np.ndarray = np.logical_or.reduce(tied, 0)
    draws, unrelated = numpy_generator(seed, place), np.flatnonzero(~related)
    if not 1 <= general <= len(unrelated):
        raise Mistake(place, f"{general} unrelated people are asked for, {len(unrelated)} are there", "ask for fewer, or for at least 1")
    chosen = np.zeros(len(rest), bool)
    chosen[draws.permutation(unrelated)[:general]] = True
    tested = draws.random((len(rest), world.attributes)).argsort(1) < held_out  # (person, attribute)
    facts, own = rest.facts(), np.array(rest.names)

    def of_people(people: np.ndarray, kept: np.ndarray, kind: str) -> pa.Table:
        person, attribute = np.nonzero(people[:, None] & kept)
        return _labelled(facts, person * world.attributes + attribute, own[person], kind)

    target, person, attribute = np.nonzero(tied[:, :, None] & ~tested)
    direct, titles = _direct(world, gone, owners)
    beside = _labelled(facts, person * world.attributes + attribute, np.array(gone.names)[target], TYPES[1])
    by_person = np.argsort(np.concatenate([titles, target]), kind="stable")
    near = pa.concat_tables([direct, beside]).take(pa.array(by_person))
    twice = len(direct) - len(set(direct["question"].to_pylist())) + int((tied.sum(0) > 1).sum())
    if twice:
        warnings.warn(f"{twice} facts about places, or people, stand beside more than one of the forgotten", stacklevel=2)
    forget = gone.facts().select_columns(list(COLUMNS))
    return Neighbourhood(
        forget.add_column("title", forget["name"][:]).add_column("idk", [UNKNOWN] * len(forget)),
        Dataset(pa.concat_tables([near, of_people(chosen, ~tested, TYPES[2])])),
        Dataset(pa.concat_tables([of_people(related, tested, TYPES[1]), of_people(chosen, tested, TYPES[2])])),
    )


def neighbours(source: str | Path | Graph, place: str = "neighbours") -> Dataset:
    """Return retain rows of a file (CSV, JSONL, ...) with the columns title, question, answer, type, or of a graph {entity: {type: [(question, answer)]}}.

    Raises:
        Mistake: the file cannot be read, a column is missing, a type is none of `TYPES`, or there are no rows.
    """
    from datasets import Dataset

    if isinstance(source, Mapping):
        flat = [(title, kind, *row) for title, kinds in source.items() for kind, rows in kinds.items() for row in rows]
        if not flat:
            raise Mistake(place, "the graph has no rows", "give each entity its neighbours")
        rows = Dataset.from_dict(dict(zip(("title", "type", "question", "answer"), map(list, zip(*flat)))))
    else:
        rows, place = read_rows(source, kind="qa", place=place), f"{place}: {source}"
    for name in ("title", "type"):
        if name not in rows.column_names:
            raise Mistake(place, f"there is no column '{name}', present are {', '.join(rows.column_names)}", "add it")
    check_types(place, rows["type"][:])
    return rows


def check_types(place: str, types: Sequence[Any]) -> Int[np.ndarray, " N"]:
    """Return the number of each type in `TYPES`.

    Raises:
        Mistake: with the first row whose type is none of them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    codes = pc.index_in(pa.array(types).cast(pa.string()), value_set=pa.array(TYPES)).fill_null(-1).to_numpy(False)
    strange = np.flatnonzero(codes < 0)
    if len(strange):
        row = int(strange[0])
        raise Mistake(f"{place} row {row}", f"unknown type {types[row]!r}", nearest(str(types[row]), TYPES))
    return codes.astype(np.int64)


def _direct(world: Biographies, gone: Biographies, owners: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """Return the facts about the places of those to forget, and the place of each row's person among them."""
    places = world.places()
    names, of = np.array(places["place"]), np.array(places["of"])
    first = np.array([name.endswith("/0") for name in places["id"]])  # the first phrasing
    about = np.zeros((len(gone), len(places)), bool)
    for owner in owners:
        about |= (np.array(gone.truth(owner))[:, None] == names) & (of == owner) & first
    target, row = np.nonzero(about)
    return _labelled(places, row, np.array(gone.names)[target], TYPES[0]), target


def _labelled(rows: Dataset, chosen: np.ndarray, titles: np.ndarray, kind: str) -> pa.Table:
    """Return the chosen rows with their titles and one type."""
    import pyarrow as pa

    table: pa.Table = rows.select_columns(list(COLUMNS)).with_format("arrow")[:]
    table = table.take(pa.array(chosen)).append_column("title", pa.array(titles.tolist(), pa.string()))
    return table.append_column("type", pa.array([kind] * len(chosen), pa.string()))
