"""Experience replay on class-incremental digits against avalanche-lib: five tasks of two digits, 200 rows of memory, the same network, rows and steps.

The peer runs in an environment of its own (`.venv-avalanche`, made on first use), as one process that waits for orders, so that rounds alternate. Seconds
are of training alone, ours with the encoding of the rows. The optimizer is plain
SGD: the peer keeps the averages of Adam from task to task and ours starts anew, which decides more than the speed. Every task is cut to a multiple of ten rows:
the peer would take a last step on the three rows that are left over, mostly on its memory, and end ten points higher for it. Two settings:
- classes: several epochs per task, a memory balanced over classes, filled behind each task on both sides (`update: task`);
- online: one pass, ten rows at a time, a reservoir. The peer gets every ten rows as an experience (`split_online_stream`), its way to do that. Ours is timed
  twice: one `learn` per task, whose steps are the same ten rows and whose memory takes them in step by step, and one `learn` per ten rows.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from torch import nn

from benchmarks.timing import Figure, Seconds, clocked, conversation, figure
from remanence.data.digits import digits
from remanence.learn.replay import Replay
from remanence.models.forward import fresh_weights
from remanence.stream import Task
from remanence.training.trainer import Settings, Trainer

FOLDER = Path(__file__).parent.parent / ".venv-avalanche"
PACKAGES = (
    ("torch==2.13.0",),
    ("--no-deps", "torchvision==0.28.0"),
    ("avalanche-lib==0.6.0",),
)  # torchvision's dependencies would bring CUDA
MEMORY, BATCH, HIDDEN, RATE, EPOCHS = 200, 10, 256, 0.1, 4
SEEDS = (0, 1, 2)


def environment(folder: Path = FOLDER) -> Path:
    """Return the Python of the peer's environment, made on first use (1.5 GB)."""
    python, done = folder / "bin/python", folder / "made"
    if not done.exists():
        print(f"making {folder} for avalanche-lib", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in PACKAGES:
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=True)
        done.touch()
    return python


def network(seed: int) -> nn.Module:
    """Return the perceptron that both sides start from."""
    with fresh_weights(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def pairs_of_classes() -> list[Task]:
    """Return the five tasks."""
    tasks = []
    for first in range(0, 10, 2):
        rows = digits("train", (first, first + 1))
        tasks.append(Task(f"digits {first} and {first + 1}", rows.select(range(len(rows) // BATCH * BATCH)), kind="classes"))
    return tasks


def in_tens(tasks: list[Task], seed: int) -> list[Task]:
    """Return a task for every ten rows of each task, in a shuffled order."""
    found = []
    for task in tasks:
        rows = task.train.shuffle(seed=seed)
        found += [
            Task(f"{task.name}, from {first}", rows.select(range(first, min(first + BATCH, len(rows)))), kind="classes")
            for first in range(0, len(rows), BATCH)
        ]
    return found


def learn(tasks: list[Task], *, epochs: float, memory: str, seed: int, update: str = "step") -> tuple[nn.Module, Seconds]:
    """Train on the tasks with replay; return the model and the seconds."""
    model, learner = network(seed), Replay(capacity=MEMORY, memory=memory, batch_size=BATCH, update=update)
    settings = Settings(epochs=epochs, batch_size=BATCH, optimizer="sgd", lr=RATE / 2, clip=None)  # the peer takes the mean of new and old

    def work() -> None:
        for number, task in enumerate(tasks):
            learner.learn(model, task, Trainer(settings, seed=1000 * seed + number, progress=False))

    return model, clocked(work)


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images whose best class is right."""
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def run(*, tiny: bool = False) -> list[Figure]:
    """Compare over three seeds (one where `tiny`)."""
    tasks, seeds = pairs_of_classes(), SEEDS[:1] if tiny else SEEDS
    rows = concatenate_datasets([task.train for task in tasks])
    parts = {"train": rows.with_format("numpy")[:], "test": digits("test").with_format("numpy")[:]}
    data = {
        f"{letter}_{part}": np.asarray(rows[column], kind)
        for part, rows in parts.items()
        for letter, column, kind in (("x", "features", np.float32), ("y", "label", np.int64))
    }
    test = torch.from_numpy(data["x_test"]), torch.from_numpy(data["y_test"])
    modes: dict[str, tuple[str, Callable[[int], tuple[nn.Module, Seconds]], float]] = {
        "classes": ("classes", lambda seed: learn(tasks, epochs=EPOCHS, memory="balanced", seed=seed, update="task"), 3.0),
        "online, one learn per task": ("online", lambda seed: learn(tasks, epochs=1, memory="reservoir", seed=seed), 100.0),
        "online, one learn per ten rows": (
            "online",
            lambda seed: learn(in_tens(tasks, seed), epochs=1, memory="reservoir", seed=seed),
            100.0,
        ),
    }
    found: dict[str, dict[str, list[Any]]] = {name: {"ours": [], "peer": [], "right": [], "peer_right": []} for name in modes}
    with tempfile.TemporaryDirectory() as folder, conversation([environment(), Path(__file__).with_name("replay_avalanche.py")]) as ask:
        for seed in seeds:
            file = Path(folder) / f"{seed}.npz"
            weights = {f"weight.{name}": value.numpy() for name, value in network(seed).state_dict().items()}
            np.savez(file, **(data | weights))  # type: ignore[arg-type]
            order = {
                "file": str(file),
                "seed": seed,
                "memory": MEMORY,
                "batch": BATCH,
                "hidden": HIDDEN,
                "rate": RATE,
                "threads": torch.get_num_threads(),
            }
            if seed == seeds[0]:  # a round that only warms up
                ask({**order, "mode": "classes", "epochs": 1})
                learn(tasks, epochs=1, memory="balanced", seed=seed, update="task")
            answers: dict[str, dict[str, Any]] = {}  # the peer goes first in every other seed
            for name, (mode, ours, _) in modes.items():
                wanted = {**order, "mode": mode, "epochs": EPOCHS if mode == "classes" else 1}
                if seed % 2 and mode not in answers:
                    answers[mode] = ask(wanted)
                model, seconds = ours(seed)
                if mode not in answers:
                    answers[mode] = ask(wanted)
                answer = answers[mode]
                for key, value in (
                    ("ours", seconds),
                    ("peer", tuple(answer["seconds"])),
                    ("right", accuracy(model, *test)),
                    ("peer_right", answer["accuracy"]),
                ):
                    found[name][key].append(value)
    return [
        figure(
            f"replay on digits, {name}, avalanche-lib / ours",
            found[name]["ours"],
            found[name]["peer"],
            "speedup",
            goal,
            {
                "accuracy": statistics.mean(found[name]["right"]),
                "peer_accuracy": statistics.mean(found[name]["peer_right"]),
                "accuracies": found[name]["right"],
                "peer_accuracies": found[name]["peer_right"],
            },
        )
        for name, (_, _, goal) in modes.items()
    ]
