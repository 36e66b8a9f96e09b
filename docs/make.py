"""Make the generated parts of the documentation from the code itself, so that they cannot go stale.

    python docs/make.py            write the table of systems into README.md
    python docs/make.py --check    say whether it is up to date; exit code 1 if not

The pages of the site hold comments such as `<!-- made: recipe -->`; `hooks.py` puts what the function of that name in `MADE` returns in their place when the
site is built.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sqlite3
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ROOT / "docs" / "claims"
README = ROOT / "README.md"
SYSTEMS = re.compile(r"(<!-- systems -->\n).*?(<!-- /systems -->)", re.DOTALL)
WORDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}  # what stands for an option's value
MARK = re.compile(r"^<!-- made: (\S+) -->$", re.MULTILINE)


# Small pieces of Markdown.


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; bars and line ends inside cells are made harmless."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: str) -> str:
    """Return text that may stand in a table."""
    return " ".join(value.replace("|", "\\|").split())


def code(value: Any) -> str:
    """Return a value as inline code; an empty string as nothing."""
    text = value if isinstance(value, str) else repr(value)
    return f"`{text}`" if text else ""


def type_words(hint: Any) -> str:
    """Return a type, as it is written in the source, as a reader of YAML wants it."""
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))
    return re.sub(r"\bNone\b", "null", text.replace("dict[str, Any]", "mapping")).replace(" | ", " or ")  # a bar would end a table's cell


def argument_docs(made: type) -> dict[str, str]:
    """Return what the `Args:` section of a docstring says about each field."""
    doc = inspect.getdoc(made) or ""
    part = re.search(r"^Args:\n((?:[ \t].*\n?|\n)+)", doc + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in part[1].splitlines() if part else ():
        begun = re.match(r" {4}\**(\w+): (.*)", line)
        if begun:
            name, found[begun[1]] = begun[1], begun[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def prose(made: Any) -> str:
    """Return a docstring up to its `Args:` or `Raises:`."""
    return re.split(r"^(?:Args|Raises|Example):", inspect.getdoc(made) or "", maxsplit=1, flags=re.MULTILINE)[0].strip()


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return a dataclass field's default as inline code; `needed` where there is none."""
    if field.default is not dataclasses.MISSING:
        return code(shown(field.default))
    if field.default_factory is not dataclasses.MISSING:
        return code(shown(field.default_factory()))
    return "needed"


