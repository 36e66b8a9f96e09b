"""The plain form of Sparsey's code selection: one mac, one cell, one input at a time, in Python numbers.

It is the reference for `sparsey_level.py`, which does the same for all macs in a few operations: with the same uniforms the codes and weights are the same bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from remanence.memory.sparsey import RATCHET, CSAConfig

Signals = Mapping[int, float]  # number of an active input -> the weight that it sends


class LoopMac:
    """One mac.

    Args:
        sizes: inputs of each field.
        modules: Q.
        cells: K.
        csa: code selection.
        pi: fewest and most active inputs of U.
        own: for H, the module of this mac that an input comes from, or -1.
        freeze: share of set weights above which a field learns no more.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        modules: int,
        cells: int,
        *,
        csa: CSAConfig,
        pi: tuple[float, float] = (1, math.inf),
        own: Sequence[int] = (),
        freeze: float = 0.5,
    ):
        self.modules, self.cells, self.csa, self.pi, self.own, self.freeze = modules, cells, csa, pi, list(own), freeze
        self.weights = {name: [[0] * (modules * cells) for _ in range(size)] for name, size in sizes.items()}

    def allowed(self, name: str, j: int, q: int) -> bool:
        """Say whether input j of a field may reach module q: a module gets nothing from itself."""
        return name != "H" or not self.own or self.own[j] != q

    def fill(self, name: str) -> float:
        """Return the share of a field's weights that are set."""
        possible = sum(self.cells for j in range(len(self.weights[name])) for q in range(self.modules) if self.allowed(name, j, q))
        return sum(map(sum, self.weights[name])) / possible

    def evidence(self, inputs: Mapping[str, Signals], fields: Sequence[str], first: bool) -> list[list[float]]:
        """Return V (steps 2 to 4) as modules of cells, from some of the fields."""
        V = [[1.0] * self.cells for _ in range(self.modules)]
        powers = {"U": self.csa.lam_first} if first else dict(zip("UHD", self.csa.lam, strict=True))
        for name in (name for name in "UHD" if name in powers and name in fields and inputs[name]):
            for q in range(self.modules):
                active = [j for j in inputs[name] if self.allowed(name, j, q)]
                for k in range(self.cells):
                    total = sum(inputs[name][j] * self.weights[name][j][q * self.cells + k] for j in active)
                    share = min(1.0, total / max(1, len(active)))
                    V[q][k] *= share if powers[name] == 1 else share ** powers[name]
        return V

    def familiarity(self, V: Sequence[Sequence[float]]) -> float:
        """Return G (step 5)."""
        total = 0.0
        for module in V:
            total += max(module)
        return total / self.modules

    def runs(self, inputs: Mapping[str, Signals]) -> bool:
        """Say whether the mac runs (step 1)."""
        return self.pi[0] <= len(inputs["U"]) <= self.pi[1] if "U" in inputs else any(inputs.values())

    def learn(self, inputs: Mapping[str, Signals], uniforms: Sequence[float], *, first: bool) -> tuple[list[int], float]:
        """Draw a code and store it (steps 1 to 10); a silent mac returns -1s and 0."""
        if not self.runs(inputs):
            return [-1] * self.modules, 0.0
        V = self.evidence(inputs, list(inputs), first)
        G = self.familiarity(V)
        csa = self.csa
        eta = 1 + (max(0.0, G - csa.g_min) / (1 - csa.g_min)) ** csa.g_exp * (csa.chi * self.cells)
        c = csa.centre + (RATCHET - csa.centre) * min(1.0, self.fill("U") / self.freeze) if csa.ratchet else csa.centre
        code = []
        for module, uniform in zip(V, uniforms, strict=True):
            upto = list(itertools.accumulate(1 + (eta - 1) / (1 + math.exp(-csa.slope * (v - c))) for v in module))
            code.append(min(self.cells - 1, sum(edge <= uniform * upto[-1] for edge in upto)))
        for name, active in inputs.items():
            if self.fill(name) > self.freeze:
                continue
            for j in active:
                for q in range(self.modules):
                    if self.allowed(name, j, q):
                        self.weights[name][j][q * self.cells + code[q]] = 1
        return code, G

    def recognise(self, inputs: Mapping[str, Signals], ties: Sequence[float], *, first: bool) -> tuple[list[int], float, float]:
        """Return the code of most evidence, G, and the weight F(zeta) of what is sent."""
        if not self.runs(inputs):
            return [-1] * self.modules, 0.0, 0.0
        V = self.evidence(inputs, list(inputs), first)
        if not first and self.csa.backoff is not None:
            V = self.back_off(inputs)
        code, zeta = [], 0
        for module, uniform in zip(V, ties, strict=True):
            tied = [k for k, v in enumerate(module) if v == max(module)]
            code.append(tied[int(uniform * len(tied))])
            zeta += sum(v >= max(module) - self.csa.eps for v in module)
        power, most = self.csa.hypotheses
        zeta = round(zeta / self.modules)
        return code, self.familiarity(V), float(zeta**power) if zeta <= most else 0.0

    def back_off(self, inputs: Mapping[str, Signals]) -> list[list[float]]:
        """Return the evidence of all fields if familiar enough, else the best without one, else the best alone, else the best of all."""
        there = [name for name in inputs if inputs[name]]
        best: list[list[list[float]]] = []
        for left_out, threshold in zip(range(len(there)), self.csa.backoff or (), strict=False):
            versions = [self.evidence(inputs, kept, False) for kept in itertools.combinations(there, len(there) - left_out)]
            best.append(max(versions, key=self.familiarity))
            if self.familiarity(best[-1]) >= threshold:
                return best[-1]
        return max(reversed(best), key=self.familiarity)
