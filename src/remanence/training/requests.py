"""What forgetters ask of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from remanence.errors import Mistake

if TYPE_CHECKING:
    from datasets import Dataset

    from remanence.stream import Request


def retain_of(request: Request, method: str, remedy: str = "add retain rows to the request, or forget with gradient ascent") -> Dataset:
    """Return the retain set of a request.

    Raises:
        Mistake: it has none; the method that needs it is named.
    """
    if request.retain is None:
        raise Mistake(f"request '{request.name}'", f"has no retain set, and {method} needs one", remedy)
    return request.retain
