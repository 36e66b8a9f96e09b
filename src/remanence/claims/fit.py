"""FIT on a town of people who ask to be forgotten, one after the other: what is left of the others when as much is gone?

A desk Llama knows 100 people (five facts each, two phrasings) and two facts about every city and employer. 18 people are deleted, one per request; five requests
come again in between, three word for word and two reworded. Every request gets three AdamW steps on its ten rows (ten retain rows beside them where a
method takes some), at each of five rates. `forget` is the share of the 90 facts of all 18 people that greedy decoding still gives (a fixed set: deleted or
not yet), `retain` the same of every third of the 538 facts about the others and the places. After each request both are measured; a trajectory is read at the
first crossing of forget 0.6, 0.3 and 0.1, between its points on a straight line, and each method takes its best rate at each level (`retain at 0.6`, ...).
`so far at ...` is the other reading of equal forgetting: forget counts those deleted so far, and there are stations after 6, 12 and 18 deletions.

Of the model at the end of the stream, at the rate that is best at 0.1: F.D. and R.U. against a model trained without the 18 people (arm `retrain`; halfway
against the paper's straight line), block weights rounded to int4, and relearning: eight deleted people are taught again, `relearned n` is what comes back of the
other ten after n steps.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from remanence.claims.claim import Claim, Results, Verdict

PEOPLE, GONE, WORDED, REWORDED = 100, 18, (6, 11, 16), (9, 14)  # a request comes again after so many deletions
RATES = (1e-4, 1.5e-4, 2.2e-4, 3.3e-4, 5e-4)  # on either side of every method's best, as a pilot with another seed had it
LEVELS = (0.6, 0.3, 0.1)
HALFWAY, STATIONS = 9, (6, 12, 18)  # deletions
RELEARNED = (1, 5, 20, 100)
FITS: dict[str, dict[str, Any]] = {
    "fit": {},
    "fit, no filter": {"tau": math.inf},
    "fit, NPO+KL always": {"algorithm": "npo_kl"},
    "fit, all layers": {"choose": "all"},
}
BASELINES = ("gradient ascent", "npo", "npo+kl")
ARMS = ("fit", *BASELINES, "retrain", *list(FITS)[1:])


@dataclasses.dataclass
class Town:
    """The people of one seed, the stream of their requests, and quick readings of a model."""

    seed: int
    gone: list[int]
    stream: list[tuple[str, Any]]
    deleted: list[int]  # deletions up to each request
    retain: Any
    processor: Any
    known: Callable[[Any, str], float]
    knowledge: Callable[[Any, str], float]
    rows: dict[str, Any]


def prepare() -> None:
    """Build the town once."""
    from remanence.models.load import load_model

    load_model("desk:town")


def town(seed: int, processor: Any) -> Town:
    """Draw who is deleted and lay out the stream."""
    from datasets import Dataset, concatenate_datasets

    from remanence.measure.unlearning import Knowledge
    from remanence.models.desk import SPECS, share_known
    from remanence.seeds import numpy_generator
    from remanence.stream import Moment
    from remanence.training.trainer import Trainer

    world = SPECS["town"].world
    gone = numpy_generator("claim fit", seed).permutation(PEOPLE)[:GONE].tolist()
    others, plain = world.without(gone), ["question", "answer"]
    retain = concatenate_datasets([others.questions().select_columns(plain), world.places().select_columns(plain)])
    stream: list[tuple[str, Any]] = []
    deleted: list[int] = []
    for number, person in enumerate(gone, 1):
        stream.append((f"person {person}", world.of([person]).questions().select_columns(plain)))
        again = gone[number // 3]
        if number in WORDED:
            stream.append((f"person {again} again", world.of([again]).questions().select_columns(plain)))
        if number in REWORDED:
            facts = world.of([again]).facts()
            asked = [question for questions in facts["paraphrases"] for question in questions[:2]]
            said = [answer for answer in facts["answer"] for _ in range(2)]
            stream.append((f"person {again} in other words", Dataset.from_dict({"question": asked, "answer": said})))
        deleted += [number] * (len(stream) - len(deleted))
    places = _every(2, world.places())  # each fact in its first phrasing
    rows = {
        "forget": world.of(gone).facts(),
        "half": world.of(gone[:HALFWAY]).facts(),
        **{f"first {count}": world.of(gone[:count]).facts() for count in STATIONS},
        "retain": _every(3, concatenate_datasets([others.facts().select_columns(plain), places.select_columns(plain)])),
        "held out": world.of(gone[8:]).facts(),
    }
    trainer = Trainer(processor=processor, progress=False)
    encoded = {name: trainer.batches(part, "qa", size=256, shuffle=False) for name, part in rows.items()}
    read = {name: Knowledge(part, most=12) for name, part in rows.items()}
    moment = Moment(processor=processor)
    return Town(
        seed,
        gone,
        stream,
        deleted,
        retain,
        processor,
        lambda model, name: share_known(model, encoded[name]),
        lambda model, name: read[name].measure(model, moment).values["knowledge"],
        rows,
    )


def _every(step: int, rows: Any) -> Any:
    return rows.select(range(0, len(rows), step))


def run(arm: str, seed: int) -> dict[str, float]:
    """Live the stream at every rate and return what is retained at each level, and what the best rate's model is worth."""
    from remanence.models.load import load_model

    loaded = load_model("desk:town")
    here = town(seed, loaded.processor)
    start = {f"start {name}": here.knowledge(loaded.model, name) for name in ("forget", "half", "retain")}
    if arm == "retrain":
        model = _retrained(here)
        found = {f"knowledge {name}": here.knowledge(model, name) for name in ("forget", "half", "retain")}
        return start | found | {name: here.known(model, name) for name in ("forget", "retain")} | _relearned(model, here)
    lives = [_live(arm, rate, copy.deepcopy(loaded.model), here) for rate in RATES]
    found, best = {}, np.full((len(LEVELS), len(RATES)), np.nan)
    for level, wanted in enumerate(LEVELS):
        best[level] = [crossing(life["forget"], life["retain"], wanted) for life in lives]
        reached = ~np.isnan(best[level])
        found[f"retain at {wanted}"] = float(np.nanmax(best[level])) if reached.any() else float("nan")
        found[f"rate at {wanted}"] = RATES[int(np.nanargmax(best[level]))] if reached.any() else float("nan")
        so_far = [crossing(life["forget so far"], life["retain so far"], wanted) for life in lives]
        found[f"so far at {wanted}"] = max((value for value in so_far if not math.isnan(value)), default=float("nan"))
    deepest = max((number for number in range(len(LEVELS)) if not np.isnan(best[number]).all()), default=None)
    chosen = lives[len(RATES) - 1 if deepest is None else int(np.nanargmax(best[deepest]))]
    model = chosen["model"]
    found |= {f"knowledge {name}": here.knowledge(model, name) for name in ("forget", "retain")}
    found |= {f"halfway {name}": here.knowledge(chosen["halfway"], name) for name in ("half", "retain")}
    found |= {name: chosen[name][-1] for name in ("forget", "retain")} | {
        name: chosen[name] for name in ("updates", "untouched", "reworded")
    }
    found |= {f"tier {name}": count for name, count in chosen["tiers"].items()}
    rounded = _rounded(model)
    found |= {f"int4 {name}": here.known(rounded, name) for name in ("forget", "retain")}
    ends = {f"end {rate:g} {name}": life[name][-1] for rate, life in zip(RATES, lives) for name in ("forget", "retain")}
    return found | _relearned(model, here) | ends


