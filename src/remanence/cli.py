"""The command line: a thin shell over the library. Exit codes: 0 done, 2 a mistake that one sentence explains, 130 interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from remanence.cli_convomem import convomem
from remanence.cli_recall import recall_app
from remanence.errors import Mistake

app = typer.Typer(
    help="Decide what a model remembers, and prove what remains.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

receipt_app = typer.Typer(
    help="Receipts of served requests: show, verify, and the key that signs them.", no_args_is_help=True, rich_markup_mode="markdown"
)
app.add_typer(receipt_app, name="receipt")
app.add_typer(recall_app, name="recall")
app.command()(convomem)

_Usage: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")  # typer may bring its own click
Changes = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key, value in YAML; may be repeated.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the new model; must not exist yet.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random stream.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No bars and no lines per event.")]
State = Annotated[Path | None, typer.Option(help="State to go on from; by default the model's beginning.")]
Window = Annotated[int | None, typer.Option(min=1, help="Tokens that stay visible, for a model without a memory of its own.")]
Budget = Annotated[int | None, typer.Option(min=0, help="Tokens held of what left the window; by default a quarter of it.")]
Score = Annotated[str | None, typer.Option(help="What is held: surprisal (default), attention, mix, recency, uniform or random.")]
Positions = Annotated[
    str | None, typer.Option(help="original (default), or rebased: a text may be longer than the model's positions (rotary ones).")
]
KindOption = Annotated[str | None, typer.Option("--kind", help="text, qa, chat, classes or images; by default seen from the columns.")]


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and exit code 2."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _note
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for each other on a busy machine take many times the time
    try:
        with _quiet_libraries():
            if "ACCELERATE_USE_CPU" in os.environ:
                from remanence.training.processes import start_missing

                start_missing()
            code = app(standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except Mistake as mistake:
        _fail(str(mistake))
    except _Usage as error:
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        command = context.command_path if context is not None else "remanence"
        _fail(f"{command.replace('python -m ', '')}: {error.format_message().rstrip('.')}; see {command} --help")
    except KeyboardInterrupt:
        print("remanence: interrupted; go on with --resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        _fail(f"{error.filename or 'system'}: {error.strerror or error}; check the path, its permissions and the free space")
    finally:
        if "torch.distributed" in sys.modules:
            from remanence.training.processes import leave

            leave()


def _note(message: Any, category: type[Warning], filename: str, *_: object, **__: object) -> None:
    """Print our own warnings as one line; those of libraries are theirs to developers and stay silent."""
    if f"{os.sep}remanence{os.sep}" in filename:
        print("remanence: note: " + " ".join(str(message).split()), file=sys.stderr)


def _fail(sentence: str) -> None:
    def say() -> None:
        print("remanence: " + " ".join(sentence.split()), file=sys.stderr, flush=True)

    if "WORLD_SIZE" in os.environ:
        from remanence.training.processes import say_once

        say_once(say)
    else:
        say()
    sys.exit(2)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own bars and notices off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    yield


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the results; an old demo there is replaced.")] = Path("runs/demo"),
    quiet: Quiet = False,
) -> None:
    """A week in the life of a model, lived twice: carelessly and carefully.

    Example: `remanence demo`
    """
    import shutil

    from remanence.recipe import Recipe
    from remanence.runs import LEDGER, run_recipe

    recipe = Recipe.load(Path(__file__).parent / "demo.yaml")
    if output.exists():
        if not (output / LEDGER).is_file() and any(output.iterdir()):
            raise Mistake(output, "is not an old demo", "name another --output")
        shutil.rmtree(output)
    place = run_recipe(recipe, output=output, progress=not quiet)
    print(place / "report.html")


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the results; by default the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was stopped or killed.")] = False,
    life: Annotated[list[str], typer.Option(help="Only this life; may be repeated.")] = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the recipe's.")] = None,
    changes: Changes = [],  # noqa: B006
    check: Annotated[bool, typer.Option("--check", help="Read recipe, data and model, say what would be done, write nothing.")] = False,
    quiet: Quiet = False,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Walk a model through a recipe's events; measure, record, report.

    Example: `remanence run recipes/quick/digits.yaml --set training.lr=1e-3`

    Several processes: `accelerate launch --num_processes 2 --cpu -m remanence run recipes/quick/digits.yaml`
    """
    from remanence.recipe import Recipe
    from remanence.runs import run_recipe

    read = Recipe.load(recipe, changes)
    if folder is not None:  # of a recipe that was copied: where its relative paths begin
        read = read.model_copy(update={"folder": folder})
    if check:
        for name in life or read.life_names:
            lived = read.life(name, seed=seed, progress=False)
            for deed in lived.deeds:
                print(f"{name}: {deed.event.name} by {deed.label}")
        return
    place = run_recipe(read, output=output, resume=resume, seed=seed, lives=life, progress=not quiet)
    if os.environ.get("RANK", "0") == "0":
        print(place / "report.html")


