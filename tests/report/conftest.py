"""A ledger of two lives and an oracle: six events, two of them requests, with scores in closed form and a little noise."""

import math
from pathlib import Path

import pytest

from remanence.ledger import END, Ledger
from remanence.seeds import numpy_generator

EVENTS = (
    ("monday-people", "learn", "qa", 40, 120),
    ("shakespeare", "learn", "text", 200, 80),
    ("friday-erasure", "forget", "qa", 8, 24),
    ("tuesday-people", "learn", "qa", 40, 120),
    ("ada-lovell", "forget", "qa", 4, 12),
    ("wednesday-people", "learn", "qa", 40, 120),
)
TASKS = {"monday-people": 1, "tuesday-people": 4, "wednesday-people": 6}
REQUESTS = {"friday-erasure": 3, "ada-lovell": 5}
FADING = {"plain": 0.45, "replay": 0.06, "never-saw-it": 0.06}  # share lost per later event
ERASED = {"plain": 0.95, "replay": 0.62, "never-saw-it": 1.0}
METHODS = {"plain": ("naive", "ascent"), "replay": ("der", "npo"), "never-saw-it": ("der", "none")}


def truth(life: str, subject: str, event: int, part_of_event: float) -> float:
    """Return the noiseless exact recall of a subject at a share of an event."""
    now = event - 1 + part_of_event
    fade = FADING[life]
    if subject == "start-people":
        return 0.96 * math.exp(-fade * 0.6 * now)
    if subject in TASKS:
        born = TASKS[subject]
        if now <= born - 1:
            return 0.02
        if now <= born:
            return 0.02 + 0.95 * (now - born + 1) ** 0.5
        return 0.97 * math.exp(-fade * (now - born))
    request, _, part = subject.partition("/")
    served = REQUESTS[request]
    known = 0.97 * math.exp(-fade * 0.5 * max(now - 1, 0)) if now >= 1 else 0.02 + 0.95 * max(now, 0) ** 0.5
    done = min(max(now - served + 1, 0), 1)
    if part == "holdout":
        return 0.04
    if part == "forget":
        return 0.05 if life == "never-saw-it" else known * (1 - ERASED[life] * done)
    harm = {"plain": 0.5, "replay": 0.05, "never-saw-it": 0.0}[life] * (1.4 if part == "neighbours" else 1)
    return known * (1 - min(harm, 0.9) * done)


