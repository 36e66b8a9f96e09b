"""Questions as tokens: where the answer begins, and what stands between the two, for methods that work on a model's input and output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from remanence.errors import Mistake
from remanence.models.forward import is_language_model
from remanence.training.batches import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

    from remanence.stream import Request
    from remanence.training.trainer import Trainer

ENDS = ("one?", "two.", "three", "4", "five!", 'six"', "(seven)")  # ways in which a question may end


def ask(method: str, model: nn.Module, request: Request) -> None:
    """Hold model and request to what an input and output method needs.

    Raises:
        Mistake: not a language model, or rows that are not questions and answers.
    """
    if not is_language_model(model):
        raise Mistake(method, f"{type(model).__name__} is not a language model", "choose another method")
    if request.kind != "qa":
        raise Mistake(
            f"request '{request.name}'", f"'{method}' needs questions and answers, the rows are of kind '{request.kind}'", "use qa"
        )


def encoded_questions(trainer: Trainer, rows: Dataset) -> list[tuple[list[int], list[int]]]:
    """Return each row's question (with what stands around it) and answer (with the end token) as tokens, by the trainer's template."""
    found = trainer.encode(rows, "qa").with_format(None)
    pairs = zip(found["input_ids"][:], found["labels"][:])
    cuts = [(ids, next(place for place, label in enumerate(labels) if label != IGNORED)) for ids, labels in pairs]
    return [(ids[:cut], ids[cut:]) for ids, cut in cuts]


def marker_of(trainer: Trainer) -> list[int]:
    """Return the tokens that end every question, whatever its last word is: what the template puts between question and answer.

    Raises:
        Mistake: there are none.
    """
    from datasets import Dataset

    rows = Dataset.from_dict({"question": [f"what is {end}" for end in ENDS], "answer": ["a"] * len(ENDS)})
    backwards = [question[::-1] for question, _ in encoded_questions(trainer, rows)]
    marker = []
    for tokens in zip(*backwards):
        if len(set(tokens)) > 1:
            break
        marker.append(tokens[0])
    if not marker:
        raise Mistake(
            "training.template",
            "has nothing between question and answer that tokens show",
            "write for example 'Q: {question}\\nA: {answer}'",
        )
    return marker[::-1]
