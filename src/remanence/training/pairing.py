"""Which retain row meets which forget row: pairs of row numbers (M, 2) per epoch, batches of them, and how often each row is met.

F are n forget rows, R are m retain rows; a row belongs to an entity e (a person, an author, a document), and a retain row is of a type:

| type | is |
|---|---|
| entity | DIRECT: about something that the entity's own facts name (its town, its employer) |
| domain | INDIRECT: about others of the same field (people of the same town) |
| general | unrelated; its entity is not looked at |

| strategy | pairs of an epoch | M |
|---|---|---|
| one_to_one_seq | (F[i], R[i]): only the first n retain rows are ever met | n |
| one_to_one_random (TOFU) | (F[i], R[uniform]), redrawn every epoch | n |
| cyclic | (F[i mod n], R[i mod m]) | max(n, m) |
| direct, indirect | cyclic without the rows of the other type | max(n, m') |
| balanced | cyclic with as many indirect as direct rows of each entity, drawn once | max(n, m') |
| melu | cyclic inside each entity; each general row with a forget row drawn once | sum_e max(n_e, m_e) + general |

`order` shuffled draws a new order of the pairs every epoch; by_entity keeps an entity's pairs together, in the order of the forget rows, general ones last.
Everything is a function of seeds: batch i is the same whoever asks, whenever. Cost: O(n + m) per epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from remanence.data.neighbourhoods import TYPES, check_types
from remanence.errors import Mistake, nearest
from remanence.seeds import numpy_generator
from remanence.training.batches import Batch, Batches

if TYPE_CHECKING:
    from datasets import Dataset

STRATEGIES = ("one_to_one_seq", "one_to_one_random", "direct", "indirect", "balanced", "cyclic", "melu")
LABELLED = ("direct", "indirect", "balanced", "melu")  # strategies that look at entities and types
ORDERS = ("shuffled", "by_entity")
DIRECT, INDIRECT, GENERAL = range(3)


@dataclass(frozen=True, eq=False)
class Labels:
    """Entity and type of every row; entities are numbered as they first appear, those of the forget rows first."""

    entities: tuple[str, ...]
    forget: Int[np.ndarray, " n"]
    retain: Int[np.ndarray, " m"]
    types: Int[np.ndarray, " m"]


@dataclass(frozen=True, eq=False)
class Pairing:
    """Pairs by epoch; `pair` makes one of rows.

    Args:
        strategy: of `STRATEGIES`.
        n: forget rows.
        m: retain rows.
        labels: entities and types, where they are known.
        order: shuffled | by_entity.
        seed: of what is drawn once: the indirect rows of balanced, the forget rows that general ones meet.
        allow_missing: leave out entities that have rows on one side only (melu), or too few indirect ones (balanced).

    Raises:
        Mistake: an unknown name, labels that are missing or do not fit, or too few retain rows.
    """

    strategy: str
    n: int
    m: int
    labels: Labels | None = None
    order: str = "shuffled"
    seed: int = 42
    allow_missing: bool = False
    _fixed: np.ndarray | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_names("pairs", self.strategy, self.order)
        if self.labels is None and (self.strategy in LABELLED or self.order == "by_entity"):
            asked = f"strategy '{self.strategy}'" if self.strategy in LABELLED else "order 'by_entity'"
            raise Mistake("pairs", f"{asked} needs the entities and types of rows", "add their columns, or pair cyclic and shuffled")
        if self.strategy == "one_to_one_seq" and self.m < self.n:
            raise Mistake("pairs", f"one_to_one_seq has {self.m} retain rows for {self.n} forget rows", "add retain rows or pair cyclic")
        if self.strategy != "one_to_one_random":
            object.__setattr__(self, "_fixed", self._built(0, 0))

    def __len__(self) -> int:
        """Return M, the pairs of an epoch."""
        return self.n if self._fixed is None else len(self._fixed)

    def epoch(self, number: int, seed: int = 0) -> Int[np.ndarray, "M 2"]:
        """Return an epoch's pairs (forget row, retain row) in their order.

        Args:
            number: of the epoch, from 0.
            seed: of the event: of the order, and of the retain rows of one_to_one_random.
        """
        pairs = self._built(number, seed) if self._fixed is None else self._fixed
        if self.order == "shuffled":
            return pairs[numpy_generator(seed, "order of pairs", number).permutation(len(pairs))]
        labels = self._labels()
        return pairs[np.lexsort((labels.forget[pairs[:, 0]], labels.types[pairs[:, 1]] == GENERAL))]

    def batches(self, forget: Batches, retain: Batches, seed: int = 0) -> PairedBatches:
        """Return the pairs of two encoded sets as batches by number.

        Raises:
            Mistake: they have other numbers of rows than the pairing was made for.
        """
        return PairedBatches(self, forget, retain, seed)

    def exposures(self, pairs: int | None = None, seed: int = 0) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
        """Return how often each forget row and each retain row is met in the first `pairs` pairs (by default an epoch)."""
        left, met = len(self) if pairs is None else pairs, (np.zeros(self.n, np.int64), np.zeros(self.m, np.int64))
        for number in range(-(-left // max(1, len(self)))):
            taken = self.epoch(number, seed)[: left - number * len(self)]
            for side, counts in enumerate(met):
                counts += np.bincount(taken[:, side], minlength=len(counts))
        return met

    def report(self, pairs: int | None = None, seed: int = 0) -> dict[str, Any]:
        """Return as plain JSON how often rows are met in the first `pairs` pairs (by default an epoch): per side, per type, per entity."""
        forget, retain = self.exposures(pairs, seed)
        found: dict[str, Any] = {"strategy": self.strategy, "order": self.order, "pairs_per_epoch": len(self), "pairs": int(forget.sum())}
        found |= {"forget": _side(forget), "retain": _side(retain)}
        if self.labels is None:
            return found
        labels, count = self.labels, len(self.labels.entities)
        found["types"] = {name: _side(retain[labels.types == code]) for code, name in enumerate(TYPES)}
        own = {"forget": np.bincount(labels.forget, forget, count)}
        for code in (DIRECT, INDIRECT):
            own[TYPES[code]] = np.bincount(labels.retain, retain * (labels.types == code), count)
        targets = np.unique(np.concatenate([labels.forget, labels.retain[labels.types != GENERAL]]))
        found["entities"] = {labels.entities[code]: {key: int(value[code]) for key, value in own.items()} for code in targets}
        return found

    def _labels(self) -> Labels:
        assert self.labels is not None  # __post_init__ refused
        return self.labels

    def _built(self, number: int, seed: int) -> Int[np.ndarray, "M 2"]:
        """Return an epoch's pairs before they are ordered."""
        if self.strategy == "one_to_one_seq":
            return one_to_one_seq(self.n)
        if self.strategy == "one_to_one_random":
            return one_to_one_random(self.n, self.m, numpy_generator(self.seed, seed, "retain rows", number))
        if self.strategy == "cyclic":
            return cyclic(self.n, np.arange(self.m))
        labels = self._labels()
        if self.strategy in ("direct", "indirect"):
            kept = np.flatnonzero(labels.types != (INDIRECT if self.strategy == "direct" else DIRECT))
            if not len(kept):
                raise Mistake("pairs", f"no retain row is left for '{self.strategy}'", "add such rows, or general ones")
            return cyclic(self.n, kept)
        draws = numpy_generator(self.seed, self.strategy)
        if self.strategy == "balanced":
            if not self.allow_missing:
                refuse_unbalanced(labels)
            return cyclic(self.n, balanced(labels.retain, labels.types, draws))
        if not self.allow_missing:
            refuse_one_sided(labels)
        return melu(labels.forget, labels.retain, labels.types, draws)


