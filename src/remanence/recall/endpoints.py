"""The routes of the server: spaces, conversations, messages, search, prompts, facts, forgetting, receipts; each a few lines over `Recall`.

A space that the caller's key does not see and a space that is not there are answered alike. Forgetting needs the `confirm` of a preview: what goes is what was
seen, and if the selection has changed in between, nothing goes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from remanence.errors import Mistake
from remanence.recall import requests as ask
from remanence.recall.access import key_of
from remanence.recall.items import Fact, Hit, Message, Prompt, Selection
from remanence.recall.service import Recall

router = APIRouter(prefix="/v1")


def memory(request: Request) -> Recall:
    """Return the memory that is served."""
    return request.app.state.recall  # type: ignore[no-any-return]


Memory = Annotated[Recall, Depends(memory)]


def named_space(request: Request, space: Annotated[ask.Name, Path()]) -> str:
    """Return a space's name if the caller may see one of that name."""
    if not key_of(request).may(space):
        raise HTTPException(404, "there is no such space")
    return space


def standing_space(recall: Memory, space: Annotated[str, Depends(named_space)]) -> str:
    """Return a space's name if it is there and the caller may see it."""
    if space not in recall.store.spaces():
        raise HTTPException(404, "there is no such space")
    return space


Named = Annotated[str, Depends(named_space)]
Space = Annotated[str, Depends(standing_space)]


def message_of(recall: Recall, space: str, number: int) -> Message:
    """Return a message of a space."""
    found = recall.store.messages(Selection(space=space, ids=(number,)))
    if not found:
        raise HTTPException(404, "there is no such message")
    return found[0]


# Spaces and conversations.


@router.get("/spaces", tags=["spaces"])
def spaces(request: Request, recall: Memory) -> list[dict[str, Any]]:
    """List the spaces that your key sees."""
    return [{"name": name, **recall.stats(name)} for name in recall.store.spaces() if key_of(request).may(name)]


@router.put("/spaces/{space}", tags=["spaces"])
def make_space(space: Named, recall: Memory, body: ask.Making) -> dict[str, Any]:
    """Make a space if it is not there."""
    recall.store.make_space(space, encrypt=body.encrypt)
    return {"name": space, **recall.stats(space)}


@router.get("/spaces/{space}/stats", tags=["spaces"])
def stats(space: Space, recall: Memory) -> dict[str, Any]:
    """Count what a space holds."""
    return recall.stats(space)


@router.get("/spaces/{space}/conversations", tags=["conversations"])
def conversations(space: Space, recall: Memory) -> list[dict[str, Any]]:
    """List the conversations of a space."""
    return recall.store.conversations(space)


@router.get("/spaces/{space}/gist", tags=["conversations"])
def gist(space: Space, recall: Memory, conversation: ask.Name) -> dict[str, str]:
    """Show the one line that stands for a conversation."""
    return {"gist": recall.gist(space, conversation)}


# Messages.


