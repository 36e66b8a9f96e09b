"""Sparsey as a memory: levels of macs on grids, episodes, recall of sequences, labels; trained one look at a time, without a gradient.

    >>> import torch
    >>> from remanence.memory.sparsey_net import Sparsey
    >>> patterns = torch.rand(5, 200, generator=torch.Generator().manual_seed(0)) < 0.08
    >>> memory = Sparsey.mac(200, modules=16, cells=12, seed=0)
    >>> for pattern in patterns:
    ...     _ = memory.learn(pattern)
    >>> memory.novelty(patterns[3])  # seen once
    0.0
    >>> memory.novelty(torch.roll(patterns[3], 7)) > 0.3
    True

Level 0 looks at the input through windows that may overlap, level 1 at the macs of level 0, and so on. A code lasts 1, 2, 4, ... frames, level by level. Codes of
one frame ago reach the same level (H, within `radius` on the grid) and the level below (D), so that a frame is stored in its context. `recall` shows the start of
a sequence and lets H and D go on; pixels are read back through the weights of U.

Labels are counted per winner of the top level (label = argmax_y sum_q P(y | winner_q)), or the codes themselves are kept and the nearest one votes.

Equations, symbols, differences from the paper and costs: see `sparsey.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.errors import Mistake, nearest
from remanence.memory.sparsey import CSAConfig, Frame, activity
from remanence.memory.sparsey_level import Macs
from remanence.memory.sparsey_wiring import Level, build, pixels
from remanence.seeds import generator
from remanence.storage import load_tree, save_tree

READOUTS = ("counts", "nearest")
KIND = "sparsey"


class Recognition(NamedTuple):
    """What a memory makes of frames: the code of the top level, its familiarity, and a score per class (None without labels)."""

    code: Int[Tensor, "*N T M Q"]
    familiarity: Float[Tensor, "*N T"]
    scores: dict[Any, float] | None


class Recalled(NamedTuple):
    """The frames that follow a prefix, level 0's codes of them, and the evidence for each."""

    frames: Bool[Tensor, "n F"]
    code: Int[Tensor, "n M Q"]
    familiarity: Float[Tensor, " n"]


