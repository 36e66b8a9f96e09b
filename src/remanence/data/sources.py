"""Load the data clause of a recipe: a path, or one source with modifiers, checked before anything is read.

    data: corpus.jsonl                                             # beside the recipe
    data: ${REMANENCE_DATA}/shakespeare.txt                        # real data; the variable is ../shared/data unless set
    data: {file: qa.csv, columns: {question: prompt}, limit: 500}
    data: {biographies: {people: 40, seed: 1}, where: {attribute: [pet, food]}}
    data: {biographies: {people: 100, templates: 2, neighbourhood: {people: 12, part: retain}}}
    data: {digits: {classes: [0, 1], part: test}}
    data: {mnist: {classes: [3]}, shuffle: 7, split: {train: 0.9}}
    data: {pythondocs: {characters: 200000}}
    data: {pch: {rows: deletions}, where: {request: 12}}           # kind text or qa
    data: [old.jsonl, {file: new.jsonl, limit: 100}]               # one after the other, with the columns that they share

Modifiers act in this order: `where`, `except`, `shuffle` (a seed), `split` (`{train: 0.9}` keeps the first 90 %, `{test: 0.1}` the
last 10 %), `skip`, `limit`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remanence.data.biographies import Biographies
from remanence.data.digits import digits, in_classes
from remanence.data.neighbourhoods import neighbourhood
from remanence.data.pch import PCH
from remanence.data.pythondocs import pythondocs
from remanence.data.readers import read_rows
from remanence.errors import Mistake, nearest
from remanence.seeds import derive
from remanence.stream import COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

DEFAULT_DATA = "../shared/data"
Cell = bool | int | float | str
Cells = dict[str, Cell | list[Cell]]


class _Clause(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)


class People(_Clause):
    """A run of people: `{people: 40, first: 0}`."""

    people: int = Field(ge=1)
    first: int = Field(0, ge=0)


class NeighbourhoodClause(_Clause):
    """Arguments of `neighbourhood`: a run of people to forget, and which of its three sets."""

    people: int = Field(ge=1)
    first: int = Field(0, ge=0)
    part: Literal["forget", "retain", "test"]
    general: int = Field(30, ge=1)
    held_out: int = Field(2, ge=1)
    seed: int = 42


class BiographiesClause(_Clause):
    """Arguments of `Biographies`, and which rows: statements are kind text, the others (questions, facts, places, strangers) kind qa.

    `neighbours_of` gives the facts of those among `people` who share a value with it; `neighbourhood` rows to forget, to retain and to test, with the entity
    that each stands beside and its type (kind qa).
    """

    people: int = 400
    first: int = 0
    seed: int = 0
    attributes: int = 5
    templates: int = 3
    answers: Literal["short", "sentence"] = "short"
    rows: Literal["questions", "facts", "statements", "places", "strangers"] | None = None
    neighbours_of: People | None = None
    neighbourhood: NeighbourhoodClause | None = None


class DigitsClause(_Clause):
    """Arguments of `digits`."""

    classes: list[int] | None = None
    part: Literal["train", "test"] = "train"


class MnistClause(_Clause):
    """A folder with an IDX pair; the first 80 % of its rows are `train`, the others `test` (8,000 and 2,000 of MNIST's t10k files)."""

    folder: str = "${REMANENCE_DATA}/mnist10k"
    classes: list[int] | None = None
    part: Literal["train", "test"] = "train"


class PythondocsClause(_Clause):
    """Arguments of `pythondocs`."""

    characters: int | None = Field(200_000, ge=1)
    part: Literal["train", "test"] = "train"


class PCHClause(_Clause):
    """Arguments of `PCH`, and which rows: everything (to be taught), deletions (one per request), retain; text, or question and answer."""

    requests: int = 300
    retained: int = 300
    again: float = 0.35
    seed: int = 0
    rows: Literal["everything", "deletions", "retain"] = "everything"


class Split(_Clause):
    """Which end of the rows to keep, and how much of them."""

    train: float | None = Field(None, gt=0, lt=1)
    test: float | None = Field(None, gt=0, lt=1)


class Source(_Clause):
    """A data clause: exactly one source, and modifiers."""

    file: str | None = None
    biographies: BiographiesClause | None = None
    digits: DigitsClause | None = None
    mnist: MnistClause | None = None
    pythondocs: PythondocsClause | None = None
    pch: PCHClause | None = None
    columns: dict[str, str] | None = None
    where: Cells = {}
    except_: Cells = Field({}, alias="except")
    shuffle: int | None = None
    split: Split | None = None
    skip: int = Field(0, ge=0)
    limit: int | None = Field(None, ge=1)


NESTED: dict[str, type[_Clause]] = {
    "biographies": BiographiesClause,
    "digits": DigitsClause,
    "mnist": MnistClause,
    "pythondocs": PythondocsClause,
    "pch": PCHClause,
    "split": Split,
    "neighbours_of": People,
    "neighbourhood": NeighbourhoodClause,
}
SOURCES = ("file", "biographies", "digits", "mnist", "pythondocs", "pch")


def check_source(spec: Any, *, place: str = "data", kind: str | None = None) -> list[Source]:
    """Return the typed clauses without reading any data: one, or those of a list.

    Args:
        spec: a path, a mapping, or a list of them, as in the module's examples.
        place: the recipe's file, line or field, for errors.
        kind: where given, the rows must be able to be of that kind.

    Raises:
        Mistake: an unknown key, a value of the wrong type or range, no source or several, an empty list.
    """
    if not isinstance(spec, list):
        return [_check_one(spec, place=place, kind=kind)]
    if not spec:
        raise Mistake(place, "is an empty list", "name at least one source")
    return [_check_one(part, place=f"{place}.{number}", kind=kind) for number, part in enumerate(spec)]


def guess_kind(spec: Any, *, folder: str | Path = ".", place: str = "data") -> str:
    """Return the kind of a data clause's rows, seen from the source or from its columns (qa before chat before classes, images, text).

    Raises:
        Mistake: the file cannot be read, or its columns fit no kind.
    """
    source = check_source(spec, place=place)[0]
    if source.file is None:
        rows = source.biographies.rows if source.biographies is not None else None
        text = source.pythondocs is not None or source.pch is not None or rows == "statements"
        return "text" if text else "qa" if source.biographies is not None else "classes"
    said: list[str] = []
    for kind in ("qa", "chat", "classes", "images", "text"):
        try:
            read_rows(expand(source.file, Path(folder), place), kind=kind, columns=source.columns, place=place)
        except Mistake as mistake:
            said.append(str(mistake))
        else:
            return kind
    if len(set(said)) == 1:  # every kind meets the same obstacle: the file itself
        raise Mistake(place, said[0].removeprefix(f"{place}: ").rpartition("; ")[0], said[0].rpartition("; ")[2])
    raise Mistake(source.file, "its columns fit no kind", "say --kind, and name the columns text, question and answer, messages, or label")


def _check_one(spec: str | dict[str, Any] | Source, *, place: str, kind: str | None) -> Source:
    """Return one typed clause.

    Args:
        spec: a path or a mapping, as in the module's examples.
        place: the recipe's file, line or field, for errors.
        kind: where given, the rows must be able to be of that kind.

    Raises:
        Mistake: an unknown key, a value of the wrong type or range, no source or several.
    """
    if isinstance(spec, Source):
        source = spec
    elif isinstance(spec, str):
        source = Source.model_validate({"file": spec})
    elif isinstance(spec, dict):
        try:
            source = Source.model_validate({key: {} if key in SOURCES and value is None else value for key, value in spec.items()})
        except ValidationError as error:
            raise _mistake(place, error) from error
    else:
        raise Mistake(place, f"is {type(spec).__name__}", "give a path or a mapping with one source")
    chosen = [name for name in SOURCES if getattr(source, name) is not None]
    if len(chosen) != 1:
        problem = f"names {' and '.join(chosen)} at once" if chosen else "names no source"
        raise Mistake(place, problem, f"give exactly one of {', '.join(SOURCES)}")
    if source.columns is not None and source.file is None:
        raise Mistake(f"{place}.columns", f"{chosen[0]} has its own columns", "remove it; columns belongs to file")
    if source.split is not None and (source.split.train is None) == (source.split.test is None):
        raise Mistake(f"{place}.split", "needs one part", "write {train: 0.9} or {test: 0.1}")
    if kind is not None:
        _check_kind(source, kind, place)
    return source


def load_rows(spec: Any, *, kind: str, place: str = "data", folder: str | Path = ".") -> Dataset:
    """Load the rows of a data clause.

    Args:
        spec: a path, a mapping, or a list of them, as in the module's examples.
        kind: text | qa | chat | classes | images.
        place: the recipe's file, line or field, for errors.
        folder: what relative paths start from, the recipe's folder.

    Raises:
        Mistake: as `check_source` and `read_rows`; also where a filter leaves nothing.
    """
    sources = check_source(spec, place=place, kind=kind)
    if len(sources) == 1:
        return _load_one(sources[0], kind, place, folder)
    from datasets import concatenate_datasets

    parts = [_load_one(source, kind, f"{place}.{number}", folder) for number, source in enumerate(sources)]
    shared = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    try:
        return concatenate_datasets([part.select_columns(shared) for part in parts])
    except (ValueError, TypeError) as error:
        raise Mistake(place, f"the sources' columns differ in type ({error})", "give the shared columns one type") from error


def _load_one(source: Source, kind: str, place: str, folder: str | Path) -> Dataset:
    rows = _rows_of(source, kind, place, Path(folder))
    for column, wanted in source.where.items():
        rows = _filtered(rows, column, wanted, keep=True, place=f"{place}.where")
    for column, wanted in source.except_.items():
        rows = _filtered(rows, column, wanted, keep=False, place=f"{place}.except")
    if source.shuffle is not None:
        order = np.random.default_rng(derive(source.shuffle, "shuffle")).permutation(len(rows))
        rows = rows.select(order)
    start, stop = _kept(source, len(rows))
    if stop <= start:
        raise Mistake(place, f"nothing is left of {len(rows)} rows", "lower skip or widen split")
    return rows if (start, stop) == (0, len(rows)) else rows.select(range(start, stop))


def expand(path: str, folder: Path, place: str) -> str:
    """Return `path` with `~` and `${VARIABLE}` filled in, relative to `folder`; hub names stay as they are.

    `REMANENCE_DATA` is `../shared/data`, seen from the current directory, unless it is set.

    Raises:
        Mistake: a variable that is not set, or a `REMANENCE_DATA` that is no folder.
    """
    if path.startswith("hub:"):
        return path

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name == "REMANENCE_DATA":
            data = Path(os.environ.get(name) or DEFAULT_DATA).expanduser().absolute()
            if not data.is_dir():
                raise Mistake(place, f"REMANENCE_DATA is {data}, which is no folder", "set it to the folder of the real data")
            return str(data)
        if name not in os.environ:
            raise Mistake(place, f"the variable {name} is not set", "set it or write the path out")
        return os.environ[name]

    filled = Path(re.sub(r"\$\{(\w+)\}|\$([A-Z_][A-Z0-9_]*)", value, path)).expanduser()
    return str(filled if filled.is_absolute() else folder / filled)


def _check_kind(source: Source, kind: str, place: str) -> None:
    if kind not in COLUMNS:
        raise Mistake(place, f"unknown kind '{kind}'", nearest(kind, COLUMNS))
    if source.file is not None:
        return
    given = {"digits": "classes", "mnist": "classes", "pythondocs": "text", "pch": "qa" if kind == "qa" else "text"}
    name = next(name for name in SOURCES if getattr(source, name) is not None)
    if source.biographies is not None:
        rows, near = source.biographies.rows, source.biographies.neighbours_of
        if near is not None and rows not in (None, "facts"):
            raise Mistake(f"{place}.biographies", f"neighbours are facts, not {rows}", "remove rows or neighbours_of")
        around = source.biographies.neighbourhood
        if around is not None and (rows is not None or near is not None):
            raise Mistake(f"{place}.biographies", "neighbourhood is a set of its own", "remove rows and neighbours_of, or neighbourhood")
        plain = rows is None and near is None and around is None
        given["biographies"] = "text" if rows == "statements" or (plain and kind == "text") else "qa"
    if given[name] != kind:
        raise Mistake(
            place, f"{name} gives rows of kind '{given[name]}', '{kind}' is asked for", f"write kind: {given[name]} or take another source"
        )


def _rows_of(source: Source, kind: str, place: str, folder: Path) -> Dataset:
    if source.file is not None:
        return read_rows(expand(source.file, folder, place), kind=kind, columns=source.columns, place=place)
    if source.biographies is not None:
        clause = source.biographies
        world = Biographies(**clause.model_dump(exclude={"rows", "neighbours_of", "neighbourhood"}))
        if clause.neighbourhood is not None:
            asked = clause.neighbourhood
            people = range(asked.first, asked.first + asked.people)
            return getattr(neighbourhood(world, people, **asked.model_dump(include={"general", "held_out", "seed"})), asked.part)
        if clause.neighbours_of is not None:
            first = clause.neighbours_of.first
            return world.neighbours(range(first, first + clause.neighbours_of.people))
        return getattr(world, clause.rows or ("statements" if kind == "text" else "questions"))()
    if source.digits is not None:
        return digits(source.digits.part, source.digits.classes)
    if source.mnist is not None:
        return _mnist(source.mnist, place, folder)
    if source.pch is not None:
        return getattr(PCH(**source.pch.model_dump(exclude={"rows"})), source.pch.rows)()
    assert source.pythondocs is not None  # check_source found exactly one source
    return pythondocs(source.pythondocs.characters, source.pythondocs.part)


def _mnist(clause: MnistClause, place: str, folder: Path) -> Dataset:
    rows = read_rows(expand(clause.folder, folder, f"{place}.mnist"), kind="classes", place=f"{place}.mnist")
    cut = len(rows) * 8 // 10
    start, stop = (0, cut) if clause.part == "train" else (cut, len(rows))
    labels = rows.data.column("label").to_numpy()[start:stop]
    keep = start + np.flatnonzero(in_classes(f"{place}.mnist", labels, clause.classes))
    return rows.select(keep)


def _filtered(rows: Dataset, column: str, wanted: Cell | list[Cell], *, keep: bool, place: str) -> Dataset:
    """Return the rows whose `column` is (`keep`) or is not among `wanted`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column not in rows.column_names:
        raise Mistake(
            place, f"there is no column '{column}', present are {', '.join(rows.column_names)}", nearest(column, rows.column_names)
        )
    cells: pa.ChunkedArray = rows.select_columns([column]).with_format("arrow")[:][column]
    values = wanted if isinstance(wanted, list) else [wanted]
    feature: Any = rows.features[column]
    try:
        if type(feature).__name__ == "ClassLabel":
            values = [feature.str2int(value) if isinstance(value, str) else value for value in values]
        if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
            values = [str(value) for value in values]  # YAML reads 12 as a number where a CSV file holds text
        mask = pc.is_in(cells, value_set=pa.array(values, type=cells.type)).to_numpy()
    except (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, NotImplementedError) as error:
        raise Mistake(
            f"{place}.{column}", f"{wanted!r} cannot be compared with {cells.type}", "give values as they stand in the column"
        ) from error
    chosen = np.flatnonzero(mask if keep else ~mask)
    if not len(chosen):
        raise Mistake(f"{place}.{column}", f"none of {len(rows)} rows is left with {wanted!r}", "widen the filter")
    return rows if len(chosen) == len(rows) else rows.select(chosen)


def _kept(source: Source, count: int) -> tuple[int, int]:
    """Return the first row and the end of what `split`, `skip` and `limit` leave of `count` rows."""
    start, stop = 0, count
    if source.split is not None and source.split.train is not None:
        stop = round(count * source.split.train)
    elif source.split is not None and source.split.test is not None:
        start = round(count * (1 - source.split.test))
    start += source.skip
    return start, stop if source.limit is None else min(stop, start + source.limit)


def _mistake(place: str, error: ValidationError) -> Mistake:
    """Return the first complaint as one sentence with the field's name."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        model: Any = Source
        for part in path[:-1]:
            model = NESTED[part]
        known = [field.alias or name for name, field in model.model_fields.items()]
        return Mistake(".".join([place, *path[:-1]]), f"unknown key '{path[-1]}'", nearest(path[-1], known))
    wanted = first["msg"][0].lower() + first["msg"][1:]
    return Mistake(".".join([place, *path]), f"is {first['input']!r}", wanted)
