"""What the proxy stores of an exchange: the user's turn and the reply, once, whatever becomes of the connection.

Idea: a stream is passed on piece by piece while its text is gathered beside it. The reply is stored before the piece with `[DONE]` goes out, so that who has
read it to the end finds it remembered; if the client goes away or the upstream dies, what there is is stored and marked. Cost: the text of a reply in memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from remanence.errors import Mistake
from remanence.recall.calls import Call, raw_text, storable
from remanence.recall.items import Message
from remanence.recall.service import Recall
from remanence.recall.upstream import Answer, Broken

LOG = logging.getLogger("remanence.recall.proxy")
LINE = 2**24  # bytes of a line of a stream; a longer one is passed on but not read


class Reply:
    """The first choice of an answer, gathered from a stream or read whole."""

    def __init__(self) -> None:
        self.model: str | None = None
        self.finish: str | None = None
        self.done = False
        self._texts: list[str] = []
        self._rest = b""

    @property
    def text(self) -> str:
        """Return the text so far."""
        return storable("".join(self._texts))

    @property
    def whole(self) -> bool:
        """Return whether the model came to its end."""
        return self.done or self.finish is not None

    @classmethod
    def read(cls, content: bytes) -> Reply:
        """Read an answer that came in one piece."""
        reply = cls()
        reply._take(content, "message")
        reply.done = True
        return reply

    def feed(self, piece: bytes) -> None:
        """Read on in a stream of server-sent events; lines may be cut anywhere."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > LINE:
            self._rest = b""
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    self.done = True
                else:
                    self._take(data, "delta")

    def _take(self, data: bytes, part: str) -> None:
        try:
            content = json.loads(data)
            choices = content.get("choices")
            first = next((choice for choice in choices if choice.get("index", 0) == 0), {})
            finish, message, model = first.get("finish_reason"), first.get(part) or {}, content.get("model")
            text = raw_text(message)
        except (ValueError, TypeError, AttributeError, RecursionError):
            return  # not ours to judge: it is passed on as it is
        self.model = model if isinstance(model, str) else self.model
        self.finish = finish if isinstance(finish, str) else self.finish
        self._texts.append(text)


class Keeper:
    """Store an exchange once.

    The user's turn is stored beside the model's own work, from the moment at which the model took the request; a request that failed leaves nothing.
    """

    def __init__(self, recall: Recall, call: Call):
        self._recall, self._call = recall, call
        self._stored: list[int] = []
        self._problem = ""
        self._kept = False
        self._user: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start storing the user's turn."""
        if self._call.stores and self._call.said and self._user is None:
            self._user = asyncio.create_task(self._add("user", self._call.said, {}))

    async def keep(self, reply: Reply) -> None:
        """Store what is not stored yet, to the end even if whoever waits for it is gone; a second call does nothing."""
        if self._kept or not self._call.stores:
            return
        self._kept = True
        with anyio.CancelScope(shield=True):
            self.begin()
            if self._user is not None:
                await self._user
            if reply.text.strip():
                marks = {} if reply.whole else {"aborted": True}
                marks |= {"finish": reply.finish} if reply.finish not in (None, "stop") else {}
                await self._add("assistant", reply.text, marks | ({"model": reply.model[:200]} if reply.model else {}))

    async def _add(self, role: str, text: str, meta: dict[str, Any]) -> None:
        try:
            self._stored.append((await run_in_threadpool(self._write, role, text, {"via": "proxy", **meta})).id)
        except Mistake as error:  # the model's answer is paid for: it is passed on though it could not be stored
            self._problem = f"not stored: {error.problem}"
            LOG.error("a turn was not stored: %s", error.place)

    def _write(self, role: str, text: str, meta: dict[str, Any]) -> Message:
        call = self._call
        key = f"{call.key}/{role}" if call.key else None
        return self._recall.add(text, role=role, space=call.space, conversation=call.conversation, person=call.person, meta=meta, key=key)

    def told(self) -> dict[str, str]:
        """Return the headers that say what was stored."""
        if not self._call.stores:
            return {}
        note = " ".join(self._problem.encode("ascii", "replace").decode().split())[:500]
        return {"x-remanence-stored": ",".join(map(str, self._stored))} | ({"x-remanence-note": note} if note else {})


class Relay(StreamingResponse):
    """Pass a stream on as it comes; however it ends, the exchange is stored once."""

    def __init__(self, answer: Answer, keeper: Keeper, headers: dict[str, str]):
        super().__init__(self._pieces(), answer.status, headers)
        self._answer, self._keeper, self._reply = answer, keeper, Reply()

    async def _pieces(self) -> AsyncIterator[bytes]:
        self._keeper.begin()
        try:
            async for piece in self._answer.pieces:
                self._reply.feed(piece)
                if self._reply.done:
                    await self._keeper.keep(self._reply)
                yield piece
        except Broken as error:
            LOG.warning("the upstream broke off: %s", error)
            told = {
                "message": "the upstream broke off in the middle of its answer",
                "type": "upstream_error",
                "param": None,
                "code": "broken_stream",
            }
            yield b"\n\ndata: " + json.dumps({"error": told}).encode() + b"\n\n"
        await self._keeper.keep(self._reply)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            LOG.info("the client went away in the middle of an answer")
        finally:
            with anyio.CancelScope(shield=True):
                await self._keeper.keep(self._reply)
                await self._answer.close()