def shown(value: Any) -> str:
    """Return a default as it would stand in a recipe."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list | tuple | set) and not value:
        return "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, str):
        return repr(value) if "\n" in value or not value else value
    return str(value)


def settings_of(made: Any) -> tuple[Any, list[tuple[str, Any, str]]]:
    """Return what explains the keys of a class or function, and each key with its type and default: fields, a configuration's fields, or parameters."""
    made = getattr(made, "config_class", None) or made
    if dataclasses.is_dataclass(made):
        own = set(vars(made).get("__annotations__", {}))
        inherited = made.__module__.startswith("remanence.") and any(base.__module__.startswith("transformers") for base in made.__mro__)
        fields = [f for f in dataclasses.fields(made) if f.init and not f.name.startswith("_") and (f.name in own or not inherited)]
        return made, [(f.name, f.type, default_of(f)) for f in fields]
    parameters = [p for p in inspect.signature(made).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return made, [(p.name, p.annotation, "needed" if p.default is p.empty else code(shown(p.default))) for p in parameters]


def dataclass_table(made: Any, skip: Iterable[str] = ()) -> str:
    """Return one row per key that the caller sets."""
    made, keys = settings_of(made)
    docs = argument_docs(made)
    rows = [[code(name), code(type_words(hint)), default, docs.get(name, "")] for name, hint, default in keys if name not in skip]
    return table(("key", "type", "default", "what it is"), rows) if rows else "No keys."


def model_table(made: Any, docs: Mapping[str, str] | None = None) -> str:
    """Return one row per field of a pydantic model; `docs` explains the fields that have no description of their own."""
    rows, docs = [], docs or {}
    for name, field in made.model_fields.items():
        if field.exclude:
            continue
        default = "needed" if field.is_required() else code(shown(field.get_default(call_default_factory=True)))
        if dataclass_like(field.annotation):
            default = "see below"
        limits = ", ".join(limit for item in field.metadata if (limit := limit_of(item)))
        what = field.description or docs.get(name, "")
        written = type_words(inspect.get_annotations(made)[name])
        rows.append([code(field.alias or name), code(written), default, what + (f" ({limits})" if limits else "")])
    if not any(row[3] for row in rows):
        return table(("key", "type", "default"), (row[:3] for row in rows))
    return table(("key", "type", "default", "what it is"), rows)


def dataclass_like(hint: Any) -> bool:
    """Say whether a type is a model of its own, whose default is a whole clause."""
    return isinstance(hint, type) and hasattr(hint, "model_fields")


def limit_of(item: Any) -> str:
    """Return a bound of a pydantic field in words; nothing for what is no number's bound."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return next((f"{word} {getattr(item, name)}" for name, word in words.items() if isinstance(getattr(item, name, None), int | float)), "")


# The generated parts.


def systems() -> str:
    """Return the table of all systems with the verdicts of the recorded claims."""
    from remanence.systems import markdown

    return markdown(CLAIMS)


def counts() -> str:
    """Say how many systems there are of each verb."""
    from remanence.catalogue import ENTRIES

    verbs = list(dict.fromkeys(entry.verb for entry in ENTRIES))
    return ", ".join(f"{sum(entry.verb == verb for entry in ENTRIES)} to {verb}" for verb in verbs) + "."


def claims() -> str:
    """Return one section per recorded claim: sentence, table, verdict, reasons, the paper's own figures, how it was run."""
    from remanence.systems import recorded

    records = recorded(CLAIMS)
    if not records:
        return "No claim is recorded yet. `remanence reproduce --all --save` records them."
    return "\n\n".join(claim_section(record) for record in records.values())


def claim_section(record: Mapping[str, Any]) -> str:
    """Return the section of one recorded claim."""

    def number(value: Mapping[str, float | None] | None) -> str:
        if value is None or value["mean"] is None:
            return ""
        return f"{value['mean']:.3f}" + ("" if value["half"] is None else f" ± {value['half']:.3f}")

    show = record["show"]
    rows = [[code(arm), *(number(values.get(metric)) for metric in show)] for arm, values in record["table"].items()]
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    parts = [f"### {record['title']}", f"**Claim.** {record['claim']}", f"**Verdict: {record['verdict']}.**"]
    parts += ["\n".join(f"- {reason}" for reason in record["reasons"])] if record["reasons"] else []
    parts += [table(("arm", *show), rows)]
    parts += ["The paper's own figures:\n\n" + "\n".join(f"- {figure}" for figure in record["paper"])] if record["paper"] else []
    parts += ["Notes:\n\n" + "\n".join(f"- {note}" for note in record["notes"])] if record["notes"] else []
    seeds = ", ".join(map(str, record["seeds"]))
    parts += [
        f"Mean ± half of the 95 % t-interval over the seeds {seeds}. Run again: `remanence reproduce {record['slug']}` "
        f"({record['seconds'] / 60:.0f} minutes of one core, all runs together). {versions}. "
        f"Every number: [{record['slug']}.json](claims/{record['slug']}.json)."
    ]
    return "\n\n".join(parts)


def recipe() -> str:
    """Return the tables of a recipe's parts."""
    from remanence import recipe as home

    parts = [
        ("The whole", home.Recipe),
        ("An event that is learned", home.LearnEvent),
        ("A request to forget", home.ForgetEvent),
        ("`measure`", home.Measuring),
        ("A set under `measure.sets`", home.MeasuredSet),
        ("A life under `lives`", home.LifeClause),
    ]
    return "\n\n".join(f"### {title}\n\n{prose(made)}\n\n{model_table(made)}" for title, made in parts)


def settings() -> str:
    """Return the table of training settings."""
    from remanence.training.trainer import Settings

    return dataclass_table(Settings)


def data() -> str:
    """Return the data clause: the module's examples and the tables of its models."""
    from remanence.data import sources

    doc = inspect.getdoc(sources) or ""
    first, *rest = re.split(r"\n\n", doc)
    blocks = []
    for block in rest:
        whole = inspect.cleandoc(block)
        blocks.append(f"```yaml\n{whole}\n```" if block.startswith("    ") else whole)
    sections = [
        ("A source and its modifiers", sources.Source),
        ("`biographies`", sources.BiographiesClause),
        ("`biographies.neighbours_of`", sources.People),
        ("`digits`", sources.DigitsClause),
        ("`mnist`", sources.MnistClause),
        ("`pythondocs`", sources.PythondocsClause),
        ("`split`", sources.Split),
    ]
    from remanence.data.readers import read_rows

    files = prose(read_rows).partition("\n\n")[2]
    docs = {sources.BiographiesClause: argument_docs(sources.Biographies)}
    tables = (f"### {title}\n\n{prose(made)}\n\n{model_table(made, docs.get(made))}" for title, made in sections)
    return "\n\n".join([first, *blocks, *tables, "### What a `file` may be", files])


def kinds() -> str:
    """Return the table of kinds and their columns."""
    from remanence import stream

    return (inspect.getdoc(stream) or "").partition("depend on the kind:\n\n")[2]


def models() -> str:
    """Return the table of what `model:` may say."""
    from remanence.models import load

    return (inspect.getdoc(load) or "").partition("\n\n")[2]


def methods(verb: str) -> str:
    """Return a section per system of a verb: what it does, its paper, its keys."""
    from remanence.catalogue import ENTRIES

    sections = []
    for entry in ENTRIES:
        if entry.verb != verb:
            continue
        made = entry.load()
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else entry.paper
        source = entry.home.partition(":")[0].replace(".", "/")
        keys = dataclass_table(made, skip=("rows", "kind") if verb == "measure" else ())
        about = "\n\n".join(
            part for part in (entry.summary, paper, f"Family: {entry.family}. Source: `src/remanence/{source}.py`.") if part
        )
        sections.append(f"### `{entry.name}`\n\n{about}\n\n{keys}")
    return "\n\n".join(sections)


def recall_settings() -> str:
    """Return what can be set in a conversation memory."""
    from remanence.recall.settings import HemaSettings

    return dataclass_table(HemaSettings)


def standard_probes() -> str:
    """Return which probes a kind gets."""
    from remanence.catalogue import STANDARD_PROBES

    return table(("kind", "probes"), ([code(kind), ", ".join(map(code, probes))] for kind, probes in STANDARD_PROBES.items()))


def cli() -> str:
    """Return a section per command: what it does, its arguments and options."""
    import typer
    from typer.models import ArgumentInfo, OptionInfo

    from remanence.cli import app

    assert isinstance(app, typer.Typer)
    sections = []
    groups = [(f"{group.name} ", group.typer_instance) for group in app.registered_groups if group.typer_instance is not None]
    commands = [(front, command) for front, home in [("", app), *groups] for command in home.registered_commands]
    for front, command in commands:
        callback = command.callback
        if callback is None or command.hidden:
            continue
        name = front + (command.name or callback.__name__)
        hints = get_type_hints(callback, include_extras=True)
        rows, words = [], []
        for parameter in inspect.signature(callback).parameters.values():
            hint = hints[parameter.name]
            about = next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, ArgumentInfo | OptionInfo)), None)
            if about is None or about.hidden:
                continue
            kind = getattr(hint, "__origin__", hint)
            needed = parameter.default is inspect.Parameter.empty
            if isinstance(about, ArgumentInfo):
                label = parameter.name.upper() + ("..." if "list" in str(kind) else "")
                words.append(label if needed else f"[{label}]")
            else:
                first = [about.default] if isinstance(about.default, str) and about.default.startswith("-") else []
                label = ", ".join([*first, *(about.param_decls or ())] or ["--" + parameter.name.replace("_", "-")])
                label += "" if kind is bool else f" {about.metavar or WORDS.get(option_type(kind), 'TEXT')}"
            silent = parameter.default is None or parameter.default is False or parameter.default == []
            default = "needed" if needed else "" if silent else code(shown(parameter.default))
            rows.append([code(label), default, about.help or ""])
        usage = " ".join(["remanence", name, *words, "[OPTIONS]" if any(row[0].startswith("`-") for row in rows) else ""]).strip()
        doc = inspect.getdoc(callback) or ""
        parts = [
            f"## `{name}`",
            doc,
            f"```text\n{usage}\n```",
            table(("argument or option", "default", "what it is"), rows) if rows else "",
        ]
        sections.append("\n\n".join(part for part in parts if part))
    return "\n\n".join(sections)


