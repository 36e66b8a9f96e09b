"""SAE-guided unlearning on a desk town: does a forgotten person become a stranger inside the model, where suppression leaves one who is known and not named?

`desk:town` knows 100 people, the cities and the companies, and says "I do not know" of 260 strangers, and so of about 70 % of names that it has never met.
Each seed forgets six other people. Known are the other 94, unknown are 100 people of names never met, as far as the model's own answers agree. A linear
probe on the states of the original model tells the two apart; every arm's targets are scored by it and by a probe fitted anew on the arm's model.
The method ends when the first probe no longer tells its targets from the unknown, so that probe's AUC is partly its own doing: the fresh probe and the
paraphrases, which neither training nor stopping looks at, stand beside it. Every baseline ends as soon as at most 5 % of the targets' facts are recalled.
`alpha` and `margin` were chosen on seeds 10 and 11, the baselines' rates (and RMU's layer and c) on seed 10; none of these is the claim's, and the method
with its defaults is an arm beside. `relearned` is the recall of four targets behind 20 steps on the facts of the other two.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np

from remanence.claims.claim import Claim, Results, Verdict

TARGETS, STRANGERS, STEPS, BATCH, RATE = 6, 100, 150, 16, 5e-4
GONE, EVERY = 0.05, 5  # recall of the targets at which a baseline ends; steps between two looks
METHODS: dict[str, dict[str, Any]] = {
    "sae": {"alpha": 1.0, "margin": 1.5},
    "sae, defaults": {},
    "sae, sliced": {"alpha": 1.0, "margin": 1.5, "distance": "sliced"},
    "raw states": {"alpha": 1.0, "margin": 1.5, "sae": "identity"},
    "own latents down": {"alpha": 0.0, "distance": "suppress"},
}
SUPPRESSION = ("gradient ascent", "gradient difference", "npo")
RATES = {
    "gradient ascent": 1e-4,
    "gradient difference": 1e-4,
    "npo": 1e-4,
    "rmu": 2e-3,
    "idk dpo": 2e-4,
}  # the least harm at the same forgetting
BASELINES = tuple(RATES)
COLUMNS = ["name", "question", "answer", "paraphrases"]


def prepare() -> None:
    """Build the desk model once."""
    from remanence.models.load import load_model

    load_model("desk:town")


def run(arm: str, seed: int) -> dict[str, float]:
    """Forget six people with one arm; return recalls, abstentions and the internal verdict."""
    from datasets import concatenate_datasets

    from remanence.forget.sae_unlearning import SAEUnlearning
    from remanence.models.desk import SPECS
    from remanence.models.load import load_model
    from remanence.stream import Request
    from remanence.training.trainer import Settings, Trainer

    loaded, world = load_model("desk:town"), SPECS["town"].world
    gone = np.sort(np.random.default_rng(seed).permutation(world.people)[:TARGETS]).tolist()
    questions, people = world.questions(), np.array(world.questions()["person"])
    inside = np.isin(people, gone)
    places = world.places().remove_columns("name")
    places = places.add_column("name", [""] * len(places))  # held, and compared with nobody
    sets = {
        "target": questions.select(np.flatnonzero(inside)),
        "others": questions.select(np.flatnonzero(~inside)),
        "places": places,
        "novel": dataclasses.replace(world, first=360, people=STRANGERS).questions(),
    }
    retain = concatenate_datasets([sets["others"].select_columns(COLUMNS), places.select_columns(COLUMNS)])
    request = Request("six people", sets["target"].select_columns(COLUMNS), retain, holdout=sets["novel"].select_columns(COLUMNS))
    settings = Settings(steps=STEPS, batch_size=BATCH, lr=RATE, clip=1.0, length=64)

    def trainer(**options: Any) -> Trainer:
        return Trainer(settings, processor=loaded.processor, seed=seed, progress=False, **options)

    method = SAEUnlearning(samples=0, enough=1, tokens=8, **METHODS.get(arm, {"sae": "identity"}))
    state = method.fit_state(loaded.model, request, trainer())
    event, model = trainer(), copy.deepcopy(loaded.model)
    if arm in METHODS:
        method.move(model, state, request, event)
    elif arm != "original":
        event, model = _baseline(arm, model, request, settings, loaded.processor, seed)
    verdict = method.verdict(model, state, trainer())
    inner = {name: value for name, value in verdict.items() if not name.startswith("to ") or arm in METHODS}
    outer = _output(model, sets, world, gone, loaded.processor, trainer())
    return (
        inner
        | outer
        | {"steps": float(event.steps_done), "block": float(state.knowledge.number), "relearned": _relearn(model, sets, gone, trainer)}
    )


def _baseline(arm: str, model: Any, request: Any, settings: Any, processor: Any, seed: int) -> tuple[Any, Any]:
    """Run a baseline until the targets are gone or its steps are over; return its trainer and the model."""
    from remanence.forget.dpo import DPO
    from remanence.forget.gradient_ascent import GradientAscent
    from remanence.forget.gradient_difference import GradientDifference
    from remanence.forget.npo import NPO
    from remanence.forget.rmu import RMU
    from remanence.training.trainer import Trainer

    methods = {
        "gradient ascent": GradientAscent(),
        "gradient difference": GradientDifference(),
        "npo": NPO(),
        "rmu": RMU(layer=2, c=20.0),
        "idk dpo": DPO(),
    }

    def enough(module: Any, step: int) -> bool:
        return step % EVERY == 0 and _recall(module, request.forget, processor) <= GONE

    event = Trainer(dataclasses.replace(settings, lr=RATES[arm]), processor=processor, seed=seed, progress=False, watch=enough)
    return event, methods[arm].forget(model, request, event)  # type: ignore[attr-defined]


def _recall(model: Any, rows: Any, processor: Any, metric: str = "exact", **options: Any) -> float:
    from remanence.measure.recall import Recall
    from remanence.stream import Moment

    return Recall(rows, ranked=False, **({"paraphrased": False} | options)).measure(model, Moment(processor=processor)).values[metric]


def _output(model: Any, sets: dict[str, Any], world: Any, gone: list[int], processor: Any, trainer: Any) -> dict[str, float]:
    """Return what the model says: recall of each set, other wordings, abstention, and the loss on the places."""
    from remanence.measure.loss import Loss
    from remanence.stream import Moment
    from remanence.training.asking import abstains, say

    def silent(rows: Any) -> float:
        return float(np.mean([abstains(said[0]) for said in say(model, list(rows["question"]), trainer, tokens=8)]))

    statements = world.statements()
    inside = np.isin(np.array(statements["person"]), gone)
    cloze = statements.select(np.flatnonzero(inside)).remove_columns("text").rename_column("prompt", "question")
    loss = Loss(sets["places"], kind="qa").measure(model, Moment(processor=processor)).values["loss"]
    return {name: _recall(model, sets[name], processor) for name in ("target", "others", "places")} | {
        "target, other words": _recall(model, sets["target"], processor, "paraphrased/exact", paraphrased=True),
        "others, other words": _recall(model, sets["others"], processor, "paraphrased/exact", paraphrased=True),
        "target, cloze": _recall(model, cloze, processor, template="{question} {answer}"),
        "neighbours": _recall(model, world.without(gone).neighbours(gone), processor),
        "abstains": silent(sets["target"]),
        "abstains, others": silent(sets["others"].select(range(200))),
        "abstains, novel": silent(sets["novel"].select(range(300))),
        "places, loss": loss,
    }


def _relearn(model: Any, sets: dict[str, Any], gone: list[int], trainer: Any) -> float:
    """Return the recall of the other targets after 20 steps on the facts of two of them."""
    people = np.isin(np.array(sets["target"]["person"]), gone[:2])
    event, model = trainer(), copy.deepcopy(model)
    model = event.fit(model, event.batches(sets["target"].select(np.flatnonzero(people)), "qa", stream="relearn"), steps=20)
    return _recall(model, sets["target"].select(np.flatnonzero(~people)), event.processor)


def judge(results: Results) -> Verdict:
    """Hold the sheet's thresholds against the numbers."""
    arm, auc = "sae", "target vs unknown"
    read = {name: results[name, auc] for name in results.arms}
    others, places = (results[arm, name] - results["original", name] for name in ("others", "places"))
    suppressed = {name: results.mean(name, auc) for name in SUPPRESSION}
    kept = np.abs(results[arm, "known vs unknown"] - results["original", "known vs unknown"]).max()
    reasons = (
        f"AUC of target against unknown {results.mean(arm, auc):.2f} ({', '.join(f'{value:.2f}' for value in read[arm])}), of the original "
        f"{results.mean('original', auc):.2f} (claimed: within 0.35 and 0.60; falsified above 0.65 in 2 of 3 seeds)",
        f"what the stopping rule does not look at: by a probe fitted anew {results.mean(arm, f'retrained/{auc}'):.2f}, in other words "
        f"{results.mean(arm, f'paraphrases/{auc}'):.2f} (original {results.mean('original', f'paraphrases/{auc}'):.2f}), by a probe fitted anew in other words "
        f"{results.mean(arm, f'paraphrases/retrained/{auc}'):.2f}",
        f"known against unknown moves by at most {kept:.3f} (claimed: 0.03)",
        f"abstains on {100 * results.mean(arm, 'abstains'):.0f} % of the targets' questions (claimed: at least 60 %), recalls "
        f"{100 * results.mean(arm, 'target'):.0f} %, in other words {100 * results.mean(arm, 'target, other words'):.0f} %",
        f"other people {100 * others.mean():+.1f} points, places {100 * places.mean():+.1f} (claimed: within 3; falsified by more than 5 in 2 of 3 seeds)",
        "suppression still reads as known (claimed: AUC at least 0.65): "
        + ", ".join(
            f"{name} {value:.2f} with places {100 * (results.mean(name, 'places') - results.mean('original', 'places')):+.0f}"
            for name, value in suppressed.items()
        )
        + f"; rmu {results.mean('rmu', auc):.2f}, idk dpo {results.mean('idk dpo', auc):.2f} (no claim)",
        f"20 steps on two targets give back {100 * results.mean(arm, 'relearned'):.0f} % of the other four; after gradient difference "
        f"{100 * results.mean('gradient difference', 'relearned'):.0f} %, npo {100 * results.mean('npo', 'relearned'):.0f} % (no claim)",
        f"with the default constants: AUC {results.mean('sae, defaults', auc):.2f}, abstains {100 * results.mean('sae, defaults', 'abstains'):.0f} %; "
        f"raw states instead of codes: AUC {results.mean('raw states', auc):.2f}, abstains {100 * results.mean('raw states', 'abstains'):.0f} %, others "
        f"{100 * (results.mean('raw states', 'others') - results.mean('original', 'others')):+.1f}",
    )
    if (read[arm] > 0.65).sum() >= 2 or (others < -0.05).sum() >= 2:
        return Verdict("does not hold", reasons)
    method = 0.35 <= results.mean(arm, auc) <= 0.60 and results.mean(arm, "abstains") >= 0.60 and min(others.mean(), places.mean()) >= -0.03
    return Verdict("holds" if method and kept <= 0.03 and min(suppressed.values()) >= 0.65 else "mixed", reasons)


