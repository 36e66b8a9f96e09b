r"""A guardrail: questions about what is to be forgotten are recognised and answered with a refusal, before the model's own answer counts.

No weight changes: the model knows all that it knew, and whoever reads its weights, or asks around the filter, gets it. It is the control for every other
method: what passes only the tests that ask questions is no better than this. Guarantee: none.

Paper: Thaker et al. 2024, "Guardrail Baselines for Unlearning in LLMs", arXiv 2403.03329 (prompting and filtering).

| paper | here | default |
|---|---|---|
| input filter | runs of at most `longest` tokens that stand in forget questions and in no retain question (`blocked_runs`) | 6 |
| prompting | prompt: text put in front of every question | "" |
| refusal | refusal | I do not know |

Differs from the paper: the filter is a list of runs instead of another model's judgement; without retain rows it is the forget questions themselves, word
for word. It needs questions and answers (kind qa) and sees a question where the template's words stand before the answer. An adapter is merged.
Returns a `GuardedForCausalLM`. Cost: one pass over the rows' tokens; in use, see `models/guarded.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from datasets import Dataset
from torch import nn

from remanence.errors import Mistake
from remanence.models.guarded import Runs, guarded
from remanence.stream import Request
from remanence.training.questions import ask, encoded_questions, marker_of
from remanence.training.trainer import Trainer


@dataclass(frozen=True)
class Guardrail:
    """Refuse questions about the forget rows; put a prompt in front of all.

    Args:
        refusal: what is said instead of an answer.
        longest: tokens of the longest run that the filter looks for; 0: no filter.
        prompt: text in front of every question; empty: none.

    Raises:
        Mistake: neither a filter nor a prompt, or an empty refusal.
    """

    refusal: str = "I do not know"
    longest: int = 6
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.longest < 0:
            raise Mistake("guardrail.longest", f"must be 0 or more, got {self.longest!r}", "correct the value")
        if not self.longest and not self.prompt:
            raise Mistake("guardrail", "has neither a filter nor a prompt", "set longest above 0, or give a prompt")
        if not self.refusal.strip():
            raise Mistake("guardrail.refusal", "is empty", "say what the model shall answer")

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Find what tells forget questions from retain questions, and put the gate around the model.

        Raises:
            Mistake: not a language model, rows that are not questions, or a forget question that nothing tells from the retain questions.
        """
        ask("guardrail", model, request)
        if self.prompt:
            prompt = trainer.processor(self.prompt, add_special_tokens=False, verbose=False)["input_ids"]
            model = guarded(model, prompt=prompt)
        if not self.longest:
            return model
        gone = [question for question, _ in encoded_questions(trainer, request.forget)]
        if request.retain is None:
            runs = sorted(set(map(tuple, gone)))
        else:
            runs = blocked_runs(gone, [question for question, _ in encoded_questions(trainer, request.retain)], self.longest)
        trainer.note("guardrail", {"request": request.name, "runs": len(runs), "guarantee": "none"})
        refusal = encoded_questions(trainer, Dataset.from_dict({"question": ["what?"], "answer": [self.refusal]}))[0][1]
        return guarded(model, blocked=[list(run) for run in runs], refusal=refusal, marker=marker_of(trainer))


def blocked_runs(forget: Runs, retain: Runs, longest: int) -> list[tuple[int, ...]]:
    """Return the shortest runs of tokens that stand in forget questions and in no retain question; none holds another (ours). O(tokens x longest).

    Raises:
        Mistake: a forget question holds none.
    """
    found: set[tuple[int, ...]] = set()
    for length in range(1, longest + 1):
        kept = {run for question in retain for run in runs_of(question, length)}
        new = {run for question in forget for run in runs_of(question, length)} - kept
        found |= {run for run in new if not any(part in found for part in parts_of(run))}
    told = (any(run in found for length in range(1, longest + 1) for run in runs_of(question, length)) for question in forget)
    bare = next((number for number, good in enumerate(told) if not good), None)
    if bare is not None:
        problem = f"no run of at most {longest} tokens tells the question of forget row {bare} from the retain questions"
        raise Mistake("guardrail", problem, "raise `longest`, or take the question out of the retain set")
    return sorted(found)


def runs_of(tokens: Sequence[int], length: int) -> Iterable[tuple[int, ...]]:
    """Return the runs of `length` tokens."""
    return zip(*(tokens[place:] for place in range(length)))


def parts_of(run: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Return the shorter runs inside a run."""
    return (part for length in range(1, len(run)) for part in runs_of(run, length))
