"""Shorten: the compact memory's summarisers.

| name | what it is |
|---|---|
| `extractive` | keeps the sentences with the rarest words, verbatim; needs no model, invents nothing, the same words give the same summary |
| a folder or hub id | a Hugging Face model: sequence-to-sequence (Pegasus, T5, BART) or causal with a chat template |
| `openai:MODEL@URL` | any OpenAI-compatible endpoint |

A model that summarises may invent, and what it invents enters every later prompt: the history of every gist is kept, and its length is cut by tokens.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remanence.errors import Mistake
from remanence.recall.protocols import Summarizer, Tokenizer

ASK = (
    "Rewrite the running summary of a conversation so that it also covers the new turn. Keep names, numbers, dates and corrections; where they contradict, "
    "keep the newer. At most {tokens} tokens, one line, nothing but the summary.\n\nSummary so far: {earlier}\nNew turn: {new}"
)
BREVITY = 4  # words that a sentence counts beyond its own, so that a cry of one word is not the densest
MISSES = 40  # sentences in a row that do not fit any more: then the line is full
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
_COMMON = frozenset(
    re.findall(
        r"\S+",
        """
    a about after again all also am an and any are as at back be because been before but by can come could day did do does don't even
    for from get give go good had has have he her here him his how i i'm if in into is it it's its just know last like look made make
    many me more most much my new no not now of off on one only or other our out over people said same say see she should so some such
    take tell than thank thanks that that's the their them then there these they thing think this those time to too two up us use very
    want was way we well were what when where which who why will with would yes you your user assistant tool system
    """,
    )
)


def plain_weight(word: str) -> float:
    """Return how much a word tells, without a corpus: numbers and names most, common words nothing."""
    if word.lower() in _COMMON:
        return 0.0
    if any(letter.isdigit() for letter in word):
        return 3.0
    return (2.0 if word[0].isupper() else 1.0) * math.log2(1 + min(len(word), 12)) / 2


@dataclass
class Extractive:
    """Keep the sentences that tell most and fit, in their order.

    Args:
        tokenizer: what counts.
        weight: of a word; a fitted inverse document frequency takes this place.
    """

    tokenizer: Tokenizer
    weight: Callable[[str], float] = plain_weight
    name: str = "extractive"
    window: int = 1 << 20

    def __call__(self, earlier: str, new: str, tokens: int) -> str:
        """Return the sentences of both with the most weight, newer ones first where equal."""
        sentences = list(dict.fromkeys(part for text in (earlier, new) for part in _SENTENCE.split(text.strip()) if part))
        worth = [self._worth(sentence) for sentence in sentences]
        order = sorted(range(len(sentences)), key=lambda place: (-worth[place], -place))
        kept, left, misses = [], tokens, 0
        for place in order:
            size = self.tokenizer.count(sentences[place])
            if size <= left and worth[place] > 0:
                kept.append(place)
                left, misses = left - size, 0
            else:
                misses += 1
            if misses > MISSES or left < 2:
                break
        if not kept and sentences:
            return self.tokenizer.cut(sentences[order[0]], tokens)
        return " ".join(sentences[place] for place in sorted(kept))

    def _worth(self, sentence: str) -> float:
        """Return the words' weight for the room it takes, so that the line tells most; a question tells little: its answer is what counts."""
        words = _WORD.findall(sentence)
        total = sum(self.weight(word) for word in set(words)) / (len(words) + BREVITY)
        return total / 4 if sentence.endswith("?") else total


@dataclass
class HuggingFace:
    """Ask a model of transformers, greedily.

    Args:
        name: folder or hub id.
        model: causal or sequence-to-sequence.
        tokenizer: of the model.
        chat: it is causal; otherwise it is given the plain text.
        window: tokens that it reads.
    """

    name: str
    model: Any
    tokenizer: Any
    chat: bool
    window: int

    def __call__(self, earlier: str, new: str, tokens: int) -> str:
        """Return the model's summary."""
        import torch

        asked = ASK.format(tokens=tokens, earlier=earlier or "(none)", new=new) if self.chat else f"{earlier} {new}".strip()
        if self.chat and self.tokenizer.chat_template:
            asked = self.tokenizer.apply_chat_template([{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True)
        longest = self.window - (tokens if self.chat else 0)
        ids = self.tokenizer(asked, return_tensors="pt", truncation=True, max_length=longest)["input_ids"].to(self.model.device)
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, num_beams=1)
        return self.tokenizer.decode(out[0, ids.shape[1] if self.chat else 0 :], skip_special_tokens=True)


@dataclass
class Endpoint:
    """Ask an OpenAI-compatible endpoint.

    Args:
        name: `openai:MODEL@URL`.
        model: there.
        client: `recall/openai_client.py`.
        window: tokens that it reads.
    """

    name: str
    model: str
    client: Any
    window: int = 8192

    def __call__(self, earlier: str, new: str, tokens: int) -> str:
        """Return the endpoint's summary."""
        asked = ASK.format(tokens=tokens, earlier=earlier or "(none)", new=new)
        return str(self.client.complete([{"role": "user", "content": asked}], model=self.model, max_tokens=2 * tokens, temperature=0))


@functools.lru_cache(maxsize=2)
def load_model(name: str) -> HuggingFace:
    """Load a Hugging Face model that summarises.

    Raises:
        Mistake: it cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        chat = not config.is_encoder_decoder
        model = (AutoModelForCausalLM if chat else AutoModelForSeq2SeqLM).from_pretrained(name, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        remedy = "name the folder or hub id of a causal or sequence-to-sequence model with safetensors, extractive, or openai:MODEL@URL"
        raise Mistake("summarizer", f"'{name}' cannot be read ({str(error).splitlines()[0]})", remedy) from error
    window = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 512, 1 << 15)
    return HuggingFace(name, model.requires_grad_(False), tokenizer, chat, window)


def load_summarizer(name: str, tokenizer: Tokenizer) -> Summarizer:
    """Load a summariser by name (see the table of this module).

    Raises:
        Mistake: it cannot be read.
    """
    if name == "extractive":
        return Extractive(tokenizer)
    if name.startswith("openai:"):
        from remanence.recall.openai_client import OpenAIClient, split_endpoint

        model, url = split_endpoint(name)
        return Endpoint(name, model, OpenAIClient(url))
    return load_model(name)
