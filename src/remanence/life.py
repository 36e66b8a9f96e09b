"""The main job: walk one model through a stream of tasks and requests, measure, record, resume. Knows the protocols, no method by name.

    start model ─ probes ─► event 1 ─ probes (every k steps inside, and after) ─► event 2 ─► ... ─► an ordinary model folder, and a ledger

A life that was killed goes on: the ledger says which events are complete, the folder holds the model and the learners' states after the last of them, and
the checkpoints of the event that was running. The order of writing (state, then ledger, then the removal of what is no longer needed) makes every instant
a good one to be killed at.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.errors import Mistake
from remanence.ledger import END, Ledger, now
from remanence.models.forward import unwrapped
from remanence.seeds import derive
from remanence.storage import load_tree, save_tree, whole_folder
from remanence.stream import (
    Auditor,
    Event,
    Forgetter,
    Learner,
    Moment,
    Probe,
    Remembering,
    Request,
    Scores,
    Stream,
    Task,
    fingerprint,
    keys_of,
)
from remanence.training.checkpoint import Checkpoints, model_state
from remanence.training.processes import barrier, by_main, gathered, rank
from remanence.training.trainer import Settings, Stateful, Trainer

if TYPE_CHECKING:
    from torch import nn

Probes = Mapping[str, Mapping[str, Probe]]  # subject -> name of the probe -> probe


@dataclass
class Deed:
    """An event with the method that serves it and how that method trains.

    Args:
        event: a task or a request.
        method: a learner for a task; a forgetter (or `None`: do nothing) for a request.
        settings: of the trainer.
        label: name of the method in the ledger.
    """

    event: Event
    method: Learner | Forgetter | None
    settings: Settings
    label: str = ""

    def __post_init__(self) -> None:
        wanted: Any = Learner if isinstance(self.event, Task) else Forgetter
        if self.method is not None and not isinstance(self.method, wanted):
            raise Mistake(
                f"event '{self.event.name}'",
                f"{type(self.method).__name__} is not a {wanted.__name__.lower()}",
                "choose a method of the event's verb",
            )
        if self.method is None and isinstance(self.event, Task):
            raise Mistake(f"event '{self.event.name}'", "no learner was given", "name one under `learn:`")
        self.label = self.label or (type(self.method).__name__ if self.method is not None else "nothing")


@dataclass
class Life:
    """One model's walk through a stream.

    Args:
        deeds: the events in order, each with its method and settings.
        model: the start model.
        processor: its tokenizer or image processor.
        probes: what is measured before the first event and after each one, by subject.
        inside: what is measured inside an event; by default the same probes.
        every: steps between two measurements inside an event; 0: none.
        ledger: where everything is written; by default one in memory.
        folder: for states and checkpoints; `None`: the life cannot be resumed.
        name: of the life, for people ("careful").
        recipe: name of the recipe.
        seed: of every random stream.
        oracle: a life that never sees what later requests ask to forget, and for which requests do nothing: the reference for all others.
        description: put into the ledger with the run (plain JSON).
        trust_remote_code: let a model that is loaded again on resume run the code that comes with it.
        keep_models: folder that gets the model after every event, as `event-0001`, `event-0002`, ...; `None` keeps none.
        auditor: attacks every request that was served (holds a copy of the model before it); what it finds is a note of the event.
        oracle_at: gives the oracle's model behind an event's number, for the auditor; `None` where there is none.
        moved: record how far each weight moved in each event (holds a copy of the weights during the event).
        progress: draw bars and print a line per event.
    """

    deeds: Sequence[Deed]
    model: nn.Module
    processor: Any = None
    probes: Probes = field(default_factory=dict)
    inside: Probes | None = None
    every: int = 0
    ledger: Ledger | None = None
    folder: Path | None = None
    name: str = "life"
    recipe: str = "python"
    seed: int = 0
    oracle: bool = False
    description: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    keep_models: Path | None = None
    auditor: Auditor | None = None
    oracle_at: Callable[[int], nn.Module | None] | None = None
    moved: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        Stream([deed.event for deed in self.deeds])  # refuses doubles
        self.run_id = f"{self.recipe}/{self.name}/{self.seed}"
        if self.oracle:
            self.deeds = without_forgotten(self.deeds)
        if self.ledger is None and rank() == 0:
            self.ledger = Ledger(":memory:")
        methods = {id(deed.method): deed.method for deed in self.deeds if isinstance(deed.method, Stateful)}
        self._stateful: list[Stateful] = list(methods.values())

    # The walk.

    def run(self, *, resume: bool = False) -> nn.Module:
        """Live the whole stream and return the model; with `resume`, go on behind the last event that is complete.

        Raises:
            Mistake: the run is in the ledger already and `resume` is off; a NaN loss; a full disk.
        """
        done = self._begin(resume)
        if done == 0:
            self._measure(0, None, self.probes)
        for number in range(done + 1, len(self.deeds) + 1):
            self._live(number, self.deeds[number - 1])
        return self.model

    def _live(self, number: int, deed: Deed) -> None:
        from remanence.models.load import weights_hash

        event, begun, at = deed.event, time.monotonic(), now()
        before_hash = weights_hash(self.model)
        before = {name: value.detach().clone() for name, value in self.model.named_parameters()} if self.moved else {}
        trainer = self._trainer(number, deed)
        audited = self.auditor is not None and isinstance(event, Request) and deed.method is not None
        original = copy.deepcopy(self.model) if audited else None
        if isinstance(event, Request):
            asked = {part: {"rows": len(rows), "sha256": fingerprint(rows, event.kind)} for part, rows in event.sets.items()}
            trainer.note("asked", {"kind": event.kind} | asked)
        if isinstance(event, Task):
            assert isinstance(deed.method, Learner)
            self.model = deed.method.learn(self.model, event, trainer)
        else:
            if isinstance(deed.method, Forgetter):
                self.model = deed.method.forget(self.model, event, trainer)
            self._erase(event, trainer)
        seconds = time.monotonic() - begun
        scores = self._measure(number, None, self.probes)
        if original is not None and isinstance(event, Request):
            self._audit(number, event, original, trainer)
        self._save_state(number)
        row = {
            "event": number,
            "name": event.name,
            "verb": "learn" if isinstance(event, Task) else "forget",
            "kind": event.kind,
            "method": deed.label,
            "settings": {"method": describe(deed.method), "training": asdict(deed.settings)},
            "rows": len(event.train) if isinstance(event, Task) else len(event.forget),
            "steps": trainer.steps_done,
            "weights_before": before_hash,
            "weights_after": weights_hash(self.model),
            "seconds": seconds,
            "at": at,
        }
        moved = self._moved(number, before)  # every process: the weights may be sharded

        def write() -> None:
            if self.ledger is not None:
                with self.ledger.transaction():
                    self._write("moved", moved)
                    self._write("events", [row])

        by_main(write)
        self._tidy(number)
        if self.progress and rank() == 0:
            self._tell(number, deed, trainer.steps_done, seconds, scores)

    def _trainer(self, number: int, deed: Deed) -> Trainer:
        place = self.folder and self.folder / "checkpoints" / f"event-{number:04d}"
        inside = self.probes if self.inside is None else self.inside

        def watch(model: nn.Module, step: int) -> None:
            if step % self.every == 0:
                self._measure(number, step, inside)

        return Trainer(
            deed.settings,
            processor=self.processor,
            seed=derive(self.seed, number),
            name=f"{self.name}: {deed.event.name}",
            owner=deed.method,
            history=[event for event in (earlier.event for earlier in self._history(number)) if isinstance(event, Task)],
            checkpoints=Checkpoints(place, deed.settings.checkpoint_every) if place and deed.settings.checkpoint_every else None,
            record=lambda table, rows: self._write(table, [{"event": number} | row for row in rows]),
            watch=watch if self.every else None,
            progress=self.progress,
            tracked=(self.run_id.replace("/", "-"), (self.ledger.path.parent if self.ledger else Path("runs")) / "trackers"),
        )

    def _history(self, number: int) -> Sequence[Deed]:
        """Return the earlier deeds, tasks without the rows that requests took away since."""
        earlier = self.deeds[: number - 1]
        return without_forgotten(earlier, drop=True) if any(isinstance(deed.event, Request) for deed in earlier) else earlier

    def _erase(self, request: Request, trainer: Trainer) -> None:
        """Make every learner let go of the forgotten rows that it keeps, and the model of what its memory made of them."""
        gone = {type(method).__name__: method.erase(request, trainer) for method in self._stateful if isinstance(method, Remembering)}
        core = unwrapped(self.model)
        if isinstance(core, Remembering) and (emptied := core.erase(request, trainer)):
            gone[type(core).__name__] = emptied
        if gone:
            trainer.note("erased from memories", gone)

    # Measuring and writing.

    def _audit(self, number: int, request: Request, original: nn.Module, trainer: Trainer) -> None:
        assert self.auditor is not None
        oracle = self.oracle_at(number) if self.oracle_at is not None else None
        at = Moment(event=number, processor=self.processor, seed=derive(self.seed, number, "audit"))
        trainer.note("audit", self.auditor.audit(self.model, request, original, oracle, at))

    def _measure(self, number: int, step: int | None, probes: Probes) -> dict[str, Scores]:
        moment = Moment(event=number, step=step, processor=self.processor, seed=derive(self.seed, number, step, "probe"))
        found: dict[str, Scores] = {}
        for subject, named in probes.items():
            for probe_name, probe in named.items():
                scores = probe.measure(self.model, moment)
                found.setdefault(subject, Scores({})).values.update(scores.values)
                place = {"event": number, "step": END if step is None else step, "probe": probe_name, "subject": subject}
                if self.ledger is None:
                    continue
                with self.ledger.transaction():
                    self._write("scores", [place | {"metric": metric, "value": value} for metric, value in scores.values.items()])
                    if step is None:
                        rows = [(str(item.get("item", row)), item) for row, item in enumerate(scores.items)]
                        self._write(
                            "items",
                            [place | {"item": name, "scores": {k: v for k, v in item.items() if k != "item"}} for name, item in rows],
                        )
        return found

    def _write(self, table: str, rows: list[dict[str, Any]]) -> None:
        if self.ledger is not None and rows:
            self.ledger.write(table, [{"run": self.run_id} | row for row in rows])

    def _moved(self, number: int, before: Mapping[str, Any]) -> list[dict[str, Any]]:
        from remanence.models.roles import weights_by_role
        from remanence.training.masks import moved

        if not before:
            return []
        roles = {weight.name: weight for weight in weights_by_role(self.model, strict=False)}
        rows = []
        for row in moved(before, self.model):
            weight = roles.get(row["weight"])
            rows.append({"event": number, **row, "role": weight.role if weight else "other", "layer": weight.layer if weight else None})
        return rows

    def _tell(self, number: int, deed: Deed, steps: int, seconds: float, scores: Mapping[str, Scores]) -> None:
        from rich.console import Console

        def short(subject: str) -> str:
            values = scores[subject].values
            metric = next((name for name in ("exact", "accuracy", "loss") if name in values), next(iter(values), ""))
            return f"{subject.split('/')[-1]} {metric} {values[metric]:.3g}" if metric else subject

        subjects = [name for name in scores if name == deed.event.name or name.startswith(f"{deed.event.name}/")]
        verb = "learns" if isinstance(deed.event, Task) else "forgets"
        line = f"{self.name} [{number}/{len(self.deeds)}] {verb} {deed.event.name} by {deed.label}, {steps} steps, {seconds:.1f} s"
        Console(stderr=True, highlight=False).print("; ".join([line, *map(short, subjects)]), markup=False, soft_wrap=True)

    # Beginning, saving, resuming.

    def lived(self) -> int | None:
        """Return the number of events that the ledger holds as complete, `None` where it does not know this run.

        Raises:
            Mistake: the run was begun with another recipe.
        """

        def look() -> int | None:
            known = self.ledger.read("SELECT settings FROM runs WHERE run = ?", self.run_id) if self.ledger is not None else []
            if self.ledger is None or not known:
                return None
            done, remedy = self.ledger.done(self.run_id), "resume with the recipe that began it, or name another output"
            if done > len(self.deeds):
                raise Mistake("recipe", f"the ledger holds {done} events of this run, the recipe only {len(self.deeds)}", remedy)
            key = differing(json.loads(known[0]["settings"]), self._settings(), self.name)
            if key is not None:
                raise Mistake("recipe", f"differs in '{key}' from the one that began the run '{self.run_id}'", remedy)
            return done

        return by_main(look)

    def _settings(self) -> dict[str, Any]:
        """Return what the ledger keeps of the run's settings, as it will be read back."""
        return json.loads(json.dumps(self.description | {"oracle": self.oracle}))

    def _begin(self, resume: bool) -> int:
        """Write the run's row, or read the state behind the last complete event; return that event's number."""
        import torch

        lived = self.lived()
        done = lived or 0
        if lived is not None and not resume:
            raise Mistake(
                self.ledger.path if self.ledger else "ledger",
                f"the run '{self.run_id}' is here already",
                "add --resume, or name another output",
            )
        if lived is None:
            if self.folder and rank() == 0:
                shutil.rmtree(self.folder, ignore_errors=True)  # left by another run; gone before the ledger speaks of this one
            self._write(
                "runs",
                [
                    {
                        "recipe": self.recipe,
                        "life": self.name,
                        "seed": self.seed,
                        "settings": self._settings(),
                        "versions": versions(),
                        "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
                        "at": now(),
                    }
                ],
            )
        if done:
            self._load_state(done)
        barrier()
        torch.manual_seed(derive(self.seed, "global"))  # nothing here draws from it; foreign code that does is at least repeatable
        return done

    def _state_folder(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / "state" / f"event-{number:04d}"

    def _save_state(self, number: int) -> None:
        if self.folder is None:
            return
        from remanence.models.load import save_model

        state, methods = model_state(self.model), gathered([method.state_dict() for method in self._stateful])

        def save() -> None:
            with whole_folder(self._state_folder(number)) as temporary:
                save_model(self.model, self.processor, temporary / "model", state_dict=state)
                save_tree(temporary / "methods.safetensors", methods)
            if self.keep_models is not None:
                with whole_folder(self.keep_models / f"event-{number:04d}") as temporary:
                    shutil.copytree(self._state_folder(number) / "model", temporary, dirs_exist_ok=True)

        by_main(save)

    def _load_state(self, number: int) -> None:
        from remanence.models.load import load_model

        if self.folder is None:
            raise Mistake("life", "cannot be resumed without a folder", "give one")
        folder = self._state_folder(number)
        if not folder.is_dir():
            raise Mistake(folder, "the state that the ledger speaks of is not there", "restore it, or start anew in another output")
        loaded = load_model(str(folder / "model"), trust_remote_code=self.trust_remote_code)
        self.model, self.processor = loaded.model, loaded.processor if loaded.processor is not None else self.processor
        for method, state in zip(self._stateful, load_tree(folder / "methods.safetensors"), strict=True):
            method.load_state_dict(state)

    def _tidy(self, number: int) -> None:
        """Remove what the ledger no longer needs: older states, the event's checkpoints."""
        if self.folder is None or rank() != 0:
            return
        shutil.rmtree(self.folder / "checkpoints" / f"event-{number:04d}", ignore_errors=True)
        for old in (self.folder / "state").glob("event-*"):
            if old.name < f"event-{number:04d}":
                shutil.rmtree(old, ignore_errors=True)

    def save(self, folder: Path) -> None:
        """Save the model as an ordinary folder."""
        from remanence.models.load import save_model

        state = model_state(self.model)
        by_main(lambda: save_model(self.model, self.processor, folder, state_dict=state))


def differing(old: Any, new: Any, life: str) -> str | None:
    """Return the dotted key of the first difference between two runs' settings that could change what a life does, `None` if there is none."""

    def walk(one: Any, other: Any, path: tuple[str, ...]) -> str | None:
        if path in (("recipe", "output"), ("recipe", "keep_models")) or (path[:2] == ("recipe", "lives") and path[2:] and path[2] != life):
            return None
        if isinstance(one, dict) and isinstance(other, dict):
            keys = dict.fromkeys([*one, *other])
            return next((found for key in keys if (found := walk(one.get(key), other.get(key), (*path, key)))), None)
        if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            return next((found for number, pair in enumerate(zip(one, other)) if (found := walk(*pair, (*path, str(number))))), None)
        return None if json.dumps(one) == json.dumps(other) else ".".join(path[1:] if path[0] == "recipe" else path)

    return walk(old, new, ())


def without_forgotten(deeds: Sequence[Deed], *, drop: bool = False) -> list[Deed]:
    """Return the deeds with every request's rows taken out of the tasks before it, and requests that do nothing.

    Args:
        deeds: in order.
        drop: leave out a task that loses all of its rows.

    Raises:
        Mistake: a task loses all of its rows and `drop` is off.
    """
    kept: list[Deed] = []
    for number, deed in enumerate(deeds):
        if isinstance(deed.event, Request):
            kept.append(replace(deed, method=None, label="never saw it"))
            continue
        later = [other.event for other in deeds[number + 1 :] if isinstance(other.event, Request) and other.event.kind == deed.event.kind]
        gone = {key for request in later for key in keys_of(request.forget, request.kind)}
        if not gone:
            kept.append(deed)
            continue
        keys = keys_of(deed.event.train, deed.event.kind)
        rows = [row for row, key in enumerate(keys) if key not in gone]
        if not rows and drop:
            continue
        if not rows:
            raise Mistake(
                f"task '{deed.event.name}'", "later requests forget all of it, so the oracle has nothing to learn", "split the task"
            )
        test = deed.event.measured  # what is measured stays the same for every life
        train = deed.event.train if len(rows) == len(keys) else deed.event.train.select(rows)
        kept.append(replace(deed, event=replace(deed.event, train=train, test=test)))
    return kept


def describe(method: Any) -> dict[str, Any]:
    """Return a method's class and its hyper-parameters (dataclass fields that are set by the caller), as plain JSON."""
    if method is None:
        return {}
    found: dict[str, Any] = {"class": type(method).__name__}
    if is_dataclass(method):
        for item in fields(method):
            if item.init:
                value = getattr(method, item.name)
                found[item.name] = describe(value) if is_dataclass(value) else value if _is_plain(value) else str(value)
    return found


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import platform
    from importlib.metadata import version

    names = ("remanence", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")
    return {"python": platform.python_version(), "machine": platform.machine()} | {name: version(name) for name in names}
