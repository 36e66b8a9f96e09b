"""What the benchmark asks: any callable text -> text, with its tokens, time and price counted.

`Priced` wraps a callable; it counts tokens by the words of the callable's own reply where that is a `Reply` (an endpoint knows them), by `count` otherwise.
Prices are per million tokens. `hf_model` makes a callable of a Hugging Face causal LM, with its chat template where it has one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from remanence.errors import Mistake

_PIECE = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Reply:
    """A model's answer and what it took; `cached` of the input tokens came from the provider's cache."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    cost: float = 0.0


Model = Callable[[str], Reply]


@lru_cache(maxsize=64)
def count_words(text: str) -> int:
    """Return the number of words and marks: the token count where no tokenizer is named (about 0.8 of a word-piece count in English)."""
    return len(_PIECE.findall(text))


@dataclass
class Priced:
    """A model as the benchmark wants it.

    Args:
        ask: text -> text, or text -> `Reply` with the tokens that the endpoint reported (its time and cost are measured here).
        name: for the tables and the cache: two models must not share one.
        count: tokens of a text.
        price_in, price_out, price_cached: dollars per million tokens; `price_cached` `None` is the input's.
        seconds: (input tokens, output tokens) -> seconds, where the callable is a model of a model; `None` measures.
    """

    ask: Callable[[str], Reply | str]
    name: str
    count: Callable[[str], int] = count_words
    price_in: float = 0.0
    price_out: float = 0.0
    price_cached: float | None = None
    seconds: Callable[[int, int], float] | None = None

    def __call__(self, prompt: str) -> Reply:
        begun = time.perf_counter()
        found = self.ask(prompt)
        took = time.perf_counter() - begun
        if isinstance(found, str):
            found = Reply(found, self.count(prompt), self.count(found))
        cached = min(found.cached_tokens, found.input_tokens)
        price_cached = self.price_in if self.price_cached is None else self.price_cached
        cost = (found.input_tokens - cached) * self.price_in + cached * price_cached + found.output_tokens * self.price_out
        if self.seconds is not None:
            took = self.seconds(found.input_tokens, found.output_tokens)
        return Reply(found.text, found.input_tokens, found.output_tokens, cached, took, cost / 1e6)


def hf_model(folder: str, *, new_tokens: int = 128, device: str | None = None) -> Callable[[str], Reply]:
    """Return a callable that answers greedily with a Hugging Face causal LM (a folder or a hub id).

    Raises:
        Mistake: a prompt is longer than the model reads: it is refused, never cut silently.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise Mistake(folder, f"is no causal language model ({str(error).splitlines()[0]})", "name a folder or a hub id") from error
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    limit = getattr(model.config, "max_position_embeddings", None)

    def ask(prompt: str) -> Reply:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        if limit and length + new_tokens > limit:
            raise Mistake(folder, f"a prompt has {length} tokens, and the model reads {limit}", "ask for smaller sizes or another policy")
        with torch.no_grad():
            ids = ids.to(model.device)
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
        answer = str(tokenizer.decode(written[0, length:], skip_special_tokens=True))
        return Reply(answer.strip(), length, int(written.shape[1] - length))

    return ask
