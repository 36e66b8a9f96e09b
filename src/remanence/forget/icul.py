r"""In-context unlearning: every question comes with the forget rows in front, their answers turned to wrong ones, and some correct rows behind them.

The model sees the wrong answers and doubts the right ones; no weight changes, so the model knows all that it knew, and without the context it says so.
It was made for classification by large models that learn in context; a model that never met several questions in a row loses its way. Guarantee: none.

Paper: Pawelczyk, Neel and Lakkaraju 2023, "In-Context Unlearning: Language Models as Few Shot Unlearners", arXiv 2310.07579, section 4.
Context: "[forget input 1] [flipped label] ... [forget input K] [flipped label] [input 1] [label 1] ... [input s] [label s] [query]", temperature 0.

| paper | here | default |
|---|---|---|
| flipped label | `turned`: one of the row's perturbed answers, else another answer of the request's rows | |
| s correctly labelled examples | correct, drawn from the retain rows | 4 |
| K points to forget, all in the context | shown: at most so many, those nearest to the question | 8 |
| temperature 0 | greedy decoding, the generation settings of the returned model | |

Differs from the paper: where there are more forget rows than fit, a question is shown those that share most with it. An adapter is merged.
Returns a `GuardedForCausalLM`. Cost: a forward pass over context and question, for every token that is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from remanence.errors import Mistake
from remanence.models.forward import unwrapped
from remanence.models.guarded import Runs, guarded
from remanence.stream import Request
from remanence.training.questions import ask, marker_of
from remanence.training.requests import retain_of
from remanence.training.trainer import Trainer


@dataclass(frozen=True)
class ICUL:
    """Put forget rows with wrong answers, and correct retain rows, in front of every question.

    Args:
        correct: correct rows behind the turned ones; 0 needs no retain rows.
        shown: forget rows in front of a question, at most.

    Raises:
        Mistake: a number out of range.
    """

    correct: int = 4
    shown: int = 8

    def __post_init__(self) -> None:
        for name, least in (("correct", 0), ("shown", 1)):
            if getattr(self, name) < least:
                raise Mistake(f"icul.{name}", f"must be {least} or more, got {getattr(self, name)!r}", "correct the value")

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Turn the answers, draw the correct rows, and put the gate around the model.

        Raises:
            Mistake: not a language model, rows that are not questions, no other answer to turn to, or a context that does not fit.
        """
        ask("icul", model, request)
        chance = trainer.generator("icul")
        examples = self._texts(trainer, request.forget["question"][:], turned(request, chance))
        behind: Runs = []
        if self.correct:
            retain = retain_of(request, "ICUL", "add retain rows to the request, or set correct: 0")
            rows = retain.select(torch.randperm(len(retain), generator=chance)[: self.correct].tolist())
            behind = self._texts(trainer, rows["question"][:], rows["answer"][:])
        self._check(model, request, examples, behind, trainer)
        trainer.note("icul", {"request": request.name, "turned": len(examples), "correct": len(behind), "guarantee": "none"})
        made = guarded(model, examples=examples, shown=self.shown, correct=behind, marker=marker_of(trainer))
        made.generation_config.do_sample = False
        return made

    def _texts(self, trainer: Trainer, questions: list[str], answers: list[str]) -> Runs:
        """Return rows as the template writes them, each on lines of its own, as tokens without begin and end."""
        template = trainer.settings.template
        texts = [
            template.replace("{question}", question).replace("{answer}", answer) + "\n" for question, answer in zip(questions, answers)
        ]
        return trainer.processor(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _check(self, model: nn.Module, request: Request, examples: Runs, behind: Runs, trainer: Trainer) -> None:
        most = getattr(getattr(unwrapped(model), "config", None), "max_position_embeddings", None)
        longest = sum(sorted(map(len, examples))[-self.shown :]) + sum(map(len, behind))
        longest += max(map(len, trainer.encode(request.forget, request.kind).with_format(None)["input_ids"][:]))
        if most is not None and longest > most:
            raise Mistake("icul", f"context and question have up to {longest} tokens, the model reads {most}", "lower `shown` or `correct`")


def turned(request: Request, chance: torch.Generator) -> list[str]:
    """Return a wrong answer for each forget row: one of its `perturbed_answers`, else one of the other answers among the request's rows.

    Raises:
        Mistake: there is no other answer.
    """
    rows = request.forget.with_format(None)
    answers: list[str] = rows["answer"][:]
    if "perturbed_answers" in rows.column_names:
        wrong: list[Any] = rows["perturbed_answers"][:]
    else:
        known = sorted({*answers, *(request.retain["answer"][:] if request.retain is not None else ())})
        wrong = [[other for other in known if other != answer] for answer in answers]
    bare = next((number for number, others in enumerate(wrong) if not others), None)
    if bare is not None:
        problem = f"there is no wrong answer for forget row {bare}"
        raise Mistake(f"request '{request.name}'", problem, "add rows with other answers, or a column 'perturbed_answers'")
    draws = torch.rand(len(wrong), generator=chance).tolist()
    return [others[int(draw * len(others))] for others, draw in zip(wrong, draws)]
