"""A small client of OpenAI-compatible endpoints: chat, streamed chat and embeddings, with retries and without secrets in what it says.

Idea: one httpx client, one place where a failure of the wire becomes a `Mistake`. An error names the endpoint, the status and the endpoint's error code, never
the key, the request or the endpoint's own words (which may repeat either). The key is an argument, or REMANENCE_UPSTREAM_KEY; OPENAI_API_KEY is sent to
api.openai.com alone. Redirects are not followed: a key goes to the address that was named. Cost: the wire's.

    client = OpenAIClient("http://localhost:11434/v1")
    text = client.complete([{"role": "user", "content": "Good morning"}], model="llama3.2")
    vectors = client.embed(["one text", "another"], model="nomic-embed-text")  # (2, D) fp32
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from jaxtyping import Float32

from remanence.errors import Mistake

AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504})  # statuses worth another try
LONGEST_WAIT = 30.0  # seconds between two tries, whatever Retry-After asks
REMEDIES = {
    400: "check the model's name and its options",
    401: "set REMANENCE_UPSTREAM_KEY to a key of this endpoint",
    403: "use a key that may do this",
    404: "check the address (it usually ends in /v1) and the model's name",
    413: "send less at once",
    429: "wait, or use a key with a higher limit",
}


def split_endpoint(name: str) -> tuple[str, str]:
    """Split `openai:MODEL@URL` (or `MODEL@URL`) into model and URL.

    Raises:
        Mistake: it has no model or no http(s) address.
    """
    found = re.fullmatch(r"(.+?)@(https?://.+)", name.removeprefix("openai:"))
    if not found:
        raise Mistake("endpoint", "names no model and address", "write openai:MODEL@URL, as in openai:llama3.2@http://localhost:11434/v1")
    return found[1], found[2]


def clean_address(url: str) -> str:
    """Return an endpoint's base address without trailing slash.

    Raises:
        Mistake: it is no http(s) address, or holds a name and password, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is no number is refused here
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        raise Mistake("endpoint", "is no http or https address", "name one such as http://localhost:11434/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise Mistake("endpoint", "holds more than host and path", "give the key in REMANENCE_UPSTREAM_KEY, not in the address")
    return url.rstrip("/")


def key_for(url: str, key: str | None = None) -> str | None:
    """Return the key to send to an address: the one given, REMANENCE_UPSTREAM_KEY, or for api.openai.com OPENAI_API_KEY.

    Raises:
        Mistake: it holds a character that no header can carry.
    """
    found = key or os.environ.get("REMANENCE_UPSTREAM_KEY") or None
    if found is None and urlsplit(url).hostname == "api.openai.com":
        found = os.environ.get("OPENAI_API_KEY") or None
    if found is not None and not re.fullmatch(r"[\x21-\x7e]+", found.strip()):
        raise Mistake("endpoint", "the key holds a character that no header can carry", "copy it again")
    return found.strip() if found else None


class OpenAIClient:
    """Talk to an OpenAI-compatible endpoint; safe to share between threads.

    Args:
        url: the base address, usually ending in /v1.
        key: sent as a bearer token; see `key_for` for where else it is looked for.
        timeout: seconds to wait for each piece of an answer.
        retries: further tries after a connection that failed or a status of `AGAIN`, with waits of 0.5, 1, 2, ... seconds or what Retry-After says.
        transport: of httpx, for tests.
        wait: sleeps, for tests.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 120.0,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
        wait: Callable[[float], None] = time.sleep,
    ):
        self.url, self.retries, self._wait = clean_address(url), retries, wait
        self._key = key_for(self.url, key)
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)), transport=transport)

    def __repr__(self) -> str:
        return f"OpenAIClient({self.url!r})"

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Post a chat completion (not streamed) and return the endpoint's answer whole."""
        return self._json("POST", "chat/completions", {**body, "stream": False})

    def complete(self, messages: Sequence[Mapping[str, Any]], *, model: str, **options: Any) -> str:
        """Return the text of the first choice of a chat completion.

        Raises:
            Mistake: the endpoint failed, or answered without text.
        """
        answer = self.chat({"model": model, "messages": [dict(message) for message in messages], **options})
        try:
            text = answer["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise self._strange("holds no text")
        return text

    def stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Post a chat completion and yield its streamed chunks as they arrive; a stream that breaks off raises."""
        with self._answer("POST", "chat/completions", {**body, "stream": True}) as answer:
            try:
                for line in answer.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    if line.startswith("data:") and data:
                        yield _object(data)
            except (httpx.TransportError, ValueError) as error:
                raise self._strange(f"broke off ({type(error).__name__})") from None
        raise self._strange("ended before [DONE]")

    def embed(self, texts: Sequence[str], *, model: str, batch: int = 128, **options: Any) -> Float32[np.ndarray, "N D"]:
        """Return the endpoint's vector of each text, as it gave them (not normalised), in the order of the texts.

        Raises:
            Mistake: the endpoint failed, or its vectors are not one row of numbers per text, all of one length.
        """
        rows: list[Any] = []
        for first in range(0, len(texts), batch):
            part = list(texts[first : first + batch])
            answer = self._json("POST", "embeddings", {"model": model, "input": part, "encoding_format": "float", **options})
            try:
                found = sorted(answer["data"], key=lambda row: row["index"])
                if [row["index"] for row in found] != list(range(len(part))):
                    raise ValueError
                rows += [row["embedding"] for row in found]
            except (LookupError, TypeError, ValueError):
                raise self._strange("does not hold one vector per text") from None
        try:
            vectors = np.array(rows, dtype=np.float32)
        except (TypeError, ValueError):
            raise self._strange("holds vectors of different lengths, or no numbers") from None
        if len(texts) and vectors.ndim != 2:
            raise self._strange("does not hold one vector per text")
        return vectors.reshape(len(texts), -1) if len(texts) else np.zeros((0, 0), np.float32)

    def models(self) -> dict[str, Any]:
        """Return the endpoint's list of models."""
        return self._json("GET", "models", None)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        with self._answer(method, path, body) as answer:
            try:
                return _object(answer.read())
            except (httpx.TransportError, ValueError):
                raise self._strange("is no JSON object") from None

    @contextmanager
    def _answer(self, method: str, path: str, body: Mapping[str, Any] | None) -> Iterator[httpx.Response]:
        """Yield an answer with status 200..299 whose body is not yet read, trying again where that may help."""
        tries = self.retries + 1
        content = None if body is None else json.dumps(body).encode()  # escapes what UTF-8 cannot hold: half a surrogate pair is text too
        for attempt in range(tries):
            request = self._http.build_request(method, f"{self.url}/{path}", content=content, headers={"content-type": "application/json"})
            last = attempt == tries - 1
            try:
                answer = self._http.send(request, stream=True)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                if last:
                    problem = f"cannot be reached ({type(error).__name__})"
                    raise Mistake(self.url, problem, "check that it is running and the address is right") from None
                self._wait(min(LONGEST_WAIT, 0.5 * 2**attempt))
                continue
            try:
                if answer.is_success:
                    yield answer
                    return
                if answer.status_code not in AGAIN or last:
                    raise self._refusal(answer)
            finally:
                answer.close()
            self._wait(min(LONGEST_WAIT, retry_after(answer.headers) or 0.5 * 2**attempt))

    def _refusal(self, answer: httpx.Response) -> Mistake:
        code = ""
        try:
            answer.read()
            code = error_code(answer.content)
        except httpx.TransportError:
            pass
        remedy = REMEDIES.get(answer.status_code, "try again later, or look at the endpoint's own log")
        return Mistake(self.url, f"answered with status {answer.status_code}{f' ({code})' if code else ''}", remedy)

    def _strange(self, problem: str) -> Mistake:
        return Mistake(self.url, f"the endpoint's answer {problem}", "check that it speaks the OpenAI interface")


def error_code(body: bytes) -> str:
    """Return the error code or type of an endpoint's error answer where it is one plain word, else nothing."""
    try:
        error = _object(body).get("error")
    except ValueError:
        return ""
    words = [error.get("code"), error.get("type")] if isinstance(error, dict) else []
    return next((word for word in words if isinstance(word, str) and re.fullmatch(r"[a-z_]{1,40}", word)), "")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that Retry-After asks for, where it names a number."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _object(data: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found
