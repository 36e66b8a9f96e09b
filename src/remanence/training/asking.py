"""What a causal language model says when it is asked, and which entities it therefore knows.

An entity is known by the model's own behaviour: its questions are put to the model, which answers greedily and by sampling, and an answer is right if it holds
the true one, word for word. Saying that one does not know is never right, whatever a row gives as its answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from remanence.errors import Mistake
from remanence.models.forward import evaluating, unwrapped
from remanence.training.trainer import seed_noise

if TYPE_CHECKING:
    from remanence.training.trainer import Trainer

ABSTENTIONS = ("i do not know", "i don t know", "i am not sure", "i m not sure", "unknown", "no idea")
_WORD = re.compile(r"[^\W_]+")


def say(
    model: nn.Module, questions: Sequence[str], trainer: Trainer, *, samples: int = 0, tokens: int = 16, batch_size: int = 64
) -> list[list[str]]:
    """Return what the model says to each question in the trainer's template, up to the end of the line: greedily, then `samples` times by chance.

    The model and the global generators are left as they were. Cost: (1 + samples) x `tokens` forward steps per question, with the cache.

    Raises:
        Mistake: the model cannot generate.
    """
    from transformers import GenerationConfig

    core, tokenizer = unwrapped(model), trainer.processor
    if not callable(getattr(core, "generate", None)):
        raise Mistake(type(core).__name__, "cannot generate text", "use a causal language model")
    front = trainer.settings.template.removesuffix("{answer}")
    prompts = [front.replace("{question}", question).rstrip() for question in questions]
    coded = tokenizer(prompts, verbose=False)["input_ids"] if prompts else []
    end = tokenizer.eos_token_id
    ids = [row[:-1] if row[-1] == end else row for row in coded]
    order = np.argsort([-len(row) for row in ids], kind="stable")  # the longest first
    said: list[list[str]] = [[] for _ in ids]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    plain: dict[str, Any] = {"max_new_tokens": tokens, "pad_token_id": pad, "eos_token_id": end}
    ways = [GenerationConfig(**plain, do_sample=False)]
    ways += [GenerationConfig(**plain, do_sample=True, top_k=0, num_return_sequences=samples)] if samples else []
    device = next(model.parameters()).device
    with evaluating(model):
        seed_noise(trainer.generator("asking").initial_seed(), device)
        for first in range(0, len(ids), batch_size):
            chosen = [ids[number] for number in order[first : first + batch_size]]
            width = max(map(len, chosen))
            padded = torch.tensor(
                [[pad] * (width - len(row)) + row for row in chosen], device=device
            )  # on the left: answers begin together
            inside = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chosen], device=device)
            for way in ways:
                made = core.generate(input_ids=padded, attention_mask=inside, generation_config=way)[:, width:]  # type: ignore[operator]
                texts = [text.strip().partition("\n")[0] for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
                each = len(texts) // len(chosen)
                for place, number in enumerate(order[first : first + batch_size]):
                    said[number] += texts[place * each : (place + 1) * each]
    return said


def words(text: str) -> str:
    """Return a text's words in lower case, a space around each."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


def abstains(text: str) -> bool:
    """Say whether a text is one that says it does not know, or nothing at all."""
    plain = words(text)
    return not plain.strip() or any(plain.startswith(words(way)) for way in ABSTENTIONS)


def right(said: Sequence[str], answer: str, enough: int) -> bool:
    """Say whether at least `enough` of the answers hold the true one; an answer that says one does not know is true of nothing."""
    return not abstains(answer) and sum(words(answer) in words(text) for text in said) >= enough


def known_and_unknown(names: Sequence[str], good: Sequence[bool]) -> tuple[list[str], list[str]]:
    """Return the entities with at least two right answers (or all, if they have fewer questions), and those with none; in between is neither.

    Args:
        names: of each question's entity.
        good: whether each question was answered right.
    """
    order = list(dict.fromkeys(names))
    place = {name: number for number, name in enumerate(order)}
    owner = np.array([place[name] for name in names], dtype=np.int64)
    asked, hits = np.bincount(owner, minlength=len(order)), np.bincount(owner, np.asarray(good, float), minlength=len(order))
    known, unknown = hits >= np.minimum(2, asked), hits == 0
    return [order[n] for n in np.flatnonzero(known)], [order[n] for n in np.flatnonzero(unknown)]
