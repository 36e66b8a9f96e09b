"""The other side of `benchmarks.replay`: avalanche-lib, run by the Python of its own environment; one order per line of input, one JSON line per answer.

An order is {"mode": "classes" | "online", "file": data and initial weights (npz), ...}. Metrics and loggers are off, as they would only cost time.
"""

import json
import sys
import time
import warnings

import numpy as np
import torch
from torch import nn

warnings.simplefilter("ignore")
for name in ("nms", "qnms"):  # torchvision's own kernels want CUDA; nothing here calls them, but its import asks for their names
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from avalanche.benchmarks import nc_benchmark, split_online_stream  # noqa: E402
from avalanche.training import ClassBalancedBuffer, Naive, ReservoirSamplingBuffer  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin  # noqa: E402


class Labelled(torch.utils.data.TensorDataset):
    """Tensors with the `targets` that avalanche looks for."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor):
        super().__init__(inputs, targets)
        self.targets = targets.tolist()


def train(order: dict) -> dict:
    """Train one model as ordered; return seconds of training and the accuracy on the test rows."""
    held = np.load(order["file"])
    data = {name: torch.from_numpy(held[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    torch.manual_seed(order["seed"])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, order["hidden"]), nn.ReLU(), nn.Linear(order["hidden"], 10))
    model.load_state_dict({name: torch.from_numpy(held[f"weight.{name}"]) for name in model.state_dict()})
    sets = [Labelled(data[f"x_{part}"], data[f"y_{part}"]) for part in ("train", "test")]
    scenario = nc_benchmark(*sets, n_experiences=5, task_labels=False, fixed_class_order=list(range(10)))
    online = order["mode"] == "online"
    kept = ReservoirSamplingBuffer(order["memory"]) if online else ClassBalancedBuffer(order["memory"])
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=order["rate"]),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=order["batch"],
        train_epochs=order["epochs"],
        plugins=[ReplayPlugin(order["memory"], batch_size_mem=order["batch"], storage_policy=kept)],
        evaluator=EvaluationPlugin(),
    )
    stream = split_online_stream(scenario.train_stream, experience_size=order["batch"]) if online else scenario.train_stream
    processor, wall = time.process_time(), time.perf_counter()
    for experience in stream:
        strategy.train(experience, num_workers=0)
    seconds = time.process_time() - processor, time.perf_counter() - wall
    model.eval()
    with torch.no_grad():
        right = (model(data["x_test"]).argmax(1) == data["y_test"]).float().mean().item()
    return {"seconds": seconds, "accuracy": right, "steps": strategy.clock.train_iterations}


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr  # avalanche may print
    for line in sys.stdin:
        order = json.loads(line)
        torch.set_num_threads(order["threads"])
        print(json.dumps(train(order)), file=out, flush=True)
