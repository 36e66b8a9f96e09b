"""MkDocs hooks: fill the generated parts into the pages, and leave pages out of the navigation that are not written yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from make import filled  # MkDocs lets a hook import its neighbours while it is loaded

HERE = Path(__file__).resolve().parent


def on_config(config: Any, **_: Any) -> Any:
    """Drop the entries of the navigation whose file is not there."""
    if config.nav:
        config.nav = [entry for entry in map(_present, config.nav) if entry]
    return config


def _present(entry: Any) -> Any:
    if isinstance(entry, str):
        return entry if (HERE / entry).is_file() else None
    ((title, inner),) = entry.items()
    kept = [item for item in map(_present, inner) if item] if isinstance(inner, list) else _present(inner)
    return {title: kept} if kept else None


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the generated parts in the place of their comments."""
    return filled(markdown)
