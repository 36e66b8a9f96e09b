"""The exact index: equal to brute force over the stored vectors, whatever is appended, removed or asked for meanwhile."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from remanence.recall.vector_index import VectorIndex, slack
from remanence.seeds import numpy_generator


def unit(count: int, dim: int, *parts: object, precision: type = np.float16) -> np.ndarray:
    """Return unit vectors as a store gives them back: rounded to its precision, in fp32."""
    found = numpy_generator(0, *parts).standard_normal((count, dim))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(precision).astype(np.float32)


def brute(ids: np.ndarray, vectors: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    """Return the nearest ids by one fp64 product per row in plain Python, rounded to fp32, ties by the higher id."""
    scores = [np.float32(sum(np.float64(a) * np.float64(b) for a, b in zip(row, query))) for row in vectors]
    return sorted(ids.tolist(), key=lambda one: (-scores[ids.tolist().index(one)], -one))[:k]


def brute_fp64(ids: np.ndarray, vectors: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    scores = (vectors.astype(np.float64) * query.astype(np.float64)).sum(1).astype(np.float32)
    return ids[np.lexsort((-ids, -scores))][:k].tolist()


@pytest.mark.parametrize("precision", [np.float16, np.float32])
@pytest.mark.parametrize(("count", "dim", "block"), [(1, 5, 16), (63, 60, 16), (64, 384, 16), (300, 33, 64), (5000, 384, 2048)])
def test_top_k_is_identical_to_brute_force_cosine(count: int, dim: int, block: int, precision: type) -> None:
    vectors, ids = unit(count, dim, "rows", count, dim, precision=precision), 3 * np.arange(1, count + 1)
    index = VectorIndex(dim, block)
    for first in range(0, count, 37):
        index.append(ids[first : first + 37], vectors[first : first + 37])
    assert len(index) == count
    for query in (*unit(5, dim, "queries", precision=np.float32), vectors[count // 2]):
        for k in (1, 10, count, count + 5):
            found, scores = index.search(query, k)
            assert found.tolist() == brute_fp64(ids, vectors, query, k)
            assert (np.diff(scores) <= 0).all()
        some = ids[numpy_generator(1, count).random(count) < 0.3]
        chosen = np.isin(ids, some)
        assert index.search(query, 7, some)[0].tolist() == brute_fp64(some, vectors[chosen], query, 7)
    if count <= 300:
        assert index.search(query, 5)[0].tolist() == brute(ids, vectors, query, 5)


def test_equal_vectors_rank_by_the_higher_id_wherever_they_stand() -> None:
    one, other = unit(2, 384, "ties")
    ids = np.arange(1, 5001)
    index = VectorIndex(384, 512)
    index.append(ids, np.where((ids % 7 == 0)[:, None], one, other))
    same = ids[ids % 7 == 0][::-1]
    found, scores = index.search(one, len(same))
    assert found.tolist() == same.tolist()
    assert len(set(scores.tolist())) == 1


def test_rounding_of_fp32_products_does_not_change_the_ranking() -> None:
    base = unit(1, 384, "near")[0]
    noise = numpy_generator(0, "noise").standard_normal((3000, 384)) * 1e-5  # scores closer to each other than fp32 sums are to the truth
    vectors = (base + noise).astype(np.float32)
    index = VectorIndex(384)
    index.append(np.arange(1, 3001), vectors)
    assert index.search(base, 50)[0].tolist() == brute_fp64(np.arange(1, 3001), vectors, base, 50)
    assert slack(base) < 1e-4


def test_removed_rows_are_absent_and_the_rest_is_as_before() -> None:
    vectors, ids = unit(1000, 32, "gone"), np.arange(1, 1001)
    index = VectorIndex(32, 128)
    index.append(ids, vectors)
    gone = np.concatenate([ids[100:300], [5, 5, 2000]])
    assert index.remove(gone) == 201
    keep = ~np.isin(ids, gone)
    assert index.ids().tolist() == ids[keep].tolist()
    for query in unit(5, 32, "queries"):
        assert index.search(query, 50)[0].tolist() == brute_fp64(ids[keep], vectors[keep], query, 50)
    index.append(np.array([1500]), vectors[:1])
    assert index.search(vectors[0], 1)[0].tolist() == [1500]
    index.remove(index.ids())
    assert (len(index), index.last, len(index.search(vectors[0], 3)[0])) == (0, 0, 0)


def test_scores_of_given_ids_are_those_of_the_search() -> None:
    vectors, ids = unit(500, 48, "scores"), 2 * np.arange(1, 501)
    index = VectorIndex(48, 100)
    index.append(ids, vectors)
    found, scores = index.search(vectors[3], 500)
    order = numpy_generator(0, "order").permutation(500)
    assert index.scores(vectors[3], found[order]).tolist() == scores[order].tolist()
    assert np.isnan(index.scores(vectors[3], np.array([1, 2000, -4]))).all()


def test_ids_that_do_not_rise_are_refused() -> None:
    index = VectorIndex(4)
    index.append(np.array([1, 5]), unit(2, 4, "x"))
    for wrong in ([5], [7, 6], [3]):
        with pytest.raises(ValueError, match="rise"):
            index.append(np.array(wrong), unit(len(wrong), 4, "y"))


def test_searches_beside_writers_see_whole_snapshots() -> None:
    vectors, ids = unit(4000, 16, "threads"), np.arange(1, 4001)
    index, wrong = VectorIndex(16, 256), []
    index.append(ids[:1000], vectors[:1000])
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            found, scores = index.search(vectors[0], 20)
            exact = (vectors[found - 1].astype(np.float64) @ vectors[0].astype(np.float64)).astype(np.float32)
            if len(set(found.tolist())) != 20 or not np.allclose(scores, exact, atol=1e-6):
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for first in range(1000, 4000, 50):
        index.append(ids[first : first + 50], vectors[first : first + 50])
        index.remove(ids[first - 900 : first - 870])
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
