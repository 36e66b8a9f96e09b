"""Recipes: YAML <-> typed, validated objects. Every error names the file, the line, the field and what was expected.

A recipe names a start model, the events of its life, the methods that serve them and what is measured. `lives` lets several lives walk through the same
events with other methods, side by side in one ledger; an `oracle` life never sees what is asked to be forgotten.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from remanence.errors import Mistake, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from remanence.life import Deed, Life, Probes
    from remanence.stream import Event
    from remanence.training.trainer import Settings

Clause = str | dict[str, Any]
Source = str | dict[str, Any] | list[str | dict[str, Any]]
Kind = Annotated[str, Field(pattern="^(text|qa|chat|classes|images)$")]
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^/\x00-\x1f]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LearnEvent(_Strict):
    """A task to learn."""

    learn: Name = Field(description="name of the task, unique in the recipe")
    data: Source = Field(description="rows to train on: a path, or a source with its options")
    kind: Kind = Field("text", description="text | qa | chat | classes | images")
    test: Source | None = Field(None, description="rows to measure on; by default the training rows")
    method: Clause | None = Field(None, description="learner for this event alone")
    training: dict[str, Any] = Field(default_factory=dict, description="training settings for this event alone")


class ForgetEvent(_Strict):
    """A request to forget."""

    forget: Name = Field(description="name of the request, unique in the recipe")
    data: Source = Field(description="rows whose influence must go")
    retain: Source | None = Field(None, description="rows that must stay; may be trained on")
    neighbours: Source | None = Field(None, description="rows close to the forgotten ones that must stay; measured only")
    holdout: Source | None = Field(None, description="rows like the forgotten ones that the model never saw")
    kind: Kind = Field("qa", description="text | qa | chat | classes | images")
    method: Clause | None = Field(None, description="forgetter for this event alone")
    training: dict[str, Any] = Field(default_factory=dict, description="training settings for this event alone")


class MeasuredSet(_Strict):
    """A set that is measured at every stop, whatever the events."""

    data: Source = Field(description="rows to measure on")
    kind: Kind = Field("qa", description="text | qa | chat | classes | images")


class Measuring(_Strict):
    """What is measured, and when."""

    every: int = Field(
        0, ge=0, description="optimizer steps between two measurements inside an event; 0: only before the first event and after each"
    )
    limit: int | None = Field(None, ge=1, description="rows per set inside an event (the first ones); all rows after it")
    sets: dict[Name, MeasuredSet] = Field(default_factory=dict, description="sets beside those of the events")
    probes: dict[Kind, list[Clause]] = Field(default_factory=dict, description="probes per kind; by default those of the kind")


class LifeClause(_Strict):
    """One of several lives."""

    learn: Clause | None = Field(None, description="learner of this life")
    forget: Clause | None = Field(None, description="forgetter of this life")
    oracle: bool = Field(False, description="never see what will be forgotten; requests do nothing")
    training: dict[str, Any] = Field(default_factory=dict, description="training settings of this life")


class Recipe(_Strict):
    """A whole run."""

    name: Name = Field(description="of the recipe; also of its output folder")
    model: str = Field(min_length=1, description="Hugging Face folder or hub id, `desk:NAME`, or `module:function`")
    events: list[LearnEvent | ForgetEvent] = Field(min_length=1, description="tasks and requests in order")
    learn: Clause = Field("sequential", description="learner of all tasks")
    forget: Clause = Field("npo", description="forgetter of all requests")
    training: dict[str, Any] = Field(default_factory=dict, description="training settings of all events")
    forgetting: dict[str, Any] = Field(default_factory=dict, description="training settings of the requests, on top of `training`")
    measure: Measuring = Field(default_factory=Measuring, description="what is measured, and when")
    lives: dict[Name, LifeClause] = Field(default_factory=dict, description="lives side by side; by default one, called `life`")
    seed: int = Field(0, ge=0, description="of every random stream")
    output: str | None = Field(None, description="folder of the results; by default runs/NAME")
    keep_models: bool = Field(False, description="keep the model after every event")
    dtype: str | None = Field(
        None, pattern="^(float32|bfloat16|float16|float64)$", description="of the weights; by default the model's own"
    )
    trust_remote_code: bool = Field(False, description="let a hub model run its own code")
    folder: Path = Field(Path("."), exclude=True, description="where relative paths begin; set by the reader")

    @field_validator("events", mode="before")
    @classmethod
    def _choose_kind(cls, events: Any) -> Any:
        """Decide by the key `learn` or `forget`, so that errors speak of one of the two."""
        if not isinstance(events, list):
            return events
        chosen: list[Any] = []
        for event in events:
            if isinstance(event, dict) and ("learn" in event) != ("forget" in event):
                chosen.append((LearnEvent if "learn" in event else ForgetEvent).model_validate(event))
            elif isinstance(event, LearnEvent | ForgetEvent):
                chosen.append(event)
            else:
                raise ValueError("an event is a mapping with either `learn: NAME` or `forget: NAME`")
        return chosen

    @classmethod
    def load(cls, path: str | Path, changes: Iterable[str] = ()) -> Recipe:
        """Read a YAML file.

        Args:
            path: of the recipe.
            changes: `key.inner=value` overrides, values in YAML (`training.lr=1e-4`, `events.0.kind=qa`).

        Raises:
            Mistake: naming file, line, field and what was expected.
        """
        path = Path(path)
        tree, lines = read_yaml(path)
        for change in changes:
            _override(tree, change)
        return cls.of(tree, place=str(path), lines=lines, folder=path.parent)

    @classmethod
    def of(cls, tree: Any, *, place: str = "recipe", lines: dict[tuple, int] | None = None, folder: Path = Path(".")) -> Recipe:
        """Make a recipe from plain dicts and lists.

        Raises:
            Mistake: as in `load`.
        """
        if not isinstance(tree, dict):
            raise Mistake(place, f"must be a mapping, got {type(tree).__name__}", "begin with `name:`, `model:` and `events:`")
        try:
            recipe = cls.model_validate(tree | {"folder": folder})
        except ValidationError as error:
            raise _explain(error, place, lines or {}) from None
        recipe.check(place)
        return recipe

    def check(self, place: str) -> None:
        """Refuse what the types alone cannot see: unknown methods and keys, sources, doubles, settings.

        Raises:
            Mistake: naming the field.
        """
        from remanence.data.sources import check_source

        names = [_event_name(event) for event in self.events] + list(self.measure.sets)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise Mistake(f"{place}: events", f"two events or sets are called '{twice}'", "give each its own name")
        for number, event in enumerate(self.events):
            where = f"{place}: events.{number}"
            for part in ("data", "test", "retain", "neighbours", "holdout"):
                source = getattr(event, part, None)
                if source is not None:
                    check_source(source, kind=event.kind, place=f"{where}.{part}")
        for name, chosen in self.measure.sets.items():
            check_source(chosen.data, kind=chosen.kind, place=f"{place}: measure.sets.{name}.data")
        for life in self.life_names:
            self._methods(life, f"{place}: ")

    # What the recipe says, resolved.

    @property
    def life_names(self) -> list[str]:
        """The lives, in order."""
        return list(self.lives) or ["life"]

    @property
    def place(self) -> Path:
        """The folder of the results."""
        return Path(self.output) if self.output else Path("runs") / re.sub(r"[^\w.-]+", "-", self.name)

    def clause(self, life: str, event: LearnEvent | ForgetEvent) -> Clause | None:
        """Return the method clause that serves an event in a life: the event's own, else the life's, else the recipe's."""
        chosen = self.lives.get(life, LifeClause())
        if isinstance(event, LearnEvent):
            return event.method or chosen.learn or self.learn
        return None if chosen.oracle else event.method or chosen.forget or self.forget

    def settings(self, life: str, event: LearnEvent | ForgetEvent, place: str = "") -> Settings:
        """Return the training settings of an event in a life: recipe, then `forgetting`, then life, then event."""
        from remanence.training.trainer import Settings

        chosen = self.lives.get(life, LifeClause())
        found = Settings().changed(f"{place}training", self.training)
        if isinstance(event, ForgetEvent):
            found = found.changed(f"{place}forgetting", self.forgetting)
        found = found.changed(f"{place}lives.{life}.training", chosen.training)
        return found.changed(f"{place}event '{_event_name(event)}'.training", event.training)

    def _methods(self, life: str, place: str = "") -> list[tuple[Any, Settings, str]]:
        """Build each event's method; equal clauses share one object, so that a learner keeps its state from task to task."""
        from remanence.catalogue import build, label

        made: dict[str, Any] = {}
        found = []
        for number, event in enumerate(self.events):
            clause, verb = self.clause(life, event), "learn" if isinstance(event, LearnEvent) else "forget"
            settings = self.settings(life, event, place)
            if clause is None:
                found.append((None, settings, "never saw it"))
                continue
            key = f"{verb}{clause!r}"
            if key not in made:
                where = (
                    f"{place}events.{number}.method" if event.method else f"{place}lives.{life}.{verb}" if self.lives else f"{place}{verb}"
                )
                made[key] = build(clause, verb, where)
            found.append((made[key], settings, label(clause)))
        return found

    def stream(self) -> list[Event]:
        """Read all data and return the events.

        Raises:
            Mistake: a file that is missing or malformed, an empty set, forget rows inside the retain set.
        """
        from remanence.stream import Request, Task

        events: list[Event] = []
        for number, event in enumerate(self.events):
            parts = {}
            for part in ("data", "test", "retain", "neighbours", "holdout"):
                source = getattr(event, part, None)
                if source is not None:
                    parts[part] = self.rows(source, event.kind, f"events.{number}.{part}")
            data = parts.pop("data")
            name = _event_name(event)
            events.append(
                Task(name, data, kind=event.kind, **parts)
                if isinstance(event, LearnEvent)
                else Request(name, data, kind=event.kind, **parts)
            )
        return events

    def rows(self, source: Source, kind: str, place: str) -> Dataset:
        """Read one source."""
        from remanence.data.sources import load_rows

        return load_rows(source, kind=kind, place=place, folder=self.folder)

    def probes(self, events: Iterable[Event], limit: int | None = None) -> Probes:
        """Return the probes of every measured set: tasks, parts of requests, extra sets."""
        from remanence.stream import Task
        from remanence.training.trainer import Settings

        settings = Settings().changed("training", self.training)
        sets: dict[str, tuple[Dataset, str]] = {}
        for name, chosen in self.measure.sets.items():
            sets[name] = (self.rows(chosen.data, chosen.kind, f"measure.sets.{name}.data"), chosen.kind)
        for event in events:
            if isinstance(event, Task):
                sets[event.name] = (event.measured, event.kind)
            else:
                sets |= {f"{event.name}/{part}": (rows, event.kind) for part, rows in event.sets.items()}
        return {
            subject: probes_for(rows if limit is None else rows.select(range(min(limit, len(rows)))), kind, self.measure.probes.get(kind))
            for subject, (rows, kind) in sets.items()
        }

    def life(self, name: str, *, ledger: Any = None, folder: Path | None = None, seed: int | None = None, progress: bool = True) -> Life:
        """Build one life: read the data, load the model, make the methods. Nothing is written.

        Raises:
            Mistake: whatever is wrong with any of them.
        """
        from remanence.life import Deed, Life
        from remanence.models.load import load_model

        if name not in self.life_names:
            raise Mistake("lives", f"there is no life '{name}'", nearest(name, self.life_names))
        seed = self.seed if seed is None else seed
        events = self.stream()
        methods = self._methods(name)
        loaded = load_model(self.start_model, dtype=self.dtype, trust_remote_code=self.trust_remote_code, seed=seed)
        deeds = [Deed(event, method, settings, label) for event, (method, settings, label) in zip(events, methods, strict=True)]
        _refuse_misfit(deeds, loaded.model, loaded.processor)
        return Life(
            deeds,
            loaded.model,
            processor=loaded.processor,
            probes=self.probes(events),
            inside=self.probes(events, self.measure.limit) if self.measure.every else None,
            every=self.measure.every,
            ledger=ledger,
            folder=folder,
            name=name,
            recipe=self.name,
            seed=seed,
            oracle=self.lives.get(name, LifeClause()).oracle,
            description={"recipe": self.model_dump(mode="json")},
            keep_models=self.keep_models,
            progress=progress,
        )

    @property
    def start_model(self) -> str:
        """The model's name; a relative folder begins at the recipe's folder, or else at the current one."""
        expanded = os.path.expanduser(expand(self.model))
        beside = self.folder / expanded
        return str(beside) if beside.is_dir() else expanded


