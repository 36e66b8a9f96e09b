"""Who may ask a memory what: API keys, the spaces each may see, how often and how much; one guard in front of every route.

A key is 32 random bytes, shown once when it is made; the file holds its SHA-256 alone (nothing to guess: the key is random), readable by its owner only.
Every route, those of a mounted proxy or MCP server too, stands behind `Guard`: it puts the caller's `Key` into `request.state.key`, and whoever serves a space
asks `key.may(space)`. Logs hold the method, the route's template, the status, the time and the key's name: no path, query, text or key.

Cost: one hash and one comparison per key and request.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from remanence.errors import Mistake
from remanence.storage import whole_file

LOG = logging.getLogger("remanence.recall.server")
PREFIX = "rk_"
OPEN = frozenset({"/", "/health", "/openapi.json", "/page.css", "/page.js", "/favicon.ico"})  # hold no one's words
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Key:
    """Who asks. `spaces`: the only ones that this key sees; `None`: all of them, and what is above spaces (audit log, erasing everywhere)."""

    name: str
    digest: str = ""
    spaces: tuple[str, ...] | None = None
    made: float = 0.0

    def may(self, space: str) -> bool:
        """Return whether this key sees a space."""
        return self.spaces is None or space in self.spaces


class Keys:
    """The keys of a server, in one JSON file that is read again when it changes, so that a key made or revoked elsewhere counts at once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[Key, ...] = ()

    def all(self) -> tuple[Key, ...]:
        """Return the keys.

        Raises:
            Mistake: the file cannot be read, or is none of ours.
        """
        with self._lock:
            return self._read()

    def _read(self) -> tuple[Key, ...]:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, ()
            return ()
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        if stamp != self._stamp:
            try:
                rows = json.loads(self.path.read_text(encoding="utf-8"))["keys"]
                self._keys = tuple(
                    Key(
                        str(row["name"]), str(row["digest"]), None if row["spaces"] is None else tuple(map(str, row["spaces"])), row["made"]
                    )
                    for row in rows
                )
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise Mistake(
                    self.path, f"is no file of keys ({type(error).__name__})", "move it away; the next start makes a new one"
                ) from error
            self._stamp = stamp
        return self._keys

    def make(self, name: str, spaces: Sequence[str] | None = None) -> str:
        """Make a key and return it: it is kept nowhere and cannot be shown again.

        Args:
            name: to tell it from others in logs and to revoke it.
            spaces: that it may see; `None`: all.
        """
        secret = PREFIX + secrets.token_urlsafe(32)
        with self._lock:
            keys = self._read()
            if not name or len(name) > 100 or not name.isprintable():
                raise Mistake("key", "needs a printable name of 1 to 100 characters", "give one")
            if any(key.name == name for key in keys):
                raise Mistake(self.path, f"has a key named '{name}' already", "revoke it first or choose another name")
            self._write((*keys, Key(name, digest(secret), None if spaces is None else tuple(spaces), time.time())))
        return secret

    def revoke(self, name: str) -> None:
        """Remove a key; a running server refuses it from the next request on."""
        with self._lock:
            keys = self._read()
            if all(key.name != name for key in keys):
                raise Mistake(self.path, f"has no key named '{name}'", f"it has {', '.join(key.name for key in keys) or 'none'}")
            self._write(tuple(key for key in keys if key.name != name))

    def _write(self, keys: tuple[Key, ...]) -> None:
        with whole_file(self.path) as temporary, os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=1)
        self._stamp = None

    def find(self, secret: str) -> Key | None:
        """Return the key that a caller presents, compared in constant time with every one there is."""
        asked, found = digest(secret), None
        for key in self.all():
            if hmac.compare_digest(key.digest, asked):
                found = key
        return found


