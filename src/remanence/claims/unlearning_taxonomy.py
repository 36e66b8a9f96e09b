"""Ways to forget, side by side on the town: do the figures that a model says of itself agree with the gold standard, the model that never saw the people?

A desk Llama knows 100 people, facts about cities and employers, and to say "I do not know" of strangers. Ten people must go; what the rest was taught must
stay. Each method gets the same steps and four tries of its rate and strengths on ten other people of the town, judged by forget and retain accuracy alone;
then it serves the request once. `forget`, `retain`, `places`, `strangers`: share of answers said word by word.
`probability`: of the forgotten answers. `ks`: p-value of the two-sample test between its truth ratios and the retrained model's. `privleak`: 100 (A - A_ref) /
A_ref with A = 1 - AUC of Min-K 40 % (rows that must go against people it never met), 0 ideal, -100 not forgotten, above 0 over-forgotten. `auc inside`: the
same AUC in the weights themselves, without a gate around them. `distance`: mean KL(retrained || model) per answer token on the forgotten and on kept facts.
`retrain again` is the same training from other first weights: the noise. SISA learned the people and places by itself, without the strangers; its reference is SISA that never saw the ten.
"""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.catalogue import ENTRIES
from remanence.claims.claim import Claim, Results, Verdict
from remanence.models.desk import SPECS, DeskSpec, path

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from remanence.data.biographies import Biographies
    from remanence.stream import Request

PEOPLE, GONE, STEPS, BATCH = 100, 10, 60, 32
RATES = (2e-5, 5e-5, 1e-4, 3e-4)
SEEDS = (0, 1, 2)
LOW, OVER, LEFT, KEPT, TWICE = (
    0.01,
    20.0,
    0.05,
    0.05,
    2.0,
)  # KS p-value, PrivLeak, forget and retain accuracy against retrain, distance against its noise
SHARDS, SLICES, LEARN_STEPS = 3, 1, 100


@dataclass(frozen=True)
class Arm:
    """A method of the catalogue at work.

    Args:
        clause: as in a recipe.
        grid: what is tried: (rate, other keys) each, four entries; a single one is not tuned.
        refuses: it teaches or gives a refusal.
        gate: the weights stay, the answer is changed.
    """

    clause: dict[str, Any]
    grid: tuple[tuple[float, dict[str, Any]], ...] = tuple((rate, {}) for rate in RATES)
    refuses: bool = False
    gate: bool = False


@dataclass(frozen=True)
class TownWithout(DeskSpec):
    """The town as it would be had some people never been taught.

    Args:
        gone: their numbers.
    """

    gone: tuple[int, ...] = field(default=())

    @property
    def world(self) -> Biographies:
        """The people that the model knows."""
        return town().world.without(self.gone)

    def taught(self) -> Dataset:
        """Return the town's rows without theirs."""
        return left(self.gone)


Grid = tuple[tuple[float, dict[str, Any]], ...]
ONCE: Grid = ((0.0, {}),)
HELD: Grid = tuple((rate, {"alpha": alpha}) for rate in (1e-4, 3e-4) for alpha in (5.0, 20.0))  # of methods with a retain term
WIDE: Grid = tuple((rate, {}) for rate in (5e-5, 1e-4, 3e-4, 1e-3))
KNOWN: dict[str, Arm] = {  # one line per method: to add one, add its line
    "gradient ascent": Arm({"method": "gradient-ascent"}),
    "gradient ascent, 1e-3": Arm({"method": "gradient-ascent"}, grid=((1e-3, {}),)),
    "gradient difference": Arm({"method": "gradient-difference"}, HELD),
    "ascent with kl": Arm({"method": "kl"}, HELD),
    "npo": Arm({"method": "npo"}, HELD),
    "simnpo": Arm({"method": "simnpo"}, grid=tuple((rate, {"alpha": alpha}) for rate in (1e-4, 3e-4) for alpha in (1.0, 5.0))),
    "wga": Arm({"method": "wga"}, HELD),
    "undial": Arm({"method": "undial"}, WIDE),
    "refusal": Arm({"method": "refusal"}, WIDE, refuses=True),
    "dpo": Arm({"method": "dpo"}, HELD, refuses=True),
    "rmu": Arm({"method": "rmu"}, grid=tuple((1e-2, {"c": c, "alpha": alpha}) for c in (2.0, 10.0) for alpha in (1.0, 10.0))),
    "task vector": Arm({"method": "task-vector"}, grid=tuple((1e-4, {"alpha": alpha}) for alpha in (1.0, 2.0, 3.0, 5.0))),
    "ssd": Arm({"method": "ssd"}, grid=tuple((0.0, {"alpha": alpha}) for alpha in (4.0, 7.0, 12.0, "auto"))),
    "icul": Arm({"method": "icul"}, grid=ONCE, gate=True),
    "guardrail": Arm({"method": "guardrail"}, grid=ONCE, refuses=True, gate=True),
}
ARMS = {name: arm for name, arm in KNOWN.items() if arm.clause["method"] in {entry.name for entry in ENTRIES}}
EXACT = ("retrain again", "sisa")


