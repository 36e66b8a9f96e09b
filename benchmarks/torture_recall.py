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
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

from benchmarks.serving import Book, holes, start, texts_of
from benchmarks.torture_recall_faults import damage, full_disk, fuzz, injection
from remanence.errors import Mistake
from remanence.recall.items import Selection
from remanence.recall.service import Recall


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
        early = turn % 4 == 1  # while it is just opening the store for its clients
        serving = start(folder, key, ready=not early)
        key = serving.key
        before, instant = len(book.gone), float(draw.random() * (0.3 if early else 2.0))
        with ThreadPoolExecutor(4) as pool:
            asks = [serving.client() for _ in range(4)]
            for who, ask in enumerate(asks):
                pool.submit(work, ask, who, turn)
            end = time.monotonic() + 20
            while turn % 10 == 3 and len(book.gone) < before + 3 and time.monotonic() < end:
                time.sleep(0.01)  # some lives last until a few erasures were answered: these must hold
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
