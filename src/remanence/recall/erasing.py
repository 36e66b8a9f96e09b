"""The routes that forget, and those that prove it: previews, erasures, receipts, the audit log.

Forgetting needs the `confirm` of a preview: what goes is what was seen, and if the selection has changed in between, nothing goes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.exceptions import HTTPException

from remanence.errors import Mistake
from remanence.recall import requests as ask
from remanence.recall.access import key_of
from remanence.recall.deletion import check_deletion, receipts_of
from remanence.recall.endpoints import KEYED, Memory, Space
from remanence.recall.service import Recall

router = APIRouter(prefix="/v1", dependencies=[KEYED])


@router.post("/spaces/{space}/forget/preview", tags=["forgetting"])
def preview(request: Request, space: Space, recall: Memory, body: ask.Doomed) -> dict[str, Any]:
    """Show what would go (counts and examples), and what to send to have it go."""
    return _preview(request, recall, body, space)


@router.post("/spaces/{space}/forget", tags=["forgetting"])
def forget(request: Request, space: Space, recall: Memory, body: ask.Forgetting) -> dict[str, Any]:
    """Forget what a preview showed, and answer with the receipt."""
    return _forget(request, recall, body, space)


@router.post("/forget/preview", tags=["forgetting"])
def preview_everywhere(request: Request, recall: Memory, body: ask.Doomed) -> dict[str, Any]:
    """Show what would go from every space (a person, usually); needs a key that sees all spaces."""
    _everywhere(request)
    return _preview(request, recall, body, None)


@router.post("/forget", tags=["forgetting"])
def forget_everywhere(request: Request, recall: Memory, body: ask.Forgetting) -> dict[str, Any]:
    """Forget in every space what a preview showed."""
    _everywhere(request)
    return _forget(request, recall, body, None)


def _everywhere(request: Request) -> None:
    if key_of(request).spaces is not None:
        raise HTTPException(403, "this key sees some spaces only")


def _preview(request: Request, recall: Recall, body: ask.Doomed, space: str | None) -> dict[str, Any]:
    rest = body.model_dump(exclude={"query", "k"}, exclude_none=True)
    if body.query is not None:
        found = [hit.chunk.message for hit in recall.search(body.query, body.k, body.selection(space))]
        if not found:
            raise HTTPException(404, "nothing was found for this query")
        rest = {"ids": list(dict.fromkeys(found))}
    which = ask.Which(**rest)
    seen = dataclasses.asdict(recall.preview(which.selection(space)))
    del seen["selection"]  # every id: long, and the conditions say the same
    return {
        "space": space,
        "selection": which.model_dump(exclude_none=True),
        "confirm": _seal(request, recall, which, space),
        "preview": seen,
    }


def _forget(request: Request, recall: Recall, body: ask.Forgetting, space: str | None) -> dict[str, Any]:
    which = ask.Which(**body.model_dump(exclude={"confirm", "reason"}))
    if not hmac.compare_digest(_seal(request, recall, which, space), body.confirm.encode("utf-8", "replace").decode("ascii", "replace")):
        raise HTTPException(409, "this is not what was previewed, or it has changed since")
    return recall.forget(which.selection(space), reason=body.reason)


def _seal(request: Request, recall: Recall, which: ask.Which, space: str | None) -> str:
    """Return what stands for a selection and the messages that are in it now; only this server, while it runs, can make it."""
    selection = which.selection(space)
    named = json.dumps([space, which.model_dump()], sort_keys=True).encode()
    ids = hashlib.sha256(recall.store.ids(selection).tobytes()).digest()
    return hmac.new(request.app.state.secret, named + ids, "sha256").hexdigest()


# What is above spaces.


@router.get("/stats", tags=["server"])
def all_stats(request: Request, recall: Memory) -> dict[str, Any]:
    """Count what the store holds; needs a key that sees all spaces."""
    _everywhere(request)
    return recall.stats()


@router.get("/log", tags=["server"])
def audit_log(request: Request, recall: Memory, after: Annotated[int, Query(ge=0, le=ask.LAST)] = 0) -> list[dict[str, Any]]:
    """Show the audit log (counts, ids and hashes); needs a key that sees all spaces."""
    _everywhere(request)
    return recall.store.audit_log(after)


@router.get("/receipts", tags=["forgetting"])
def receipts(request: Request, recall: Memory) -> list[dict[str, Any]]:
    """List the receipts of everything that was erased; needs a key that sees all spaces."""
    _everywhere(request)
    return receipts_of(recall.store)


@router.post("/receipts/verify", tags=["forgetting"])
def verify(recall: Memory, body: ask.Shown) -> list[dict[str, Any]]:
    """Check a receipt: each thing that was checked, whether it holds, and the words for it."""
    try:
        checked = check_deletion(body.receipt, recall, trusted=body.trusted)
    except Mistake as error:
        return [{"what": error.place, "holds": False, "words": error.problem}]
    return [{"what": what, "holds": holds, "words": words} for what, holds, words in checked]