def town() -> DeskSpec:
    """Return the specification of the desk model that forgets."""
    return SPECS["town"]


def chosen(seed: int, what: str) -> tuple[int, ...]:
    """Return the numbers of the people that a seed forgets, and of those that it tunes on; the two are disjoint."""
    from remanence.seeds import numpy_generator

    order = numpy_generator("unlearning taxonomy", seed).permutation(PEOPLE)
    return tuple(sorted(order[:GONE] if what == "test" else order[GONE : 2 * GONE]))


def without(seed: int) -> TownWithout:
    """Return the specification of a seed's retrained model."""
    values = {item.name: getattr(town(), item.name) for item in dataclasses.fields(DeskSpec)}
    return TownWithout(**values, gone=tuple(int(person) for person in chosen(seed, "test")))


def prepare() -> None:
    """Build the town, and for each seed the model that never saw the ten people, twice."""
    path("town")
    jobs = [(seed, start) for seed in SEEDS for start in (0, 1)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(build_reference, jobs))


def build_reference(job: tuple[int, int]) -> None:
    """Build one retrained model into the cache."""
    seed, start = job
    path(without(seed), start, progress=False)


def request_of(people: tuple[int, ...]) -> Request:
    """Return the request to forget people, with all else that was taught as what must stay."""
    from remanence.stream import Request

    return Request("people", town().world.of(people).questions(), left(people).select_columns(["question", "answer"]))


def left(people: tuple[int, ...]) -> Dataset:
    """Return what the town was taught, without some people."""
    from datasets import Dataset

    rows = town().taught()
    return Dataset.from_dict(rows[np.flatnonzero(~np.isin(np.array(rows["person"]), people))])


def serve(arm: Arm, people: tuple[int, ...], seed: int, rate: float, options: dict[str, Any]) -> nn.Module:
    """Let a method serve the request on the town's model."""
    from remanence.catalogue import build
    from remanence.models.load import load_model
    from remanence.training.trainer import Settings, Trainer

    loaded = load_model("desk:town")
    settings = Settings(steps=STEPS, batch_size=BATCH, lr=rate, warmup=5)
    trainer = Trainer(settings, processor=loaded.processor, seed=seed, progress=False)
    return build(arm.clause | options, "forget", "arm").forget(loaded.model, request_of(people), trainer)


def tuned(arm: Arm, seed: int) -> tuple[float, dict[str, Any]]:
    """Return the grid's entry that does best on ten other people: harmonic mean of what they lost and what the others kept. No reference is looked at."""
    from remanence.errors import Mistake

    if len(arm.grid) == 1:
        return arm.grid[0]
    people = chosen(seed, "tune")
    scores = []
    for rate, options in arm.grid:
        try:
            model = serve(arm, people, seed, rate, options)
            lost, kept = 1 - said(model, town().world.of(people).facts()), said(model, town().world.without(people).facts())
            scores.append(2 * lost * kept / max(lost + kept, 1e-9))
        except Mistake:  # it diverged
            scores.append(-1.0)
    return arm.grid[int(np.argmax(scores))]