def expand(path: str) -> str:
    """Put environment variables into a path; `REMANENCE_DATA` has the default ../shared/data."""
    return re.sub(r"\$\{?REMANENCE_DATA\}?", os.environ.get("REMANENCE_DATA", "../shared/data"), os.path.expandvars(path))


def probes_for(rows: Dataset, kind: str, clauses: Iterable[Clause] | None = None, **shared: Any) -> dict[str, Any]:
    """Return the probes of a set by name: the clauses', or the standard ones of the kind.

    Args:
        rows: the set.
        kind: of its rows.
        clauses: names, or mappings with `probe` and its options.
        shared: options for every probe that has them (`length`, `template`).

    Raises:
        Mistake: an unknown probe, option or value.
    """
    from dataclasses import fields

    from remanence.catalogue import STANDARD_PROBES, entry

    found = {}
    for clause in clauses if clauses is not None else STANDARD_PROBES[kind]:
        options = dict(clause) if isinstance(clause, dict) else {"probe": clause}
        name = str(options.pop("probe", ""))
        place = f"measure.probes.{kind}.{name}"
        made: Any = entry(name, "measure", "measure.probes").load()
        known = [field.name for field in fields(made) if field.init and field.name not in ("rows", "kind")]
        for option in options:
            if option not in known:
                raise Mistake(f"{place}.{option}", "unknown key", nearest(option, known))
        options = {key: value for key, value in (shared | {"kind": kind}).items() if key in known or key == "kind"} | options
        if "kind" not in {field.name for field in fields(made)}:
            options.pop("kind")
        try:
            found[name] = made(rows, **options)
        except TypeError as error:
            raise Mistake(place, f"wrong options ({error})", "see the probe's arguments") from None
    return found


