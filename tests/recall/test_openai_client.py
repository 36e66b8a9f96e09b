"""The client of OpenAI-compatible endpoints, against scripted answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from remanence.errors import Mistake
from remanence.recall.openai_client import OpenAIClient, clean_address, key_for, split_endpoint

KEY = "sk-very-secret-0123456789"
URL = "http://model.test/v1"


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REMANENCE_UPSTREAM_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def client(answer: Callable[[httpx.Request], httpx.Response], waits: list[float] | None = None, **options: Any) -> OpenAIClient:
    pauses = [] if waits is None else waits
    return OpenAIClient(URL, KEY, transport=httpx.MockTransport(answer), wait=pauses.append, **options)


def reply(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def test_a_completion_sends_key_model_and_options_and_returns_the_text() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=reply("good morning"))

    assert client(answer).complete([{"role": "user", "content": "hello"}], model="m", temperature=0) == "good morning"
    assert str(seen[0].url) == URL + "/chat/completions"
    assert seen[0].headers["authorization"] == f"Bearer {KEY}"
    sent = json.loads(seen[0].content)
    assert sent == {"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "stream": False}


def test_half_a_surrogate_pair_is_sent_like_any_text() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=reply(str(len(json.loads(request.content)["messages"][0]["content"]))))

    assert client(answer).complete([{"role": "user", "content": "a\ud83d"}], model="m") == "2"


def test_vectors_come_in_the_order_of_the_texts_and_in_batches() -> None:
    sizes: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["input"]
        sizes.append(len(texts))
        rows = [{"index": number, "embedding": [float(text), 1.0]} for number, text in enumerate(texts)]
        return httpx.Response(200, json={"data": rows[::-1]})

    vectors = client(answer).embed([str(number) for number in range(5)], model="m", batch=2)
    assert sizes == [2, 2, 1]
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[float(number), 1.0] for number in range(5)]
    assert client(answer).embed([], model="m").shape == (0, 0)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        [{"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": ["secret"]}, {"index": 1, "embedding": ["x"]}],
        [{"index": 0, "embedding": 1.0}, {"index": 1, "embedding": 2.0}],
        ["x", "y"],
    ],
)
def test_vectors_that_are_not_one_row_per_text_are_refused(data: Any) -> None:
    with pytest.raises(Mistake, match="vector"):
        client(lambda request: httpx.Response(200, json={"data": data})).embed(["one", "two"], model="m")


def test_a_stream_yields_each_chunk_until_done() -> None:
    body = b': comment\n\ndata: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n'
    assert [chunk["n"] for chunk in client(lambda request: httpx.Response(200, content=body)).stream({"model": "m"})] == [1, 2]


class Dying(httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield b'data: {"n": 1}\n\n'
        raise httpx.ReadError("gone")


@pytest.mark.parametrize("stream", [Dying(), httpx.ByteStream(b'data: {"n": 1}\n\n')])
def test_a_stream_that_breaks_off_says_so(stream: Any) -> None:
    chunks = client(lambda request: httpx.Response(200, stream=stream)).stream({"model": "m"})
    assert next(chunks) == {"n": 1}
    with pytest.raises(Mistake, match="broke off|ended before"):
        next(chunks)


def test_busy_endpoints_and_failed_connections_are_tried_again_as_long_as_they_ask() -> None:
    waits: list[float] = []
    script: Iterator[httpx.Response | Exception] = iter(
        [
            httpx.ConnectError("down"),
            httpx.Response(429, headers={"retry-after": "7"}),
            httpx.Response(503),
            httpx.Response(200, json=reply("up")),
        ]
    )

    def answer(request: httpx.Request) -> httpx.Response:
        step = next(script)
        if isinstance(step, Exception):
            raise step
        return step

    assert client(answer, waits).complete([], model="m") == "up"
    assert waits == [0.5, 7.0, 2.0]


@pytest.mark.parametrize(("status", "calls"), [(401, 1), (404, 1), (400, 1), (500, 3), (429, 3)])
def test_a_refusal_names_status_and_code_and_never_key_or_text(status: int, calls: int) -> None:
    seen: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(1)
        return httpx.Response(status, json={"error": {"message": f"bad key {KEY} for: my secret text", "code": "some_code"}})

    with pytest.raises(Mistake) as raised:
        client(answer, retries=2).complete([{"role": "user", "content": "my secret text"}], model="m")
    assert len(seen) == calls
    assert str(status) in str(raised.value)
    assert "some_code" in str(raised.value)
    assert KEY not in str(raised.value)
    assert "secret text" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_an_endpoint_that_is_not_there_is_a_sentence_without_the_key() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError(f"no route, {KEY}")

    with pytest.raises(Mistake, match="cannot be reached") as raised:
        client(answer).complete([], model="m")
    assert KEY not in str(raised.value)
    assert KEY not in repr(client(answer))


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"null", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}'])
def test_an_answer_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(Mistake, match="endpoint's answer"):
        client(lambda request: httpx.Response(200, content=body)).complete([], model="m")


def test_a_redirect_is_not_followed_with_the_key() -> None:
    with pytest.raises(Mistake, match="307"):
        client(lambda request: httpx.Response(307, headers={"location": "http://elsewhere.test"})).complete([], model="m")


def test_the_general_key_of_openai_goes_to_openai_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-general")
    assert key_for("https://api.openai.com/v1") == "sk-general"
    assert key_for("https://api.openai.com.evil.test/v1") is None
    monkeypatch.setenv("REMANENCE_UPSTREAM_KEY", "sk-own")
    assert key_for("http://localhost/v1") == "sk-own"
    assert key_for("http://localhost/v1", "sk-given") == "sk-given"
    with pytest.raises(Mistake, match="no header"):
        key_for("http://localhost/v1", "two\nlines")


def test_endpoints_are_split_and_checked() -> None:
    assert split_endpoint("openai:llama3.2@http://localhost:11434/v1") == ("llama3.2", "http://localhost:11434/v1")
    assert split_endpoint("a@b@https://x.test/v1") == ("a@b", "https://x.test/v1")
    assert clean_address("http://localhost:1/v1/") == "http://localhost:1/v1"
    for wrong in ("llama", "openai:@http://x", "m@ftp://x"):
        with pytest.raises(Mistake):
            split_endpoint(wrong)
    for wrong in ("localhost", "ftp://x", "http://", "http://a:b@host/v1", "http://host/?key=1", "http://host:port/"):
        with pytest.raises(Mistake):
            clean_address(wrong)