def run(name: str, seed: int) -> dict[str, float]:
    """Tune, serve the request, and measure."""
    from remanence.models.load import load_model

    people = chosen(seed, "test")
    reference = load_model(path(without(seed), 0)).model
    found: dict[str, float] = {}
    begun = time.monotonic()
    if name == "nothing":
        model: nn.Module = load_model("desk:town").model
    elif name == "retrain":
        model = reference
    elif name == "retrain again":
        model = load_model(path(without(seed), 1)).model
    elif name == "sisa":
        model, reference, found = by_sisa(people, seed)
    else:
        rate, options = tuned(ARMS[name], seed)
        begun = time.monotonic()
        model = serve(ARMS[name], people, seed, rate, options)
        found = {"rate": rate} | {key: float(value) if value != "auto" else -1.0 for key, value in options.items()}
    found["seconds"] = time.monotonic() - begun
    return measured(model, reference, people) | found


def by_sisa(people: tuple[int, ...], seed: int) -> tuple[nn.Module, nn.Module, dict[str, float]]:
    """Return SISA's ensemble after it forgot, one that never saw the people, and whether their weights are the same bits."""
    import torch

    from remanence.forget.sisa import SISA
    from remanence.models.desk import make_model
    from remanence.models.load import load_model
    from remanence.stream import Request, Task
    from remanence.training.trainer import Settings, Trainer

    processor = load_model("desk:town").processor
    settings = Settings(steps=LEARN_STEPS, batch_size=64, lr=town().lr, warmup=20, schedule="linear", beta2=town().beta2)

    def learned(data: Dataset) -> tuple[Any, Any, Any]:
        method, task = SISA(SHARDS, SLICES), Task("town", data, kind="qa")
        trainer = Trainer(settings, processor=processor, seed=seed, progress=False)
        return method, task, method.learn(make_model(town(), processor, seed), task, trainer)

    method, task, model = learned(facts_alone(town().taught()))
    trainer = Trainer(settings, processor=processor, seed=seed + 1, history=[task], progress=False)
    model = method.forget(model, Request("people", town().world.of(people).questions()), trainer)
    _, _, never = learned(facts_alone(left(people)))
    pairs = zip(model.state_dict().values(), never.state_dict().values(), strict=True)
    return model, never, {"same bits": float(all(torch.equal(one, other) for one, other in pairs))}


def facts_alone(rows: Dataset) -> Dataset:
    """Return the rows about people and places, without the strangers."""
    return rows.select(np.flatnonzero(np.array(rows["person"]) < PEOPLE))


# What is measured.


def said(model: nn.Module, rows: Dataset) -> float:
    """Return the share of answers that greedy decoding gives word by word."""
    from remanence.measure.recall import Recall
    from remanence.models.load import load_model
    from remanence.stream import Moment

    at = Moment(processor=load_model("desk:town").processor)
    return Recall(rows, paraphrased=False, ranked=False).measure(model, at).values["exact"]


def measured(model: nn.Module, reference: nn.Module, people: tuple[int, ...]) -> dict[str, float]:
    """Return all metrics of a model against its reference."""
    from scipy.stats import ks_2samp

    from remanence.models.guarded import GuardedForCausalLM

    world = town().world
    forget, kept = world.of(people), world.without(people)
    strangers = dataclasses.replace(world, first=PEOPLE, people=40).strangers()
    holdout = dataclasses.replace(world, first=PEOPLE + town().strangers, people=GONE)
    ratios, wanted = truth_ratios(model, forget.facts()), truth_ratios(reference, forget.facts())
    auc, auc_reference = (min_k_auc(each, forget.questions(), holdout.questions()) for each in (model, reference))
    inside = min_k_auc(model.inner, forget.questions(), holdout.questions()) if isinstance(model, GuardedForCausalLM) else auc
    finite = bool(np.isfinite(ratios).all())
    return {
        "forget": said(model, forget.facts()),
        "forget paraphrased": said(model, paraphrased(forget.facts())),
        "probability": float(np.exp(-losses(model, forget.facts())).mean()),
        "retain": said(model, kept.facts()),
        "places": said(model, world.places()),
        "strangers": said(model, strangers),
        "truth ratio": float(np.median(ratios)) if finite else float("nan"),
        "ks": float(ks_2samp(ratios, wanted).pvalue) if finite else 0.0,
        "auc": auc,
        "auc inside": inside,
        "privleak": 100 * ((1 - auc) - (1 - auc_reference)) / (1 - auc_reference),
        "distance": divergence(model, reference, forget.facts()),
        "distance kept": divergence(model, reference, kept.facts()),
    }


