"""The other side of `benchmarks.titans_memory`: titans-pytorch's NeuralMemory; one order per line of input, one JSON line of seconds per answer.

An order is {"tokens", "dim", "heads", "chunk", "threads"}; the memory is the package's own default: two layers, expansion 4, momentum.
"""

import json
import sys
import time
import warnings

import torch

warnings.simplefilter("ignore")
from titans_pytorch import NeuralMemory  # noqa: E402


def run(order: dict) -> dict:
    """Go forward and backward once; return processor and wall seconds."""
    torch.manual_seed(0)
    memory = NeuralMemory(dim=order["dim"], dim_head=order["dim"] // order["heads"], heads=order["heads"], chunk_size=order["chunk"])
    x = torch.randn(1, order["tokens"], order["dim"])
    processor, wall = time.process_time(), time.perf_counter()
    memory(x)[0].square().mean().backward()
    return {
        "seconds": (time.process_time() - processor, time.perf_counter() - wall),
        "parameters": sum(p.numel() for p in memory.parameters()),
    }


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        order = json.loads(line)
        torch.set_num_threads(order["threads"])
        print(json.dumps(run(order)), file=out, flush=True)
