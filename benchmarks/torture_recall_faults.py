"""The faults that a recall server and its store are put through: a full disk, damage, odd requests, strings that want to break out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import httpx
import numpy as np

from benchmarks.odd_requests import HOSTILE, odd_request
from benchmarks.serving import EVERY, Book, holes, start, texts_of
from remanence.errors import Mistake
from remanence.recall.items import NewMessage, Selection
from remanence.recall.service import Recall


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

    SQLite keeps no checksums of what its pages hold: those of the messages are the store's own.
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
    whole, refused, read = base.read_bytes(), 0, 0
    for number in range(times):
        base.write_bytes(_damaged(whole, draw))
        for more in ("-wal", "-shm"):
            base.with_name(base.name + more).unlink(missing_ok=True)
        try:
            with Recall.open(folder / "memory") as recall:
                held = [one.text for one in recall.messages(EVERY)]
                recall.search(said[0], 5, here)
            read += 1
            wrong += [f"damage {number}: other messages than were stored"] if held != texts else []
        except Mistake:
            refused += 1
        except Exception as error:
            wrong.append(f"damage {number}: {type(error).__name__} instead of a sentence")
    base.write_bytes(whole)
    return (
        f"damage: {damaged} damaged cache files made anew (10 nearest: {np.mean(agreed):.3f} found); {times} damaged databases: {refused} refused with a sentence, {read} read whole, "
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
