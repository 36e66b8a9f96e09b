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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.errors import Mistake
from remanence.memory.sparsey import CSAConfig, Frame, activity
from remanence.memory.sparsey_encode import episodes
from remanence.memory.sparsey_readout import Readout
from remanence.memory.sparsey_wiring import Level, build, pixels
from remanence.seeds import generator
from remanence.storage import load_tree, save_tree

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


@dataclass(eq=False)
class Sparsey:
    """An associative memory of binary frames and sequences.

    Args:
        levels: from the input upwards.
        shape: rows and columns of the input; (1, F) for a flat one.
        seed: of all codes and ties.
        readouts: how labels are read: `counts` of winners, `nearest` stored code; the first is the usual one. `nearest` keeps every labelled code.
    """

    levels: Sequence[Level]
    shape: tuple[int, int]
    seed: int = 0
    readouts: Sequence[str] = ("counts",)

    def __post_init__(self) -> None:
        if not self.levels:
            raise Mistake("levels", "there is no level", "give at least one")
        self.grids = [build(self.levels, number, self.shape, self.seed) for number in range(len(self.levels))]
        self.persistence = [2**number if level.persistence is None else level.persistence for number, level in enumerate(self.levels)]
        self.random = generator(self.seed, "codes")
        top = self.levels[-1]
        self.readout = Readout(self.grids[-1].count, top.modules, top.cells, self.readouts)

    @property
    def classes(self) -> list[Hashable]:
        """The labels, in the order in which they came."""
        return self.readout.classes

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

    def learn(self, x: object, label: Hashable | None = None, *, force: bool = False) -> Recognition:
        """Store a frame (F,) or an episode (T, F), in one look.

        Args:
            x: booleans, or zeros and ones.
            label: of the whole; the code of the last frame stands for it.
            force: learn in frozen fields as well.

        Raises:
            Mistake: the input is not binary, is empty or of another size, or every mac is frozen.
        """
        frames = episodes(x, self.shape)
        if len(frames) != 1:
            raise Mistake("learn", f"got {len(frames)} episodes", "store one after the other: the code of each depends on those before")
        if not force and all(bool(macs.fields["U"].frozen(macs.clock).all()) for macs in self.grids):
            raise Mistake("learn", "the memory is frozen: its weights are set beyond `freeze`", "make a larger one, or say force=True")
        state, seen = None, []
        for t in range(frames.shape[1]):
            state = self._step(frames[:, t], state, t, learn=True, force=force)
            seen.append(state[-1])
        if label is not None:
            self.readout.learn(seen[-1].code, label)
        return _recognition(seen, None, frames.shape[1] == 1)

    def recognise(self, x: object) -> Recognition:
        """Recognise a frame (F,), an episode (T, F), or a batch of episodes (N, T, F); nothing changes.

        Raises:
            Mistake: the input is not binary, is empty or of another size.
        """
        frames = episodes(x, self.shape)
        seen = self._watch(frames)[1]
        scores = None
        if self.classes and len(frames) == 1:
            scores = dict(zip(self.classes, self.readout.scores(seen[-1].code)[0].tolist(), strict=True))
        return _recognition(seen, scores, frames.shape[1] == 1)

    def recall(self, prefix: object, n: int, *, support: float = 0.9) -> Recalled:
        """Recognise the start of a sequence and return the n frames that follow in memory.

        Args:
            prefix: a frame (F,) or frames (T, F).
            n: how many to recall.
            support: share of a mac's winners that a pixel must be connected with, to be on.
        """
        frames = episodes(prefix, self.shape)
        if n < 1 or not self.grids[0].fields.keys() - {"U"}:
            raise Mistake(
                "recall", f"n={n}, fields {', '.join(self.grids[0].fields)}", "ask for at least one frame, of a level with H or D"
            )
        state, _ = self._watch(frames)
        found = []
        for t in range(frames.shape[1], frames.shape[1] + n):
            state = self._step(None, state, t)
            found.append(state[0])
        code = torch.cat([frame.code for frame in found])
        return Recalled(pixels(self.grids[0], code) >= support, code, torch.cat([_mean(frame) for frame in found]))

    def novelty(self, x: object) -> float:
        """Return 1 - G of the last frame."""
        return 1 - float(self.recognise(x).familiarity.flatten()[-1])

    def similarity(self, a: object, b: object) -> float:
        """Return the share of modules in which both codes have the same winner, over macs that run for either."""
        one, two = (self._watch(episodes(x, self.shape))[1][-1].code[0] for x in (a, b))
        either = (one >= 0) | (two >= 0)
        return float(((one == two) & either).sum() / either.sum().clamp(min=1))

    def partial_fit(self, X: object, y: Any = None, *, force: bool = False) -> Self:
        """Store rows (N, F), one after the other: what the n-th becomes depends on those before, so there is no exact batch."""
        frames = episodes(X, self.shape, rows=True)
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
        return self.readout.scores(self.encode(X), readout)

    def score(self, X: object, y: Any) -> float:
        """Return the share of rows whose class is right."""
        found, right = self.predict(X), y.tolist() if hasattr(y, "tolist") else list(y)
        return sum(a == b for a, b in zip(found, right, strict=True)) / len(found)

    def encode(self, X: object) -> Int[Tensor, "N M Q"]:
        """Return the top level's code of each row (N, F)."""
        return self._watch(episodes(X, self.shape, rows=True))[1][-1].code

    def transform(self, X: object) -> Bool[Tensor, "N cells"]:
        """Return the codes of rows (N, F) as cells on or off, for a classifier on top."""
        return self.readout.units(self.encode(X)) > 0

    def save(self, path: str | Path) -> None:
        """Write the memory as one file, weights as packed bits; it goes on exactly where it was."""
        tree = {
            "kind": KIND,
            "levels": [dataclasses.asdict(level) for level in self.levels],
            "settings": {"shape": self.shape, "seed": self.seed, "readouts": self.readouts},
            "weights": [macs.state() for macs in self.grids],
            "random": self.random.get_state(),
            "readout": self.readout.state(),
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
        for macs, state in zip(memory.grids, tree["weights"], strict=True):
            macs.load_state(state)
        memory.random.set_state(tree["random"])
        memory.readout.load_state(tree["readout"])
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
        for number, macs in enumerate(self.grids):
            if before is not None and t % self.persistence[number]:
                now.append(before[number])
            else:
                inputs = {} if below is None else {"U": below}
                for name, source in (("H", number), ("D", number + 1)):
                    if before is not None and name in macs.fields:
                        inputs[name] = activity(before[source].code, before[source].sent, self.grids[source].cells)
                uniforms = torch.rand(macs.count, macs.modules, generator=self.random, dtype=torch.float64) if learn else None
                first = before is None
                now.append(
                    macs.recognise(inputs, first=first) if uniforms is None else macs.learn(inputs, uniforms, first=first, force=force)
                )
            below = activity(now[-1].code, now[-1].sent, macs.cells)
        return now


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
