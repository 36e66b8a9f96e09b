"""OFMU on the desk's town: does decorrelated ascent with an outer retain step keep more than plain ascent, at equal forgetting?

A desk Llama that knows 100 people, and facts about cities and employers, must forget 10 people (100 questions); the other 90 are the retain set. Every arm
takes steps of unit length times 0.15 (OFMU's outer steps: 0.3), batch 32, 60 forget gradients. `kept` is the share of the other people's facts that are still
recalled at the first look at which the mean probability of the forget answers is below 0.10; an arm that never gets there scores 0. Baselines are looked at
after every step, OFMU after every round (which favours the baselines); `cities` is the same for facts about cities, which no retain batch holds. The nine
`grid` points of OFMU and its arms with five outer steps per round stop at that look. Processor time leaves the looks out.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from remanence.claims.claim import Claim, Results, Verdict

GONE, GOAL = 10, 0.10  # people to forget, mean probability of their answers
ROUNDS, INNER, BATCH = 12, 5, 32
LENGTH, SHORT = 0.15, 1e-4  # of a step; gradients are cut to SHORT and the rate is LENGTH / SHORT, so that every step is LENGTH long
BETA, ETA = 0.5, 0.3
FACTORS = {"/3": 1 / 3, "": 1.0, "x3": 3.0}
GRID = {
    f"grid beta{b} eta{e}": {"beta": BETA * times_b, "eta_out": ETA * times_e}
    for b, times_b in FACTORS.items()
    for e, times_e in FACTORS.items()
}
OFMUS: dict[str, dict[str, Any]] = {
    "ofmu": {},
    "ofmu beta 0": {"beta": 0.0},
    "ofmu outer 5": {"outer_steps": 5},
    "ofmu beta 0 outer 5": {"beta": 0.0, "outer_steps": 5},
    **{name: values for name, values in GRID.items() if name != "grid beta eta"},  # the middle is `ofmu`
}
LAMBDAS = {"graddiff 0.2": 0.2, "graddiff /3": 1 / 3, "graddiff": 1.0, "graddiff x3": 3.0}
NPOS = {"npo": 1.0, "npo x4": 4.0}
WHOLE = ("ofmu", "ofmu beta 0", "gradient ascent", *LAMBDAS, *NPOS)  # the arms that run to their end


def prepare() -> None:
    """Build the desk model once."""
    from remanence.models.load import load_model

    load_model("desk:town")


def run(arm: str, seed: int) -> dict[str, float]:
    """Forget ten people and return what is kept when they are forgotten, and at the end."""
    from remanence.forget.gradient_ascent import GradientAscent
    from remanence.forget.gradient_difference import GradientDifference
    from remanence.forget.npo import NPO
    from remanence.forget.ofmu import OFMU
    from remanence.measure.recall import Recall
    from remanence.models.desk import SPECS
    from remanence.models.load import load_model
    from remanence.seeds import derive, numpy_generator
    from remanence.stream import Moment, Request
    from remanence.training.trainer import Settings, Trainer

    loaded, world = load_model("desk:town"), SPECS["town"].world
    model, moment = loaded.model, Moment(processor=loaded.processor)
    gone = numpy_generator(seed, "gone").permutation(len(world))[:GONE].tolist()
    request = Request("ten people", world.of(gone).questions(), world.without(gone).questions())
    places = world.places()
    cities = places.select(np.flatnonzero(np.array(places["of"]) == "birth_city"))
    forgotten, kept, known = (
        Recall(rows, paraphrased=False, ranked=False, batch_size=256) for rows in (request.forget, world.without(gone).facts(), cities)
    )
    every = INNER + OFMUS[arm].get("outer_steps", 1) if arm in OFMUS else 1
    found, looking = {"kept": 0.0, "cities": 0.0, "reached": 0.0}, 0.0

    def look(model: Any, step: int) -> bool:
        nonlocal looking
        begun = time.process_time()
        if step % every == 0 and not found["reached"] and forgotten.measure(model, moment).values["probability"] < GOAL:
            found.update(kept=_exact(kept, model, moment), cities=_exact(known, model, moment), reached=1.0)
            found["forget gradients"] = step if every == 1 else INNER * step / every
        looking += time.process_time() - begun
        return bool(found["reached"]) and arm not in WHOLE

    if arm in OFMUS:
        method: Any = OFMU(**{"inner_steps": INNER, "outer_rounds": ROUNDS, "beta": BETA, "eta_in": LENGTH, "eta_out": ETA} | OFMUS[arm])
    elif arm in LAMBDAS:
        method = GradientDifference(alpha=LAMBDAS[arm])
    else:
        method = NPO(alpha=NPOS[arm]) if arm in NPOS else GradientAscent()
    unit: dict[str, Any] = {} if arm in OFMUS else {"optimizer": "sgd", "lr": LENGTH / SHORT, "clip": SHORT}
    settings = Settings(steps=ROUNDS * INNER, batch_size=BATCH, **unit)
    trainer = Trainer(settings, processor=loaded.processor, seed=derive(seed, "forget"), watch=look, progress=False)
    begun = time.process_time()
    model = method.forget(model, request, trainer)
    found["seconds per step"] = (time.process_time() - begun - looking) / trainer.steps_done
    if arm in WHOLE:
        found["end forget"] = forgotten.measure(model, moment).values["probability"]
        found |= {"end kept": _exact(kept, model, moment), "end cities": _exact(known, model, moment)}
    if arm in OFMUS:
        found["cosine"] = float(np.mean([row["cosine"] for row in method.history if row["level"] == "inner"]))
    return found


def _exact(probe: Any, model: Any, moment: Any) -> float:
    return probe.measure(model, moment).values["exact"]


def judge(results: Results) -> Verdict:
    """Hold the sheet's thresholds against the numbers."""
    gain = results["ofmu", "kept"] - results["ofmu beta 0", "kept"]
    failed = int((gain < 0.2).sum())
    beaten = all(bool((results["ofmu", "kept"] > results[rival, "kept"]).all()) for rival in ("gradient ascent", "graddiff 0.2"))
    grid = [results.mean("ofmu" if name == "grid beta eta" else name, "kept") for name in GRID]
    weights = [results.mean(name, "kept") for name in LAMBDAS if name != "graddiff 0.2"]
    spread, rival_spread = max(grid) - min(grid), max(weights) - min(weights)
    late = results["ofmu", "end kept"] - results["ofmu beta 0", "end kept"]
    cost = results.mean("ofmu", "seconds per step") / results.mean("graddiff", "seconds per step")
    listed = ", ".join(f"{value:+.2f}" for value in gain)
    reasons = (
        f"decorrelation keeps {listed} more of the others' facts at equal forgetting (claimed: at least +0.20 in every seed; falsified if 2 fail): "
        f"{results.mean('ofmu', 'kept'):.2f} against {results.mean('ofmu beta 0', 'kept'):.2f}",
        f"gradient ascent keeps {results.mean('gradient ascent', 'kept'):.2f}, gradient difference with lambda 0.2 "
        f"{results.mean('graddiff 0.2', 'kept'):.2f} (claimed: below OFMU in every seed)",
        f"over a grid of beta and eta_out, each a third to three times the default, kept spreads over {spread:.2f} ({min(grid):.2f} to {max(grid):.2f}); "
        f"gradient difference over lambda 1/3 to 3 over {rival_spread:.2f} ({min(weights):.2f} to {max(weights):.2f}) (claimed: OFMU's is smaller)",
        f"no claim against a well-weighted baseline: gradient difference with lambda 3 keeps {results.mean('graddiff x3', 'kept'):.2f}, "
        f"NPO with alpha 4 {results.mean('npo x4', 'kept'):.2f}; OFMU with five outer steps per round {results.mean('ofmu outer 5', 'kept'):.2f} "
        f"(without decorrelation {results.mean('ofmu beta 0 outer 5', 'kept'):.2f})",
        f"at the end of the 60 forget gradients decorrelation keeps {', '.join(f'{value:+.2f}' for value in late)} more (no claim: forgetting is not equal "
        f"there, mean probability {results.mean('ofmu', 'end forget'):.3f} against {results.mean('ofmu beta 0', 'end forget'):.4f})",
        f"an OFMU step, outer ones counted in, takes {cost:.1f} times the processor time of a gradient-difference step",
    )
    if failed >= 2:
        return Verdict("does not hold", reasons)
    return Verdict("holds" if failed == 0 and beaten and spread < rival_spread else "mixed", reasons)


