"""Torture a recall server and its store: load, kills, a full disk, damage, odd requests, strings that want to break out. One line each; exit 1 on any loss.

    python -m benchmarks.torture_recall            # 50 clients for 60 s, 100 kills, 10,000 odd requests: some six minutes on two cores
    python -m benchmarks.torture_recall --quick    # the same in small, under a minute

The server is a forked process that serves real HTTP; whatever it answered is kept here and compared with what the store holds afterwards. The embedder is
`hashing`: what is tested is that nothing is lost, not how well it is found.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from benchmarks.odd_requests import HOSTILE, odd_request
from benchmarks.serving import start
from remanence.errors import Mistake
from remanence.recall.items import NewMessage, Selection
from remanence.recall.service import Recall

EVERY = Selection(space=None)


@dataclass
class Book:
    """What a server acknowledged: texts that must be there, and texts that must not; what it did not answer may be either."""

    there: dict[str, int] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wrong(self, texts: Sequence[str]) -> list[str]:
        """Name what a store's texts should be and are not."""
        held = Counter(texts)
        found = [f"lost: {text}" for text in self.there if text not in held]
        found += [f"doubled: {text}" for text, count in held.items() if count > 1]
        return found + [f"came back: {text}" for text in self.gone if text in held]


def holes(folder: Path) -> list[str]:
    """Name what is wrong inside a closed store: damaged pages, turns that are missing or doubled, messages without chunks, chunks without vectors."""
    with contextlib.closing(sqlite3.connect(folder / "memory" / "recall.sqlite")) as base:
        found = [f"integrity: {row[0]}" for row in base.execute("PRAGMA integrity_check") if row[0] != "ok"]
        found += [f"foreign key: {row[0]}" for row in base.execute("PRAGMA foreign_key_check")]
    with Recall.open(folder / "memory") as recall:
        for space in recall.spaces():
            ids = recall.store.chunk_ids(Selection(space=space))
            with_chunks = {chunk.message for chunk in recall.store.chunks(ids.tolist())}
            messages = recall.messages(Selection(space=space))
            found += [f"message {one.id} has no chunk" for one in messages if one.id not in with_chunks]
            vectors = sum(len(block) for block, _ in recall.store.vectors(space))
            found += [f"{space}: {len(ids)} chunks, {vectors} vectors"] if vectors != len(ids) else []
            doubled = [place for place, count in Counter((one.conversation, one.turn) for one in messages).items() if count > 1]
            found += [f"{space}: turn {place} twice" for place in doubled]
    return found


def texts_of(folder: Path) -> list[str]:
    """Return the texts of all messages of a closed store."""
    with Recall.open(folder / "memory") as recall:
        return [one.text for one in recall.messages(EVERY)]


def load(folder: Path, clients: int, seconds: float) -> tuple[str, list[str]]:
    """Let many clients write at once, each message sent under a key and one in five sent twice; reads between."""
    serving, book, spent, statuses = start(folder), Book(), [], Counter[int]()
    end = time.monotonic() + seconds

    def work(who: int) -> None:
        draw = np.random.default_rng(who)
        with serving.client() as ask:
            number = 0
            while time.monotonic() < end:
                number += 1
                text = f"client {who} says {number}"
                body = {"text": text, "conversation": f"c{who % 10}", "key": f"{who}-{number}", "person": f"p{who}"}
                begun = time.perf_counter()
                answers = [ask.post("/v1/spaces/load/messages", json=body)]
                spent.append(time.perf_counter() - begun)
                if draw.random() < 0.2:
                    answers.append(ask.post("/v1/spaces/load/messages", json=body))
                if draw.random() < 0.1:
                    answers.append(ask.post("/v1/spaces/load/search", json={"query": text, "k": 3}))
                with book.lock:
                    statuses.update(answer.status_code for answer in answers)
                    if answers[0].status_code == 201:
                        book.there[text] = answers[0].json()["id"]

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    code = serving.end()
    wrong = book.wrong(texts_of(folder)) + holes(folder)
    wrong += [f"{count} answers {status}" for status, count in statuses.items() if status not in (200, 201)]
    wrong += [f"the server ended with {code}"] if code else []
    times = np.sort(spent) * 1000
    lost, doubled = (sum(one.startswith(word) for one in wrong) for word in ("lost", "doubled"))
    return (
        f"{clients} clients, {seconds:.0f} s: {len(book.there)} acknowledged ({len(book.there) / seconds:.0f}/s, p50 {np.median(times):.0f} ms, "
        f"p95 {np.quantile(times, 0.95):.0f} ms), {lost} lost, {doubled} doubled",
        wrong,
    )