@app.command()
def learn(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub id, or desk:NAME.")],
    data: Annotated[str, typer.Option(help="Rows to learn: JSONL, Parquet, CSV, text, a folder of images, IDX.")],
    out: Out,
    method: Annotated[str, typer.Option(help="Learner; `remanence systems` lists them.")] = "sequential",
    test: Annotated[str | None, typer.Option(help="Rows to measure on; by default the training rows.")] = None,
    kind: KindOption = None,
    changes: Changes = [],  # noqa: B006
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Teach a model new rows and save it as an ordinary model folder, with its ledger and report beside it.

    Example: `remanence learn desk:bio --data people.jsonl --method hft --set ratio=0.5 --set training.steps=100 --out runs/learned`
    """
    event = {"learn": "task", "data": _source(data), "kind": kind or _kind(data), "method": _clause(method, changes)}
    _serve(model, event | ({"test": _source(test)} if test else {}), out, changes, seed, quiet)


@app.command()
def forget(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub id, or desk:NAME.")],
    request: Annotated[str, typer.Option(help="Rows to forget.")],
    out: Out,
    retain: Annotated[str | None, typer.Option(help="Rows that must stay.")] = None,
    neighbours: Annotated[str | None, typer.Option(help="Rows close to the forgotten ones, measured only.")] = None,
    holdout: Annotated[str | None, typer.Option(help="Rows that the model never saw, measured only.")] = None,
    method: Annotated[str, typer.Option(help="Forgetter; `remanence systems` lists them.")] = "npo",
    audited: Annotated[bool, typer.Option("--audit", help="Attack the result, and put the verdict into the receipt.")] = False,
    oracle: Annotated[str | None, typer.Option(help="A model trained without the rows, for the audit to compare with.")] = None,
    kind: KindOption = None,
    changes: Changes = [],  # noqa: B006
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Make a model forget rows and save it as an ordinary model folder, with its receipt, ledger and report beside it.

    Example: `remanence forget runs/learned --request erase.jsonl --retain keep.jsonl --method npo --audit --out runs/forgotten`
    """
    if oracle is not None and not audited:
        raise Mistake("--oracle", "is what an audit compares with", "add --audit")
    event = {"forget": "request", "data": _source(request), "kind": kind or _kind(request), "method": _clause(method, changes)}
    event |= {part: _source(value) for part, value in (("retain", retain), ("neighbours", neighbours), ("holdout", holdout)) if value}
    _serve(model, event, out, changes, seed, quiet, audited=audited, oracle=oracle)


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub id, or desk:NAME.")],
    data: Annotated[str, typer.Option(help="Rows to measure on.")],
    probe: Annotated[list[str], typer.Option(help="Probe; may be repeated; by default those of the kind.")] = [],  # noqa: B006
    kind: KindOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, items included.")] = False,
    seed: Seed = 0,
) -> None:
    """Measure what a model remembers of some rows; nothing is written.

    Example: `remanence measure runs/learned --probe recall --data people.jsonl --json`
    """
    from remanence.models.load import load_model
    from remanence.recipe import expand, probes_for
    from remanence.stream import Moment

    kind = kind or _kind(data)
    rows = _rows(data, kind)
    probes = probes_for(rows, kind, probe or None)
    loaded = load_model(expand(model), seed=seed)
    found = {name: made.measure(loaded.model, Moment(processor=loaded.processor, seed=seed)) for name, made in probes.items()}
    if as_json:
        print(json.dumps({name: {"values": scores.values, "items": scores.items} for name, scores in found.items()}, indent=1))
        return
    _table(
        f"{model} on {data} ({len(rows)} rows)",
        ("probe", "metric", "value"),
        [(n, m, f"{v:.4g}") for n, s in found.items() for m, v in s.values.items()],
    )


