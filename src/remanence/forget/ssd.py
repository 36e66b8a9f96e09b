"""Selective synaptic dampening: shrink the weights that matter far more for the forget rows than for the data as a whole. No optimizer step is taken.

The importance of a weight is the diagonal of the Fisher information, once on all training data D (it may be saved when training ends, and the data thrown
away) and once on the forget rows. A weight whose forget importance exceeds alpha times its general importance is multiplied by the ratio of the two.

Paper: Foster, Schoepf and Brintrup 2023, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", arXiv 2308.07707 (AAAI 2024);
label_free: arXiv 2402.19308; alpha "auto": arXiv 2402.10098.

| paper | here | shape | default |
|---|---|---|---|
| importance on D, D_f | general, special: `Fisher`, one tensor per parameter | (P,) | |
| alpha, selection weight | alpha: a number, or auto: the percentile 100 - ln(1 + 100 \\|D_f\\|/\\|D\\|) of the pooled ratios special/general | | auto |
| lambda, dampening constant | lam | | 1 |
| exponent of the ratio, cap on beta (released code) | exponent, lower_bound | | 1, 1 |
| how importance is measured | mode: sample (mean of squared gradients), batch (mean over batches of the squared mean gradient), label_free (\\|gradient\\| of the mean squared norm of the logits) | | sample |

Differs from the paper: D is the retain and the forget rows of the request; in `sample` mode, where D holds D_f, no ratio exceeds |D|/|D_f|, so an alpha from
there on selects nothing and is refused (alpha = inf says it openly). alpha does not carry over between modes, batch sizes or numbers of classes. A language
model's row counts with its mean NLL over supervised tokens. The edit keeps the old values of the weights it touched: `undo` puts them back bit for bit.
Cost: one pass with gradients over D (none with a saved importance) and one over D_f; memory: two copies of the trained weights, a third for alpha "auto".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.stream import COLUMNS, Request
from remanence.training.batches import Batches
from remanence.training.fisher import Fisher, load_fisher
from remanence.training.importance import MODES, importance_of, save_importance
from remanence.training.masks import check_pattern, matching
from remanence.training.processes import is_sharded
from remanence.training.requests import retain_of
from remanence.training.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SSD", "auto_alpha", "check_bound", "dampening", "save_importance"]
CROWDED = 0.2  # share of a tensor above which a selection is a sign of over-forgetting


@dataclass
class SSD:
    """Dampen the weights that the forget rows depend on.

    Args:
        alpha: a weight is selected where its forget importance exceeds alpha times its general one; a number above 0, or `auto`.
        lam: a selected weight is multiplied by min((lam general / special)^exponent, lower_bound).
        mode: sample | batch | label_free.
        exponent: of the ratio.
        lower_bound: cap on the factor, in (0, 1]: no weight grows.
        importance: file of the general importance (`save_importance`); without it the request's retain rows are needed.
        batch_size: rows per batch; of both importances in the modes batch and label_free. `None`: the trainer's.
        parameters: regular expression that a parameter's name must match (anywhere); `None`: all that require a gradient.
        dry_run: note what would be done, and change nothing.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    alpha: float | str = "auto"
    lam: float = 1.0
    mode: str = "sample"
    exponent: float = 1.0
    lower_bound: float = 1.0
    importance: str | None = None
    batch_size: int | None = None
    parameters: str | None = None
    dry_run: bool = False
    edits: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def need(name: str, good: bool, what: str) -> None:
            if not good:
                raise Mistake(f"ssd.{name}", f"must be {what}, got {getattr(self, name)!r}", "correct the value")

        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        need("alpha", self.alpha == "auto" or (number and float(self.alpha) > 0), "a number above 0, or auto")
        need("lam", 0 <= self.lam < math.inf, "0 or more, and finite")
        need("exponent", 0 < self.exponent < math.inf, "above 0, and finite")
        need("lower_bound", 0 < self.lower_bound <= 1, "in (0, 1]")
        need("batch_size", self.batch_size is None or self.batch_size >= 1, "1 or more")
        if self.mode not in MODES:
            raise Mistake("ssd.mode", f"unknown value {self.mode!r}", nearest(self.mode, MODES))
        check_pattern("ssd.parameters", self.parameters)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Measure both importances, select, dampen, and note what was done; `undo` takes the last edit back.

        Raises:
            Mistake: neither a retain set nor a saved importance, one that does not belong to this model, mode or data, or an alpha that cannot select.
        """
        if is_sharded(model):
            raise Mistake("ssd", "cannot dampen a sharded model", "run it in one process, or replicated")
        model.to(trainer.accelerator.device)
        names = matching(model, self.parameters, "ssd.parameters")
        special, forget_rows = self._measure(model, trainer, names, request.forget, request.kind)
        general, rows = self._general(model, request, trainer, names, special, forget_rows)
        if self.mode == "sample":
            check_bound(general, special, rows, forget_rows, self.alpha)
        ratios = torch.cat([(special[name] / general[name]).flatten() for name in special])  # NaN where both are 0
        alpha = auto_alpha(ratios, forget_rows, rows) if self.alpha == "auto" else float(self.alpha)
        edit, counts, betas = self._dampen(model, special, general, alpha)
        self._note(trainer, request, model, special, general, alpha, ratios, counts, betas)
        if not self.dry_run:
            self.edits.append({"request": request.name, "weights": edit})
        return model

    def _general(
        self, model: nn.Module, request: Request, trainer: Trainer, names: list[str], special: Fisher, forget_rows: int
    ) -> tuple[Mapping[str, Tensor], int]:
        """Return the importance on D by parameter name, and |D| in rows."""
        if self.importance is not None:
            saved = load_fisher(self.importance, definition=MODES[self.mode], model=model)
            lacking = next((name for name in names if name not in saved), None)
            if lacking is not None:
                raise Mistake(self.importance, f"holds no importance of '{lacking}'", "compute it anew, with all parameters free")
            each = 1 if self.mode == "sample" else self.batch_size or trainer.settings.batch_size  # a batch-wise importance counts batches
            return {name: saved[name].to(special[name]) for name in names}, max(saved.count * each, forget_rows)
        retain = retain_of(request, "SSD", "add retain rows to the request, or name a saved importance (importance: path)")
        if self.mode != "sample":
            from datasets import concatenate_datasets

            rows = concatenate_datasets([part.select_columns(list(COLUMNS[request.kind])) for part in (retain, request.forget)])
            batches = self._batches(trainer, trainer.encode(rows, request.kind))
            return importance_of(model, batches, self.mode, trainer, names), batches.count
        kept, count = self._measure(model, trainer, names, retain, request.kind)
        total = count + forget_rows  # a mean over rows: that over D is made of its two parts, and the forget rows are passed once
        return {name: (count * kept[name] + forget_rows * special[name]) / total for name in special}, total

    def _measure(self, model: nn.Module, trainer: Trainer, names: list[str], rows: Dataset, kind: str) -> tuple[Fisher, int]:
        """Return the importance on some rows, and their number (in mode sample, of those with a supervised token)."""
        batches = self._batches(trainer, trainer.encode(rows, kind))
        found = importance_of(model, batches, self.mode, trainer, names)
        return found, found.count if self.mode == "sample" else batches.count

    def _batches(self, trainer: Trainer, encoded: Dataset) -> Batches:
        pad = getattr(trainer.processor, "pad_token_id", None) or 0
        return Batches(encoded, self.batch_size or trainer.settings.batch_size, pad=pad)

    def _dampen(
        self, model: nn.Module, special: Mapping[str, Tensor], general: Mapping[str, Tensor], alpha: float
    ) -> tuple[dict[str, Any], dict[str, int], Tensor]:
        """Multiply the selected weights; return places and old values by name, the number selected by name, and all factors."""
        edit, counts, betas = {}, {}, []
        weights = dict(model.named_parameters())
        for name in special:
            selected, beta = dampening(special[name], general[name], alpha, self.lam, self.exponent, self.lower_bound)
            places = selected.flatten().nonzero()[:, 0]  # (n,)
            counts[name] = len(places)
            betas.append(beta.flatten()[places])
            if len(places) and not self.dry_run:
                weight = weights[name].detach()
                edit[name] = {"places": places.cpu(), "old": weight[selected].cpu()}
                weight[selected] = (weight[selected].to(beta.dtype) * betas[-1]).to(weight.dtype)
        return edit, counts, torch.cat(betas)

    def _note(
        self,
        trainer: Trainer,
        request: Request,
        model: nn.Module,
        special: Fisher,
        general: Mapping[str, Tensor],
        alpha: float,
        ratios: Tensor,
        counts: dict[str, int],
        betas: Tensor,
    ) -> None:
        sizes = {name: value.numel() for name, value in special.items()}
        crowded = [name for name, count in counts.items() if count > CROWDED * sizes[name]]
        if crowded:
            share = counts[crowded[0]] / sizes[crowded[0]]
            warnings.warn(
                f"request '{request.name}': {share:.0%} of '{crowded[0]}' is selected, and more than {CROWDED:.0%} of {len(crowded) - 1} other"
                " parameters: a sign of forgetting too much; raise alpha",
                stacklevel=3,
            )
        real = ratios[ratios.isfinite() & (ratios > 0)]
        decades = real.log10().floor().clamp(-6, 6).to(torch.int64) + 6
        trainer.note(
            "ssd",
            {
                "request": request.name,
                "mode": self.mode,
                "alpha": alpha if math.isfinite(alpha) else "inf",
                "lam": self.lam,
                "selected": sum(counts.values()),
                "weights": sum(sizes.values()),
                "fraction": sum(counts.values()) / sum(sizes.values()),
                "selected_by_parameter": counts,
                "frozen": [name for name, weight in model.named_parameters() if not weight.requires_grad],
                "trace_forget": special.trace,
                "trace_general": math.fsum(value.sum(dtype=torch.float64).item() for value in general.values()),
                "ratios_by_decade": torch.bincount(decades, minlength=13).tolist(),  # 10^-6 and below ... 10^6 and above
                "betas_by_tenth": torch.histc(betas.float(), bins=10, min=0, max=1).to(torch.int64).tolist(),
                "dry_run": self.dry_run,
            },
        )

    def undo(self, model: nn.Module) -> nn.Module:
        """Put the old values of the last edit back, bit for bit.

        Raises:
            Mistake: there is no edit.
        """
        if not self.edits:
            raise Mistake("ssd", "there is no edit to undo", "forget something first")
        weights = dict(model.named_parameters())
        for name, edit in self.edits.pop()["weights"].items():
            weight = weights[name].detach()
            touched = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            touched[edit["places"].to(weight.device)] = True
            weight[touched.view(weight.shape)] = edit["old"].to(weight)
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return the edits, for `undo` after a restart."""
        return {"edits": self.edits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.edits = list(state["edits"])


def dampening(
    special: Float[Tensor, "*P"], general: Float[Tensor, "*P"], alpha: float, lam: float, exponent: float = 1.0, lower_bound: float = 1.0
) -> tuple[Bool[Tensor, "*P"], Float[Tensor, "*P"]]:
    """Return which weights are selected, special > alpha general, and the factor beta = min((lam general / special)^exponent, lower_bound), 1 elsewhere.

    The paper's selection and dampening rules, with exponent and cap of the released code. A dead weight (0, 0) is not selected.
    """
    selected = special > alpha * general  # inf * 0 is NaN, which is not less
    beta = (lam * general / special).pow(exponent).clamp(max=lower_bound)
    return selected, torch.where(selected, beta, torch.ones_like(beta))


def auto_alpha(ratios: Float[Tensor, "P"], forget_rows: int, rows: int) -> float:
    """Return the percentile P = 100 - ln(1 + 100 |D_f|/|D|) of the ratios special/general, NaN (dead weights) left out (arXiv 2402.10098).

    Linear between neighbours, as NumPy has it; two selections, O(P).
    """
    alive = ratios[~ratios.isnan()]
    if len(alive) == 0:
        return math.inf
    place = (100 - math.log1p(100 * forget_rows / rows)) / 100 * (len(alive) - 1)
    below = math.floor(place)
    low = alive.kthvalue(below + 1).values.item()
    high = alive.kthvalue(min(below + 2, len(alive))).values.item()
    return low if low == high else low + (place - below) * (high - low)


def check_bound(general: Mapping[str, Tensor], special: Mapping[str, Tensor], rows: int, forget_rows: int, alpha: float | str) -> None:
    """Hold the importances to what a mean over D that holds D_f implies: general >= |D_f|/|D| special.

    Raises:
        Mistake: alpha is finite and at or above |D|/|D_f|, or the general importance is not of data that hold the forget rows.
    """
    bound = rows / forget_rows
    if alpha != "auto" and bound <= float(alpha) < math.inf:
        raise Mistake(
            "ssd.alpha",
            f"no ratio can exceed |D|/|D_f| = {bound:g} in mode sample, so {alpha:g} selects nothing",
            "take a smaller alpha, or auto",
        )
    for name, value in special.items():
        if bool((value > bound * general[name] * (1 + 1e-3) + torch.finfo(value.dtype).tiny).any()):
            raise Mistake(
                f"importance of '{name}'",
                f"some ratio exceeds |D|/|D_f| = {bound:g}: the data behind the general importance lack the forget rows",
                "compute it over all training data, on these weights",
            )
