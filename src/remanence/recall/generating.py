"""Let a Hugging Face causal language model answer one request in a thread of its own, and hand out the text as it comes.

Sampling draws Gumbel noise from a generator of its own, so that no global one is touched: argmax(logits / temperature + noise) is a sample of
softmax(logits / temperature). Cost: the model's own, and a hop between threads per piece.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from anyio import to_thread
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer

from remanence.models.forward import evaluating
from remanence.recall.upstream import Broken
from remanence.seeds import generator


@dataclass(frozen=True)
class Asked:
    """What a request asks for: prompt, and the options that count."""

    ids: Int64[Tensor, "1 T"]
    tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    plain: bool


class Run:
    """Make one answer: a thread generates, and the texts come out here."""

    def __init__(self, model: Any, tokenizer: Any, turn: threading.Lock, asked: Asked, name: str, number: int):
        self.model, self.tokenizer, self.turn, self.asked = model, tokenizer, turn, asked
        self.stopped = threading.Event()
        self.tokens, self.ended, self.failed = 0, False, ""
        self._head = {"id": f"chatcmpl-local-{number}", "created": int(time.time()), "model": name}
        self._noise = generator("local model", number if asked.seed is None else f"seed {asked.seed}")
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def texts(self) -> Iterator[str]:
        """Yield the answer in pieces."""
        threading.Thread(target=self._generate, daemon=True).start()
        texts = until(self._streamer, self.asked.stops, self.halt)
        if self.asked.plain:
            texts = _trimmed(texts)
        yield from (text for text in texts if text)
        if self.failed:
            raise Broken(self.failed)

    def halt(self) -> None:
        """End the answer here: a stop word has come."""
        self.ended = True
        self.stopped.set()

    def _generate(self) -> None:
        try:
            while not self.turn.acquire(timeout=0.05):
                if self.stopped.is_set():
                    return
            try:
                self._forward()
            finally:
                self.turn.release()
        except Exception as error:  # whatever a model raises: the reader must not wait for ever
            self.failed = type(error).__name__
        finally:
            self._streamer.end()

    def _forward(self) -> None:
        model, asked = self.model, self.asked
        ids = asked.ids.to(model.device)
        stops = model.generation_config.eos_token_id
        ends = {stops} if isinstance(stops, int) else set(stops or []) | {self.tokenizer.eos_token_id} - {None}

        def draw(_: Int64[Tensor, "1 T"], logits: Float[Tensor, "1 V"]) -> Float[Tensor, "1 V"]:
            return noisy(logits, asked.temperature, asked.top_p, self._noise) if asked.temperature > 0 else logits

        def enough(read: Int64[Tensor, "1 T"], _: Any, **__: Any) -> Tensor:
            self.tokens = read.shape[1] - ids.shape[1]
            self.ended = self.ended or int(read[0, -1]) in ends
            return torch.full((1,), self.stopped.is_set(), device=read.device)

        pad = next(iter(ends), 0)
        config = GenerationConfig(max_new_tokens=asked.tokens, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=pad)
        with evaluating(model):
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=self._streamer,
                logits_processor=[draw],
                stopping_criteria=[enough],
            )

    @property
    def usage(self) -> dict[str, int]:
        """Return the counts of tokens."""
        read = self.asked.ids.shape[1]
        return {"prompt_tokens": read, "completion_tokens": self.tokens, "total_tokens": read + self.tokens}

    async def whole(self) -> AsyncIterator[bytes]:
        """Yield the answer in one piece."""
        text = await to_thread.run_sync(lambda: "".join(self.texts()))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish, "logprobs": None}
        yield json.dumps({**self._head, "object": "chat.completion", "choices": [choice], "usage": self.usage}).encode()

    @property
    def finish(self) -> str:
        """Return why the answer ended."""
        return "stop" if self.ended else "length"

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events."""
        head = {**self._head, "object": "chat.completion.chunk"} | ({"usage": None} if self.asked.usage else {})

        def event(delta: dict[str, str], finish: str | None = None) -> bytes:
            return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        yield event({"role": "assistant", "content": ""})
        texts = self.texts()
        while (text := await to_thread.run_sync(next, texts, None)) is not None:
            yield event({"content": text})
        yield event({}, self.finish)
        if self.asked.usage:
            yield _event({**head, "choices": [], "usage": self.usage})
        yield b"data: [DONE]\n\n"


def noisy(logits: Float[Tensor, "1 V"], temperature: float, top_p: float, noise: torch.Generator) -> Float[Tensor, "1 V"]:
    """Return logits whose largest is a sample: softened, cut to the smallest set of tokens with probability top_p, with Gumbel noise on them."""
    logits = logits.float().cpu() / temperature
    order = logits.sort(descending=True, dim=-1)
    before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)  # probability of all that are likelier
    cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order.indices, before >= top_p)
    cut.scatter_(-1, order.indices[:, :1], False)  # the likeliest always stays
    uniform = torch.rand(logits.shape, generator=noise).clamp_(min=torch.finfo(torch.float32).tiny)
    return (logits - (-uniform.log()).log()).masked_fill(cut, -torch.inf)


def until(pieces: Iterable[str], stops: Sequence[str], halt: Callable[[], None]) -> Iterator[str]:
    """Yield a text in pieces up to the first stop word; what may be the beginning of one is held back until it is known."""
    held = ""
    pieces = iter(pieces)
    for piece in pieces:
        held += piece
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            halt()
            yield held[: min(found)]
            for _ in pieces:  # to the end of the generating thread, so that counts stand
                pass
            return
        keep = max((size for stop in stops for size in range(1, len(stop)) if held.endswith(stop[:size])), default=0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held


def _trimmed(pieces: Iterator[str]) -> Iterator[str]:
    """Yield a text without the spaces it begins with."""
    begun = False
    for piece in pieces:
        text = piece if begun else piece.lstrip()
        begun = begun or bool(text)
        yield text


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
