"""The read path of a conversation memory, embedding left out: against its goals, and against chromadb, txtai and mem0 for the same vectors.

A read is a search for the ten nearest chunks and the fetch of their texts. Every memory runs in a process of its own that is handed vectors (D = 384); rounds
alternate between ours and a peer. The peers live in `.venv-recall-peers`, made on first use beside this Python's own packages. Ours is exact at these sizes;
`found` is the share of the ten that brute force finds. mem0 adds one memory per call and is asked at 1,000. Then 10,000 chunks of text with paraphrased
questions: P@5 and R@50 of each retriever (`recall_quality`). A million chunks: `recall_million`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recall_quality import quality
from benchmarks.timing import Figure, Seconds, conversation, figure
from remanence.seeds import numpy_generator

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-recall-peers"
PACKAGES = ("chromadb==1.5.9", "txtai==9.14.0", "mem0ai==2.2.1", "faiss-cpu>=1.10")
DIM, K, TOPICS, BATCH = 384, 10, 4000, 500
GOAL = {10_000: 0.005}  # seconds, the median
Ask = Callable[[dict[str, Any]], dict[str, Any]]


def peer_python(folder: Path = FOLDER) -> Path:
    """Return the Python that has the peers, made on first use; it sees this Python's packages too, so that no second torch is fetched."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        print(f"making {folder} for chromadb, txtai and mem0", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        place = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
        )
        (Path(place.stdout.strip()) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES], check=True)
        (folder / "made").touch()
    return python


def unit_vectors(count: int, *parts: object) -> Iterator[np.ndarray]:
    """Yield fp32 unit vectors in blocks: topics with falling spread over turned axes, about as many dimensions in use as a sentence encoder's vectors have."""
    shared = numpy_generator(0, "axes")
    axes = np.linalg.qr(shared.standard_normal((DIM, DIM)))[0].astype(np.float32)
    spread = (np.arange(1, DIM + 1) ** -0.45).astype(np.float32)
    topics = shared.standard_normal((TOPICS, DIM)).astype(np.float32)
    own = numpy_generator(0, *parts)
    for first in range(0, count, 20_000):
        size = min(20_000, count - first)
        found = ((topics[own.integers(TOPICS, size=size)] + own.standard_normal((size, DIM), dtype=np.float32)) * spread) @ axes
        yield found / np.linalg.norm(found, axis=1, keepdims=True)


def write_vectors(folder: Path, count: int, asked: int) -> tuple[np.ndarray, np.ndarray]:
    """Write the vectors and queries for the processes; return them."""
    vectors, queries = (np.concatenate(list(unit_vectors(*given))) for given in ((count, "vectors"), (asked, "queries")))
    vectors = vectors.astype(np.float16).astype(np.float32)  # as they are stored
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", queries)
    return vectors, queries


@contextmanager
def memory(name: str, folder: Path) -> Iterator[Ask]:
    """Start a memory in a process of its own."""
    python = Path(sys.executable) if name == "remanence" else peer_python()
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    (folder / name).mkdir()
    for part in ("vectors.npy", "queries.npy"):
        (folder / name / part).symlink_to(folder / part)
    with conversation([python, Path(__file__).with_name("recall_peer.py"), name, folder / name], env) as ask:
        yield ask


def fill(ask: Ask, count: int) -> tuple[float, float]:
    """Add vectors in batches; return processor and wall seconds."""
    seconds = [ask({"do": "add", "first": first, "last": min(first + BATCH, count)})["seconds"] for first in range(0, count, BATCH)]
    return sum(one[0] for one in seconds), sum(one[1] for one in seconds)


def milliseconds(seconds: list[Seconds]) -> dict[str, float]:
    """Return median and 95th percentile on the wall."""
    walls = [1000 * wall for _, wall in seconds]
    return {"p50 ms": statistics.median(walls), "p95 ms": float(np.percentile(walls, 95))}


def against_goal(name: str, seconds: list[Seconds], goal: float | None, more: dict[str, Any]) -> Figure:
    """Return a figure of reads beside the seconds that a read may take (5 ms where no goal was set)."""
    allowed = [(goal or 0.005,) * 2] * len(seconds)
    return figure(f"{name}: a read / {1000 * allowed[0][0]:g} ms", seconds, allowed, "overhead", 1 if goal else None, more)


def side_by_side(count: int, peers: tuple[str, ...], rounds: int) -> list[Figure]:
    """Fill ours and each peer with the same vectors and search them in turn."""
    figures = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        vectors, queries = write_vectors(folder, count, rounds)
        truth = [set(np.argsort(-(vectors @ query), kind="stable")[:K].tolist()) for query in queries]
        with memory("remanence", folder) as ours:
            written = fill(ours, count)
            ours({"do": "search", "query": 0, "k": K})  # reads the vectors into memory
            answers = [ours({"do": "search", "query": query, "k": K}) for query in range(rounds)]
            alone = [tuple(one["seconds"]) for one in answers]
            more = milliseconds(alone) | {"MiB": answers[-1]["bytes"] / 2**20, "chunks stored per second": count / written[1]}
            more["found"] = statistics.mean(len(set(one["ids"]) & gold) / K for one, gold in zip(answers, truth, strict=True))
            figures.append(against_goal(f"{count:,} chunks", alone, GOAL.get(count), more))
            for name in peers:
                with memory(name, folder) as peer:
                    filled = fill(peer, count)
                    own: list[Seconds] = []
                    theirs: list[Seconds] = []
                    found = []
                    for query in range(rounds):
                        for which in ((ours, own), (peer, theirs)) if query % 2 else ((peer, theirs), (ours, own)):
                            answer = which[0]({"do": "search", "query": query, "k": K})
                            which[1].append(tuple(answer["seconds"]))
                            if which[0] is peer:
                                found.append(len(set(answer["ids"]) & truth[query]) / K)
                    seen = {f"peer {key}": value for key, value in milliseconds(theirs).items()}
                    seen |= {"peer MiB": answer_bytes(peer), "peer found": statistics.mean(found)}
                    figures.append(
                        figure(f"{count:,} chunks, a read: {name} / ours", own, theirs, "speedup", None, milliseconds(own) | seen)
                    )
                    rates = {"stored per second": count / written[1], "peer stored per second": count / filled[1]}
                    figures.append(figure(f"{count:,} chunks stored: {name} / ours", [written], [filled], "speedup", None, rates))
    return figures


def answer_bytes(ask: Ask) -> float:
    """Return the MiB that a memory has grown by."""
    return ask({"do": "about"})["bytes"] / 2**20


def run(tiny: bool = False) -> list[Figure]:
    """Return the figures; tiny leaves the peers and the encoder out."""
    if tiny:
        return side_by_side(300, (), 5) + quality("hashing", people=4, asked=5)
    figures = side_by_side(1_000, ("chromadb", "txtai", "mem0"), 60)
    figures += side_by_side(10_000, ("chromadb", "txtai"), 100)
    figures += side_by_side(100_000, ("chromadb", "txtai"), 100)
    return figures + quality("sentence", people=200, asked=100)