@app.command()
def audit(
    model: Annotated[str, typer.Argument(help="Model that was asked to forget: folder, hub id, or desk:NAME.")],
    request: Annotated[str, typer.Option(help="Rows that it was asked to forget.")],
    reference: Annotated[str, typer.Option(help="The model before it forgot.")],
    oracle: Annotated[str | None, typer.Option(help="A model that was trained without the rows.")] = None,
    retain: Annotated[str | None, typer.Option(help="Rows that must stay.")] = None,
    holdout: Annotated[str | None, typer.Option(help="Rows like the forgotten ones that no model ever saw.")] = None,
    neighbours: Annotated[str | None, typer.Option(help="Rows close to the forgotten ones that must stay.")] = None,
    kind: KindOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of Markdown.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write it to a .json, .md or .html file, or the curve to a .png or .svg.")
    ] = None,
    changes: Changes = [],  # noqa: B006
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Find out what a model still holds of rows that it was asked to forget: outputs, membership, attacks, harm; and a verdict.

    Example: `remanence audit desk:bio --reference desk:bio --request '{biographies: {people: 4}}' --retain '{biographies: {people: 20, first: 4}}'
    --holdout '{biographies: {people: 4, first: 200}}' --set relearn_steps=16 --out audit.json`
    """
    from remanence.forget.audit import AuditSettings
    from remanence.forget.audit import audit as examine
    from remanence.forget.audit.picture import check_output, write_report
    from remanence.models.load import load_model
    from remanence.recipe import _override, expand
    from remanence.stream import Request
    from remanence.training.processes import shared_accelerator

    tree: dict[str, Any] = {}
    for change in changes:
        _override(tree, change)
    settings = AuditSettings().changed("--set", tree)
    if out is not None:
        check_output(out, settings)
    kind = kind or _kind(request)
    parts = {part: _rows(path, kind) for part, path in (("retain", retain), ("neighbours", neighbours), ("holdout", holdout)) if path}
    asked = Request("request", _rows(request, kind), kind=kind, **parts)
    device = shared_accelerator().device
    loaded = {spec: load_model(expand(spec), seed=seed, device=device) for spec in dict.fromkeys((model, reference, oracle)) if spec}
    found = examine(
        loaded[model].model,
        asked,
        processor=loaded[model].processor,
        original=loaded[reference].model,
        oracle=loaded[oracle].model if oracle else None,
        settings=settings,
        seed=seed,
        progress=not quiet,
    )
    if out is not None:
        write_report(found, out)
    print(json.dumps(found.as_dict(), indent=1) if as_json else found.markdown(), end="\n" if as_json else "")


@app.command()
def remember(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a language model.")],
    text: Annotated[str, typer.Argument(help="Text file to read, or - for the standard input.")],
    out: Annotated[Path, typer.Option("--out", help="File of the state (.safetensors).")],
    state: State = None,
    window: Window = None,
    budget: Budget = None,
    score: Score = None,
    positions: Positions = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Let a model read a text of any length, and save what it holds of it: a file of constant size.

    A model with a memory that learns while it reads needs nothing else. Any other decoder is given a window, and holds the most surprising tokens that
    left it (memory reweaving; nothing is trained).

    Example: `remanence remember runs/titans/careful/model book.txt --out book.safetensors`

    Example: `remanence remember Qwen/Qwen2.5-1.5B book.txt --window 1024 --budget 512 --out book.safetensors`
    """
    from remanence.recipe import expand
    from remanence.remembering import load_reader, load_state, read_text, weaving
    from remanence.remembering import remember as read

    if out.is_dir():
        raise Mistake(out, "is a folder", "name a file for the state")
    weave = weaving(window, budget, score, positions)
    words, begun = read_text(text), load_state(state)
    held = read(load_reader(expand(model), begun, weave, seed=seed), words, begun, progress=not quiet)
    held.save(out)
    print(f"{out}: {held.seen:,} tokens in {held.bytes / 2**20:.2f} MiB")


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a language model.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    state: Annotated[Path | None, typer.Option(help="What it remembers (from `remanence remember`); the file is left as it is.")] = None,
    tokens: Annotated[int, typer.Option(help="Length of the answer, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time; above: drawn.")] = 0.0,
    seed: Seed = 0,
) -> None:
    """Ask a model what it remembers: continue a prompt from a state.

    Example: `remanence ask runs/titans/careful/model "Who is Juliet?" --state book.safetensors --tokens 40`
    """
    from remanence.recipe import expand
    from remanence.remembering import ask as answer
    from remanence.remembering import load_reader, load_state

    held = load_state(state)
    print(answer(load_reader(expand(model), held, seed=seed), prompt, held, tokens=tokens, temperature=temperature, seed=seed))


