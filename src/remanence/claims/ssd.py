"""SSD on MNIST: does damping a few weights erase a class, without a step of training, and leave the other nine alone?

A small CNN with BatchNorm learns 8,000 MNIST images; then it must forget one class, for each of the classes 1, 3, 5, 6. All accuracies are on 2,000 images
that were never trained on. Arms: SSD in its modes, the same damping factors at permuted places, gradient ascent until the class is as gone as the claim
asks, training again from other initial weights, and nothing. `mia` is the share of the forgotten training images that an attack (logistic regression on loss
and entropy, fitted on kept training images against test images) takes for members: read it against the retrained model's. The paper's Fashion-MNIST and
CIFAR are replaced by MNIST, which the desk has.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np

from remanence.claims.claim import Claim, Results, Verdict

CLASSES = (1, 3, 5, 6)
EPOCHS, BATCH, RATE = 5, 64, 0.05
GONE = 0.05  # of the forget class's accuracy
SSDS: dict[str, dict[str, Any]] = {
    "ssd sample auto": {"mode": "sample", "alpha": "auto"},
    "ssd batch auto": {"mode": "batch", "alpha": "auto"},
    "ssd batch alpha 10": {"mode": "batch", "alpha": 10.0},
    "permuted places": {"mode": "sample", "alpha": "auto"},
}
ARMS = ("nothing", "retrain", *SSDS, "gradient ascent", "random rows")


def run(arm: str, seed: int) -> dict[str, float]:
    """Train, forget each class in turn from the same trained model, and return the means over classes and each class's numbers."""
    import torch

    from remanence.data.sources import load_rows
    from remanence.models.load import load_model
    from remanence.stream import Request, Task
    from remanence.training.trainer import Settings, Trainer

    train = load_rows({"mnist": {}}, kind="classes")
    test = load_rows({"mnist": {"part": "test"}}, kind="classes")
    labels, test_labels = np.array(train["label"]), np.array(test["label"])
    settings = Settings(
        epochs=EPOCHS, batch_size=BATCH, optimizer="sgd", lr=RATE, momentum=0.9, weight_decay=5e-4, schedule="cosine", clip=None
    )

    def fresh(seed: int) -> torch.nn.Module:
        return load_model("desk:cnn-mnist", seed=seed).model

    def fitted(model: torch.nn.Module, rows: Any) -> torch.nn.Module:
        trainer = Trainer(settings, seed=seed, progress=False)
        return trainer.fit(model, trainer.batches(rows, "classes"))

    begun = time.monotonic()
    original = fitted(fresh(seed), train)
    training = time.monotonic() - begun
    found: dict[str, float] = {}
    for wanted in CLASSES:
        inside = labels == wanted
        if arm == "random rows":  # 5 % of all rows instead of a class: known to be much harder
            inside = np.random.default_rng(seed * 10 + wanted).random(len(labels)) < 0.05
        request = Request(f"class {wanted}", train.select(np.flatnonzero(inside)), train.select(np.flatnonzero(~inside)), kind="classes")
        begun = time.monotonic()
        if arm == "nothing":
            model = original
        elif arm == "retrain":
            model = fitted(fresh(seed + 1000), request.retain)
        elif arm == "gradient ascent":
            model = _ascend(copy.deepcopy(original), request, seed)
        else:
            from remanence.forget.ssd import SSD

            method = SSD(**SSDS.get(arm, SSDS["ssd sample auto"]))
            trainer = Trainer(settings, seed=seed, history=[Task("all", train, kind="classes")], progress=False)
            model = method.forget(copy.deepcopy(original), request, trainer)
            if arm == "permuted places":
                model = _permuted(original, model, seed)
        seconds = time.monotonic() - begun
        scores = _scores(model, test, test_labels == wanted)
        forgotten = _scores(model, request.forget, np.ones(len(request.forget), bool))["forget"]
        before = _scores(original, test, test_labels == wanted)
        found |= {
            f"forget {wanted}": scores["forget"],
            f"retain {wanted}": scores["retain"],
            f"retain change {wanted}": scores["retain"] - before["retain"],
            f"forget rows {wanted}": forgotten,
            f"mia {wanted}": _attack(model, request, test, seed),
            f"seconds {wanted}": seconds,
        }
    names = ("forget", "retain", "retain change", "forget rows", "mia", "seconds")
    means = {name: float(np.mean([found[f"{name} {wanted}"] for wanted in CLASSES])) for name in names}
    return means | {"training seconds": training} | found


def _scores(model: Any, rows: Any, chosen: np.ndarray) -> dict[str, float]:
    """Return the accuracy on the chosen rows and on the others."""
    from remanence.measure.accuracy import Accuracy
    from remanence.stream import Moment

    right = np.array([item["correct"] for item in Accuracy(rows, "classes").measure(model, Moment()).items], float)
    return {"forget": float(right[chosen].mean()), "retain": float(right[~chosen].mean()) if (~chosen).any() else float("nan")}


def _ascend(model: Any, request: Any, seed: int) -> Any:
    """Climb the forget loss until the class is gone from its own training rows; the rate is the training's tenth."""
    from remanence.forget.gradient_ascent import GradientAscent
    from remanence.training.trainer import Settings, Trainer

    def enough(module: Any, _: int) -> bool:
        return _scores(module, request.forget, np.ones(len(request.forget), bool))["forget"] <= GONE

    trainer = Trainer(
        Settings(steps=200, batch_size=BATCH, optimizer="sgd", lr=RATE / 10, clip=1.0), seed=seed, watch=enough, progress=False
    )
    return GradientAscent().forget(model, request, trainer)