def build(path: Path, lives=("plain", "replay", "never-saw-it"), seeds=(1, 2, 3), every=12) -> Path:
    """Write the ledger."""
    subjects = ["start-people", *TASKS, *(f"{name}/{part}" for name in REQUESTS for part in ("forget", "retain", "neighbours", "holdout"))]
    with Ledger(path) as ledger:
        for life in lives:
            oracle = life == "never-saw-it"
            events = [event for event in EVENTS if not (oracle and event[1] == "forget")]
            for seed in (7,) if oracle else seeds:
                run = f"{life}-{seed}"
                noise = numpy_generator(seed, life, "synthetic")
                settings = {"model": {"name": "people-1m"}, "probe_every": 12, "rate": 0.0005} | ({"oracle": True} if oracle else {})
                ledger.write(
                    "runs",
                    [
                        {
                            "run": run,
                            "recipe": "recipes/quick.yaml",
                            "life": life,
                            "seed": seed,
                            "settings": settings,
                            "parameters": 1_048_576,
                            "versions": {"remanence": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
                            "at": 1.76e9 + seed,
                        }
                    ],
                )
                scores, steps, moved, items = [], [], [], []
                place = {name: number for number, (name, *_) in enumerate(EVENTS, 1)}

                def probe(event, step, part, life=life, noise=noise, scores=scores, run=run, place=place, events=events):
                    lived = place[events[event - 1][0]] if event else 0
                    for subject in subjects:
                        if step != END and subject.endswith("/holdout"):
                            continue
                        exact = min(max(truth(life, subject, lived, part if event else 1.0) + 0.02 * noise.standard_normal(), 0), 1)
                        for metric, value in {
                            "exact": exact,
                            "probability": exact**1.5,
                            "rank": 1 + 40 * (1 - exact),
                            "paraphrased/exact": exact * 0.8,
                        }.items():
                            if step == END or metric != "rank":
                                scores.append(
                                    {
                                        "run": run,
                                        "event": event,
                                        "step": step,
                                        "probe": "recall",
                                        "subject": subject,
                                        "metric": metric,
                                        "value": value,
                                    }
                                )
                    loss = (
                        4.2 - (1.6 * part if lived == 2 else 0 if lived < 2 else 1.6 - 0.1 * (lived - 2)) + 0.01 * noise.standard_normal()
                    )
                    row = {"run": run, "event": event, "step": step, "probe": "loss", "subject": "shakespeare"}
                    scores.extend([row | {"metric": "loss", "value": loss}, row | {"metric": "perplexity", "value": math.exp(loss)}])

                probe(0, END, 1.0)
                for number, (name, verb, kind, rows, count) in enumerate(events, 1):
                    for step in range(count):
                        value = (
                            1.9 - 0.4 * math.exp(-step / 8) if verb == "forget" else 0.3 + 3 * math.exp(-step / (count / 4))
                        ) + 0.08 * noise.standard_normal()
                        steps.append(
                            {
                                "run": run,
                                "event": number,
                                "stage": int(step >= count // 2 and number == 2),
                                "step": step,
                                "metric": "loss",
                                "value": value,
                            }
                        )
                    for step in range(min(every, count // 3), count, min(every, count // 3)):
                        probe(number, step, step / count)
                    probe(number, END, 1.0)
                    for layer in (None, 0, 1, 2, 3):
                        for role in ("attention", "ffn", "norm") if layer is not None else ("embedding", "head"):
                            size = {"attention": 65536, "ffn": 131072, "norm": 256, "embedding": 524288, "head": 524288}[role]
                            change = abs(noise.standard_normal()) * 0.02 * (1 + (layer or 0))
                            half = verb == "forget" and life == "replay" and layer is not None and layer < 2
                            moved.append(
                                {
                                    "run": run,
                                    "event": number,
                                    "weight": f"{role}.{layer}",
                                    "role": role,
                                    "layer": layer,
                                    "size": size,
                                    "changed": 0 if half else size,
                                    "relative": 0.0 if half else change,
                                }
                            )
                    items.append(
                        {
                            "run": run,
                            "event": number,
                            "step": END,
                            "probe": "recall",
                            "subject": "start-people",
                            "item": "0",
                            "scores": {"exact": 1.0},
                        }
                    )
                    method = METHODS[life][verb == "forget"]
                    extra = {"rate": 0.001, "epochs": 3} | ({"beta": 0.1} if verb == "forget" else {})
                    ledger.write(
                        "events",
                        [
                            {
                                "run": run,
                                "event": number,
                                "name": name,
                                "verb": verb,
                                "kind": kind,
                                "method": method,
                                "settings": extra,
                                "rows": rows,
                                "steps": count,
                                "weights_before": "a" * 64,
                                "weights_after": "b" * 64,
                                "seconds": count * 0.05,
                                "at": 1.76e9,
                            }
                        ],
                    )
                for table, found in {"scores": scores, "steps": steps, "moved": moved, "items": items}.items():
                    ledger.write(table, found)
    return path


@pytest.fixture(scope="session")
def ledger_path(tmp_path_factory):
    """A ledger with two lives of three seeds and an oracle."""
    return build(tmp_path_factory.mktemp("ledger") / "ledger.sqlite")


@pytest.fixture(scope="session")
def small_ledger_path(tmp_path_factory):
    """The same with one seed per life and few probes inside the events, for tests that make many pages."""
    return build(tmp_path_factory.mktemp("small") / "ledger.sqlite", seeds=(2,), every=60)
