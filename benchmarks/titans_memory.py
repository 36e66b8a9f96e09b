"""Titans' neural memory: the chunk form against the token-by-token rule, against titans-pytorch, and its cost over tokens, width and chunk.

titans-pytorch is installed beside this Python's torch, into `.venv-titans`, and runs as one process that waits for orders, so that rounds alternate. Its rule
is another one: one update per chunk with averaged gates, all gradients at the initial weights, so that nothing waits for the chunk before; ours takes
gradients at the weights that entered each chunk, which makes chunks sequential. Memory is the growth of a fresh process's peak, per token.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Figure, Seconds, clocked, conversation, figure, forget_peak, paired, peak_bytes
from remanence.memory import dual
from remanence.memory.titans import NeuralMemory

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-titans"
PACKAGES = (
    "titans-pytorch==0.5.5",
    *(
        "einops",
        "einx",
        "tensordict",
        "axial-positional-embedding",
        "assoc-scan",
        "hyper-connections",
        "rotary-embedding-torch",
        "x-transformers",
    ),
    *("torch-einops-utils", "frozendict", "pyvers", "loguru", "orjson", "cloudpickle", "importlib_metadata", "zipp"),
)  # without their own dependencies, which would bring a second torch
DIM, HEADS, CHUNK = 256, 4, 32


def peer_folder(folder: Path = FOLDER) -> Path:
    """Return the folder that titans-pytorch lies in, filled on first use."""
    if not (folder / "made").exists():
        print(f"making {folder} for titans-pytorch", file=sys.stderr)
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--target",
            folder,
            *PACKAGES,
        ]
        subprocess.run(command, check=True)
        (folder / "made").touch()
    return folder


def train(memory: NeuralMemory, x: torch.Tensor) -> None:
    """Go forward and backward once."""
    memory(x)[0].square().mean().backward()


def against_reference(tokens: int, rounds: int) -> Figure:
    """Read the same tokens in chunks and token by token; the outputs are compared in float64, as rounding grows with every token (see titans.py)."""
    torch.manual_seed(0)
    memory = NeuralMemory(DIM, HEADS, chunk=CHUNK)
    x = torch.randn(1, tokens, DIM)

    def ways(x: torch.Tensor) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
        q, parts, _ = memory._tokens(x, None, None)
        W, norm = memory._start(1, q), memory._norm(1, q)
        return (
            lambda: dual.read_write(memory.rule, dual.start(W, parts, True), q, parts, norm).y,
            lambda: dual.read_write_reference(memory.rule, W, (), q, parts, norm)[0],
        )

    with torch.no_grad():
        ours, theirs = paired(*ways(x), rounds)
        memory.double()
        chunked, sequential = (way() for way in ways(x.double()))
    more = {"largest difference in float64": (chunked - sequential).abs().max().item()}
    return figure(f"{tokens} tokens read, token by token / in chunks", ours, theirs, "speedup", 10, more)


def against_peer(tokens: int, rounds: int) -> Figure:
    """Go forward and backward, ours and titans-pytorch's in turn."""
    torch.manual_seed(0)
    memory = NeuralMemory(DIM, HEADS, chunk=CHUNK)
    x = torch.randn(1, tokens, DIM)
    order = {"tokens": tokens, "dim": DIM, "heads": HEADS, "chunk": CHUNK, "threads": torch.get_num_threads()}
    ours: list[Seconds] = []
    theirs: list[Seconds] = []
    script, env = Path(__file__).with_name("titans_peer.py"), {**os.environ, "PYTHONPATH": str(peer_folder())}
    with conversation([sys.executable, script], env) as ask:
        for turn in range(rounds + 1):
            ours.append(clocked(lambda: train(memory, x)))
            answer = ask(order)
            theirs.append(tuple(answer["seconds"]))
            if turn == 0:  # both warm up
                ours.clear()
                theirs.clear()
    more = {"parameters": sum(p.numel() for p in memory.parameters()), "peer parameters": answer["parameters"]}
    return figure(f"{tokens} tokens forward and backward, titans-pytorch / ours", ours, theirs, "speedup", 3, more)


def measured(order: dict[str, Any]) -> dict[str, Any]:
    """Do one piece of work in a fresh process; return its seconds and the growth of its peak in bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.titans_memory", json.dumps(order)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def work(order: dict[str, Any]) -> dict[str, Any]:
    """Read, or read and go back, as ordered."""
    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    dim, heads, tokens = order["D"] * order["heads"], order["heads"], order["tokens"]
    memory = NeuralMemory(dim, heads, chunk=order["chunk"], recompute=order.get("recompute", 0))
    train(memory, torch.randn(1, 2 * order["chunk"], dim))
    forget_peak()
    before = peak_bytes()
    x = torch.randn(1, tokens, dim)
    if order["train"]:
        seconds = clocked(lambda: train(memory, x))
    else:
        with torch.no_grad():
            seconds = clocked(lambda: memory(x))
    return {"seconds": seconds, "bytes": peak_bytes() - before}


def costs(orders: list[tuple[str, dict[str, Any]]]) -> list[Figure]:
    """Return seconds per token of each order over those of the first."""
    shared = {"heads": 2, "threads": torch.get_num_threads()}
    found = [(name, order, measured(shared | order)) for name, order in orders]
    first = found[0]
    figures = []
    for name, order, done in found:
        ours, peers = ([tuple(s / one[1]["tokens"] for s in one[2]["seconds"])] for one in ((name, order, done), first))
        more = {"tokens per second": order["tokens"] / done["seconds"][0], "KiB per token": done["bytes"] / 1024 / order["tokens"]}
        figures.append(figure(f"seconds per token: {name} / {first[0]}", ours, peers, "overhead", None, more))
    return figures


def run(tiny: bool = False) -> list[Figure]:
    """Return the figures; tiny leaves the peer out."""
    tokens = (128, 256) if tiny else (2048, 8192, 32768, 131072)
    figures = [against_reference(64 if tiny else 2048, 1 if tiny else 3)]
    if not tiny:
        figures.append(against_peer(4096, 7))
    base = {"D": 64, "chunk": 32, "train": True, "recompute": 0}
    figures += costs([(f"reading {T} tokens", base | {"tokens": T, "train": False}) for T in tokens])
    figures += costs([(f"training on {T} tokens, 16 chunks recomputed", base | {"tokens": T, "recompute": 16}) for T in tokens])
    widths, chunks, T = ((32,), (16, 32), 128) if tiny else ((32, 64, 128), (8, 16, 32, 64, 128), 4096)
    pairs = [(64, 32)] + [(D, b) for D in widths for b in chunks if (D, b) != (64, 32)]
    return figures + costs([(f"training, D {D}, chunk {b}", base | {"tokens": T, "D": D, "chunk": b}) for D, b in pairs])


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