class Sparsey:
    """An associative memory of binary frames and sequences.

    Args:
        levels: from the input upwards.
        shape: rows and columns of the input; (1, F) for a flat one.
        seed: of all codes and ties.
        readouts: how labels are read: `counts` of winners, `nearest` stored code; the first is the usual one. `nearest` keeps every labelled code.
    """

    def __init__(self, levels: Sequence[Level], shape: tuple[int, int], *, seed: int = 0, readouts: Sequence[str] = ("counts",)):
        if not levels:
            raise Mistake("levels", "there is no level", "give at least one")
        for name in readouts:
            if name not in READOUTS:
                raise Mistake("readouts", f"no readout '{name}'", nearest(name, READOUTS))
        self.specs, self.shape, self.seed, self.readouts = tuple(levels), shape, seed, tuple(readouts)
        self.levels = [build(self.specs, number, shape, seed) for number in range(len(levels))]
        self.persistence = [2**number if spec.persistence is None else spec.persistence for number, spec in enumerate(levels)]
        self.random = generator(seed, "codes")
        self.classes: list[Hashable] = []
        self.counts: Float[Tensor, "C cells"] = torch.zeros(0, self._top.count * self._top.modules * self._top.cells)
        self.codes: list[Tensor] = []
        self.labels: list[int] = []

    @classmethod
    def mac(
        cls,
        features: int,
        modules: int = 24,
        cells: int = 16,
        csa: CSAConfig | None = None,
        pi: tuple[float, float] = (1, float("inf")),
        freeze: float = 0.5,
        permanence: int | None = None,
        *,
        seed: int = 0,
        readouts: Sequence[str] = ("counts",),
    ) -> Self:
        """Return a memory of one mac that sees all features."""
        level = Level((1, 1), None, modules, cells, csa or CSAConfig(), pi, freeze, permanence, radius=0)
        return cls([level], (1, features), seed=seed, readouts=readouts)

    @property
    def _top(self) -> Macs:
        return self.levels[-1]

    def learn(self, x: object, label: Hashable | None = None, *, force: bool = False) -> Recognition:
        """Store a frame (F,) or an episode (T, F), in one look.

        Args:
            x: booleans, or zeros and ones.
            label: of the whole; the code of the last frame stands for it.
            force: learn in frozen fields as well.

        Raises:
            Mistake: the input is not binary, is empty or of another size, or all macs of level 0 are frozen.
        """
        frames = self._frames(x)
        if len(frames) != 1:
            raise Mistake("learn", f"got {len(frames)} episodes", "store one after the other: the code of each depends on those before")
        if not force and bool(self.levels[0].fields["U"].frozen(self.levels[0].clock).all()):
            raise Mistake("learn", "the memory is frozen: its weights are set beyond `freeze`", "make a larger one, or say force=True")
        state, seen = None, []
        for t in range(frames.shape[1]):
            state = self._step(frames[:, t], state, t, learn=True, force=force)
            seen.append(state[-1])
        if label is not None:
            self._label(seen[-1].code, label)
        return _recognition(seen, None, frames.shape[1] == 1)

    def recognise(self, x: object) -> Recognition:
        """Recognise a frame (F,), an episode (T, F), or a batch of episodes (N, T, F); nothing changes.

        Raises:
            Mistake: the input is not binary, is empty or of another size.
        """
        frames = self._frames(x)
        seen = self._watch(frames)[1]
        scores = None
        if self.classes and len(frames) == 1:
            scores = dict(zip(self.classes, self._scores(seen[-1].code, self.readouts[0])[0].tolist(), strict=True))
        return _recognition(seen, scores, frames.shape[1] == 1)

    def recall(self, prefix: object, n: int, *, support: float = 0.9) -> Recalled:
        """Recognise the start of a sequence and return the n frames that follow in memory.

        Args:
            prefix: a frame (F,) or frames (T, F).
            n: how many to recall.
            support: share of a mac's winners that a pixel must be connected with, to be on.
        """
        frames = self._frames(prefix)
        if n < 1 or not self.levels[0].fields.keys() - {"U"}:
            raise Mistake(
                "recall", f"n={n}, fields {', '.join(self.levels[0].fields)}", "ask for at least one frame, of a level with H or D"
            )
        state, _ = self._watch(frames)
        found = []
        for t in range(frames.shape[1], frames.shape[1] + n):
            state = self._step(None, state, t)
            found.append(state[0])
        code = torch.cat([frame.code for frame in found])
        return Recalled(pixels(self.levels[0], code) >= support, code, torch.cat([_mean(frame) for frame in found]))

    def novelty(self, x: object) -> float:
        """Return 1 - G of the last frame."""
        return 1 - float(self.recognise(x).familiarity.flatten()[-1])

    def similarity(self, a: object, b: object) -> float:
        """Return the share of modules in which both codes have the same winner, over macs that run for either."""
        one, two = (self._watch(self._frames(x))[1][-1].code[0] for x in (a, b))
        either = (one >= 0) | (two >= 0)
        return float(((one == two) & either).sum() / either.sum().clamp(min=1))

    def partial_fit(self, X: object, y: Sequence[Hashable] | None = None, *, force: bool = False) -> Self:
        """Store rows (N, F), one after the other: what the n-th becomes depends on those before, so there is no exact batch."""
        frames = self._frames(X, rows=True)
        if y is not None and len(y) != len(frames):
            raise Mistake("y", f"has {len(y)} labels for {len(frames)} rows", "give one per row")
        plain = [None] * len(frames) if y is None else y.tolist() if hasattr(y, "tolist") else list(y)
        for row, label in zip(frames[:, 0], plain, strict=True):
            self.learn(row, label, force=force)
        return self

    def predict(self, X: object, readout: str | None = None) -> list[Any]:
        """Return the class of each row (N, F)."""
        scores = self.decision_function(X, readout)
        return [self.classes[number] for number in scores.argmax(1).tolist()]

    def decision_function(self, X: object, readout: str | None = None) -> Float[Tensor, "N C"]:
        """Return a score per row and class, in the order of `classes`.

        Raises:
            Mistake: no label was ever given, or the readout is not kept.
        """
        readout = readout or self.readouts[0]
        if not self.classes:
            raise Mistake("predict", "no label was ever learned", "give labels to partial_fit")
        if readout not in self.readouts:
            raise Mistake("readout", f"'{readout}' is not kept", f"make the memory with readouts=('{readout}',)")
        return self._scores(self.encode(X), readout)

    def score(self, X: object, y: Sequence[Hashable]) -> float:
        """Return the share of rows whose class is right."""
        found, right = self.predict(X), y.tolist() if hasattr(y, "tolist") else list(y)
        return sum(a == b for a, b in zip(found, right, strict=True)) / len(found)

    def encode(self, X: object) -> Int[Tensor, "N M Q"]:
        """Return the top level's code of each row (N, F)."""
        return self._watch(self._frames(X, rows=True))[1][-1].code

    def transform(self, X: object) -> Bool[Tensor, "N cells"]:
        """Return the codes of rows (N, F) as cells on or off, for a classifier on top."""
        code = self.encode(X)
        return activity(code, torch.ones(code.shape[:2]), self._top.cells)[:, :-1] > 0

    def save(self, path: str | Path) -> None:
        """Write the memory as one file, weights as packed bits; it goes on exactly where it was."""
        tree = {
            "kind": KIND,
            "levels": [dataclasses.asdict(spec) for spec in self.specs],
            "settings": {"shape": self.shape, "seed": self.seed, "readouts": self.readouts},
            "weights": [macs.state() for macs in self.levels],
            "random": self.random.get_state(),
            "classes": list(self.classes),
            "counts": self.counts,
            "codes": torch.cat(self.codes).to(torch.int16) if self.codes else None,
            "labels": self.labels,
        }
        save_tree(path, tree)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            Mistake: the file is missing, damaged, or no memory of this kind.
        """
        tree = load_tree(path)
        if not isinstance(tree, dict) or tree.get("kind") != KIND:
            raise Mistake(path, "is no Sparsey memory", "name a file that Sparsey.save wrote")
        memory = cls([Level(**spec | {"csa": CSAConfig(**spec["csa"])}) for spec in tree["levels"]], **tree["settings"])
        for macs, state in zip(memory.levels, tree["weights"], strict=True):
            macs.load_state(state)
        memory.random.set_state(tree["random"])
        memory.classes, memory.counts, memory.labels = list(tree["classes"]), tree["counts"], list(tree["labels"])
        memory.codes = [] if tree["codes"] is None else list(tree["codes"].long()[:, None].unbind(0))
        return memory

    def _watch(self, frames: Bool[Tensor, "N T F"]) -> tuple[list[Frame], list[Frame]]:
        """Recognise episodes: the frames of all levels at the end, and of the top level all along."""
        state, seen = None, []
        for t in range(frames.shape[1]):
            state = self._step(frames[:, t], state, t)
            seen.append(state[-1])
        assert state is not None
        return state, seen

    def _step(
        self, x: Bool[Tensor, "N F"] | None, before: list[Frame] | None, t: int, *, learn: bool = False, force: bool = False
    ) -> list[Frame]:
        """Go one frame further, from the input (None: from memory) upwards; a level whose code persists keeps it."""
        below = None if x is None else torch.nn.functional.pad(x.double(), (0, 1))
        now: list[Frame] = []
        for number, macs in enumerate(self.levels):
            if before is not None and t % self.persistence[number]:
                now.append(before[number])
            else:
                inputs = {} if below is None else {"U": below}
                for name, source in (("H", number), ("D", number + 1)):
                    if before is not None and name in macs.fields:
                        inputs[name] = activity(before[source].code, before[source].sent, self.levels[source].cells)
                uniforms = torch.rand(macs.count, macs.modules, generator=self.random, dtype=torch.float64) if learn else None
                first = before is None
                now.append(
                    macs.recognise(inputs, first=first) if uniforms is None else macs.learn(inputs, uniforms, first=first, force=force)
                )
            below = activity(now[-1].code, now[-1].sent, macs.cells)
        return now

    def _label(self, code: Int[Tensor, "1 M Q"], label: Hashable) -> None:
        """Note the class of a code."""
        if label not in self.classes:
            self.classes.append(label)
            self.counts = torch.cat([self.counts, torch.zeros(1, self.counts.shape[1])])
        number = self.classes.index(label)
        self.counts[number] += activity(code, torch.ones(code.shape[:2]), self._top.cells)[0, :-1].float()
        if "nearest" in self.readouts:
            self.codes.append(code)
            self.labels.append(number)

    def _scores(self, code: Int[Tensor, "N M Q"], readout: str) -> Float[Tensor, "N C"]:
        """Return the mean over modules of P(class | winner), or the largest overlap with a stored code of each class."""
        cells = activity(code, torch.ones(code.shape[:2]), self._top.cells)[:, :-1].float()
        modules = self._top.count * self._top.modules
        if readout == "counts":
            return cells @ (self.counts / self.counts.sum(0).clamp(min=1)).T / modules
        stored = torch.cat(self.codes)
        overlap = cells @ activity(stored, torch.ones(stored.shape[:2]), self._top.cells)[:, :-1].float().T / modules
        labels = torch.tensor(self.labels).expand(len(code), -1)
        return torch.zeros(len(code), len(self.classes)).scatter_reduce_(1, labels, overlap, "amax")

    def _frames(self, x: object, *, rows: bool = False) -> Bool[Tensor, "N T F"]:
        """Return input as episodes of binary frames.

        Raises:
            Mistake: what it is instead.
        """
        found = torch.as_tensor(x)
        if rows:
            if found.ndim != 2:
                raise Mistake("X", f"has shape {tuple(found.shape)}", "give rows of features (N, F)")
            found = found[:, None]
        found = found[(None,) * (3 - found.ndim)] if 1 <= found.ndim <= 3 else found
        features = self.shape[0] * self.shape[1]
        if found.ndim != 3 or found.shape[-1] != features:
            raise Mistake("input", f"has shape {tuple(found.shape)}", f"this memory reads frames of {features} features")
        if found.numel() == 0:
            raise Mistake("input", "has no frame", "give at least one")
        if found.dtype != torch.bool and not bool(((found == 0) | (found == 1)).all()):
            raise Mistake("input", "is not binary", "encode it first: `binarise` or `strongest_orientations` of memory.sparsey_encode")
        found = found.bool()
        if not bool(found.any(-1).all()):
            raise Mistake("input", "a frame is empty: nothing is on", "leave it out, or encode it otherwise")
        return found


def _mean(frame: Frame) -> Float[Tensor, " N"]:
    """Return the familiarity over the macs that run; 0 if none does."""
    running = frame.code[..., 0] >= 0
    return frame.familiarity.sum(-1) / running.sum(-1).clamp(min=1)


def _recognition(seen: Sequence[Frame], scores: dict[Any, float] | None, single: bool) -> Recognition:
    """Put the frames of the top level together, without the axes that the input did not have."""
    code, G = torch.stack([frame.code for frame in seen], 1), torch.stack([_mean(frame) for frame in seen], 1)
    if len(code) == 1:
        code, G = (code[0, 0], G[0, 0]) if single else (code[0], G[0])
    return Recognition(code, G, scores)
