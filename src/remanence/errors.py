"""The one exception for a user's mistake: a place, a problem and a remedy, in one sentence, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Mistake(Exception):
    """Report something that the user can mend; nothing has been written when it is raised.

    Args:
        place: where (file and line, recipe field, option, model).
        problem: what is wrong there.
        remedy: what to do about it.
    """

    def __init__(self, place: object, problem: str, remedy: str):
        self.place, self.problem, self.remedy = str(place), problem, remedy
        super().__init__(f"{place}: {problem}; {remedy}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for the closest known word, else the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
