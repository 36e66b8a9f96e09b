"""A memory over HTTP: REST with OpenAPI, a web page, and whatever is mounted beside them (an OpenAI-compatible proxy, an MCP server), behind one guard.

    serve(Recall.open("memory"))                       # http://127.0.0.1:8765, the key is printed at the first start

Loopback and a key are the defaults. A write that was answered is on the disk; on SIGTERM and SIGINT no new request is taken, those under way are
answered, and the store is closed. No log line holds a path, a text or a key.

Cost: a thread per request under way (40 at most), one transaction per write.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from remanence.errors import Mistake
from remanence.recall import endpoints
from remanence.recall.access import Guard, Keys, loopback, refusal
from remanence.recall.service import Recall

PAGE = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}


@dataclass(frozen=True)
class ServerSettings:
    """Set who is let in and how much.

    Args:
        keys: file of the API keys; `None`: no key is asked for, and only this machine is answered.
        rate, burst: requests a second of one key, and at once; 0: no limit.
        body_limit: bytes of a request.
        patience: seconds that requests under way get at the end.
    """

    keys: Path | None = None
    rate: float = 100.0
    burst: float = 200.0
    body_limit: int = 4 * 2**20
    patience: int = 30

    def __post_init__(self) -> None:
        for name, least in (("rate", 0), ("burst", 1), ("body_limit", 1024), ("patience", 0)):
            if not getattr(self, name) >= least:
                raise Mistake(name, f"must be at least {least}, got {getattr(self, name)}", "give a larger number")


def make_app(
    recall: Recall,
    settings: ServerSettings = ServerSettings(),
    *,
    routers: Sequence[APIRouter] = (),
    mounts: Mapping[str, Any] | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        recall: the memory; `request.app.state.recall` for routers.
        settings: see there.
        routers: further routes, such as the proxy's; they stand behind the same guard and find the caller's `Key` in `request.state.key`.
        mounts: prefix -> ASGI application (the MCP server), whose lifespan runs within this one.
    """
    mounts = mounts or {}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for mounted in mounts.values():
                await stack.enter_async_context(mounted.router.lifespan_context(mounted))
            yield

    app = FastAPI(
        title="Remanence recall",
        version=version("remanence"),
        description="A conversation memory that remembers verbatim, forgets for real, and can prove both.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    app.state.recall, app.state.secret = recall, secrets.token_bytes(32)
    app.include_router(endpoints.router)
    for extra in routers:
        app.include_router(extra)
    for path, (name, kind) in PAGE.items():
        app.add_api_route(path, _file(name, kind), include_in_schema=False)
    app.add_api_route("/health", health, tags=["server"])
    for prefix, mounted in mounts.items():
        app.mount(prefix, mounted)
    for error, answer in ((Mistake, _mistake), (RequestValidationError, _invalid), (HTTPException, _refused)):
        app.add_exception_handler(error, answer)
    app.add_middleware(
        Guard, keys=Keys(settings.keys) if settings.keys else None, rate=settings.rate, burst=settings.burst, body_limit=settings.body_limit
    )
    return app


def health() -> dict[str, str]:
    """Say that the server answers."""
    return {"status": "ok", "version": version("remanence")}


def _file(name: str, kind: str) -> Callable[[], Response]:
    content = (Path(__file__).parent / name).read_bytes()

    def page() -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return page


def _mistake(request: Request, error: Exception) -> Response:
    assert isinstance(error, Mistake)
    failed = isinstance(error.__cause__, OSError) or type(error.__cause__).__module__ == "sqlite3"  # the disk's fault, not the caller's
    return refusal(507 if failed else 400, error.problem, error.remedy, error.place)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])[:200].encode("utf-8", "replace").decode()
    return refusal(422, first["msg"], "see /openapi.json for what is asked here", place)  # never the input: it may be a text


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, str(error.detail), "see /openapi.json for what there is", headers=dict(error.headers or {}))


def serve(
    recall: Recall,
    host: str = "127.0.0.1",
    port: int = 8765,
    settings: ServerSettings = ServerSettings(),
    *,
    routers: Sequence[APIRouter] = (),
    mounts: Mapping[str, Any] | None = None,
    network: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until SIGTERM or SIGINT, then close the memory.

    Args:
        recall: the memory; it is closed at the end.
        host, port: where to listen; port 0: any free one.
        settings, routers, mounts: as in `make_app`.
        network: allow a host other than this machine's own.
        say: prints the lines for the user: where it listens, and at the first start the key.

    Raises:
        Mistake: the host is not this machine's and `network` is not given, no keys are set then, or the port is taken.
    """
    import uvicorn

    if not loopback(host):
        if not network:
            raise Mistake(f"--host {host}", "would let other machines in", "add --network if that is what you want, and put TLS in front")
        if settings.keys is None:
            raise Mistake(f"--host {host}", "would let other machines in without a key", "leave the keys on")
    listener = _listen(host, port)
    try:
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        say(f"Remanence recall listens on {address}")
        if settings.keys is not None and not Keys(settings.keys).all():
            secret = Keys(settings.keys).make("first")
            say(f"Your key, shown this once: {secret}")
            say(f"The page, signed in: {address}/#key={secret}")
        app = make_app(recall, settings, routers=routers, mounts=mounts)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        config = uvicorn.Config(app, access_log=False, log_config=None, server_header=False, timeout_graceful_shutdown=settings.patience)
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()
        recall.close()


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        Mistake: the port is taken, or the host is none.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        raise Mistake(f"--host {host} --port {port}", f"cannot be listened on ({error})", "choose another port") from error
    return listener