def _event_name(event: LearnEvent | ForgetEvent) -> str:
    return event.learn if isinstance(event, LearnEvent) else event.forget


def _refuse_misfit(deeds: Iterable[Deed], model: Any, processor: Any) -> None:
    """Refuse kinds that the model cannot read, before anything is written."""
    from remanence.models.forward import is_language_model

    words = is_language_model(model)
    for deed in deeds:
        if (deed.event.kind in ("text", "qa", "chat")) != words:
            remedy = "choose a language model" if not words else "choose an image classifier"
            raise Mistake(f"event '{deed.event.name}'", f"the model {type(model).__name__} cannot read kind '{deed.event.kind}'", remedy)
        if words and processor is None:
            raise Mistake("model", "has no tokenizer", "add the tokenizer's files to its folder")


# YAML with lines.


def read_yaml(path: Path) -> tuple[Any, dict[tuple, int]]:
    """Read a YAML file safely; return its content and the line of every key path.

    Raises:
        Mistake: missing file, malformed YAML, a key that stands twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else "check the folder"
        raise Mistake(path, "there is no such recipe", near if "known are" not in near or len(near) > 11 else "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(path, f"cannot be read ({error})", "name a YAML text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise Mistake(
            f"{path}:{mark.line + 1}" if mark else path, f"is not YAML ({getattr(error, 'problem', error)})", "mend the line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Mistake(path, f"holds a value that YAML cannot make ({error})", "mend the value") from None
    lines: dict[tuple, int] = {}
    if node is not None:
        _walk(node, (), lines, path)
    return tree, lines


def _walk(node: Any, path: tuple, lines: dict[tuple, int], file: Path) -> None:
    import yaml

    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise Mistake(f"{file}:{key.start_mark.line + 1}", f"the key '{key.value}' stands twice", "remove one")
                seen.add(key.value)
                lines[(*path, key.value)] = key.start_mark.line + 1
                _walk(value, (*path, key.value), lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _walk(value, (*path, number), lines, file)


def _explain(error: ValidationError, place: str, lines: dict[tuple, int]) -> Mistake:
    """Turn the first of pydantic's errors into one sentence with file, line and field."""
    first = error.errors()[0]
    path = tuple(part for part in first["loc"] if not (isinstance(part, str) and part.endswith(("Event", "]", "any"))))
    line = next((lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in lines), None)
    where = f"{place}:{line}" if line else place
    name = ".".join(map(str, path)) or "recipe"
    if first["type"] == "extra_forbidden":
        return Mistake(where, f"unknown key '{name}'", nearest(str(path[-1]), _keys_at(path)))
    if first["type"] == "missing":
        return Mistake(where, f"the key '{name}' is missing", "add it")
    value = repr(first["input"])
    return Mistake(where, f"{name}: {first['msg']}", f"got {value if len(value) < 60 else value[:57] + '...'}")


def _keys_at(path: tuple) -> Iterable[str]:
    homes: dict[str, type[BaseModel]] = {"measure": Measuring, "sets": MeasuredSet, "lives": LifeClause}
    if path and path[0] == "events":
        return {*LearnEvent.model_fields, *ForgetEvent.model_fields}
    if len(path) > 1 and path[0] in homes:
        return homes["sets" if "sets" in path else str(path[0])].model_fields
    return set(Recipe.model_fields) - {"folder"}


def _override(tree: Any, change: str) -> None:
    import yaml

    key, equals, value = change.partition("=")
    if not equals or not key or not isinstance(tree, dict):
        raise Mistake(f"--set {change}", "is not KEY=VALUE", "write for example --set training.lr=1e-4")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise Mistake(f"--set {change}", "the value is not YAML", "quote it") from None
    node: Any = tree
    *front, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    try:
        for part in front:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
        node[last] = parsed
    except (IndexError, TypeError, AttributeError, KeyError):
        raise Mistake(f"--set {change}", f"there is no place '{key}' in the recipe", "check the key") from None