def kills(folder: Path, times: int, seed: int = 0) -> tuple[str, list[str]]:
    """Kill the server again and again, at instants from its start on, while clients add, correct and forget; then look."""
    book, draw, key, wrong, opened = Book(), np.random.default_rng(seed), None, [], 0.0

    def work(ask: httpx.Client, who: int, turn: int) -> None:
        own: list[tuple[str, int]] = []
        number = 0
        with contextlib.suppress(httpx.TransportError):
            while True:
                number += 1
                text = f"life {turn} client {who} says {number}"
                made = ask.post("/v1/spaces/kills/messages", json={"text": text, "conversation": f"c{who}"})
                if made.status_code == 201:
                    with book.lock:
                        book.there[text] = made.json()["id"]
                    own.append((text, made.json()["id"]))
                if who and number % 2 == 0 and own:  # the first client only adds
                    old, there = own.pop(0)
                    with book.lock:
                        del book.there[old]  # from now on it may be there or not
                    if number % 4:
                        answer = ask.delete(f"/v1/spaces/kills/messages/{there}")
                    else:
                        new = f"{old}, corrected"
                        answer = ask.put(f"/v1/spaces/kills/messages/{there}", json={"text": new})
                    if answer.status_code == 200:
                        with book.lock:
                            book.gone.add(old)
                            if number % 4 == 0:
                                book.there[new] = there

    for turn in range(times):
        serving = start(folder, key, ready=key is None)
        key = serving.key
        instant = float(draw.random() * (0.3 if turn % 4 == 0 else 2.0))  # some while it is just opening the store for its clients
        with ThreadPoolExecutor(4) as pool:
            asks = [serving.client() for _ in range(4)]
            for who, ask in enumerate(asks):
                pool.submit(work, ask, who, turn)
            time.sleep(instant)
            serving.end(signal.SIGKILL)
        for ask in asks:
            ask.close()
        begun = time.perf_counter()
        try:
            held = texts_of(folder)
        except Mistake as mistake:
            wrong.append(f"kill {turn}: {mistake}")
            break
        opened = max(opened, time.perf_counter() - begun)
        wrong += [f"kill {turn}: {one}" for one in book.wrong(held)]
        if wrong:
            break
    wrong += holes(folder)
    return (
        f"{times} kills: {len(book.there)} acknowledged messages there, {len(book.gone)} forgotten or corrected ones gone, "
        f"{len(wrong)} wrong; slowest opening {opened:.2f} s",
        wrong,
    )


def full_disk(folder: Path, room: int) -> tuple[str, list[str]]:
    """Let no file grow beyond so many bytes: a write is refused with a sentence, reading goes on, and with room again all is as it was answered."""
    serving, book, wrong, refused = start(folder, limit=room), Book(), [], []
    with serving.client() as ask:
        for number in range(20_000):
            text = f"{number} " + "fills the disk " * 40
            answer = ask.post("/v1/spaces/disk/messages", json={"text": text})
            if answer.status_code == 201:
                book.there[text] = answer.json()["id"]
            else:
                refused.append(answer)
                if len(refused) == 10:
                    break
        wrong += [f"refused with {one.status_code}: {one.text[:200]}" for one in refused if one.status_code != 507]
        wrong += ["a refusal without a sentence"] * any("Traceback" in one.text or not one.json()["error"]["problem"] for one in refused)
        wrong += [] if refused else ["the disk was never full"]
        read = ask.get("/v1/spaces/disk/messages", params={"limit": 1000})
        wrong += [] if read.status_code == 200 and len(read.json()) == min(1000, len(book.there)) else [f"reading: {read.status_code}"]
    serving.end()
    wrong += book.wrong(texts_of(folder)) + holes(folder)
    serving = start(folder, serving.key)
    with serving.client() as ask:
        again = ask.post("/v1/spaces/disk/messages", json={"text": "there is room again"})
        wrong += [] if again.status_code == 201 else [f"with room again: {again.text[:200]}"]
    serving.end()
    return f"full disk: {len(book.there)} acknowledged and there, {len(refused)} refused with a sentence, {len(wrong)} wrong", wrong