@app.command()
def watch(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a language model.")],
    text: Annotated[str, typer.Argument(help="Text file to read, or - for the standard input.")],
    out: Annotated[
        Path, typer.Option("--out", help="Picture (.png, .svg), page with the coloured text (.html), or numbers (.csv, .json).")
    ],
    state: State = None,
    window: Window = None,
    budget: Budget = None,
    score: Score = None,
    positions: Positions = None,
    seed: Seed = 0,
) -> None:
    """Show what a memory does while it reads: how surprised it is by each token, how strongly it writes, how much it forgets, or which tokens it holds.

    Example: `remanence watch runs/titans/careful/model page.txt --out page.html`

    Example: `remanence watch Qwen/Qwen2.5-1.5B page.txt --window 128 --budget 64 --out page.html`
    """
    from remanence.recipe import expand
    from remanence.remembering import load_reader, load_state, read_text, weaving
    from remanence.remembering import watch as look
    from remanence.report.watch import check_output, write_watch

    check_output(out)
    weave = weaving(window, budget, score, positions)
    words, begun = read_text(text), load_state(state)
    title = f"What the memory of {Path(model).name} did while it read {Path(text).name if text != '-' else 'the standard input'}"
    print(write_watch(look(load_reader(expand(model), begun, weave, seed=seed), words, begun, title=title), out))


@app.command()
def report(
    ledger: Annotated[list[Path], typer.Argument(help="Ledgers that runs wrote.")],
    out: Annotated[Path | None, typer.Option("--out", help="File; by default report.html (or .md, .json) beside the first ledger.")] = None,
    format: Annotated[str, typer.Option("--format", help="html, md or json.")] = "html",
) -> None:
    """Make the report from ledgers alone.

    Example: `remanence report runs/demo/ledger.sqlite --format md --out week.md`
    """
    from remanence.errors import nearest
    from remanence.report.page import write_report

    if format not in ("html", "md", "json"):
        raise Mistake("--format", f"unknown format '{format}'", nearest(format, ("html", "md", "json")))
    print(write_report(ledger, out or ledger[0].parent / f"report.{format}", format=format))


@app.command()
def systems(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    forgetters: Annotated[bool, typer.Option("--forgetters", help="Every known way to forget instead, built or not.")] = False,
) -> None:
    """List every method and probe: name, verb, family, paper, and what its claim's last recorded run said.

    Example: `remanence systems --json`

    With `--forgetters`: every known way to make a model forget, what it needs, what it promises, what it costs, and whether it is built here.
    """
    from remanence.forgetters import methods
    from remanence.systems import system_rows

    if forgetters:
        known = methods()
        if as_json:
            print(json.dumps(known, indent=1))
            return
        columns = ("method", "family", "needs", "guarantee", "cost", "here")
        _table(
            "ways to forget",
            columns,
            [
                (each["name"], each["family"], ", ".join(each["needs"]), each["guarantee"], each["cost"], each["method"] or each["status"])
                for each in known
            ],
        )
        return
    rows = system_rows()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    _table(
        "systems",
        ("name", "verb", "family", "what it does", "claim"),
        [(r["name"], r["verb"], r["family"], r["summary"], r["claim"]) for r in rows],
    )


