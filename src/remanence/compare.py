"""Compare methods on one recipe: arms x seeds as separate processes, one ledger each, one report over all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from remanence.arms import run_arms
from remanence.catalogue import ENTRIES, entry
from remanence.errors import Mistake, nearest
from remanence.recipe import Clause, LifeClause, Recipe
from remanence.runs import LEDGER, dump
from remanence.storage import write_text

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def arms_of(recipe: Recipe, methods: Sequence[str]) -> dict[str, LifeClause]:
    """Return one life per method; the recipe's own clause of that method (with its hyper-parameters) is used where it has one.

    Raises:
        Mistake: unknown method, one named twice, or one that no event of the recipe could use.
    """
    verbs = {entry.name: entry.verb for entry in ENTRIES if entry.verb in ("learn", "forget")}
    has = {
        "learn": any(hasattr(event, "learn") for event in recipe.events),
        "forget": any(hasattr(event, "forget") for event in recipe.events),
    }
    own: dict[str, Clause] = {}
    for clause in (recipe.learn, recipe.forget, *(part for life in recipe.lives.values() for part in (life.learn, life.forget) if part)):
        own.setdefault(clause if isinstance(clause, str) else str(clause.get("method")), clause)
    found: dict[str, LifeClause] = {}
    for name in methods:
        if ":" in name:  # a class of the user's: what it can do says which events it serves
            verbs[name] = _own_verb(name)
        if name not in verbs:
            raise Mistake("--methods", f"unknown method '{name}'", nearest(name, verbs))
        if name in found:
            raise Mistake("--methods", f"'{name}' is named twice", "name it once")
        if not has[verbs[name]]:
            raise Mistake(
                "--methods", f"'{name}' is a method to {verbs[name]} and the recipe has no such event", "choose another method or recipe"
            )
        clause = own.get(name, name)
        found[name] = LifeClause(learn=clause) if verbs[name] == "learn" else LifeClause(forget=clause)
    if not found:
        raise Mistake("--methods", "names no method", f"known are {', '.join(sorted(verbs))}")
    return found


def _own_verb(name: str) -> str:
    """Return the verb of `module:Class`."""
    try:
        return entry(name, "learn", "--methods").verb
    except Mistake:
        return entry(name, "forget", "--methods").verb


def compare_methods(
    path: Path,
    methods: Sequence[str],
    *,
    seeds: int = 3,
    output: Path | None = None,
    resume: bool = False,
    workers: int | None = None,
    changes: Sequence[str] = (),
) -> tuple[Path, list[Table]]:
    """Run every method with every seed and return the folder and the tables (final score of every measured set: mean ± half of the 95 % interval).

    Raises:
        Mistake: anything wrong with recipe, methods or output; an arm that failed.
    """
    from remanence.report.page import write_report

    recipe = Recipe.load(path, changes)
    lives = arms_of(recipe, methods)
    place = output or Path("runs") / f"{recipe.place.name}-compare"
    if place.exists() and any(place.iterdir()) and not resume:
        raise Mistake(place, "holds results already", "add --resume, or name another --output")
    joint = recipe.model_copy(update={"lives": lives})
    joint.check(str(path))
    joint.life(methods[0], progress=False)  # reads data and model, so that nothing starts with a mistake in them
    base = recipe.folder.resolve()
    write_text(place / "recipe.yaml", dump(joint.model_copy(update={"model": joint.start_model})))
    commands, names, ledgers = [], [], []
    for seed in range(recipe.seed, recipe.seed + seeds):
        for name in methods:
            folder = place / name / f"seed-{seed}"
            ledgers.append(folder / LEDGER)
            if (folder / "report.html").is_file():
                continue
            command = [
                "run",
                str(place / "recipe.yaml"),
                "--folder",
                str(base),
                "--life",
                name,
                "--seed",
                str(seed),
                "--output",
                str(folder),
                "--quiet",
            ]
            commands.append([*command, "--resume"] if (folder / LEDGER).is_file() else command)
            names.append(f"{name}, seed {seed}")
    run_arms(commands, names, workers=workers)
    write_report(ledgers, place / "report.html")
    return place, final_tables(ledgers, methods)


def final_tables(ledgers: Sequence[Path], methods: Sequence[str]) -> list[Table]:
    """Return one table per metric that is a share (exact, accuracy) or, where there is none, per metric: sets x methods at the end."""
    from remanence.ledger import END, Ledger
    from remanence.report.interval import t_interval

    cells: dict[tuple[str, str, str], list[float]] = {}
    for path in ledgers:
        with Ledger(path, create=False) as ledger:
            question = """SELECT life, subject, metric, value FROM scores JOIN runs USING(run)
                          WHERE step = ? AND event = (SELECT MAX(event) FROM events WHERE events.run = scores.run)"""
            for row in ledger.read(question, END):
                value = np.nan if row["value"] is None else row["value"]
                cells.setdefault((row["metric"], row["subject"], row["life"]), []).append(value)
    metrics = list(dict.fromkeys(metric for metric, _, _ in cells))
    shown = [metric for metric in metrics if metric in ("exact", "accuracy", "loss")] or metrics
    tables: list[Table] = []
    for metric in shown:
        rows = []
        for subject in dict.fromkeys(subject for name, subject, _ in cells if name == metric):
            line = [subject]
            for method in methods:
                mean, half = t_interval(np.array(cells.get((metric, subject, method), [np.nan])))
                line.append("" if np.isnan(mean) else f"{mean:.3f}" + ("" if np.isnan(half) else f" ± {half:.3f}"))
            rows.append(tuple(line))
        tables.append((f"{metric} at the end (mean ± half of the 95 % interval)", ("set", *methods), rows))
    return tables
