"""A mem0 server as a searcher of the ConvoMem benchmark: posted over HTTP, waited for, asked.

The server is the self-hosted one (`/memories`, `/search`). One server with one configuration is not retrieval in general: name its version and settings
beside the figures.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from remanence.data.convomem import Conversation
from remanence.errors import Mistake
from remanence.measure.convomem_search import Passage


@dataclass
class Mem0:
    """A mem0 server: conversations are posted under one user id, and asked for with the question.

    Args:
        url: of the server (`http://localhost:8888`).
        user: the id; another one per benchmark that runs at the same time.
        headers: such as an authorisation.
        settle: seconds between two looks at the number of memories; two equal numbers mean that it has indexed.
        patience: seconds to wait for that at most.
    """

    url: str
    user: str = "convomem"
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    timeout: float = 120.0
    settle: float = 1.0
    patience: float = 600.0
    waiting: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise Mistake(self.url, "is no http address of a mem0 server", "write for example http://localhost:8888")

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Post every conversation."""
        for one in conversations:
            messages = [{"role": message.speaker.lower(), "content": message.text} for message in one.messages]
            self._ask("POST", "/memories", {"messages": messages, "user_id": self.user, "run_id": one.id})
        self.waiting = True

    def search(self, question: str, k: int) -> list[Passage]:
        """Wait until the server has indexed, then ask it."""
        self._wait()
        found = self._ask("POST", "/search", {"query": question, "user_id": self.user, "limit": k})
        rows = found.get("results", []) if isinstance(found, dict) else found
        return [Passage(str(row.get("memory", "")), str(row.get("run_id") or ""), float(row.get("score") or 0.0)) for row in rows or []][:k]

    def clear(self) -> None:
        """Delete all memories of the user id."""
        self._ask("DELETE", f"/memories?user_id={urllib.parse.quote(self.user)}", None)
        self.waiting = False

    def _wait(self) -> None:
        last, until = -1, time.monotonic() + self.patience
        while self.waiting:
            found = self._ask("GET", f"/memories?user_id={urllib.parse.quote(self.user)}", None)
            number = len(found.get("results", []) if isinstance(found, dict) else found or [])
            self.waiting = number != last
            if self.waiting and time.monotonic() > until:
                raise Mistake(self.url, "the server is still indexing", "give it more patience or fewer conversations")
            last = number
            if self.waiting:
                time.sleep(self.settle)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url.rstrip("/") + path, data=data, method=method)
        for name, value in {"Content-Type": "application/json", "Accept": "application/json", **self.headers}.items():
            asked.add_header(name, value)
        try:
            with urllib.request.urlopen(asked, timeout=self.timeout) as answer:
                text = answer.read().decode()
        except (urllib.error.URLError, TimeoutError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise Mistake(self.url, f"mem0 does not answer ({reason})", "start the server or name its address") from None
        try:
            return json.loads(text or "null")
        except ValueError:
            raise Mistake(self.url, "the answer is no JSON", "name the address of a mem0 server") from None