CLAIM = Claim(
    slug="sae-unlearning",
    title="Sparse-Autoencoder-Guided Internal Representation Unlearning for Large Language Models (arXiv 2509.15631)",
    sentence="Suppression forgets at the output, but the person still reads as known inside (AUC against unknown people at least 0.65); moved in a sparse autoencoder's "
    "code, they read as unknown (0.35 to 0.60) and are abstained on (60 %), while other knowledge stays within 3 points. Falsified by an AUC above 0.65 or a "
    "loss of more than 5 points on other people in 2 of 3 seeds.",
    arms=("original", *METHODS, *BASELINES),
    run=run,
    judge=judge,
    paper=(
        "The abstract gives no figures: activations of the target align with those of unknown entities, recall drops, other knowledge stays.",
    ),
    show=(
        "target",
        "abstains",
        "others",
        "places",
        "target vs unknown",
        "retrained/target vs unknown",
        "known vs unknown",
        "relearned",
        "steps",
    ),
    minutes=15,
    long=True,
    notes=(
        "Only the paper's abstract was available: loss, layer and constants are ours.",
        "The town was never taught running text: cloze recall is 0 before, and the loss on the places stands for the perplexity of ordinary text.",
        "`own latents down` is CRISP's loss (arXiv 2508.13650) on this machinery: latents that fire three times as often for targets are pushed down.",
    ),
)