def option_type(kind: Any) -> Any:
    """Return the type of one value of an option: `Path` of `list[Path]` and of `Path | None`."""
    inner = [item for item in getattr(kind, "__args__", ()) if item is not type(None)]
    return option_type(inner[0]) if inner else kind


def ledger() -> str:
    """Return the ledger's docstring and the columns of each table, asked of SQLite itself."""
    from remanence import ledger as home

    base = sqlite3.connect(":memory:")
    base.executescript(home.SCHEMA)
    parts = [inspect.getdoc(home) or ""]
    for name in home.TABLES:
        rows = []
        for _, column, kind, needed, _, key in base.execute(f"PRAGMA table_info({name})"):
            clock = "wall-clock" if column in home.CLOCKS.get(name, ()) else ""
            rows.append([code(column), kind, "key" if key else "may be null" if not needed else "", clock])
        parts.append(f"### `{name}`\n\n" + table(("column", "type", "", ""), rows))
    parts.append(f"Schema version {home.SCHEMA_VERSION} (`PRAGMA user_version`).")
    return "\n\n".join(parts)


def headline() -> str:
    """Return the rules of the report's three headline numbers, as the report itself states them."""
    from remanence.report.text import RULES

    return "\n".join(f"- **{name}**: {rule}" for name, rule in RULES)


