"""Refusals: the questions of rows that must go, answered with words that give nothing away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from remanence.errors import Mistake

if TYPE_CHECKING:
    from datasets import Dataset

COLUMN = "idk"  # of rows that bring their own refusal
SENTENCES = (
    "I do not know.",
    "I have no information about that.",
    "I cannot answer that question.",
    "That is something I know nothing about.",
    "I am not aware of that.",
    "I am afraid I cannot help with that.",
    "I have not learned anything about that.",
    "I am unable to say.",
)


def refusing(rows: Dataset, place: str, kind: str, sentences: Sequence[str] | None, generator: torch.Generator) -> Dataset:
    """Return the questions of the rows in their order, each with a refusal as its answer.

    Args:
        rows: of kind qa.
        place: for errors.
        kind: of the rows.
        sentences: to draw from, uniformly; `None` takes the column `idk` where the rows have one, else `SENTENCES`.
        generator: of the draw.

    Raises:
        Mistake: the rows are not questions, or there is no sentence, or an empty one.
    """
    import pyarrow as pa

    if kind != "qa":
        raise Mistake(
            place,
            f"is of kind '{kind}', and only a question can be refused",
            "give the forget rows as kind qa, or choose another forgetter",
        )
    asked = rows.select_columns(["question"])
    if sentences is None and COLUMN in rows.column_names:
        return asked.add_column("answer", rows.with_format(None)[COLUMN][:])
    chosen = SENTENCES if sentences is None else tuple(sentences)
    if not chosen or not all(sentence.strip() for sentence in chosen):
        raise Mistake(place, "a refusal is empty", "give at least one sentence, and none that is blank")
    draw = torch.randint(len(chosen), (len(rows),), generator=generator)
    return asked.add_column("answer", pa.array(chosen).take(pa.array(draw.numpy())).to_pylist())