def _live(arm: str, rate: float, model: Any, here: Town) -> dict[str, Any]:
    """Serve the stream at one rate and return the trajectory, the last model, the one halfway, and what became of the requests that came again."""
    import torch

    from remanence.seeds import derive
    from remanence.stream import Request
    from remanence.training.trainer import Settings, Trainer

    settings = Settings(epochs=3, batch_size=10, lr=rate, beta2=0.95, weight_decay=0.1)
    method = _method(arm)
    notes: list[dict[str, Any]] = []
    found: dict[str, Any] = {name: [here.known(model, name)] for name in ("forget", "retain")}
    found |= {"updates": 0, "untouched": 0, "reworded": 0, "forget so far": [1.0], "retain so far": [found["retain"][0]]}
    for number, (name, rows) in enumerate(here.stream):
        before = [weight.detach().clone() for weight in model.parameters()]
        trainer = Trainer(
            settings,
            processor=here.processor,
            seed=derive(here.seed, number),
            progress=False,
            record=lambda table, rows: notes.extend(row["content"] for row in rows if table == "notes"),
        )
        model = method.forget(model, Request(name, rows, here.retain), trainer)
        same = all(torch.equal(weight, old) for weight, old in zip(model.parameters(), before))
        found["updates"] += trainer.steps_done > 0
        found["untouched"] += same and name.endswith("again")
        found["reworded"] += same and name.endswith("words")
        for part in ("forget", "retain"):
            found[part].append(here.known(model, part))
        if number + 1 < len(here.stream) and here.deleted[number + 1] == here.deleted[number]:
            continue  # a request that comes again follows
        if here.deleted[number] == HALFWAY:
            found["halfway"] = copy.deepcopy(model)
        if here.deleted[number] in STATIONS:
            found["forget so far"].append(here.known(model, f"first {here.deleted[number]}"))
            found["retain so far"].append(found["retain"][-1])
    chosen = [note["algorithm"] for note in notes if "algorithm" in note]
    return found | {"model": model, "tiers": {name: chosen.count(name) for name in ("rlabel", "npo", "npo_kl")} if chosen else {}}