@router.get("/spaces/{space}/messages", tags=["messages"])
def messages(
    space: Space,
    recall: Memory,
    which: Annotated[ask.Which, Depends(ask.in_query)],
    after: Annotated[int, Query(ge=0, le=ask.LAST)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    newest: bool = False,
    contains: ask.Query | None = None,
) -> list[Message]:
    """List messages, oldest first, from the id `after` on (`newest`: the last ones)."""
    return recall.store.messages(which.selection(space), after=after, limit=limit, newest=newest, contains=contains)


@router.post("/spaces/{space}/messages", status_code=201, tags=["messages"])
def add(space: Named, recall: Memory, body: ask.SaidHere) -> Message:
    """Remember a message; when this is answered, it is on the disk."""
    rest = {"role": body.role, "person": body.person, "at": body.at, "turn": body.turn, "meta": body.meta, "key": body.key}
    return recall.add(body.text, space=space, conversation=body.conversation, **rest)


@router.post("/spaces/{space}/messages/batch", status_code=201, tags=["messages"])
def add_many(space: Named, recall: Memory, body: ask.SaidMany) -> list[Message]:
    """Remember up to 1,000 messages of one conversation."""
    return recall.add_many([message.new() for message in body.messages], space=space, conversation=body.conversation)


@router.get("/spaces/{space}/messages/{number}", tags=["messages"])
def message(space: Space, recall: Memory, number: ask.Id) -> Message:
    """Show one message."""
    return message_of(recall, space, number)


@router.put("/spaces/{space}/messages/{number}", tags=["messages"])
def edit(space: Space, recall: Memory, number: ask.Id, body: ask.Text) -> Message:
    """Correct a message; its old text is erased everywhere."""
    message_of(recall, space, number)
    return recall.edit(number, body.text)


@router.delete("/spaces/{space}/messages/{number}", tags=["forgetting"])
def forget_message(space: Space, recall: Memory, number: ask.Id) -> dict[str, Any]:
    """Forget one message, and answer with the receipt."""
    message_of(recall, space, number)
    return recall.forget(Selection(space=space, ids=(number,)))


@router.post("/spaces/{space}/search", tags=["messages"])
def search(space: Space, recall: Memory, body: ask.Question) -> list[Hit]:
    """Find what was said, best first."""
    return recall.search(body.query, body.k, body.selection(space))


@router.post("/spaces/{space}/prompt", tags=["conversations"])
def prompt(space: Space, recall: Memory, body: ask.Composing) -> Prompt:
    """Compose the prompt for a user's next words within its budget of tokens."""
    return recall.compose(
        body.user,
        system=body.system,
        space=space,
        conversation=body.conversation,
        budget=body.budget,
        scope=body.scope,
        used=not body.preview,
    )


@router.get("/spaces/{space}/export", tags=["messages"], response_class=StreamingResponse)
def export(space: Space, recall: Memory, which: Annotated[ask.Which, Depends(ask.in_query)]) -> StreamingResponse:
    """Stream messages as JSON lines."""
    selection = which.selection(space)

    def lines() -> Iterator[str]:
        after = 0
        while page := recall.store.messages(selection, after=after, limit=500):
            yield "".join(json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in page)
            after = page[-1].id

    return StreamingResponse(lines(), media_type="application/x-ndjson")


# Facts.


@router.get("/spaces/{space}/facts", tags=["facts"])
def facts(space: Space, recall: Memory, conversation: ask.Name | None = None, pinned: bool | None = None) -> list[Fact]:
    """List facts."""
    return recall.store.facts(space, conversation, pinned=pinned)


@router.post("/spaces/{space}/facts", status_code=201, tags=["facts"])
def add_fact(space: Space, recall: Memory, body: ask.Stated) -> Fact:
    """Write a fact down; a pinned one enters every prompt, and one with sources goes when a source goes."""
    return recall.add_fact(space, body.text, conversation=body.conversation, sources=body.sources, pinned=body.pinned)


@router.delete("/spaces/{space}/facts/{number}", tags=["facts"])
def remove_fact(space: Space, recall: Memory, number: ask.Id) -> dict[str, int]:
    """Remove a fact."""
    if all(fact.id != number for fact in recall.store.facts(space)):
        raise HTTPException(404, "there is no such fact")
    recall.remove_fact(number)
    return {"removed": number}


# Forgetting.


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
    seen = recall.preview(which.selection(space))
    return {"space": space, "selection": which.model_dump(exclude_none=True), "confirm": _seal(request, recall, which, space)} | {
        "preview": dataclasses.asdict(seen)
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


@router.post("/receipts/verify", tags=["forgetting"])
def verify(recall: Memory, body: ask.Shown) -> list[dict[str, Any]]:
    """Check a receipt: each thing that was checked, whether it holds, and the words for it."""
    from remanence.recall.deletion import check_deletion

    try:
        checked = check_deletion(body.receipt, trusted=body.trusted)
    except Mistake as error:
        return [{"what": error.place, "holds": False, "words": error.problem}]
    return [{"what": what, "holds": holds, "words": words} for what, holds, words in checked]
