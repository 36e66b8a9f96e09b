"""A store under random use against a plain dict that does the same, plain and sealed, SQLite and PostgreSQL, opened again in between."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest

from recall.store_cases import DIM, unit, whole
from remanence.recall.items import NewMessage, Selection
from remanence.recall.sqlite_store import SqliteStore
from remanence.recall.words import words

VOCABULARY = ["otter", "badger", "stoat", "heron", "Zürich", "42", "漢字"]


@pytest.fixture(params=["sqlite", "postgres"])
def opened(request, tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))
    if request.param == "sqlite":
        return functools.partial(SqliteStore, tmp_path / "store")
    return request.getfixturevalue("postgres")


@pytest.mark.parametrize("seed", range(3))
def test_random_use_agrees_with_a_dict(opened, seed):
    rng = random.Random(seed)
    model: dict[int, tuple[str, str, str, int, set[int]]] = {}  # message -> space, conversation, text, seed of its vector, chunks
    store = opened(embedder="stub", dim=DIM, precision="float32")
    store.make_space("a")
    store.make_space("b", encrypt=True)
    for step in range(120):
        act = rng.random()
        if act < 0.5 or not model:
            place = (rng.choice("ab"), rng.choice("cd"))
            text = " ".join(rng.choices(VOCABULARY, k=rng.randint(1, 6)))
            message, chunks = store.append(*place, NewMessage("user", text, person=place[1]), whole(text, step))
            model[message.id] = (*place, text, step, set(chunks))
        elif act < 0.65:
            id = rng.choice(list(model))
            text = rng.choice(VOCABULARY)
            _, chunks = store.replace(id, text, whole(text, step), at=1.0)
            model[id] = (*model[id][:2], text, step, set(chunks))
        elif act < 0.8:
            ids = rng.sample(list(model), min(2, len(model)))
            store.delete(ids)
            for id in ids:
                del model[id]
        elif act < 0.87:
            id = rng.choice(list(model))
            assert store.prune(sorted(model[id][4])) == len(model[id][4])
            model[id] = (*model[id][:4], set())
        elif act < 0.92:
            with pytest.raises(ZeroDivisionError), store.transaction():
                store.append("a", "c", NewMessage("user", "otter taken back"), whole("otter"))
                store.lexical("otter", 3, Selection(None))  # what is kept in memory must be taken back as well
                raise ZeroDivisionError
        elif act < 0.95:
            store.scrub()
        else:
            store.close()
            store = opened()
        space, word = rng.choice("ab"), rng.choice(VOCABULARY)
        there = {chunk: row for row in model.values() for chunk in row[4]}
        expected = {chunk for chunk, row in there.items() if row[0] == space and set(words(word)) & set(words(row[2]))}
        assert {id for id, _ in store.lexical(word, 1000, Selection(space))} == expected
        assert store.ids(Selection(None)).tolist() == sorted(model)
        conversation = rng.choice("cd")
        chosen = [id for id, row in sorted(model.items()) if row[:2] == (space, conversation)]
        for selection in (Selection(space, conversation), Selection(space, person=conversation)):
            assert [(message.id, message.text) for message in store.messages(selection)] == [(id, model[id][2]) for id in chosen]
        blocks = list(store.vectors(space, block=3))
        vectors = {int(id): vector for ids, found in blocks for id, vector in zip(ids, found)}
        assert (
            vectors.keys() == {chunk for chunk, row in there.items() if row[0] == space} == set(store.chunk_ids(Selection(space)).tolist())
        )
        assert all(np.array_equal(vector, unit(there[id][3])) for id, vector in vectors.items())
    store.close()
