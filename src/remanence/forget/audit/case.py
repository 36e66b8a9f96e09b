"""An audit in progress: the models side by side, the rows they are asked about, and what was read of them so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from remanence.data.encode import encode_rows, feature_columns
from remanence.forget.audit.intervals import bootstrap
from remanence.forget.audit.report import Curve, Finding
from remanence.forget.audit.settings import AuditSettings
from remanence.models.forward import evaluating, logits_of
from remanence.seeds import numpy_generator
from remanence.stream import Request
from remanence.training.batches import Batches
from remanence.training.memorisation import Tokens, read_tokens
from remanence.training.progress import bar
from remanence.training.scoring import walk

if TYPE_CHECKING:
    from datasets import Dataset

Measure = Callable[[str, str], Float[np.ndarray, " N"]]  # (who, set) -> one number per row
ON_HOLDOUT = "the original on the holdout"


class Case:
    """Hold models and rows of one audit; every model reads every set once.

    Args:
        request: what was to be forgotten.
        models: by role: model (the audited one), original, oracle; the last two where they are given.
        processor: tokenizer or image processor.
        settings: how to audit.
        seed: of every random choice.
        progress: draw a bar.
    """

    def __init__(self, request: Request, models: dict[str, nn.Module], processor: Any, settings: AuditSettings, seed: int, progress: bool):
        self.request, self.kind, self.models, self.processor = request, request.kind, models, processor
        self.settings, self.seed = settings, seed
        self.sets = {part: self._chosen(part, rows) for part, rows in request.sets.items()}
        self.findings: list[Finding] = []
        self.curves: list[Curve] = []
        self.skipped: dict[str, str] = {}
        self._rows: dict[str, Batches] = {}
        self._tokens: dict[tuple[str, str], Tokens] = {}
        self._logits: dict[tuple[str, str], torch.Tensor] = {}
        self._bar: bar | None = None
        self._progress, self._done, self._steps = progress, 0, 1

    @property
    def language(self) -> bool:
        """Whether the rows are read token by token."""
        return self.kind in ("text", "qa", "chat")

    @property
    def end(self) -> int | None:
        """The end token of answers."""
        return getattr(self.processor, "eos_token_id", None) if self.kind == "qa" else None

    def _chosen(self, part: str, rows: Dataset) -> Dataset:
        limit = self.settings.limit
        if limit is None or len(rows) <= limit:
            return rows
        return rows.select(np.sort(numpy_generator(self.seed, "audit", part).permutation(len(rows))[:limit]))

    # Reading.

    def encode(self, rows: Dataset, template: str | None = None, kind: str | None = None) -> Batches:
        """Return rows as model inputs."""
        kind, pad = kind or self.kind, getattr(self.processor, "pad_token_id", None) or 0
        plain = feature_columns(rows) if kind == "classes" else None
        length = self.settings.length
        inputs = plain or encode_rows(rows, kind, self.processor, length=length, template=template or self.settings.template)
        return Batches(inputs, self.settings.batch_size, shuffle=False, pad=pad)

    def rows(self, part: str) -> Batches:
        """Return a set's encoded rows."""
        if part not in self._rows:
            self._rows[part] = self.encode(self.sets[part])
        return self._rows[part]

    def tokens(self, who: str, part: str) -> Tokens:
        """Return what a model says of every supervised token of a set."""
        if (who, part) not in self._tokens:
            self.show(f"reads {part}, {who}")
            moments = part in ("forget", "holdout")
            self._tokens[who, part] = read_tokens(
                self.models[who], self.rows(part), self.settings.batch_size, end=self.end, moments=moments
            )
        return self._tokens[who, part]

    def logits(self, who: str, part: str) -> torch.Tensor:
        """Return a classifier's logits on a set, float64 (B, K)."""
        if (who, part) not in self._logits:
            self._logits[who, part] = self.read_logits(self.models[who], self.rows(part))
        return self._logits[who, part]

    def read_logits(self, model: nn.Module, rows: Batches) -> torch.Tensor:
        """Return a classifier's logits on rows, float64 (B, K)."""
        found: list[tuple[np.ndarray, torch.Tensor]] = []
        with evaluating(model):
            for numbers, batch in walk(rows, self.settings.batch_size, model):
                found.append((numbers, logits_of(model, batch).double().cpu()))
        order = np.argsort(np.concatenate([numbers for numbers, _ in found]))
        return torch.cat([logits for _, logits in found])[torch.from_numpy(order)]

    def nll(self, model: nn.Module, rows: Batches) -> Float[np.ndarray, " B"]:
        """Return each row's NLL: mean per token, or of the class."""
        if self.language:
            return read_tokens(model, rows, self.settings.batch_size).nll()
        labels = rows.columns["labels"][:]  # type: ignore[index]
        return torch.nn.functional.cross_entropy(self.read_logits(model, rows), labels, reduction="none").numpy()

    def probability(self, who: str, part: str) -> Float[np.ndarray, " B"]:
        """Return the probability of each row's answer, exp(-NLL)."""
        if self.language:
            return np.exp(-self.tokens(who, part).nll())
        labels = self.rows(part).columns["labels"][:]  # type: ignore[index]
        return self.logits(who, part).softmax(1).gather(1, labels[:, None]).squeeze(1).numpy()

    # Finding.

    def interval(self, values: np.ndarray, share: bool = True) -> tuple[float, float]:
        """Return the bootstrap interval of a mean over rows, of shares of one or of anything else."""
        return bootstrap(values, level=self.settings.level, resamples=self.settings.resamples, seed=self.seed, share=share)

    def compare(
        self, name: str, group: str, measure: Measure, *, alone: str = "lower", original: Measure | None = None, share: bool = True
    ) -> None:
        """Add a finding on the forget rows, held against the oracle or, without it, the original on rows that it never saw.

        Args:
            name: of the finding.
            group: of the finding.
            measure: one number per row of a set by a model.
            alone: direction where there is no reference.
            original: how the original's value is measured, if otherwise (an attack on it would cost as much again).
            share: values are shares of one.
        """
        values = present(measure("model", "forget"))
        if not len(values):
            self.skipped[name] = "no row has a value"
            return
        low, high = self.interval(values, share)
        reference, against = self.reference(measure)
        before = float(present((original or measure)("original", "forget")).mean()) if "original" in self.models else None
        better = alone if reference is None else "reference"
        self.findings.append(Finding(name, group, float(values.mean()), low, high, better, reference, len(values), against, before))

    def reference(self, measure: Measure) -> tuple[float | None, str]:
        """Return the reference's mean and its name; `None` where there is neither an oracle nor original and holdout."""
        if "oracle" in self.models:
            return _mean(measure("oracle", "forget")), "the oracle"
        if "original" in self.models and "holdout" in self.sets:
            return _mean(measure("original", "holdout")), ON_HOLDOUT
        return None, ""

    def announce(self, steps: int) -> None:
        """Say how many steps of work there will be, and draw the bar."""
        self._steps = steps
        if self._progress:
            self._bar = bar("audit", steps)

    def show(self, note: str) -> None:
        """Say on the bar what is being done."""
        if self._bar is not None:
            self._bar.show(min(self._done, self._steps), note)

    def tick(self, note: str) -> None:
        """Move the bar by one step of work."""
        self._done += 1
        self.show(note)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def present(values: np.ndarray) -> np.ndarray:
    """Return the values of the rows that have one."""
    return values[~np.isnan(values)]


def _mean(values: np.ndarray) -> float | None:
    found = present(values)
    return float(found.mean()) if len(found) else None
