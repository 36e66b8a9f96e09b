"""What answers behind the proxy: any OpenAI-compatible endpoint over HTTP, or a Hugging Face model in this process (`local_model.py`).

Idea: an upstream takes method, path and body and gives back status, headers and the body as it comes, piece by piece; the proxy need not know more. What it
says is passed on unread. The caller's own key (it is ours) never goes to the upstream, and the upstream's key never comes back. Cost: the wire's.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import httpx

from remanence.errors import Mistake
from remanence.recall.openai_client import clean_address, key_for

DROPPED = frozenset(  # of an answer: what belongs to one connection, is set anew, or is meant for no one further
    [
        "connection",
        "content-encoding",
        "content-length",
        "date",
        "keep-alive",
        "proxy-authenticate",
        "server",
        "set-cookie",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "www-authenticate",
    ]
)


class Broken(Exception):
    """Say that an upstream's answer broke off in the middle."""


class Silent(Mistake):
    """Say that an upstream took too long."""


@dataclass
class Answer:
    """An upstream's answer: `pieces` come as the upstream sends them and raise `Broken` where it dies; `close` lets go of it at any time."""

    status: int
    headers: Mapping[str, str]
    pieces: AsyncIterator[bytes]
    close: Callable[[], Awaitable[None]]


class Upstream(Protocol):
    """A model behind the OpenAI interface; `context` is how many tokens it reads, where that is known."""

    name: str
    context: int | None

    async def open(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        """Send a request to `path` (`chat/completions`, `models`) and return the answer as soon as its status is known.

        Raises:
            Mistake: it cannot be reached, or is silent for too long.
        """
        ...

    async def close(self) -> None:
        """Let go of everything."""
        ...


class HttpUpstream:
    """An OpenAI-compatible endpoint.

    Args:
        url: base address, usually ending in /v1.
        key: see `openai_client.key_for`.
        timeout: seconds of silence after which it counts as gone.
        transport: of httpx, for tests.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 600.0, transport: httpx.AsyncBaseTransport | None = None):
        self.name = clean_address(url)
        self.context: int | None = None
        found = key_for(self.name, key)
        headers = {"authorization": f"Bearer {found}"} if found else {}
        waits = httpx.Timeout(timeout, connect=min(timeout, 10.0))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
        self._http = httpx.AsyncClient(headers=headers, timeout=waits, transport=transport, limits=limits)

    async def open(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        """Send a request; only OpenAI's own headers of the caller go along."""
        sent = {name: value for name, value in headers.items() if re.match(r"(?i)openai-|idempotency-key$", name) and value.isascii()}
        sent |= {"content-type": "application/json", "accept-encoding": "identity"}  # pieces as they are, not as a decoder cuts them
        try:
            request = self._http.build_request(method, f"{self.name}/{path}", content=body, headers=sent)
            answer = await self._http.send(request, stream=True)
        except httpx.TimeoutException as error:
            raise Silent(self.name, f"does not answer ({type(error).__name__})", "try again, or look whether it is overloaded") from None
        except httpx.TransportError as error:
            raise Mistake(self.name, f"cannot be reached ({type(error).__name__})", "check that it is running and its address") from None
        kept = {
            name: value
            for name, value in answer.headers.items()
            if name not in DROPPED and not name.startswith("x-remanence") and value.isascii()  # others cannot be sent on as they were
        }
        return Answer(answer.status_code, kept, _pieces(answer), answer.aclose)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_bytes():
            yield piece
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise Broken(type(error).__name__) from None
    finally:
        await answer.aclose()


def load_upstream(name: str, *, key: str | None = None) -> Upstream:
    """Return the upstream of a name: an http(s) address, or `hf:FOLDER` (or a hub id) for a Hugging Face model in this process.

    Raises:
        Mistake: it is neither, or the model cannot be loaded.
    """
    if name.startswith("hf:"):
        from remanence.recall.local_model import LocalModel

        return LocalModel.load(name.removeprefix("hf:"))
    if not re.match(r"https?://", name):
        raise Mistake("upstream", "is neither an address nor a model", "write http://localhost:11434/v1, or hf:FOLDER")
    return HttpUpstream(name, key)
