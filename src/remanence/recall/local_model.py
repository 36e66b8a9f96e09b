"""A small upstream out of any Hugging Face causal language model, so that the proxy can be tried without a network: `--upstream hf:FOLDER`.

Idea: one model, one answer at a time; others wait. Messages become a prompt by the tokenizer's chat template, or where there is none by plain turns (`user: ...`)
that end where the next one would begin. A template that takes no system message gets it with the first user turn.

Of OpenAI's options these count: temperature, top_p, seed, max_tokens or max_completion_tokens, stop, stream, stream_options.include_usage, and tools where the
template shows them. Without a temperature it takes the most likely token, so that an answer can be had again. Cost: the model's own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import torch

from remanence.errors import Mistake
from remanence.models.forward import is_language_model, positions
from remanence.models.load import load_model
from remanence.recall.calls import text_of
from remanence.recall.generating import Asked, Run
from remanence.recall.upstream import Answer

TOKENS = 256  # of an answer that asks for no other number
PLAIN_STOPS = ("\nuser:", "\nsystem:", "\ntool:")


class LocalModel:
    """A causal language model behind the OpenAI interface.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: of the model.
        name: by which it is listed.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.context: int | None = positions(model)
        self._turn = threading.Lock()
        self._count = itertools.count()

    @classmethod
    def load(cls, spec: str) -> LocalModel:
        """Load a folder, a hub id or anything else that `models.load` knows.

        Raises:
            Mistake: it is not there, is no language model, or has no tokenizer.
        """
        loaded = load_model(spec, device=torch.accelerator.current_accelerator() or "cpu")
        if loaded.processor is None or not is_language_model(loaded.model):
            raise Mistake(spec, "is no language model with a tokenizer", "name the folder of a Hugging Face causal language model")
        return cls(loaded.model, loaded.processor, spec)

    async def open(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        """Answer a request as an endpoint would."""
        if path == "models":
            return _answer(200, {"object": "list", "data": [{"id": self.name, "object": "model", "created": 0, "owned_by": "local"}]})
        if path != "chat/completions":
            return _answer(404, _error("there is nothing here", "not_found"))
        try:
            asked = self.read(json.loads(body or b""))
        except Mistake as error:
            return _answer(400, _error(str(error), "context_length_exceeded" if error.place == "messages" else "invalid_request"))
        except (ValueError, RecursionError):
            return _answer(400, _error("the body is no JSON", "invalid_request"))
        run = Run(self.model, self.tokenizer, self._turn, asked, self.name, next(self._count))

        async def close() -> None:
            run.stopped.set()

        kind = "text/event-stream" if asked.stream else "application/json"
        return Answer(200, {"content-type": kind}, run.stream() if asked.stream else run.whole(), close)

    async def close(self) -> None:
        """Do nothing: there is nothing to let go of."""

    def read(self, content: Any) -> Asked:
        """Return what a request asks for.

        Raises:
            Mistake: it cannot be done.
        """
        messages = content.get("messages") if isinstance(content, dict) else None
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages)
        ):
            raise Mistake("request", "has no messages with roles", "send a chat completion")
        if content.get("n") not in (None, 1):
            raise Mistake("n", "only one choice is made at a time", "leave it out")
        tools = content.get("tools")
        text = self.prompt([{**one, "content": text_of(one)} for one in messages], tools if isinstance(tools, list) else None)
        plain = self.tokenizer.chat_template is None
        ids = self.tokenizer(text, add_special_tokens=plain, return_tensors="pt")["input_ids"]
        room = positions(self.model) - ids.shape[1]
        if room < 1:
            raise Mistake(
                "messages",
                f"they take {ids.shape[1]} tokens, the model reads {positions(self.model)}",
                "send less, or give the memory a smaller budget",
            )
        wanted = _number("max_tokens", content.get("max_completion_tokens") or content.get("max_tokens") or TOKENS, 1, 1e9, whole=True)
        stop = content.get("stop") or []
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(one, str) for one in stop):
            raise Mistake("stop", "is neither a text nor a list of texts", "correct it or leave it out")
        options = content.get("stream_options")
        return Asked(
            ids,
            min(int(wanted), room),
            _number("temperature", content.get("temperature") or 0, 0, 100),
            _number("top_p", content.get("top_p") or 1, 0, 1),
            None if content.get("seed") is None else int(_number("seed", content["seed"], -(2**63), 2**64, whole=True)),
            (*filter(None, stop), *(PLAIN_STOPS if plain else ())),
            content.get("stream") is True,
            isinstance(options, dict) and options.get("include_usage") is True,
            plain,
        )

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> str:
        """Return what the model reads.

        Raises:
            Mistake: the chat template refuses the messages.
        """
        turns = [{**one, "role": "system" if one["role"] == "developer" else one["role"]} for one in messages]
        if self.tokenizer.chat_template is None:
            return "".join(f"{one['role']}: {one['content']}\n" for one in turns) + "assistant:"
        from jinja2 import TemplateError

        try:
            with contextlib.suppress(TemplateError):
                return self.tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, tokenize=False)
            if len(turns) > 1 and [one["role"] for one in turns[:2]] == ["system", "user"]:  # Gemma's template takes no system message
                turns[:2] = [{**turns[1], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}]
            return self.tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise Mistake(
                "request", f"the model's chat template refuses these messages ({type(error).__name__})", "look at their roles"
            ) from None


def _number(name: str, value: Any, least: float, most: float, *, whole: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not least <= value <= most:
        raise Mistake(name, f"must be a {'whole ' if whole else ''}number from {least:g} to {most:g}", "correct it or leave it out")
    return value


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


def _answer(status: int, content: Mapping[str, Any]) -> Answer:
    async def pieces() -> AsyncIterator[bytes]:
        yield json.dumps(content).encode()

    async def close() -> None:
        pass

    return Answer(status, {"content-type": "application/json"}, pieces(), close)