def damage(folder: Path, times: int, seed: int = 0) -> tuple[str, list[str]]:
    """Damage caches and the database: a cache is made anew, a database is refused with a sentence or read with every message in its place.

    SQLite keeps no checksums of what its pages hold: a bit that turns inside a text is read as another letter. Those are counted, and told.
    """
    from remanence.recall.retrieval import Dense
    from remanence.recall.vector_spaces import VectorSpaces

    draw, here, wrong, damaged, agreed = np.random.default_rng(seed), Selection(space="damage"), [], 0, []
    said = [" ".join(f"word{number}" for number in draw.integers(300, size=10)) for _ in range(400)]
    with Recall.open(folder / "memory", embedder="hashing") as recall:
        recall.add_many([NewMessage("user", text) for text in said], space="damage", conversation="c")
        texts = [one.text for one in recall.messages(EVERY)]
        scores = [{hit.chunk.id: hit.score for hit in recall.search(text, 400, here)} for text in said[:20]]
    for number in range(times):  # the cache, made to be used at this size
        with Recall.open(folder / "memory") as recall:
            spaces = VectorSpaces(recall.store, above=100)
            recall.retriever = Dense(recall.store, recall.embedder, spaces)
            recall.search("word1", 5, here)
            spaces.wait()
            wrong += [] if spaces.graph("damage") else [f"cache {number}: there is no graph"]
            for text, right in zip(said, scores):
                found = {hit.chunk.id: hit.score for hit in recall.search(text, 10, here)}
                wrong += [f"cache {number}: a wrong score"] if any(abs(right[one] - score) > 1e-6 for one, score in found.items()) else []
                agreed.append(len(set(found) & set(list(right)[:10])) / 10)
        for path in (folder / "memory" / "vectors").rglob("*"):
            if path.is_file():
                path.write_bytes(_damaged(path.read_bytes(), draw))
                damaged += 1
    wrong += [f"the graphs found {np.mean(agreed):.3f} of what is nearest"] if np.mean(agreed) < 0.95 else []
    base = folder / "memory" / "recall.sqlite"
    whole, refused, read, altered = base.read_bytes(), 0, 0, 0
    for number in range(times):
        base.write_bytes(_damaged(whole, draw))
        for more in ("-wal", "-shm"):
            base.with_name(base.name + more).unlink(missing_ok=True)
        try:
            with Recall.open(folder / "memory") as recall:
                held = [one.text for one in recall.messages(EVERY)]
                recall.search(said[0], 5, here)
            read, altered = read + 1, altered + (held != texts)
            wrong += [f"damage {number}: {len(held)} messages of {len(texts)}"] if len(held) != len(texts) else []
        except Mistake:
            refused += 1
        except Exception as error:
            wrong.append(f"damage {number}: {type(error).__name__} instead of a sentence")
    base.write_bytes(whole)
    return (
        f"damage: {damaged} damaged cache files made anew (10 nearest: {np.mean(agreed):.3f} found); {times} damaged databases: {refused} refused with a sentence, {read} read whole ({altered} of them with altered letters), "
        f"{len(wrong)} wrong",
        wrong,
    )


def _damaged(content: bytes, draw: np.random.Generator) -> bytes:
    """Return bytes cut off, overwritten in one piece, or with a handful of bits turned."""
    if not content:
        return b"?"
    at, kind = int(draw.integers(len(content))), draw.random()
    if kind < 0.25:
        return content[:at]
    if kind < 0.75:
        piece = draw.bytes(int(draw.integers(64, 8192)))
        return (content[:at] + piece + content[at + len(piece) :])[: len(content)]
    changed = bytearray(content)
    for place in draw.integers(len(content), size=8):
        changed[place] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def fuzz(folder: Path, times: int, seed: int = 0) -> tuple[str, list[str]]:
    """Send odd requests: no 5xx, no traceback, and every refusal a sentence."""
    serving, draw, statuses, wrong = start(folder), np.random.default_rng(seed), Counter[int](), []
    with serving.client() as ask:
        ask.post("/v1/spaces/ours/messages", json={"text": "something to find"})
        paths = [(method.upper(), path) for path, methods in ask.get("/openapi.json").json()["paths"].items() for method in methods]
        for _ in range(times):
            method, path, options = odd_request(draw, paths)
            try:
                answer = ask.request(method, path, **options)
            except (httpx.InvalidURL, httpx.LocalProtocolError):
                continue  # the client itself will not send it
            except httpx.TransportError as error:
                wrong.append(f"{method} {path} {str(options)[:300]}: {type(error).__name__}")
                continue
            statuses[answer.status_code] += 1
            if answer.status_code >= 500 or "Traceback" in answer.text:
                wrong.append(f"{method} {path} {str(options)[:300]}: {answer.status_code} {answer.text[:200]}")
            elif answer.status_code >= 400 and method != "HEAD" and answer.status_code != 400 and "error" not in answer.text:
                wrong.append(f"{method} {path}: {answer.status_code} without a sentence")
    wrong += [f"the server ended with {code}"] if (code := serving.end()) else []
    said = (folder / "said").read_text(encoding="utf-8", errors="replace")
    wrong += ["a traceback in the log"] * ("Traceback" in said) + holes(folder)
    kinds = ", ".join(f"{100 * family}s: {sum(n for s, n in statuses.items() if s // 100 == family)}" for family in (2, 3, 4, 5))
    return f"odd requests: {sum(statuses.values())} answered ({kinds}), {len(wrong)} wrong", wrong


