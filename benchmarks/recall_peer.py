"""One memory per process for `benchmarks.recall_speed`: ours, chromadb, txtai or mem0; one order per line of input, one JSON line per answer.

`recall_peer.py NAME FOLDER` reads vectors.npy and queries.npy of the folder. Orders: {"do": "add", "first", "last"} stores those vectors with their texts;
{"do": "search", "query", "k"} finds texts by a query's vector; {"do": "about"} tells the memory that came with it. Each answer has the
processor's and the wall's seconds. Embedding is left out: every memory is handed the vectors, by whatever way it has for that.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np


def text(number: int) -> str:
    """Return the text of a vector."""
    return f"chunk {number} of a long conversation about nothing in particular"


class Remanence:
    """The store and the dense retriever."""

    def __init__(self, folder: Path, vectors: np.ndarray):
        import torch

        from remanence.recall.items import NewChunk, NewMessage, Selection
        from remanence.recall.retrieval import Dense, hits
        from remanence.recall.sqlite_store import SqliteStore

        class Given:
            name, dim = "given", vectors.shape[1]

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.items, self.everything, self.hits = (NewMessage, NewChunk), Selection(), hits
        self.store = SqliteStore(folder / "remanence", embedder="given", dim=vectors.shape[1])
        self.dense, self.vectors = Dense(self.store, Given()), vectors

    def add(self, first: int, last: int) -> None:
        message, chunk = self.items
        with self.store.transaction():
            for number in range(first, last):
                self.store.append("default", "talk", message("user", text(number)), [chunk(0, len(text(number)), self.vectors[number])])

    def search(self, query: np.ndarray, k: int) -> list[int]:
        found = self.dense.ranked(query, k, self.everything)
        return [int(hit.chunk.text.split()[1]) for hit in self.hits(self.store, found, {id: {} for id, _ in found})]


class Chromadb:
    """A persistent collection with its own HNSW index."""

    def __init__(self, folder: Path, vectors: np.ndarray):
        import chromadb

        client = chromadb.PersistentClient(str(folder / "chromadb"), settings=chromadb.Settings(anonymized_telemetry=False))
        self.collection = client.create_collection("memory", metadata={"hnsw:space": "cosine"}, embedding_function=None)
        self.vectors = vectors

    def add(self, first: int, last: int) -> None:
        numbers = range(first, last)
        self.collection.add(ids=[str(n) for n in numbers], embeddings=self.vectors[first:last], documents=[text(n) for n in numbers])

    def search(self, query: np.ndarray, k: int) -> list[int]:
        found = self.collection.query(query_embeddings=query[None], n_results=k, include=["documents", "distances"])
        return [int(words.split()[1]) for words in found["documents"][0]]


class Txtai:
    """An Embeddings database with content, its default faiss index, and vectors from outside."""

    def __init__(self, folder: Path, vectors: np.ndarray):
        from txtai import Embeddings

        self.given: np.ndarray = vectors[:0]
        self.base = Embeddings(
            {"method": "external", "transform": lambda texts: self.given[: len(texts)], "content": True, "backend": "faiss"}
        )
        self.vectors, self.filled = vectors, False

    def add(self, first: int, last: int) -> None:
        self.given = self.vectors[first:last]
        batch = last - first
        self.base.config["batch"] = self.base.config["encodebatch"] = batch
        (self.base.upsert if self.filled else self.base.index)([(n, text(n), None) for n in range(first, last)])
        self.filled = True

    def search(self, query: np.ndarray, k: int) -> list[int]:
        self.given = query[None]
        return [int(found["text"].split()[1]) for found in self.base.search("query", k)]


class Mem0:
    """Memory.add and Memory.search with inference off, over its default local qdrant."""

    def __init__(self, folder: Path, vectors: np.ndarray):
        os.environ |= {"MEM0_TELEMETRY": "False", "MEM0_DIR": str(folder / "mem0"), "OPENAI_API_KEY": "none"}
        from mem0 import Memory

        store = {"path": str(folder / "qdrant"), "embedding_model_dims": vectors.shape[1], "collection_name": "memory", "on_disk": True}
        stub = {"provider": "openai", "config": {"model": "stub", "embedding_dims": vectors.shape[1]}}
        self.memory = Memory.from_config(
            {"vector_store": {"provider": "qdrant", "config": store}, "embedder": stub, "history_db_path": str(folder / "history.db")}
        )
        self.memory.embedding_model.embed = self.embed  # type: ignore[method-assign]
        self.memory.embedding_model.embed_batch = lambda texts, *_, **__: [self.embed(one) for one in texts]
        self.vectors, self.query = vectors, vectors[0]

    def embed(self, words: str, *_: object, **__: object) -> list[float]:
        return (self.query if words == "query" else self.vectors[int(words.split()[1])]).tolist()

    def add(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.memory.add(text(number), user_id="user", infer=False)

    def search(self, query: np.ndarray, k: int) -> list[int]:
        self.query = query
        found = self.memory.search("query", filters={"user_id": "user"}, top_k=k, threshold=0.0)
        return [int(one["memory"].split()[1]) for one in found["results"]]


def resident() -> int:
    """Return the bytes of memory that the process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no such file outside Linux: the peak stands in
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(name: str, folder: Path) -> None:
    """Answer orders until the input ends."""
    out, sys.stdout = sys.stdout, sys.stderr
    vectors, queries = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("vectors", "queries"))
    memory = {"remanence": Remanence, "chromadb": Chromadb, "txtai": Txtai, "mem0": Mem0}[name](folder, vectors)
    before = resident()
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict = {}
        query = np.array(queries[order["query"]]) if order["do"] == "search" else None
        processor, wall = time.process_time(), time.perf_counter()
        if order["do"] == "add":
            memory.add(order["first"], order["last"])
        elif query is not None:
            answer["ids"] = memory.search(query, order["k"])
        answer["seconds"] = (time.process_time() - processor, time.perf_counter() - wall)
        answer["bytes"] = resident() - before
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
