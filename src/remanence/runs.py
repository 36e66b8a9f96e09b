"""A recipe as a run on disk: one output folder with the lives' models, one ledger and the report.

OUTPUT/ledger.sqlite    every number
OUTPUT/LIFE/model/      the model at the end of the life, an ordinary Hugging Face folder
OUTPUT/LIFE/models/     the model after every event, where the recipe says `keep_models`
OUTPUT/LIFE/work/       the state behind the last complete event (removed when the life is over)
OUTPUT/receipts/        one file per served request (see `remanence.receipts`)
OUTPUT/recipe.yaml      what was run
OUTPUT/report.html      made from the ledger alone
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from remanence.errors import Mistake
from remanence.storage import sweep, write_text

if TYPE_CHECKING:
    from torch import nn

    from remanence.recipe import Recipe

LEDGER = "ledger.sqlite"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one run at a time.

    Raises:
        Mistake: another process holds it, or it cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Mistake(folder, f"cannot be written ({error.strerror})", "name another output") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Mistake(folder, "another run is writing here", "wait for it, or name another output") from None
        yield
    finally:
        os.close(handle)


def run_recipe(
    recipe: Recipe,
    *,
    output: Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    lives: Sequence[str] = (),
    progress: bool = True,
    report: bool = True,
    oracle_model: str | None = None,
) -> Path:
    """Run all lives of a recipe (or the named ones), one after the other, and write the report; return the output folder.

    Everything that can be refused is refused before the first file is written. Lives that are complete are left alone on `resume`. Audits compare with the
    recipe's oracle life, or with `oracle_model` (folder, hub id, desk:NAME), a model that was trained without the forgotten rows.

    Raises:
        Mistake: anything wrong with recipe, data, model or output.
    """
    from remanence.ledger import Ledger
    from remanence.life import without_forgotten
    from remanence.receipts import local_key, write_receipts
    from remanence.stream import Request
    from remanence.training.processes import by_main, from_main, rank

    place = output or recipe.place
    seed = recipe.seed if seed is None else seed
    names = list(lives) or recipe.life_names
    oracle = next((name for name in names if name in recipe.lives and recipe.lives[name].oracle), None)
    if recipe.audit and oracle is not None:
        names = [oracle, *(name for name in names if name != oracle)]  # audits of the others look at its models
    if any(hasattr(event, "forget") for event in recipe.events):
        local_key()  # a key that cannot sign is refused now, not behind the work
    first = recipe.life(names[0], seed=seed, progress=progress)  # reads all data and the model: what is wrong with them shows here
    if any(recipe.lives[name].oracle for name in names if name in recipe.lives):
        without_forgotten(first.deeds)
    given = None
    if oracle_model is not None:
        from remanence.models.load import load_model
        from remanence.recipe import expand

        given = load_model(expand(oracle_model), trust_remote_code=recipe.trust_remote_code).model
        for deed in first.deeds:
            if first.auditor is not None and isinstance(deed.event, Request):
                first.auditor.check(first.model, deed.event, given, first.processor)
    main, path = rank() == 0, place / LEDGER
    ledger: Ledger | None = None  # the main process alone has one
    with contextlib.ExitStack() as held:

        def begin() -> None:
            nonlocal ledger
            held.enter_context(locked(place))
            if path.exists() and not resume:
                raise Mistake(place, "holds a run already", "add --resume to go on, or name another --output")
            sweep(place)
            for name in names:
                sweep(place / name)
                sweep(place / name / "work", below=True)
            ledger = held.enter_context(Ledger(path))
            if not ledger.read("SELECT 1 FROM runs LIMIT 1"):
                write_text(place / "recipe.yaml", dump(recipe))

        by_main(begin)
        for number, name in enumerate(names):
            folder, state = place / name, place / name / "work" / f"seed-{seed}"
            life = first if number == 0 else recipe.life(name, seed=seed, progress=progress)
            life.ledger, life.folder = ledger, state
            if recipe.keep_models or (recipe.audit and name == oracle):
                life.keep_models = folder / "models" / f"seed-{seed}"
            if given is not None:
                life.oracle_at = functools.partial(_same, given)
            elif oracle is not None:
                life.oracle_at = functools.partial(_model_at, place / oracle / "models" / f"seed-{seed}", recipe.trust_remote_code)
            if life.lived() == len(life.deeds) and from_main((folder / "model").is_dir() and not state.exists()):
                continue
            life.run(resume=resume)
            life.save(folder / "model")
            by_main(functools.partial(_clear, state))
        if oracle is not None and not recipe.keep_models:
            by_main(functools.partial(shutil.rmtree, place / oracle / "models", ignore_errors=True))
        if main:
            assert ledger is not None
            write_receipts(ledger, place / "receipts")
        if report and main:
            from remanence.report.page import write_report

            write_report([path], place / "report.html")
    return place


def _same(model: nn.Module, number: int) -> nn.Module:
    return model


def _model_at(folder: Path, trust_remote_code: bool, number: int) -> nn.Module | None:
    """Return the model that a life kept behind an event, `None` where it kept none."""
    from remanence.models.load import load_model

    place = folder / f"event-{number:04d}"
    return load_model(str(place), trust_remote_code=trust_remote_code).model if place.is_dir() else None


def _clear(state: Path) -> None:
    """Remove the state of a life whose model is saved: in one instant, because its absence says that the model is this run's."""
    gone = state.with_name(f".{state.name}.done.old")
    os.replace(state, gone)
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):  # another seed's state is there
        state.parent.rmdir()


def dump(recipe: Recipe) -> str:
    """Return a recipe as YAML."""
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
