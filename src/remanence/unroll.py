"""Series of events in a recipe: an event with `repeat: 50` stands for fifty, numbered.

Inside it `{n}` is the number of the copy, from 0, and may be shifted and stretched: `{n+400}`, `{5*n+2}`. A value that is nothing but such a place becomes a
whole number (`first: "{n+400}"`), elsewhere it is text. Copies whose name holds no place get their number behind it, from 1.
"""

from __future__ import annotations

import re
from typing import Any

MOST = 1000
_PLACE = re.compile(r"\{(?:(\d{1,9})\s*\*\s*)?n(?:\s*\+\s*(\d{1,9}))?\}")


def unrolled(tree: dict[str, Any], lines: dict[tuple, int]) -> tuple[dict[str, Any], dict[tuple, int]]:
    """Return the recipe with every repeated event written out, and the line of every key path in it.

    Args:
        tree: of the recipe, as it was read; what is wrong in it is left for the types to refuse.
        lines: of its key paths.
    """
    events = tree.get("events")
    if not isinstance(events, list) or not any(isinstance(event, dict) and "repeat" in event for event in events):
        return tree, lines
    found: list[Any] = []
    source: list[int] = []  # number of the event that each copy was made of
    for number, event in enumerate(events):
        count = event.get("repeat") if isinstance(event, dict) else None
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST:
            found.append(event)
            source.append(number)
            continue
        plain = {key: value for key, value in event.items() if key != "repeat"}
        for copy in range(count):
            made = filled(plain, copy)
            for verb in ("learn", "forget"):
                if count > 1 and isinstance(plain.get(verb), str) and not _PLACE.search(plain[verb]):
                    made[verb] = f"{plain[verb]} {copy + 1}"
            found.append(made)
            source.append(number)
    below: dict[int, list[tuple[tuple, int]]] = {}
    moved = {path: line for path, line in lines.items() if path[:1] != ("events",) or len(path) == 1}
    for path, line in lines.items():
        if path[:1] == ("events",) and len(path) > 1 and isinstance(path[1], int):
            below.setdefault(path[1], []).append((path[2:], line))
    for place, number in enumerate(source):
        moved |= {("events", place, *rest): line for rest, line in below.get(number, ())}
    return tree | {"events": found}, moved


def filled(value: Any, number: int) -> Any:
    """Return a value with every place `{a*n+b}` filled in; a text that is one place becomes a whole number."""
    if isinstance(value, dict):
        return {key: filled(inner, number) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, number) for inner in value]
    if not isinstance(value, str):
        return value

    def at(place: re.Match[str]) -> int:
        return int(place[1] or 1) * number + int(place[2] or 0)

    whole = _PLACE.fullmatch(value)
    return at(whole) if whole else _PLACE.sub(lambda place: str(at(place)), value)