def paraphrased(facts: Dataset) -> Dataset:
    """Return the facts asked in the first phrasing that was never taught."""
    from datasets import Dataset

    return Dataset.from_dict({"question": [each[0] for each in facts["paraphrases"]], "answer": facts["answer"][:]})


def batches_of(rows: Dataset) -> Any:
    """Return the rows' batches, encoded as they are taught."""
    from remanence.models.load import load_model
    from remanence.training.trainer import Trainer

    trainer = Trainer(processor=load_model("desk:town").processor, progress=False)
    return trainer, trainer.batches(rows.select_columns(["question", "answer"]), "qa", size=128, shuffle=False)


def losses(model: nn.Module, rows: Dataset) -> np.ndarray:
    """Return each row's mean negative log-likelihood per answer token, in nats."""
    from remanence.training.batches import IGNORED
    from remanence.training.preference import summed_nll

    trainer, batches = batches_of(rows)
    total = trainer.over_rows(model, batches, summed_nll).numpy()
    count = trainer.over_rows(model, batches, lambda _, batch: (batch["labels"][:, 1:] != IGNORED).sum(1)).numpy()
    return total / count


def truth_ratios(model: nn.Module, facts: Dataset) -> np.ndarray:
    """Return each fact's exp(-mean NLL of the wrong answers) / exp(-NLL of the right one), (rows,)."""
    from datasets import Dataset

    wrong = facts["perturbed_answers"]
    count = len(wrong[0])
    flat = Dataset.from_dict(
        {"question": [q for q in facts["question"] for _ in range(count)], "answer": [answer for each in wrong for answer in each]}
    )
    return np.exp(losses(model, facts) - losses(model, flat).reshape(-1, count).mean(1))


def min_k_auc(model: nn.Module, members: Dataset, others: Dataset, share: float = 0.4) -> float:
    """Return the AUC of Min-K (mean of the lowest share of a row's token log-probabilities, the end token left out) for members against others."""
    from sklearn.metrics import roc_auc_score

    from remanence.models.forward import evaluating
    from remanence.training.scoring import token_scores

    scores = []
    for rows in (members, others):
        _, batches = batches_of(rows)
        with evaluating(model):
            for batch in batches:
                found = token_scores(model, batch)
                for row in range(len(batch["labels"])):
                    tokens = np.sort(found.logp[found.row == row].numpy()[:-1])
                    scores.append(tokens[: max(1, int(share * len(tokens)))].mean())
    values = np.nan_to_num(np.array(scores), nan=-1e9)
    return float(roc_auc_score(np.r_[np.ones(len(members)), np.zeros(len(others))], values))


def divergence(model: nn.Module, reference: nn.Module, rows: Dataset) -> float:
    """Return the mean KL(reference || model) per answer token, in nats."""
    import torch

    from remanence.models.forward import evaluating
    from remanence.training.reference import mean_kl

    _, batches = batches_of(rows)
    with evaluating(model), evaluating(reference), torch.no_grad():
        parts = [(mean_kl(model, reference, batch).item(), batch.tokens) for batch in batches]
    return sum(value * tokens for value, tokens in parts) / sum(tokens for _, tokens in parts)


# The judgement.


def passes(results: Results, arm: str) -> np.ndarray:
    """Return for each seed whether an arm is within the noise of the retrained model on every metric."""
    noise = np.maximum(results["retrain again", "distance"], results["retrain again", "distance kept"])
    return (
        (results[arm, "ks"] >= LOW)
        & (np.abs(results[arm, "privleak"]) <= OVER)
        & (results[arm, "forget"] <= results["retrain", "forget"] + LEFT)
        & (results[arm, "retain"] >= results["retrain", "retain"] - KEPT)
        & (results[arm, "distance"] <= TWICE * noise)
        & (results[arm, "distance kept"] <= TWICE * noise)
    )