def injection(folder: Path, times: int) -> tuple[str, list[str]]:
    """Put strings that want to break out into every place that takes text; each stays what and where it is."""
    wrong: list[str] = []
    with Recall.open(folder / "memory", embedder="hashing") as recall:
        quiet = recall.add("A quiet sentence about harbours", space="quiet")
        for number in range(times):
            for text in HOSTILE:
                made = recall.add(
                    f"{text} {number}", space="loud", conversation=text, person=text, meta={text: text}, key=f"{text}{number}"
                )
                fact = recall.add_fact("loud", text, conversation=text, pinned=True)
                back = recall.messages(Selection(space="loud", conversation=text, person=text, ids=(made.id,)))
                wrong += [f"{text!r} came back changed"] if back != [made] or back[0].text != f"{text} {number}" else []
                wrong += [f"{text!r} is no fact"] if text not in [one.text for one in recall.facts("loud", text)] else []
                recall.search(text, 5, Selection(space="loud"))
                recall.store.lexical(text, 5, Selection(space="loud"))
                prompt = recall.compose(text, system="Be kind.", space="loud", conversation=text)
                for tag in ("system", "compact", "retrieved", "dialogue_tail", "user"):
                    most = 1 if tag in prompt.parts else 0
                    for mark in (f"<{tag}>", f"</{tag}>"):
                        wrong += [f"{text!r} opened or closed {mark}"] if prompt.text.count(mark) > most else []
                recall.remove_fact(fact.id)
        found = [one.text for one in recall.messages(Selection(space="quiet"))]
        wrong += [] if found == [quiet.text] and sorted(recall.spaces()) == ["loud", "quiet"] else ["another space was touched"]
    return f"injection: {times * len(HOSTILE)} strings in seven places each, {len(wrong)} left their place", wrong + holes(folder)


def parts(quick: bool) -> dict[str, Callable[[Path], tuple[str, list[str]]]]:
    """Return the parts by name, in the issue's sizes or small."""
    return {
        "load": lambda folder: load(folder, 50, 6 if quick else 60),
        "kills": lambda folder: kills(folder, 8 if quick else 100),
        "full-disk": lambda folder: full_disk(folder, (1 if quick else 8) * 2**20),
        "damage": lambda folder: damage(folder, 8 if quick else 60),
        "fuzz": lambda folder: fuzz(folder, 800 if quick else 10_000),
        "injection": lambda folder: injection(folder, 2 if quick else 20),
    }


def main() -> None:
    """Torture, print one line a part, exit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description="Torture a recall server and its store.")
    parser.add_argument("--quick", action="store_true", help="in small, under a minute")
    parser.add_argument("--only", action="append", choices=list(parts(True)), help="this part (may be repeated)")
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, Recall.open(Path(folder) / "memory", embedder="hashing") as recall:
        recall.forget(Selection(ids=(recall.add("so that everything is imported before the first fork").id,)))
    failed = False
    for name, part in parts(chosen.quick).items():
        if chosen.only and name not in chosen.only:
            continue
        folder = Path(tempfile.mkdtemp(prefix=f"torture-{name}-"))
        begun = time.monotonic()
        try:
            line, wrong = part(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{line} ({time.monotonic() - begun:.0f} s)", flush=True)
        for one in wrong[:10]:
            print(f"  {one}", flush=True)
        failed = failed or bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