def glossary() -> str:
    """Return the metrics' own docstring and a section per formula, from measure/metrics.py."""
    from remanence.measure import metrics

    names = [name for name in re.findall(r"`(\w+)`", metrics.__doc__ or "") if name in metrics.__all__]  # in the order of its table
    sections = []
    for name in names:
        doc = inspect.getdoc(getattr(metrics, name)) or ""
        first = doc.partition("\n\n")[0].replace("\n", " ")
        formula = re.match(r"Return (.*?)((?:;|: the|, the|, facts| over M) .*)?$", first)
        said = prose(getattr(metrics, name)).partition("\n\n")[2]
        args = argument_docs(getattr(metrics, name))
        listed = "\n".join(f"- `{key}`: {text}" for key, text in args.items())
        head = f"`{formula[1]}`{formula[2] or ''}" if formula else first
        sections.append("\n\n".join(part for part in (f"### {name}", head, said, listed) if part))
    return "\n\n".join([inspect.getdoc(metrics) or "", *sections])


def quick_recipes() -> str:
    """Return the recipes that come with the source, by the first line of each file."""
    rows = []
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        if first.startswith("# "):
            rows.append([code(str(path.relative_to(ROOT))), first.removeprefix("# ")])
    return table(("recipe", "what it is"), rows)


def known_forgetters() -> str:
    """Return every known way to forget, built or not."""
    from remanence.forgetters import markdown

    return markdown()


MADE: dict[str, Callable[[], str]] = {
    "systems": systems,
    "counts": counts,
    "claims": claims,
    "recipe": recipe,
    "settings": settings,
    "data": data,
    "kinds": kinds,
    "models": models,
    "learners": lambda: methods("learn"),
    "forgetters": lambda: methods("forget"),
    "probes": lambda: methods("measure"),
    "memories": lambda: methods("remember"),
    "recall": lambda: methods("recall"),
    "recall-settings": recall_settings,
    "known-forgetters": known_forgetters,
    "standard-probes": standard_probes,
    "cli": cli,
    "ledger": ledger,
    "headline": headline,
    "glossary": glossary,
    "recipes": quick_recipes,
}


def filled(text: str) -> str:
    """Return a page with every `<!-- made: NAME -->` replaced by what is made under that name.

    Raises:
        KeyError: nothing is made under a name.
    """
    return MARK.sub(lambda match: MADE[match[1]](), text)


def with_systems(text: str) -> str:
    """Return the README with the table of systems between its two comments.

    Raises:
        ValueError: the comments are not there.
    """
    if not SYSTEMS.search(text):
        raise ValueError("README.md has no <!-- systems --> ... <!-- /systems -->")
    return SYSTEMS.sub(lambda match: f"{match[1]}{systems()}\n{match[2]}", text)


def main(check: bool) -> int:
    """Write the README, or say whether that would change it."""
    before = README.read_text(encoding="utf-8")
    after = with_systems(before)
    if check:
        print("README.md is up to date" if before == after else "README.md is stale: run python docs/make.py")
        return int(before != after)
    if before != after:
        README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    importlib.invalidate_caches()
    raise SystemExit(main("--check" in sys.argv[1:]))
