"""A model's answer to a composed prompt: one question, one answer, nothing stored."""

from __future__ import annotations

import asyncio
import json

from remanence.errors import Mistake
from remanence.recall.items import Prompt
from remanence.recall.openai_client import split_endpoint
from remanence.recall.upstream import Upstream, load_upstream

LONGEST = 512  # tokens of an answer


def answer(prompt: Prompt, model: str) -> str:
    """Return what a model says to a prompt.

    Args:
        prompt: composed by `Recall.compose`.
        model: `hf:FOLDER`, or `openai:MODEL@URL`.

    Raises:
        Mistake: there is no such model, or it does not answer.
    """
    name, where = split_endpoint(model) if model.startswith("openai:") else (model, model)
    body = {"model": name, "messages": [{"role": "user", "content": prompt.text}], "max_tokens": LONGEST}
    return asyncio.run(_asked(load_upstream(where), json.dumps(body).encode()))


async def _asked(upstream: Upstream, body: bytes) -> str:
    try:
        came = await upstream.open("POST", "chat/completions", body, {"content-type": "application/json"})
        try:
            content = b"".join([piece async for piece in came.pieces])
        finally:
            await came.close()
        if not 200 <= came.status < 300:
            raise Mistake("model", f"answered with status {came.status}", "look at its own log")
        try:
            return str(json.loads(content)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError):
            raise Mistake("model", "answered something that is no chat completion", "name an OpenAI-compatible endpoint") from None
    finally:
        await upstream.close()