CLAIM = Claim(
    slug="ofmu",
    title="OFMU: Optimization-Driven Framework for Machine Unlearning (arXiv 2509.22483)",
    sentence="At equal forgetting OFMU with decorrelation keeps at least 0.2 more of the retained facts than without in every seed, more than gradient ascent and "
    "gradient difference with lambda 0.2, and spreads less over a 3x grid of (beta, eta_out) than gradient difference over lambda. Falsified if the first fails in "
    "2 of 3 seeds.",
    arms=(*OFMUS, "gradient ascent", *LAMBDAS, *NPOS),
    run=run,
    judge=judge,
    paper=(
        "TOFU forget01, Llama-2-7B, forget quality / utility: OFMU 0.42/0.63, NPO 0.40/0.58, GradDiff 3.0e-3/0.57, GradAscent 1.9e-4/0.55, retrain 1.00/0.63.",
        "0.42 and 0.40 are p-values over 40 questions: not a difference. The baselines' figures are those of an untuned reproduction.",
    ),
    show=("kept", "cities", "reached", "forget gradients", "end forget", "end kept", "end cities", "seconds per step", "cosine"),
    minutes=30,
    long=True,
    notes=(
        "Steps of unit length for all arms; beta, rho and step lengths are this project's, since the paper's were not at hand.",
        "Tried besides, after the verdict: without the cap of the forget loss, kept in seeds 0, 1, 2 is 0.85, 0.88, 0.61 with decorrelation and 0.70, 0.80, 0.60 "
        "without; the claim would fail there too.",
    ),
)