def judge(results: Results) -> Verdict:
    """Hold the sheet's expectations against the numbers."""
    from scipy.stats import kendalltau

    approximate = list(ARMS)
    winners = [arm for arm in approximate if passes(results, arm).all()]
    said_order = [results.mean(arm, "forget") + 1 - results.mean(arm, "retain") for arm in approximate]
    gold_order = [results.mean(arm, "distance") + results.mean(arm, "distance kept") for arm in approximate]
    tau = float(kendalltau(said_order, gold_order).statistic)
    hard = "gradient ascent, 1e-3"
    collapses = results.mean(hard, "probability") <= 0.05 and results.mean(hard, "retain") <= 0.1
    keeps = [arm for arm in ("gradient difference", "npo") if results.mean(arm, "retain") >= 0.9]
    exposed = [arm for arm in keeps if (results[arm, "ks"] < LOW).any() or (np.abs(results[arm, "privleak"]) > OVER).any()]
    refusing = [arm for arm in approximate if ARMS[arm].refuses]
    known = [results.mean(arm, "auc inside") for arm in refusing]
    weak = results.mean("task vector", "forget") > 0.1 or results.mean("task vector", "retain") < 0.9
    exact = bool((results["sisa", "same bits"] == 1).all())
    again = passes(results, "retrain again")
    reasons = (
        f"approximate methods within the noise of retraining on every metric in every seed: {', '.join(winners) or 'none'} (falsified by one)",
        f"rank correlation of the methods by what they say (forget and retain accuracy) and by distance to the retrained model: tau {tau:.2f} (expected below 0.8)",
        f"gradient ascent at rate 1e-3: forgotten answers at probability {results.mean(hard, 'probability'):.3f}, retain accuracy "
        f"{results.mean(hard, 'retain'):.2f} (expected about 0 both)",
        f"of gradient difference and NPO, {len(keeps)} keep 0.9 of the rest, and {len(exposed)} of these fail the KS test or |PrivLeak| {OVER:g}",
        "membership AUC in the weights of refusing methods: "
        + ", ".join(f"{arm} {value:.2f}" for arm, value in zip(refusing, known))
        + " (expected at least 0.7)",
        f"task vector: forget {results.mean('task vector', 'forget'):.2f}, retain {results.mean('task vector', 'retain'):.2f} (expected weak on facts)",
        f"SISA after forgetting has {'the very bits' if exact else 'not the bits'} of SISA that never saw the people; it knows {results.mean('sisa', 'retain'):.2f} of the rest, one model "
        f"{results.mean('retrain', 'retain'):.2f}",
        f"retraining from other first weights passes in {int(again.sum())} of {len(again)} seeds (the noise of the tests themselves)",
    )
    if winners:
        return Verdict("does not hold", reasons)
    expected = (tau < 0.8, collapses, bool(keeps) and len(exposed) == len(keeps), all(value >= 0.7 for value in known), weak, exact)
    return Verdict("holds" if all(expected) else "mixed", reasons)


CLAIM = Claim(
    slug="unlearning-taxonomy",
    title="Digital Forgetting in Large Language Models: A Survey of Unlearning Methods (arXiv 2404.02062)",
    sentence="What a model says and how near it is to the one that never saw the data disagree, and no approximate method wins everywhere: ascent collapses, "
    "methods with a retain term keep 90 % and still fail the truth-ratio test or the privacy test, refusals leave membership visible, task vectors are weak on "
    "facts, and only SISA is exact, at the price of several models. Falsified if one approximate method is within the noise of retraining on every metric in "
    "every seed.",
    arms=("nothing", "retrain", *EXACT, *ARMS),
    run=run,
    judge=judge,
    seeds=SEEDS,
    paper=(
        "TOFU forget10, Llama-2-7B-chat, forget quality / utility (OpenUnlearning, untuned): retrain 1.0/0.61, GA 1e-239/0, GradDiff 2e-229/0.58, IdkDPO 5e-13/0.04, "
        "NPO 0.42/0.54, SimNPO 2e-198/0.60, RMU 7e-21/0.03.",
        "MUSE-News, PrivLeak: GA 52.1, GradDiff 93.2, NPO -86.0, RMU 56.4 (0 is ideal).",
    ),
    show=("forget", "probability", "retain", "strangers", "ks", "privleak", "auc inside", "distance", "distance kept", "rate", "seconds"),
    minutes=20,
    long=True,
    notes=(
        "Truth ratios are taken on answers as they were taught: the town was never taught the paraphrased form, in which even the model that knows all has a "
        "ratio near 1 and the test has no power.",
        "Rates and strengths were chosen on ten other people by forget and retain accuracy; no metric that is reported here was looked at.",
    ),
)
