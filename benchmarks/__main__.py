"""Run benchmarks and print their figures: `python -m benchmarks [loop] [fisher] [replay] [dampening] [influence] ... [--threads N] [--save]`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.timing import Figure, PeerMissing, machine

NAMES = (
    "loop",
    "fisher",
    "replay",
    "dampening",
    "influence",
    "request_cost",
    "npo_openunlearning",
    "titans_memory",
    "memory_cache",
    "reweaving",
    "sparsey",
    "recall_speed",
    "recall_million",
)
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def line(one: Figure) -> str:
    """Return a figure as one line of text."""
    goal = "" if one.goal is None else f"  goal {'<=' if one.sense == 'overhead' else '>='} {one.goal:g}: {'met' if one.met else 'missed'}"
    more = "".join(f"  {name} {value:.3g}" for name, value in one.more.items() if isinstance(value, float))
    return f"{one.name}: {one.ratio:.3g} ({one.low:.3g} to {one.high:.3g}; on the wall {one.wall_ratio:.3g}){goal}{more}"


def table(records: dict[str, dict]) -> str:
    """Return the saved figures as Markdown, one table per benchmark and what it was measured on."""
    text = []
    for name, record in records.items():
        about = record["machine"]
        text.append(
            f"### {name}\n\n{about['processor']}, {about['cores']} cores (load {about['load']}), {about['threads']} thread(s), torch {about['torch']},"
            f" {record['date']}\n\n| comparison | ratio (quartiles) | on the wall | ours, s | peer, s | goal | further |\n|---|---|---|---|---|---|---|"
        )
        for one in record["figures"]:
            sign = "≤" if one["sense"] == "overhead" else "≥"
            goal = "" if one["goal"] is None else f"{sign} {one['goal']:g}: {'met' if one['met'] else 'missed'}"
            more = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in one["more"].items() if isinstance(value, float | int))
            text.append(
                f"| {one['name']} | **{one['ratio']:.3g}** ({one['low']:.3g} to {one['high']:.3g}) | {one['wall_ratio']:.3g} | {one['ours']:.3g}"
                f" | {one['peer']:.3g} | {goal} | {more} |"
            )
        text.append("")
    return "\n".join(text)


def save(records: dict[str, dict], folder: Path = DOCS) -> None:
    """Put records beside those of other benchmarks in benchmarks.json, and all of them into the marked part of benchmarks.md."""
    file, page = folder / "benchmarks.json", folder / "benchmarks.md"
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept = {name: (kept | records)[name] for name in NAMES if name in kept | records}
    file.write_text(json.dumps(kept, indent=1) + "\n")
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table(kept)}\n{END}{rest.partition(END)[2]}")


def main(words: Sequence[str] | None = None) -> None:
    """Run what was named, all by default."""
    reader = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed beside peers, in one run.")
    reader.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all by default")
    reader.add_argument("--threads", type=int, default=1, help="of torch, on both sides (1: the figures then hold on a busy machine too)")
    reader.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    reader.add_argument("--save", action="store_true", help="write docs/benchmarks.json and the tables of docs/benchmarks.md")
    chosen = reader.parse_args(words)
    for name in chosen.names:
        if name not in NAMES:
            reader.error(f"no benchmark '{name}' (choose from {', '.join(NAMES)})")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from datasets import disable_progress_bars

    disable_progress_bars()
    torch.set_num_threads(chosen.threads)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    records = {}
    for name in chosen.names or NAMES:
        try:
            figures: list[Figure] = importlib.import_module(f"benchmarks.{name}").run(tiny=chosen.tiny)
        except PeerMissing as missing:
            if chosen.names:
                reader.error(str(missing))
            print(f"left out: {missing}")
            continue
        for one in figures:
            print(line(one), flush=True)
        records[name] = {"machine": about, "date": f"{datetime.now(UTC):%Y-%m-%d}", "figures": [one.as_json() for one in figures]}
        if chosen.save:
            save({name: records[name]})


if __name__ == "__main__":
    main()
