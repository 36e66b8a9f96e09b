"""The table of systems, made from the catalogue and the recorded claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from remanence.catalogue import ENTRIES

CLAIMS = Path("docs/claims")


def recorded(folder: Path = CLAIMS) -> dict[str, dict[str, Any]]:
    """Return the recorded claims by slug; none where there is no such folder."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}


def system_rows(folder: Path = CLAIMS) -> list[dict[str, str]]:
    """Return one row per system: name, verb, family, summary, paper, arxiv, slug, and the verdict of its recorded claim."""
    claims = recorded(folder)
    rows = []
    for entry in ENTRIES:
        verdict = claims.get(entry.slug, {}).get("verdict", "not recorded") if entry.slug else ""
        names = ("name", "verb", "family", "summary", "paper", "arxiv", "slug")
        rows.append({name: getattr(entry, name) for name in names} | {"claim": verdict})
    return rows


def markdown(folder: Path = CLAIMS) -> str:
    """Return the table as Markdown, for the README and the documentation."""
    head = "| name | verb | family | what it does | paper | claim |\n|---|---|---|---|---|---|"
    lines = []
    for row in system_rows(folder):
        paper = f"[{row['paper']}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else row["paper"]
        lines.append(f"| `{row['name']}` | {row['verb']} | {row['family']} | {row['summary']} | {paper} | {row['claim']} |")
    return "\n".join([head, *lines])