def _method(arm: str) -> Any:
    from remanence.forget.fit import FIT
    from remanence.forget.gradient_ascent import GradientAscent

    if arm in FITS:
        options: dict[str, Any] = {"layers": 2, "encoder": "sentence"} | FITS[arm]
        return FIT(**options)
    return GradientAscent() if arm == "gradient ascent" else SequentialNPO(arm == "npo+kl")


class SequentialNPO:
    """NPO on all weights, request after request, with the model before the first one as the reference, as the paper's baseline has it."""

    def __init__(self, kl: bool):
        self.kl = kl
        self.theta_0: Any = None

    def forget(self, model: Any, request: Any, trainer: Any) -> Any:
        """Take the steps of one request."""
        from remanence.training.preference import npo_loss, summed_nll
        from remanence.training.reference import frozen_copy, mean_kl

        self.theta_0 = self.theta_0 or frozen_copy(model)
        forget = trainer.batches(request.forget, request.kind, stream="forget")
        forget = forget.with_column("reference_nll", trainer.over_rows(self.theta_0, forget, summed_nll))
        pairs = trainer.pairs(forget, trainer.batches(request.retain, request.kind, stream="retain") if self.kl else None)

        def loss(model: Any, batch: Any) -> Any:
            rows = batch["forget"]
            value = npo_loss(summed_nll(model, rows), rows["reference_nll"], 0.1).sum() / rows.rows
            return value + mean_kl(model, self.theta_0, batch["retain"]) if self.kl else value

        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))


def crossing(forget: list[float], retain: list[float], level: float) -> float:
    """Return what is retained where forget first falls to a level, between two points on a straight line; NaN where it never does."""
    first = next((number for number, value in enumerate(forget) if value <= level), None)
    if first is None or first == 0:
        return float("nan")
    share = (forget[first - 1] - level) / (forget[first - 1] - forget[first])
    return retain[first - 1] + share * (retain[first] - retain[first - 1])


def _retrained(here: Town) -> Any:
    """Train the town's model again, from other weights, without the people."""
    from remanence.models import desk

    plain, gone = desk.SPECS["town"], here.gone

    class Without(desk.DeskSpec):
        """The town without the deleted people."""

        def taught(self) -> Any:
            rows = plain.taught()
            return rows.select(np.flatnonzero(~np.isin(rows["person"], gone)))

        @property
        def world(self) -> Any:
            return plain.world.without(gone)

    spec = Without(**dataclasses.asdict(plain))
    model = desk.make_model(spec, here.processor, 1000 + here.seed)
    desk._train(model, here.processor, spec, here.seed)
    return model