@receipt_app.command("verify")
def verify_receipt(
    receipt: Annotated[Path, typer.Argument(help="receipt.json of a request.")],
    rows: Annotated[str | None, typer.Option(help="Rows that are said to be forgotten: are they the ones that were asked for?")] = None,
    model: Annotated[str | None, typer.Option(help="Model that is said to have come out: is it the one?")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Ledger of the run: does it say the same?")] = None,
    key: Annotated[str | None, typer.Option(help="Public key (base64) that must have signed it.")] = None,
) -> None:
    """Check a receipt: its signature, and what you hold against it. Exit code 1 where something does not hold.

    Example: `remanence receipt verify runs/forgotten/receipt.json --rows erase.jsonl --model runs/forgotten`
    """
    from remanence.ledger import Ledger
    from remanence.receipts import check_receipt, read_receipt
    from remanence.stream import fingerprint

    content = read_receipt(receipt)
    rows_hash = weights = None
    if rows is not None:
        kind = (content.get("asked") or {}).get("kind", "qa")
        rows_hash = fingerprint(_rows(rows, kind), kind)
    if model is not None:
        from remanence.models.load import load_model, weights_hash
        from remanence.recipe import expand

        weights = weights_hash(load_model(expand(model)).model)
    with contextlib.ExitStack() as held:
        opened = held.enter_context(Ledger(ledger, create=False)) if ledger is not None else None
        found = check_receipt(content, trusted=key, rows_sha256=rows_hash, weights=weights, ledger=opened)
    for what, holds, words in found:
        print(f"{'ok' if holds else 'FAILS'}  {what}: {words}")
    if not all(holds for _, holds, _ in found):
        raise typer.Exit(1)


@receipt_app.command("key")
def receipt_key(
    make: Annotated[bool, typer.Option("--make", help="Make one where there is none.")] = False,
) -> None:
    """Print the public half of the key that signs receipts (at `$REMANENCE_KEY`, by default in `~/.config/remanence`).

    Example: `remanence receipt key --make`
    """
    from remanence.receipts import key_path, local_key, make_key, public_key

    if make:
        print(f"made {make_key()}", file=sys.stderr)
    held = local_key()
    if held is None:
        raise Mistake(key_path(), "there is no key", "add --make")
    print(public_key(held))


@receipt_app.command("list")
def list_receipts(
    ledger: Annotated[Path, typer.Argument(help="Ledger of a run.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write them to, one file each, signed where there is a key.")] = None,
) -> None:
    """List the served requests of a ledger, or write their receipts.

    Example: `remanence receipt list runs/demo/ledger.sqlite --out receipts`
    """
    from remanence.ledger import Ledger
    from remanence.receipts import receipts_of, write_receipts

    with Ledger(ledger, create=False) as opened:
        if out is not None:
            for path in write_receipts(opened, out):
                print(path)
            return
        rows: list[tuple[str, ...]] = [
            (one["run"], str(one["event"]), one["request"], one["method"], str((one["asked"] or {}).get("forget", {}).get("rows", "")),
             (one["audit"] or {}).get("verdict", "not audited"))
            for one in receipts_of(opened)
        ]  # fmt: skip
    _table(f"served requests in {ledger}", ("run", "event", "request", "method", "rows", "audit"), rows)


@app.command()
def reproduce(
    slug: Annotated[str | None, typer.Argument(help="Slug of the paper; `remanence systems` lists them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every claim.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Write docs/claims/SLUG.json.")] = False,
    seeds: Annotated[int | None, typer.Option(min=3, help="Number of seeds, from 0; by default the claim's.")] = None,
    arm: Annotated[list[str], typer.Option(help="Only this arm (no verdict); may be repeated.")] = [],  # noqa: B006
    folder: Annotated[Path, typer.Option(help="Where single results are kept; a claim that was stopped goes on.")] = Path("runs/claims"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is there already.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at a time; by default one per core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    seed: Annotated[int | None, typer.Option(hidden=True)] = None,
    into: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the desk experiment of a paper: arms x seeds, table with 95 % intervals, verdict, the paper's own figures beside it.

    Example: `remanence reproduce hft --save`
    """
    from remanence.claims.claim import known_claims, run_one, save_record
    from remanence.claims.claim import reproduce as run_claim
    from remanence.systems import CLAIMS

    if (slug is None) != everything:
        raise Mistake("reproduce", "name one SLUG or say --all", f"known are {', '.join(known_claims())}")
    if into is not None:  # one arm with one seed, in a process of its own
        run_one(str(slug), arm[0], seed or 0, into)
        return
    for name in known_claims() if everything else [str(slug)]:
        record = run_claim(name, folder=folder, seeds=tuple(range(seeds)) if seeds else (), arms=arm, workers=workers, fresh=fresh)
        if as_json:
            print(json.dumps(record, indent=1))
        else:
            _show_claim(record)
        if save:
            if arm:
                raise Mistake("--save", "only a whole claim is recorded", "leave out --arm")
            print(save_record(record, CLAIMS))


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    methods: Annotated[str, typer.Option(help="Methods, comma-separated; learners take the recipe's tasks, forgetters its requests.")],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from the recipe's on.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder of the results; by default runs/NAME-compare.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on; finished arms are left alone.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at a time; by default one per core.")] = None,
    changes: Changes = [],  # noqa: B006
) -> None:
    """Run a recipe with several methods and seeds, each in a process of its own; table and curves with 95 % intervals.

    Example: `remanence compare recipes/quick/digits.yaml --methods sequential,replay,joint --seeds 3`
    """
    from remanence.compare import compare_methods

    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    place, table = compare_methods(recipe, chosen, seeds=seeds, output=output, resume=resume, workers=workers, changes=changes)
    for title, columns, rows in table:
        _table(title, columns, rows)
    print(place / "report.html")


# What the commands share.


def _show_claim(record: dict[str, Any]) -> None:
    """Print a claim's table, verdict and the paper's own figures."""

    def cell(value: dict[str, float | None] | None) -> str:
        if value is None or value["mean"] is None:
            return ""
        return f"{value['mean']:.3f}" + (f" ± {value['half']:.3f}" if value["half"] is not None else "")

    metrics = record["show"]
    _table(
        record["title"],
        ("arm", *metrics),
        [(arm, *(cell(values.get(metric)) for metric in metrics)) for arm, values in record["table"].items()],
    )
    print(
        f"Claim: {record['claim']}\nVerdict: {record['verdict']} (seeds {', '.join(map(str, record['seeds']))}; mean ± half of the 95 % interval)"
    )
    for reason in record["reasons"]:
        print(f"  - {reason}")
    for figure in record["paper"]:
        print(f"The paper: {figure}")


def _source(path: str) -> Any:
    """Return a data clause: a path (made absolute, for it begins at the current folder), or an inline YAML mapping."""
    if path.lstrip().startswith("{"):
        import yaml

        try:
            return yaml.safe_load(path)
        except yaml.YAMLError as error:
            raise Mistake("data", f"is not a YAML mapping ({getattr(error, 'problem', error)})", "quote it, or name a file") from None
    from remanence.recipe import expand

    expanded = os.path.expanduser(expand(path))
    return expanded if ":" in expanded and not Path(expanded).exists() else str(Path(expanded).absolute())


def _rows(path: str, kind: str) -> Any:
    from remanence.data.sources import load_rows

    return load_rows(_source(path), kind=kind, place=path, folder=Path("."))


def _kind(path: str) -> str:
    """See the kind from the columns or the file's ending."""
    from remanence.data.sources import guess_kind

    return guess_kind(_source(path), place=path)


def _clause(method: str, changes: list[str]) -> dict[str, Any]:
    """Return a method's clause; changes that are not of the recipe (`OF_THE_RECIPE`) are its hyper-parameters."""
    from remanence.recipe import _override

    clause: dict[str, Any] = {"method": method}
    for change in changes:
        if not change.startswith(OF_THE_RECIPE):
            _override(clause, change)
    return clause


OF_THE_RECIPE = ("training.", "measure.", "audit.")  # changes that are not a method's hyper-parameters


def _serve(
    model: str,
    event: dict[str, Any],
    out: Path,
    changes: list[str],
    seed: int,
    quiet: bool,
    *,
    audited: bool = False,
    oracle: str | None = None,
) -> None:
    """Serve one event: a recipe with a single life, its model saved in `out`, ledger and report in `out/remanence`."""
    import shutil

    from remanence.recipe import Recipe, _override
    from remanence.runs import run_recipe
    from remanence.training.processes import by_main

    def begin() -> None:
        if out.exists() and any(out.iterdir()):
            raise Mistake(out, "is there already and not empty", "name another --out")

    by_main(begin)
    tree: dict[str, Any] = {"name": out.name or "model", "model": model, "events": [event], "seed": seed}
    for change in changes:
        if change.startswith(OF_THE_RECIPE):
            _override(tree, change)
    if audited:
        tree.setdefault("audit", True)
    recipe = Recipe.of(tree, place="options", folder=Path("."))
    place = run_recipe(recipe, output=out / "remanence", progress=not quiet, oracle_model=oracle)

    def finish() -> None:
        for path in (place / "life" / "model").iterdir():
            os.replace(path, out / path.name)
        for path in (place / "receipts").glob("*.json"):
            os.replace(path, out / "receipt.json")
        shutil.rmtree(place / "receipts", ignore_errors=True)
        shutil.rmtree(place / "life")
        print(out)

    by_main(finish)


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(table)