class PairedBatches:
    """Batches of pairs by number: positions [index*size, (index+1)*size) of the epochs' pairs laid end to end.

    Args:
        pairing: what meets what.
        forget: the encoded forget rows, in the order of their set.
        retain: the encoded retain rows, in the order of their set.
        seed: of the event.

    Raises:
        Mistake: a number of rows that the pairing was not made for.
    """

    def __init__(self, pairing: Pairing, forget: Batches, retain: Batches, seed: int):
        if (forget.count, retain.count) != (pairing.n, pairing.m):
            problem = f"{pairing.n} forget and {pairing.m} retain rows were paired, {forget.count} and {retain.count} are trained on"
            raise Mistake("pairs", problem, "pair the rows that are trained on")
        self.pairing, self.forget, self.retain, self.seed = pairing, forget, retain, seed
        self.size = min(max(forget.size, retain.size), len(pairing))
        self._kept: tuple[int, np.ndarray] = (-1, np.zeros((0, 2), np.int64))

    def __len__(self) -> int:
        """Return the number of batches that hold each pair at least once."""
        return -(-len(self.pairing) // self.size)

    def numbers(self, index: int) -> Int[np.ndarray, "B 2"]:
        """Return the row numbers of batch `index`."""
        count, first = len(self.pairing), index * self.size
        epoch, inside = divmod(first, count)
        head = self._epoch(epoch)[inside : inside + self.size]
        missing = self.size - len(head)
        return head if not missing else np.concatenate([head, self._epoch(epoch + 1)[:missing]])  # size <= count: two epochs suffice

    def __getitem__(self, index: int) -> Batch:
        rows = self.numbers(index)
        return Batch({"forget": self.forget.take(rows[:, 0]), "retain": self.retain.take(rows[:, 1])})

    def _epoch(self, number: int) -> np.ndarray:
        if self._kept[0] != number:
            self._kept = (number, self.pairing.epoch(number, self.seed))
        return self._kept[1]


def pair(
    forget: Dataset,
    retain: Dataset,
    strategy: str = "melu",
    *,
    entity_key: str = "title",
    type_key: str = "type",
    order: str = "shuffled",
    seed: int = 42,
    allow_missing: bool = False,
) -> Pairing:
    """Pair rows by the columns that say whom they belong to.

    Args:
        forget: rows with `entity_key`.
        retain: rows with `entity_key` and `type_key` (entity | domain | general); one_to_one_* and cyclic do without either column.
        strategy: of `STRATEGIES`.
        entity_key: column with a row's entity.
        type_key: column with a retain row's type.
        order: shuffled | by_entity.
        seed: of what is drawn once.
        allow_missing: leave out entities that have rows on one side only (melu), or too few indirect ones (balanced).

    Raises:
        Mistake: an unknown name or type, a missing column, a question on both sides, an entity without rows on the other side, too few rows.
    """
    check_names("pairs", strategy, order)
    refuse_shared_questions("pairs", ("forget", forget), ("retain", retain))
    wanted = [("forget", forget, entity_key), ("retain", retain, entity_key), ("retain", retain, type_key)]
    missing = [(side, key) for side, rows, key in wanted if key not in rows.column_names]
    if missing and (strategy in LABELLED or order == "by_entity"):
        side, key = missing[0]
        problem = f"the {side} set has no column '{key}', which '{strategy}', {order}, needs"
        raise Mistake("pairs", problem, "name the column (entity_key, type_key), or pair cyclic and shuffled")
    labels = None if missing else labels_of(forget[entity_key][:], retain[entity_key][:], retain[type_key][:])
    return Pairing(strategy, len(forget), len(retain), labels, order, seed, allow_missing)


def labels_of(forget: Sequence[Any], retain: Sequence[Any], types: Sequence[Any]) -> Labels:
    """Number entities and types.

    Raises:
        Mistake: a type that is none, or a row without an entity.
    """
    import pyarrow as pa

    kinds = check_types("retain", types)
    sides = [pa.array(names).cast(pa.string()) for names in (forget, retain)]
    for side, names, needed in (("forget", sides[0], True), ("retain", sides[1], kinds != GENERAL)):
        holes = np.flatnonzero((names.is_null().to_numpy(False) | (names.fill_null("").to_numpy(False) == "")) & needed)
        if len(holes):
            raise Mistake(f"{side} row {holes[0]}", "belongs to no entity", "fill in its entity")
    known = pa.concat_arrays(sides).fill_null("").dictionary_encode()
    codes = known.indices.to_numpy().astype(np.int64)
    return Labels(tuple(known.dictionary.to_pylist()), codes[: len(forget)], codes[len(forget) :], kinds)


def check_names(place: str, strategy: str, order: str) -> None:
    """Refuse an unknown strategy or order.

    Raises:
        Mistake: with the nearest name.
    """
    for name, value, known in (("strategy", strategy, STRATEGIES), ("order", order, ORDERS)):
        if value not in known:
            raise Mistake(f"{place}.{name}", f"unknown value {value!r}", nearest(value, known))


def refuse_shared_questions(place: str, first: tuple[str, Dataset], second: tuple[str, Dataset]) -> None:
    """Refuse two named sets that share a question (sets without questions pass).

    Raises:
        Mistake: with the number of shared rows and the first of them.
    """
    (name, rows), (other, others) = first, second
    if "question" not in rows.column_names or "question" not in others.column_names:
        return
    import pyarrow as pa
    import pyarrow.compute as pc

    asked, there = (pc.utf8_trim_whitespace(pa.array(part["question"][:])) for part in (rows, others))
    shared = np.flatnonzero(pc.is_in(asked, value_set=there).to_numpy(False))
    if len(shared):
        problem = f"{len(shared)} questions of the {name} set stand in the {other} set too (the first is row {shared[0]})"
        raise Mistake(place, problem, "remove them from one of the two")


def refuse_one_sided(labels: Labels) -> None:
    """Refuse an entity that has rows to forget and none to retain, or the other way round.

    Raises:
        Mistake: naming the first.
    """
    retained = labels.retain[labels.types != GENERAL]
    for codes, others, lacks in ((labels.forget, retained, "retain"), (retained, labels.forget, "forget")):
        alone = np.setdiff1d(codes, others)
        if len(alone):
            problem = f"{len(alone)} entities have no {lacks} rows (the first is '{labels.entities[alone[0]]}')"
            raise Mistake("pairs", problem, "add such rows, or allow_missing to leave these entities out")


def refuse_unbalanced(labels: Labels) -> None:
    """Refuse an entity with fewer indirect than direct rows: leaving out indirect ones cannot make them equal.

    Raises:
        Mistake: naming the first.
    """
    direct, indirect = (np.bincount(labels.retain[labels.types == code], minlength=len(labels.entities)) for code in (DIRECT, INDIRECT))
    short = np.flatnonzero(indirect < direct)
    if len(short):
        problem = f"'{labels.entities[short[0]]}' has {direct[short[0]]} direct and {indirect[short[0]]} indirect rows"
        raise Mistake("pairs", problem, "add indirect rows, or allow_missing to take what there is")


# The strategies, as row numbers.


def one_to_one_seq(n: int) -> Int[np.ndarray, "n 2"]:
    """Return (i, i) for i < n."""
    return np.stack([np.arange(n), np.arange(n)], 1)


def one_to_one_random(n: int, m: int, draws: np.random.Generator) -> Int[np.ndarray, "n 2"]:
    """Return (i, uniform in [0, m)) for i < n."""
    return np.stack([np.arange(n), draws.integers(m, size=n)], 1)


def cyclic(n: int, retain: Int[np.ndarray, " m"]) -> Int[np.ndarray, "M 2"]:
    """Return (i mod n, retain[i mod m]) for i < max(n, m)."""
    place = np.arange(max(n, len(retain)))
    return np.stack([place % n, retain[place % len(retain)]], 1)


def balanced(entity: Int[np.ndarray, " m"], types: Int[np.ndarray, " m"], draws: np.random.Generator) -> Int[np.ndarray, " k"]:
    """Return the retain rows, ascending, with as many random indirect ones of each entity as it has direct ones."""
    direct = np.bincount(entity[types == DIRECT], minlength=entity.max() + 1)
    indirect = draws.permutation(np.flatnonzero(types == INDIRECT))
    indirect = indirect[np.argsort(entity[indirect], kind="stable")]  # entity by entity, in random order inside
    owner = entity[indirect]
    rank = np.arange(len(indirect)) - np.searchsorted(owner, owner)
    return np.sort(np.concatenate([np.flatnonzero(types != INDIRECT), indirect[rank < direct[owner]]]))


def melu(
    forget: Int[np.ndarray, " n"], retain: Int[np.ndarray, " m"], types: Int[np.ndarray, " m"], draws: np.random.Generator
) -> Int[np.ndarray, "M 2"]:
    """Return each entity's rows walked side by side, the shorter side again and again, then each general row with a random forget row."""
    count = max(forget.max(), retain.max()) + 1
    by_entity = np.argsort(forget, kind="stable"), np.argsort(np.where(types == GENERAL, count, retain), kind="stable")
    sizes = np.bincount(forget, minlength=count), np.bincount(retain[types != GENERAL], minlength=count)
    length = np.where((sizes[0] > 0) & (sizes[1] > 0), np.maximum(*sizes), 0)  # one-sided entities are left out
    entity = np.repeat(np.arange(count), length)
    place = np.arange(len(entity)) - np.repeat(np.cumsum(length) - length, length)
    sides = [order[(np.cumsum(size) - size)[entity] + place % size[entity]] for order, size in zip(by_entity, sizes)]
    general = np.flatnonzero(types == GENERAL)
    return np.concatenate([np.stack(sides, 1), np.stack([draws.integers(len(forget), size=len(general)), general], 1)])


def _side(counts: Int[np.ndarray, " n"]) -> dict[str, int]:
    """Return rows, exposures, rows never met, and the fewest and most exposures of a row."""
    least, most = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    return {"rows": len(counts), "exposures": int(counts.sum()), "never": int((counts == 0).sum()), "least": least, "most": most}


def table(report: dict[str, Any]) -> str:
    """Return a pairing's report as lines for people: exposures per side, type and entity."""
    head = f"{report['strategy']}, {report['order']}: {report['pairs']} pairs, {report['pairs_per_epoch']} per epoch"
    sides = {"forget": report["forget"], "retain": report["retain"]} | report.get("types", {})
    lines = [
        f"{name:<8} {side['rows']:>6} rows {side['exposures']:>8} exposures, {side['least']} to {side['most']} per row, {side['never']} never met"
        for name, side in sides.items()
    ]
    for name, own in report.get("entities", {}).items():
        lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in own.items()))
    return "\n".join([head, *lines])