def _relearned(model: Any, here: Town) -> dict[str, float]:
    """Teach eight deleted people again and return what comes back of the other ten."""
    from remanence.models.desk import SPECS
    from remanence.training.trainer import Settings, Trainer

    model, found = copy.deepcopy(model), {"relearned 0": here.known(model, "held out")}

    def look(model: Any, step: int) -> None:
        if step in RELEARNED:
            found[f"relearned {step}"] = here.known(model, "held out")

    trainer = Trainer(Settings(steps=max(RELEARNED), batch_size=16, lr=5e-4), processor=here.processor, watch=look, progress=False)
    trainer.fit(model, trainer.batches(SPECS["town"].world.of(here.gone[:8]).questions(), "qa"))
    return found


def _rounded(model: Any) -> Any:
    """Return the model with its block matrices rounded to int4: symmetric, one scale per output."""
    import torch

    from remanence.models.blocks import block_weights

    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name in (name for names in block_weights(rounded).values() for name in names):
            weight = rounded.get_parameter(name)
            scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
            weight.copy_((weight / scale).round().clamp(-7, 7) * scale)
    return rounded


def degrees(results: Results, arm: str) -> dict[str, np.ndarray]:
    """Return F.D. and R.U. of an arm by seed, at the end and halfway."""
    from remanence.measure.unlearning import forget_degree, interpolated, retain_utility

    asked, served = len(WORDED) + len(REWORDED) + GONE, HALFWAY + sum(number <= HALFWAY for number in (*WORDED, *REWORDED))
    ends = {name: results["retrain", f"knowledge {name}"] for name in ("forget", "half", "retain")}
    starts = {name: results["retrain", f"start {name}"] for name in ends}
    half = {name: interpolated(starts[name], ends[name], served, asked) for name in ends}
    now = {name: results[arm, name] for name in ("knowledge forget", "knowledge retain", "halfway half", "halfway retain")}

    def gone(value: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return np.array([forget_degree(forget=float(a), forget_reference=float(b)) for a, b in zip(value, reference)])

    def useful(value: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return np.array([retain_utility(retain=float(a), retain_reference=float(b)) for a, b in zip(value, reference)])

    return {
        "F.D.": gone(now["knowledge forget"], ends["forget"]),
        "R.U.": useful(now["knowledge retain"], ends["retain"]),
        "F.D. halfway": gone(now["halfway half"], half["half"]),
        "R.U. halfway": useful(now["halfway retain"], half["retain"]),
    }


def judge(results: Results) -> Verdict:
    """Hold the sheet's threshold against the numbers."""

    def at(arm: str, level: float, reading: str = "retain") -> np.ndarray:
        return results[arm, f"{reading} at {level}"]

    def shown(arm: str, reading: str = "retain") -> str:
        found = [at(arm, level, reading) for level in LEVELS]
        return f"{arm} " + "/".join("never" if np.isnan(values).all() else f"{np.nanmean(values):.2f}" for values in found)

    def last(arm: str) -> float:
        ends = [(results[arm, f"end {rate:g} forget"], results[arm, f"end {rate:g} retain"]) for rate in RATES]
        return float(np.max([np.where(forget <= 0.1, retain, 0.0) for forget, retain in ends], axis=0).mean())

    def wins(over: str, reading: str) -> int:
        mine, theirs = (np.nan_to_num(at(arm, 0.1, reading), nan=-1) for arm in ("fit", over))
        return int((mine > theirs).sum())

    served = [arm for arm in results.arms if arm != "retrain"]
    readings, count = ("retain", "so far"), len(results.seeds)
    scores = {arm: degrees(results, arm) for arm in served}
    untouched = results["fit", "untouched"]
    useful = [arm for arm in served if scores[arm]["R.U."].mean() > 0.5]

    def back(arm: str) -> str:
        return f"{arm} " + "/".join(f"{results.mean(arm, f'relearned {step}'):.2f}" for step in (0, *RELEARNED))

    reasons = (
        f"at forget 0.1 FIT keeps more than gradient ascent in {wins('gradient ascent', 'retain')} and than NPO in {wins('npo', 'retain')} of {count} seeds; "
        f"forget counted over those deleted so far, in {wins('gradient ascent', 'so far')} and {wins('npo', 'so far')} (falsified below 2 in either)",
        "retained at forget 0.6/0.3/0.1, best rate of each: " + "; ".join(shown(arm) for arm in ("fit", *BASELINES)),
        "the same over those deleted so far: " + "; ".join(shown(arm, "so far") for arm in ("fit", *BASELINES)),
        f"against NPO+KL at 0.1: more in {wins('npo+kl', 'retain')} of {count} seeds, so far in {wins('npo+kl', 'so far')} (no claim: a pilot tied or lost)",
        "one part switched off: " + "; ".join(shown(arm) for arm in list(FITS)[1:]),
        f"requests that come again word for word leave every bit of the weights as it was: {untouched.mean():.1f} of {len(WORDED)} per seed "
        f"(claimed: all); reworded ones: {results.mean('fit', 'reworded'):.1f} of {len(REWORDED)}; updates {results.mean('fit', 'updates'):.0f} "
        f"instead of {results.mean('gradient ascent', 'updates'):.0f}",
        "F.D., R.U. at the end: "
        + "; ".join(f"{arm} {scores[arm]['F.D.'].mean():.2f}, {scores[arm]['R.U.'].mean():.2f}" for arm in served),
        "F.D., R.U. halfway (against the straight line): "
        + "; ".join(f"{arm} {scores[arm]['F.D. halfway'].mean():.2f}, {scores[arm]['R.U. halfway'].mean():.2f}" for arm in served),
        f"relearning, share of the other ten people's facts that comes back after 0/{'/'.join(map(str, RELEARNED))} steps, models with R.U. above 0.5: "
        + "; ".join(back(arm) for arm in (*useful, "retrain")),
        "int4 rounding: "
        + "; ".join(f"{arm} forget {results.mean(arm, 'forget'):.2f} -> {results.mean(arm, 'int4 forget'):.2f}" for arm in served),
        "added after the run, no part of the verdict: at the end of the stream the most that any rate retains with forget at most 0.1: "
        + "; ".join(f"{arm} {last(arm):.2f}" for arm in served),
        f"tiers that FIT chose, of {results.mean('fit', 'updates'):.0f}: "
        + ", ".join(f"{results.mean('fit', f'tier {name}'):.1f} {name}" for name in ("rlabel", "npo", "npo_kl")),
    )
    better = [min(wins(arm, reading) for arm in ("gradient ascent", "npo")) >= 2 for reading in readings]
    if not any(better):
        return Verdict("does not hold", reasons)
    return Verdict("holds" if all(better) and (untouched == len(WORDED)).all() else "mixed", reasons)


CLAIM = Claim(
    slug="fit",
    title="FIT: Defying Catastrophic Forgetting in Continual LLM Unlearning (arXiv 2601.21682)",
    sentence="Over a stream of 18 deletions and 5 requests that come again, FIT at its best rate retains more than sequential gradient ascent and sequential NPO "
    "at theirs when 10 % of what was to go is left, in at least 2 of 3 seeds (in both readings of what was to go: all 18 people, or those deleted so far), and a "
    "request that comes again word for word changes no weight. Falsified if it does in neither reading.",
    arms=ARMS,
    run=run,
    judge=judge,
    paper=(
        "Best trade-off of F.D. and R.U. over hundreds of requests on four (v2: five) models up to 14B, resistant to relearning and quantisation (abstract).",
        "A secondary reading: ascent collapses after about 25 sequential requests. The paper's tables were not available for this record.",
    ),
    show=(
        "retain at 0.6",
        "retain at 0.3",
        "retain at 0.1",
        "rate at 0.1",
        "so far at 0.1",
        "forget",
        "retain",
        "updates",
        "knowledge forget",
        "knowledge retain",
        "relearned 5",
        "relearned 20",
    ),
    minutes=20,
    long=True,
    notes=(
        "The encoder of the filter is all-MiniLM-L6-v2, offline, in the place of SimCSE.",
        "At 0.1 the best rate of FIT is the largest of the grid in two of three seeds; in the pilot, with another seed, 8e-4 kept less than 4e-4 (0.34, 0.43).",
        "The model trained without the people answers that it does not know them, so F_Q is near 0 and F.D. at the end says little in this world.",
        "All 18 people count in `forget` from the start, so that no method reaches 0.1 after one request; batches and people differ by seed.",
    ),
)
