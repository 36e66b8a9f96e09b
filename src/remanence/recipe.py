"""Recipes: YAML <-> typed, validated objects. Every error names the file, the line, the field and what was expected.

A recipe names a start model, the events of its life, the methods that serve them and what is measured. `lives` lets several lives walk through the same
events with other methods, side by side in one ledger; an `oracle` life never sees what is asked to be forgotten.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from remanence.errors import Mistake, nearest
from remanence.unroll import MOST, unrolled

if TYPE_CHECKING:
    from datasets import Dataset

    from remanence.life import Deed, Life, Probes
    from remanence.stream import Event
    from remanence.training.trainer import Settings

MOST_KEYS = 100_000  # of a recipe, aliases counted as often as they stand

Part = Literal["forget", "retain", "neighbours", "holdout"]
PARTS: tuple[Part, ...] = ("forget", "retain", "neighbours", "holdout")
Clause = str | dict[str, Any]
Source = str | dict[str, Any] | list[str | dict[str, Any]]
Kind = Annotated[str, Field(pattern="^(text|qa|chat|classes|images)$")]
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^/\x00-\x1f]+$")]
LifeName = Annotated[Name, Field(pattern=r"^[^.]")]  # also a folder's name
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # as large as the ledger's integers


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
    repeat: int = Field(
        1, ge=1, le=MOST, strict=True, exclude=True, description="so many of these events in a row; `{n}` counts them from 0, `{5*n+2}` too"
    )


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
    repeat: int = Field(
        1, ge=1, le=MOST, strict=True, exclude=True, description="so many of these events in a row; `{n}` counts them from 0, `{5*n+2}` too"
    )


def _event_kind(event: Any) -> str | None:
    """Decide by the key `learn` or `forget`, so that errors speak of one of the two."""
    if isinstance(event, LearnEvent | ForgetEvent):
        return type(event).__name__
    if not isinstance(event, dict) or ("learn" in event) == ("forget" in event):
        return None
    return "LearnEvent" if "learn" in event else "ForgetEvent"


EventClause = Annotated[
    Annotated[LearnEvent, Tag("LearnEvent")] | Annotated[ForgetEvent, Tag("ForgetEvent")],
    Discriminator(
        _event_kind,
        custom_error_type="event",
        custom_error_message="an event is a mapping with either `learn: NAME` or `forget: NAME`",
    ),
]


class MeasuredSet(_Strict):
    """A set that is measured at every stop, whatever the events."""

    data: Source = Field(description="rows to measure on")
    kind: Kind = Field("qa", description="text | qa | chat | classes | images")


class Measuring(_Strict):
    """What is measured, and when."""

    every: int = Field(
        0, ge=0, description="optimizer steps between two measurements inside an event; 0: only before the first event and after each"
    )
    limit: int | None = Field(None, ge=1, description="rows per set inside an event, evenly spaced; all rows after it")
    parts: list[Part] = Field(
        default_factory=lambda: list(PARTS),
        description="sets of requests that are measured: forget, retain, neighbours, holdout; by default all",
    )
    sets: dict[Name, MeasuredSet] = Field(default_factory=dict, description="sets beside those of the events")
    probes: dict[Kind, list[Clause]] = Field(default_factory=dict, description="probes per kind; by default those of the kind")


class LifeClause(_Strict):
    """One of several lives."""

    learn: Clause | None = Field(None, description="learner of this life")
    forget: Clause | None = Field(None, description="forgetter of this life")
    oracle: bool = Field(False, description="never see what will be forgotten; requests do nothing")
    training: dict[str, Any] = Field(default_factory=dict, description="training settings of this life")
    forgetting: dict[str, Any] = Field(default_factory=dict, description="training settings of this life's requests, on top of `training`")


class Recipe(_Strict):
    """A whole run."""

    name: Name = Field(description="of the recipe; also of its output folder")
    model: str = Field(min_length=1, description="Hugging Face folder or hub id, `desk:NAME`, or `module:function`")
    events: list[EventClause] = Field(min_length=1, description="tasks and requests in order")
    learn: Clause = Field("sequential", description="learner of all tasks")
    forget: Clause = Field("npo", description="forgetter of all requests")
    training: dict[str, Any] = Field(default_factory=dict, description="training settings of all events")
    forgetting: dict[str, Any] = Field(default_factory=dict, description="training settings of the requests, on top of `training`")
    measure: Measuring = Field(default_factory=Measuring, description="what is measured, and when")
    audit: bool | dict[str, Any] = Field(
        False, description="attack every served request: true, or the audit's settings; with an oracle among the lives, against it"
    )
    lives: dict[LifeName, LifeClause] = Field(default_factory=dict, description="lives side by side; by default one, called `life`")
    seed: Seed = Field(0, description="of every random stream")
    output: str | None = Field(None, description="folder of the results; by default runs/NAME")
    keep_models: bool = Field(False, description="keep the model after every event, in LIFE/models/seed-SEED/event-0001 and so on")
    dtype: str | None = Field(
        None, pattern="^(float32|bfloat16|float16|float64)$", description="of the weights; by default the model's own"
    )
    trust_remote_code: bool = Field(False, description="let a hub model run its own code")
    folder: Path = Field(Path("."), exclude=True, description="where relative paths begin; set by the reader")

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
        tree, lines = unrolled(tree, lines or {})
        try:
            recipe = cls.model_validate(tree | {"folder": folder})
        except ValidationError as error:
            raise _explain(error, place, tree, lines) from None
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
        self.auditor(place=f"{place}: audit")

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
        """Return the training settings of an event in a life: recipe, then `forgetting`, then life and its `forgetting`, then event."""
        from remanence.training.trainer import Settings

        chosen = self.lives.get(life, LifeClause())
        found = Settings().changed(f"{place}training", self.training)
        if isinstance(event, ForgetEvent):
            found = found.changed(f"{place}forgetting", self.forgetting)
        found = found.changed(f"{place}lives.{life}.training", chosen.training)
        if isinstance(event, ForgetEvent):
            found = found.changed(f"{place}lives.{life}.forgetting", chosen.forgetting)
        return found.changed(f"{place}event '{_event_name(event)}'.training", event.training)

    def _methods(self, life: str, place: str = "") -> list[tuple[Any, Settings, str]]:
        """Build each event's method; equal clauses share one object, so that a learner keeps its state from task to task (and forgets with it, if it can)."""
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
                made[key] = _same_object(build(clause, verb, where), made.values())
            found.append((made[key], settings, label(clause)))
        return found

    def auditor(self, *, progress: bool = True, place: str = "audit") -> Any:
        """Return what audits the served requests, `None` where the recipe asks for none; length and template are those of training.

        Raises:
            Mistake: an unknown key, or a value out of range.
        """
        if self.audit is False:
            return None
        from remanence.forget.audit import AuditSettings
        from remanence.forget.audit.inside import RequestAuditor

        asked = self._trained() | (self.audit if isinstance(self.audit, dict) else {})
        return RequestAuditor(AuditSettings().changed(place, asked), progress)

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

        sets: dict[str, tuple[Dataset, str]] = {}
        for name, chosen in self.measure.sets.items():
            sets[name] = (self.rows(chosen.data, chosen.kind, f"measure.sets.{name}.data"), chosen.kind)
        for event in events:
            if isinstance(event, Task):
                sets[event.name] = (event.measured, event.kind)
            else:
                parts = {part: rows for part, rows in event.sets.items() if part in self.measure.parts}
                sets |= {f"{event.name}/{part}": (rows, event.kind) for part, rows in parts.items()}
        settings = self._trained()
        return {
            subject: probes_for(_sample(rows, limit), kind, self.measure.probes.get(kind), settings)
            for subject, (rows, kind) in sets.items()
        }

    def _trained(self) -> dict[str, Any]:
        """Return how rows are laid out in training; probes read them the same way."""
        from remanence.training.trainer import Settings

        settings = Settings().changed("training", self.training)
        return {"length": settings.length, "template": settings.template}

    def life(self, name: str, *, ledger: Any = None, folder: Path | None = None, seed: int | None = None, progress: bool = True) -> Life:
        """Build one life: read the data, load the model, make the methods. Nothing is written.

        Raises:
            Mistake: whatever is wrong with any of them.
        """
        from remanence.life import Deed, Life
        from remanence.models.load import load_model
        from remanence.stream import Request

        if name not in self.life_names:
            raise Mistake("lives", f"there is no life '{name}'", nearest(name, self.life_names))
        seed = self.seed if seed is None else seed
        events = self.stream()
        methods = self._methods(name)
        loaded = load_model(self.start_model, dtype=self.dtype, trust_remote_code=self.trust_remote_code, seed=seed)
        deeds = [Deed(event, method, settings, label) for event, (method, settings, label) in zip(events, methods, strict=True)]
        probes = self.probes(events)
        _refuse_misfit(deeds, loaded.model, loaded.processor)
        refuse_unreadable(deeds, probes, loaded.model, loaded.processor)
        auditor = self.auditor(progress=progress)
        if auditor is not None:
            for request in (event for event in events if isinstance(event, Request)):
                auditor.check(loaded.model, request, None, loaded.processor)
        return Life(
            deeds,
            loaded.model,
            processor=loaded.processor,
            probes=probes,
            inside=self.probes(events, self.measure.limit) if self.measure.every else None,
            every=self.measure.every,
            ledger=ledger,
            folder=folder,
            name=name,
            recipe=self.name,
            seed=seed,
            oracle=self.lives.get(name, LifeClause()).oracle,
            description={"recipe": self.model_dump(mode="json")},
            trust_remote_code=self.trust_remote_code,
            auditor=auditor,
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


def probes_for(
    rows: Dataset, kind: str, clauses: Iterable[Clause] | None = None, defaults: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the probes of a set by name: the clauses', or the standard ones of the kind.

    Args:
        rows: what to measure on.
        kind: of the rows.
        clauses: names, or mappings with `probe` and its arguments.
        defaults: arguments for the probes that know them.

    Raises:
        Mistake: an unknown probe, one that cannot read the kind, an unknown argument or a wrong value.
    """
    from remanence.catalogue import STANDARD_PROBES, build_probe

    place = f"measure.probes.{kind}"
    return dict(
        build_probe(clause, rows, kind, defaults, f"{place}.{number}")
        for number, clause in enumerate(clauses if clauses is not None else STANDARD_PROBES[kind])
    )


def _sample(rows: Dataset, limit: int | None) -> Dataset:
    """Return at most `limit` rows, evenly spaced, so that a set made of several parts is seen in all of them."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select([number * len(rows) // limit for number in range(limit)])


def _same_object(method: Any, others: Iterable[Any]) -> Any:
    """Return the object among others that is a learner and a forgetter in one, with the same settings as this one; else this one."""
    from remanence.stream import Forgetter, Learner

    if not (isinstance(method, Learner) and isinstance(method, Forgetter)):
        return method
    return next((other for other in others if type(other) is type(method) and other == method), method)


def _event_name(event: LearnEvent | ForgetEvent) -> str:
    return event.learn if isinstance(event, LearnEvent) else event.forget


def _refuse_misfit(deeds: Iterable[Deed], model: Any, processor: Any) -> None:
    """Refuse kinds that the model cannot read, methods that do not fit it, and unknown trackers, before anything is written."""
    from remanence.models.forward import is_language_model
    from remanence.stream import Checking
    from remanence.training.trackers import refuse_trackers

    words = is_language_model(model)
    for deed in deeds:
        if (deed.event.kind in ("text", "qa", "chat")) != words:
            remedy = "choose a language model" if not words else "choose an image classifier"
            raise Mistake(f"event '{deed.event.name}'", f"the model {type(model).__name__} cannot read kind '{deed.event.kind}'", remedy)
        if words and processor is None:
            raise Mistake("model", "has no tokenizer", "add the tokenizer's files to its folder")
        refuse_trackers(deed.settings.trackers)
        if isinstance(deed.method, Checking):
            deed.method.check(model, deed.event)


def refuse_unreadable(deeds: Iterable[Deed], probes: Probes, model: Any, processor: Any) -> None:
    """Encode every set as training and probes will, and refuse what the model cannot take, before anything is written. O(rows).

    Raises:
        Mistake: a row that is too long or has no answer, a label without an output, features of the wrong shape.
    """
    from remanence.data.encode import encode_rows
    from remanence.stream import Task

    for deed in deeds:
        event = deed.event
        sets = (
            {"train": event.train}
            if isinstance(event, Task)
            else {part: event.sets[part] for part in ("forget", "retain") if part in event.sets}
        )
        for part, rows in sets.items():
            with _placed(f"{part} rows of '{event.name}'"):
                encoded = encode_rows(rows, event.kind, processor, length=deed.settings.length, template=deed.settings.template)
                _refuse_unfit(encoded, event.kind, model)
    measured: list[tuple[str, Any]] = [(subject, probe) for subject, named in probes.items() for probe in named.values()]
    for subject, probe in measured:
        rows, kind = getattr(probe, "rows", None), getattr(probe, "kind", "qa")
        if rows is not None and hasattr(probe, "length"):
            with _placed(f"measured rows of '{subject}'"):
                encoded = encode_rows(rows, kind, processor, length=probe.length, template=probe.template)
                _refuse_unfit(encoded, kind, model)


@contextlib.contextmanager
def _placed(place: str) -> Iterator[None]:
    """Put the set's name in front of a mistake's place."""
    try:
        yield
    except Mistake as mistake:
        raise Mistake(f"{place}, {mistake.place}" if mistake.place != "data" else place, mistake.problem, mistake.remedy) from mistake


def _refuse_unfit(encoded: Dataset, kind: str, model: Any) -> None:
    """Refuse a row beyond the model's positions; a shape that a classifier cannot take; a label that it has no output for."""
    import numpy as np
    import torch

    from remanence.models.forward import evaluating, logits_of, unwrapped
    from remanence.training.batches import Batches

    if len(encoded) == 0:
        raise Mistake("data", "no row has a token to learn", "give longer texts")
    if kind not in ("classes", "images"):
        positions = getattr(getattr(unwrapped(model), "config", None), "max_position_embeddings", None)
        tables = [layer.num_embeddings for layer in model.modules() if isinstance(layer, torch.nn.Embedding)]
        longest = int(Batches(encoded, 1).columns["input_ids"].lengths.max())  # type: ignore[union-attr]
        if positions is not None and positions in tables[1:] and longest > positions:
            raise Mistake("data", f"a row has {longest} tokens, the model {positions} positions", f"set length to {positions} or less")
        return
    columns = Batches(encoded, 1)
    labels = columns.columns["labels"].numpy()  # type: ignore[union-attr]
    first = columns.take(np.zeros(1, np.int64))["pixel_values"]
    weight = next(model.parameters())
    try:
        with evaluating(model):
            outputs = logits_of(model, {"pixel_values": first.to(weight.device, weight.dtype)}).shape[-1]
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shape = " x ".join(map(str, first.shape[1:]))
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise Mistake("data", f"the model {type(model).__name__} cannot read rows of {shape} ({reason})", "choose another model") from error
    wrong = np.flatnonzero((labels < 0) | (labels >= outputs))
    if len(wrong):
        row = int(wrong[0])
        remedy = "number the classes from 0, or choose a model with more outputs"
        raise Mistake("data", f"row {row + 1} has the label {labels[row]}, the model has outputs 0 to {outputs - 1}", remedy)


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
    try:
        if node is not None:
            _walk(node, (), lines, path)
    except RecursionError:
        raise Mistake(path, "is nested too deeply, or holds itself by an alias", "write it out flat") from None
    return tree, lines


def _walk(node: Any, path: tuple, lines: dict[tuple, int], file: Path) -> None:
    """Note the line of every key path; refuse doubles, and aliases that multiply."""
    import yaml

    if len(lines) > MOST_KEYS:
        raise Mistake(file, f"has more than {MOST_KEYS} keys and items", "keep data in files beside the recipe")
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


def _explain(error: ValidationError, place: str, tree: Any, lines: dict[tuple, int]) -> Mistake:
    """Turn the first of pydantic's errors into one sentence with file, line and field."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = _path(first["loc"], tree, missing=first["type"] == "missing")
    line = next((lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in lines), None)
    where = f"{place}:{line}" if line else place
    name = ".".join(map(str, path)) or "recipe"
    if first["type"] == "extra_forbidden":
        return Mistake(where, f"unknown key '{name}'", nearest(str(path[-1]), _keys_at(path)))
    if first["type"] == "missing":
        return Mistake(where, f"the key '{name}' is missing", "add it")
    value = _shown(first["input"])
    return Mistake(where, f"{name}: {first['msg']}", f"got {value}")


def _path(place: tuple[int | str, ...], tree: Any, *, missing: bool) -> tuple[int | str, ...]:
    """Return the keys of pydantic's place that lead through the tree, without the names of a union's branches; a missing key ends it."""
    node, path = tree, []
    for part in place:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            node = node[part]  # type: ignore[index]
            path.append(part)
    return (*path, place[-1]) if missing else tuple(path)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python prints
        text = type(value).__name__
    return text if len(text) < 60 else text[:57] + "..."


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
    except (yaml.YAMLError, ValueError, RecursionError):
        raise Mistake(f"--set {change}", "the value is not YAML", "quote it") from None
    node: Any = tree
    *front, last = key.split(".")
    try:
        for part in front:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[int(part)]
        node[last if isinstance(node, dict) else int(last)] = parsed
    except (IndexError, TypeError, AttributeError, KeyError, ValueError):
        raise Mistake(f"--set {change}", f"there is no place '{key}' in the recipe", "check the key") from None
