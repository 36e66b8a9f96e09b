"""How Sparsey names what it sees: labels counted per winner, or the label of the nearest stored code."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remanence.errors import Mistake, nearest
from remanence.memory.sparsey import activity

READOUTS = ("counts", "nearest")


class Readout:
    """Labels of codes.

    Args:
        macs: of the top level, M.
        modules: Q.
        cells: K.
        kinds: `counts` of winners and `nearest` stored code; `nearest` keeps every labelled code.
    """

    def __init__(self, macs: int, modules: int, cells: int, kinds: Sequence[str]):
        for name in kinds:
            if name not in READOUTS:
                raise Mistake("readouts", f"no readout '{name}'", nearest(name, READOUTS))
        if not kinds:
            raise Mistake("readouts", "there is none", f"choose among {', '.join(READOUTS)}")
        self.kinds, self.modules, self.cells = tuple(kinds), macs * modules, cells
        self.classes: list[Hashable] = []
        self.counts: Float[Tensor, "C units"] = torch.zeros(0, macs * modules * cells)
        self.codes: list[Int[Tensor, "1 M Q"]] = []
        self.labels: list[int] = []

    def learn(self, code: Int[Tensor, "1 M Q"], label: Hashable) -> None:
        """Note the class of a code."""
        if label not in self.classes:
            self.classes.append(label)
            self.counts = torch.cat([self.counts, torch.zeros(1, self.counts.shape[1])])
        number = self.classes.index(label)
        self.counts[number] += self.units(code)[0]
        if "nearest" in self.kinds:
            self.codes.append(code)
            self.labels.append(number)

    def scores(self, code: Int[Tensor, "N M Q"], kind: str | None = None) -> Float[Tensor, "N C"]:
        """Return per class the mean over modules of P(class | winner), or the largest overlap with a stored code.

        Raises:
            Mistake: no label was ever given, or the readout is not kept.
        """
        kind = kind or self.kinds[0]
        if not self.classes:
            raise Mistake("predict", "no label was ever learned", "give labels to partial_fit")
        if kind not in self.kinds:
            raise Mistake("readout", f"'{kind}' is not kept", f"make the memory with readouts=('{kind}',)")
        units = self.units(code)
        if kind == "counts":
            return units @ (self.counts / self.counts.sum(0).clamp(min=1)).T / self.modules
        overlap = units @ self.units(torch.cat(self.codes)).T / self.modules
        labels = torch.tensor(self.labels).expand(len(code), -1)
        return torch.zeros(len(code), len(self.classes)).scatter_reduce_(1, labels, overlap, "amax")

    def units(self, code: Int[Tensor, "N M Q"]) -> Float[Tensor, "N units"]:
        """Return codes as cells on or off."""
        return activity(code, torch.ones(code.shape[:2]), self.cells)[:, :-1].float()

    def state(self) -> dict[str, Any]:
        """Return all of it as plain values and tensors."""
        codes = torch.cat(self.codes).to(torch.int16) if self.codes else None
        return {"classes": list(self.classes), "counts": self.counts, "codes": codes, "labels": list(self.labels)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""
        self.classes, self.counts, self.labels = list(state["classes"]), state["counts"], list(state["labels"])
        self.codes = [] if state["codes"] is None else list(state["codes"].long()[:, None].unbind(0))
