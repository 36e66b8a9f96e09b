"""A model behind the OpenAI interface that answers as a script says, and servers that really listen, for the tests of the proxy."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import uvicorn

PAUSE = 0.03  # seconds between two pieces, so that each arrives by itself


@dataclass
class Script:
    """One answer: status, headers, pieces; then an end (`done`), a broken connection (`dies`), or silence until the other side is gone (`stalls`)."""

    pieces: list[bytes]
    status: int = 200
    kind: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    end: str = "done"


@dataclass
class Scripted:
    """An ASGI application that notes what it was asked and answers by a script, the same one until it is changed."""

    script: Script
    seen: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.raw.append(body)
        with contextlib.suppress(ValueError):
            self.seen.append(json.loads(body) if body else {"path": scope["path"]})
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        script = self.script
        headers = {"content-type": script.kind, **script.headers}
        coded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": script.status, "headers": coded})
        for piece in script.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await anyio.sleep(PAUSE)
        if script.end == "dies":
            raise ConnectionAbortedError
        if script.end == "stalls":
            while (await receive())["type"] != "http.disconnect":
                pass
        await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def listening(app: Callable[..., Any]) -> Iterator[str]:
    """Serve an application on a free port of this machine and yield its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def event(content: Any) -> bytes:
    """Return a server-sent event."""
    return b"data: " + (content.encode() if isinstance(content, str) else json.dumps(content).encode()) + b"\n\n"


def delta(text: str | None = None, finish: str | None = None, **rest: Any) -> dict[str, Any]:
    """Return a chunk of a streamed completion."""
    choice = {"index": 0, "delta": ({} if text is None else {"content": text}) | rest, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "scripted", "choices": [choice]}


def stream(*texts: str, end: str = "done") -> Script:
    """Return a script that streams these texts."""
    whole = [event(delta(finish="stop")), event("[DONE]")] if end == "done" else []
    return Script([*(event(delta(text)) for text in texts), *whole], end=end)


def plain(text: str | None, **message: Any) -> Script:
    """Return a script that answers in one piece."""
    said = {"role": "assistant", "content": text, **message}
    body = {"id": "c1", "object": "chat.completion", "created": 1, "model": "scripted", "choices": [{"index": 0, "message": said}]}
    body["choices"][0]["finish_reason"] = "tool_calls" if "tool_calls" in message else "stop"  # type: ignore[index]
    return Script([json.dumps(body, indent=1).encode()], kind="application/json")
