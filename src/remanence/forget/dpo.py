r"""IdkDPO: prefer a refusal over the forgotten answer. Each forget question has two answers, "I do not know" (won) and its own (lost), and the model is to
move probability from the second to the first, measured against itself as it was. The pull fades as the margin grows, and a retain term holds the rest.

Paper: Rafailov et al. 2023, "Direct Preference Optimization", arXiv 2305.18290, eq. 7; as a forgetter: Maini et al. 2024 (TOFU), arXiv 2401.06121, section 3.
Objective: L = gamma c L_DPO(D_f) + alpha R(D_r), L_DPO = -log sigmoid(beta [(s_0(w) - s(w)) - (s_0(l) - s(l))]), s = -log pi.

| paper | here | shape | default |
|---|---|---|---|
| y_w | the row's `column`, else `refusal` | text | `idk`, "I do not know" |
| y_l | the row's answer | text | |
| -log pi_theta(y_w \| x), -log pi_theta(y_l \| x), summed over the answer | won, lost | (B,) nats | |
| the same of pi_ref | columns `won_reference`, `lost_reference` of the forget rows | (B,) nats | |
| beta | beta | scalar | 0.1 |
| c: 1 in DPO and MELU; 2 / beta in OpenUnlearning, the scale of NPO | factor: one, two_over_beta | name | one |
| weights of the two terms | gamma, alpha; retain: nll, kl, none | scalars, name | 1, 1; nll |

Differs from the paper: the reference's s_0 is computed once, before the first step, so no second model is held (except a frozen copy for retain: kl).
A refusal hides an answer and need not remove it: audit what comes out. Steps and rate are the trainer's; an epoch is a pass over the forget rows. Cost: two
forward passes over the forget rows, then three forward and backward passes per step; memory: two numbers and a second answer per forget row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.stream import Request
from remanence.training.batches import Batch, Batches
from remanence.training.preference import dpo_loss, summed_nll
from remanence.training.requests import check_terms, retain_batches, retain_term
from remanence.training.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

FACTORS = ("one", "two_over_beta")
REFUSAL = "I do not know"


@dataclass(frozen=True)
class DPO:
    """Prefer a refusal to the forget rows' answers, with a retain term.

    Args:
        beta: how large a margin over the model as it was is enough; small asks for more.
        factor: one | two_over_beta: what the preference's loss is multiplied by.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        retain: nll | kl | none.
        column: of the forget rows, with each row's refusal.
        refusal: for rows without one; `None` refuses such rows.

    Raises:
        Mistake: a value out of range, an unknown name, or an empty refusal.
    """

    beta: float = 0.1
    factor: str = "one"
    gamma: float = 1.0
    alpha: float = 1.0
    retain: str = "nll"
    column: str = "idk"
    refusal: str | None = REFUSAL

    def __post_init__(self) -> None:
        check_terms("dpo", self.gamma, self.alpha, self.retain)
        if not 0 < self.beta < float("inf"):
            raise Mistake("dpo.beta", f"must be above 0, and finite, got {self.beta!r}", "correct the value")
        if self.factor not in FACTORS:
            raise Mistake("dpo.factor", f"unknown value {self.factor!r}", nearest(self.factor, FACTORS))
        if self.refusal is not None and not self.refusal.strip():
            raise Mistake("dpo.refusal", "is empty", "write a sentence, or null to take the rows' own alone")

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma c L_DPO(forget) + alpha R(retain) for the trainer's steps.

        Raises:
            Mistake: rows that are not questions, a row without a refusal, or no retain set where the retain term needs one.
        """
        retain = retain_batches(request, trainer, "DPO", self.retain)
        forget = self._forget_rows(model, request, trainer)
        pairs, keep = trainer.pairs(forget, retain), retain_term(self.retain, model, trainer)
        scale = self.gamma * (1.0 if self.factor == "one" else 2 / self.beta)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            rows = batch["forget"]
            won, lost = won_nll(model, rows), summed_nll(model, rows)
            value = scale * dpo_loss(won, rows["won_reference"], lost, rows["lost_reference"], self.beta).sum() / rows.rows
            return value + self.alpha * keep(model, batch["retain"]) if retain is not None else value

        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))

    def _forget_rows(self, model: nn.Module, request: Request, trainer: Trainer) -> Batches:
        """Return the forget rows with their refusals as `won_input_ids` and `won_labels`, and the reference's NLLs of both answers."""
        place = f"request '{request.name}'"
        if request.kind != "qa":
            raise Mistake(
                place, f"DPO puts a refusal beside an answer, and rows of kind '{request.kind}' have none", "use qa, or forget with NPO"
            )
        said = request.forget[self.column] if self.column in request.forget.column_names else [None] * len(request.forget)
        refused = with_answers(request.forget, refusals(said, self.refusal, f"{place}, column '{self.column}'"))
        forget = trainer.batches(request.forget, "qa", stream="forget")
        won: Any = trainer.batches(refused, "qa", stream="forget").columns
        forget = forget.with_column("won_input_ids", won["input_ids"]).with_column("won_labels", won["labels"])
        reference = {
            "won_reference": trainer.over_rows(model, forget, won_nll),
            "lost_reference": trainer.over_rows(model, forget, summed_nll),
        }
        for name, values in reference.items():
            forget = forget.with_column(name, values)
        return forget


def won_nll(model: nn.Module, batch: Batch) -> Float[Tensor, "B"]:
    """Return s(y_w): each refusal's negative log-likelihood, summed over its tokens and the end token, in nats."""
    return summed_nll(model, Batch(input_ids=batch["won_input_ids"], labels=batch["won_labels"]))


def with_answers(rows: Dataset, answers: list[str]) -> Dataset:
    """Return the questions with other answers."""
    return rows.with_format(None).select_columns(["question"]).add_column("answer", answers)


def refusals(said: Iterable[Any], refusal: str | None, place: str) -> list[str]:
    """Return each row's refusal; what is missing, blank or no text (a hole in a CSV file) becomes `refusal`.

    Raises:
        Mistake: a row has none and there is no other.
    """
    texts = [text if isinstance(text, str) and text.strip() else refusal for text in said]
    holes = [row for row, text in enumerate(texts) if text is None]
    if holes:
        raise Mistake(
            f"{place}, row {holes[0]}", f"has no refusal ({len(holes)} of {len(texts)} rows have none)", "fill them in, or set dpo.refusal"
        )
    return [text for text in texts if text is not None]