def digest(secret: str) -> str:
    """Return the SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class Buckets:
    """Let each caller do `rate` things a second, and `burst` at once (a token bucket per caller, the longest unseen forgotten first)."""

    def __init__(self, rate: float, burst: float, most: int = 10_000):
        self.rate, self.burst, self.most = rate, burst, most
        self._lock = threading.Lock()
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, who: str, now: float | None = None) -> float:
        """Take one token; return 0.0, or the seconds until there is one."""
        if self.rate <= 0:
            return 0.0
        now = time.monotonic() if now is None else now
        with self._lock:
            tokens, then = self._held.pop(who, (self.burst, now))
            tokens = min(self.burst, tokens + (now - then) * self.rate)
            short = max(0.0, (1 - tokens) / self.rate)
            self._held[who] = (tokens if short else tokens - 1, now)
            if len(self._held) > self.most:
                self._held.popitem(last=False)
        return short


def refusal(status: int, problem: str, remedy: str, place: str = "request", headers: dict[str, str] | None = None) -> JSONResponse:
    """Return an error in the one form that all errors of the server have."""
    return JSONResponse({"error": {"place": place, "problem": problem, "remedy": remedy}}, status, headers)


class Guard:
    """Stand in front of an application: key, rate, size, headers, one log line, and one sentence for whatever goes wrong behind it.

    Args:
        app: the application.
        keys: `None`: no key is asked for; then only pages and programs of this machine are answered (the Host and Origin headers say who asks).
        rate, burst: requests a second of one key, and at once; 0: no limit.
        body_limit: bytes of a request.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, rate: float, burst: float, body_limit: int):
        self.app, self.keys, self.body_limit = app, keys, body_limit
        self.known, self.unknown = Buckets(rate, burst), Buckets(min(rate, 2.0), 20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, started = time.perf_counter(), 500, False

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            refused = self._admit(scope)
            if refused is not None:
                await refused(scope, receive, answer)
            else:
                await self.app(scope, self._measured(receive), answer)
        except Exception as error:  # its words may hold a user's text: only its kind and place are told
            at = error.__traceback__
            while at is not None and at.tb_next is not None:
                at = at.tb_next
            place = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at is not None else "?"
            LOG.error("%s at %s", type(error).__name__, place)
            if not started:
                response = refusal(500, f"the server failed ({type(error).__name__})", "see its log, and report this", "server")
                await response(scope, receive, answer)
        finally:
            route = scope.get("route")
            key = scope.get("state", {}).get("key")
            template = getattr(route, "path", None) or ("(page)" if scope["path"] in OPEN else "(no route)")
            spent = 1000 * (time.perf_counter() - begun)
            LOG.info("%s %s %d %.1f ms %s", scope["method"], template, status, spent, key.name if key else "-")

    def _admit(self, scope: Scope) -> JSONResponse | None:
        """Return why a request is not let through, `None` if it is."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.body_limit:
            return refusal(413, f"the body is larger than {self.body_limit} bytes", "send less at once")
        if scope["path"] in OPEN and scope["method"] in ("GET", "HEAD"):
            return None
        if self.keys is None:
            asked, origin = headers.get("host", ""), headers.get("origin")
            if not loopback(asked) or (origin is not None and not loopback(origin.partition("://")[2])):
                return refusal(403, "a server without keys answers this machine only", "start it with keys")
            key: Key | None = Key("anyone")
        else:
            kind, _, secret = headers.get("authorization", "").partition(" ")
            secret = secret.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
            key = self.keys.find(secret) if secret else None
        if key is None:
            wait = self.unknown.wait(scope["client"][0] if scope.get("client") else "?")
            if wait:
                return _slower(wait)
            told = {"www-authenticate": 'Bearer realm="remanence"'}
            return refusal(401, "the key is missing or not known", "send it as 'Authorization: Bearer KEY'", "key", told)
        scope.setdefault("state", {})["key"] = key
        wait = self.known.wait(key.digest)
        return _slower(wait) if wait else None

    def _measured(self, receive: Receive) -> Receive:
        """Return a `receive` that refuses a body that goes on after the limit, whatever its header promised."""
        seen = 0

        async def measured() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if seen > self.body_limit:
                raise HTTPException(413, f"the body is larger than {self.body_limit} bytes")
            return message

        return measured


def _slower(wait: float) -> JSONResponse:
    return refusal(429, "too many requests", f"wait {wait:.2f} s", headers={"retry-after": str(max(1, round(wait + 0.5)))})


def loopback(host: str) -> bool:
    """Return whether a host, with or without a port, is this machine."""
    name = host.rsplit(":", 1)[0] if (not host.endswith("]") and host.count(":") == 1) or "]:" in host else host
    return name.strip("[]").lower() in ("localhost", "::1") or (name.startswith("127.") and name.replace(".", "").isdecimal())


def key_of(scope: Any) -> Key:
    """Return who asks, of a request or anything else with a `state`."""
    return scope.state.key  # type: ignore[no-any-return]