def _permuted(before: Any, after: Any, seed: int) -> Any:
    """Apply SSD's damping factors at random places of the same tensors."""
    import torch

    from remanence.seeds import generator

    chance, model = generator(seed, "places"), copy.deepcopy(before)
    with torch.no_grad():
        for weight, old, new in zip(model.parameters(), before.parameters(), after.parameters(), strict=True):
            factor = torch.where(old == 0, torch.ones_like(old), new / old).flatten()
            weight.mul_(factor[torch.randperm(len(factor), generator=chance)].view_as(weight))
    return model


def _attack(model: Any, request: Any, test: Any, seed: int) -> float:
    """Return the share of forget rows that a membership attack takes for training rows."""
    import torch
    from sklearn.linear_model import LogisticRegression

    from remanence.models.forward import logits_of
    from remanence.training.trainer import Trainer

    trainer = Trainer(progress=False)

    def features(rows: Any) -> np.ndarray:
        def loss(module: Any, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(logits_of(module, batch).float(), batch["labels"], reduction="none")

        def entropy(module: Any, batch: Any) -> torch.Tensor:
            logp = torch.log_softmax(logits_of(module, batch).float(), -1)
            return -(logp.exp() * logp).sum(-1)

        batches = trainer.batches(rows, "classes", size=500, shuffle=False)
        return torch.stack([trainer.over_rows(model, batches, loss), trainer.over_rows(model, batches, entropy)], 1).numpy()

    members = request.retain.shuffle(seed=seed).select(range(len(test)))
    inside, outside, asked = features(members), features(test), features(request.forget)
    if not (np.isfinite(inside).all() and np.isfinite(outside).all() and np.isfinite(asked).all()):
        return float("nan")
    judge = LogisticRegression(class_weight="balanced").fit(
        np.concatenate([inside, outside]), np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    )
    return float(judge.predict(asked).mean())


def judge(results: Results) -> Verdict:
    """Hold the sheet's thresholds against the twelve class x seed runs."""

    def runs(arm: str, metric: str) -> np.ndarray:
        return np.stack([results[arm, f"{metric} {wanted}"] for wanted in CLASSES])

    arm = "ssd sample auto"
    forget, change, random_change = runs(arm, "forget"), runs(arm, "retain change"), runs("permuted places", "retain change")
    random_forget = runs("permuted places", "forget")
    good = int(((forget <= GONE) & (np.abs(change) <= 0.02)).sum())
    bad = int((change < -0.05).sum())
    share = results.mean(arm, "seconds") / results.mean("retrain", "seconds")
    placed = bool((random_forget.mean() <= forget.mean() + 0.02) and (random_change.mean() >= change.mean() - 0.02))
    reasons = (
        f"{good} of {forget.size} runs have at most 5 % left of the class and the others within 2 points (claimed: at least 10)",
        f"mean accuracy on the forgotten class {100 * forget.mean():.1f} %, change of the others {100 * change.mean():+.1f} points; "
        f"{bad} runs lose more than 5 points (falsified above 2)",
        f"the same factors at permuted places: class {100 * random_forget.mean():.1f} %, others {100 * random_change.mean():+.1f} points",
        f"takes {share:.2f} of the time of training again, importance over all data included (claimed: at most 1/3)",
        f"batch mode with alpha 10: class {100 * results.mean('ssd batch alpha 10', 'forget'):.1f} %, others "
        f"{100 * results.mean('ssd batch alpha 10', 'retain change'):+.1f} points; gradient ascent to the same goal: others "
        f"{100 * results.mean('gradient ascent', 'retain change'):+.1f} points",
        f"membership attack says 'member' of the forgotten rows: before {100 * results.mean('nothing', 'mia'):.0f} %, "
        f"retrained {100 * results.mean('retrain', 'mia'):.0f} %, SSD {100 * results.mean(arm, 'mia'):.0f} %",
        f"random 5 % of the rows instead of a class: their accuracy stays at {100 * results.mean('random rows', 'forget rows'):.1f} %",
    )
    if placed or bad > 2:
        return Verdict("does not hold", reasons)
    return Verdict("holds" if good >= 10 and share <= 1 / 3 else "mixed", reasons)


CLAIM = Claim(
    slug="ssd",
    title="Selective Synaptic Dampening (arXiv 2308.07707)",
    sentence="Without an optimizer step SSD (per-example importance, automatic threshold) leaves at most 5 % accuracy on the forgotten class and the others within "
    "2 points in at least 10 of 12 runs, in at most a third of retraining's time. Falsified if permuted places do as well or more than 2 runs lose over 5 points.",
    arms=ARMS,
    run=run,
    judge=judge,
    paper=(
        "An independent CIFAR-10 / ResNet-18 run with alpha 10: forgotten class 0.0 % for all ten classes, others 94 to 95.4 % for five, 12.5 and 17.7 % for two.",
        "The paper's own tables were not available for this record.",
    ),
    show=("forget", "retain", "retain change", "forget rows", "mia", "seconds"),
    minutes=10,
    long=True,
    notes=("MNIST (8,000 training and 2,000 test images) stands for Fashion-MNIST and CIFAR.",),
)
