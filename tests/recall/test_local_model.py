"""The small upstream out of a Hugging Face model, by itself and behind the proxy."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from remanence.errors import Mistake
from remanence.models.load import save_model
from remanence.recall.embedders import load_embedder
from remanence.recall.generating import noisy, until
from remanence.recall.items import Selection
from remanence.recall.local_model import LocalModel
from remanence.recall.proxy import make_proxy
from remanence.recall.server import ServerSettings, make_app
from remanence.recall.service import Recall
from remanence.recall.sqlite_store import SqliteStore
from remanence.recall.tokenizers import load_tokenizer
from remanence.recall.upstream import Upstream, load_upstream
from scripted import listening
from toy import toy_lm, toy_tokenizer

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
KNOWN = [
    "the",
    "and",
    "to",
    "she",
    "he",
    "was",
    "it",
    "you",
    "are",
    "what",
    "in",
    "of",
    "said",
    "had",
    "ball",
    "big",
    "small",
    "very",
    "day",
    "with",
    "they",
    "her",
    "his",
    "that",
    "went",
    "play",
    "time",
    "lily",
    "mom",
]
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT


def toy(family: str = "llama", template: str | None = None) -> LocalModel:
    tokenizer = toy_tokenizer(99)
    tokenizer.chat_template = template
    return LocalModel(toy_lm(family, vocab=99), tokenizer, "toy")


def asked(text: str = "hi", **rest: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": [{"role": "user", "content": text}], "max_tokens": 12, **rest}


def ask(model: Upstream, body: Any, path: str = "chat/completions") -> tuple[int, list[bytes]]:
    async def run() -> tuple[int, list[bytes]]:
        answer = await model.open("POST", path, json.dumps(body).encode(), {})
        return answer.status, [piece async for piece in answer.pieces]

    return asyncio.run(run())


def whole(model: Upstream, body: Any) -> dict[str, Any]:
    status, pieces = ask(model, body)
    assert status == 200
    return json.loads(b"".join(pieces))


def streamed(model: Upstream, body: Any) -> list[dict[str, Any]]:
    status, pieces = ask(model, {**body, "stream": True})
    assert status == 200
    assert pieces[-1] == b"data: [DONE]\n\n"
    return [json.loads(piece.removeprefix(b"data: ")) for piece in pieces[:-1]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("template", [None, CHAT])
def test_an_answer_is_the_same_whole_and_in_pieces_and_the_models_own(family: str, template: str | None) -> None:
    model = toy(family, template)
    text = whole(model, asked())["choices"][0]["message"]["content"]
    pieces = streamed(model, asked())
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == text
    ids = model.tokenizer("<user>hi\n<assistant>" if template else "user: hi\nassistant:", return_tensors="pt")["input_ids"]
    for _ in range(12):  # the slow way: the likeliest token, one after the other
        token = model.model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
        if int(token) == model.tokenizer.eos_token_id:
            break
    slow = model.tokenizer.decode(ids[0], skip_special_tokens=True).partition("assistant>" if template else "assistant:")[2]
    assert text == (slow if template else slow.lstrip())


def test_tokens_are_counted_and_the_end_has_its_reason() -> None:
    answer = whole(toy(), asked(max_tokens=5))
    assert answer["usage"] == {"prompt_tokens": 19, "completion_tokens": 5, "total_tokens": 24}
    assert answer["choices"][0]["finish_reason"] == "length"
    *_, last, usage = streamed(toy(), asked(max_tokens=5, stream_options={"include_usage": True}))
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == answer["usage"]


def test_a_stop_word_ends_the_answer_before_itself() -> None:
    model = toy()
    text = whole(model, asked(max_tokens=40))["choices"][0]["message"]["content"]
    stop = text[6:8]
    answer = whole(model, asked(max_tokens=40, stop=["never", stop]))
    assert answer["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_what_may_begin_a_stop_word_is_held_back() -> None:
    halted: list[int] = []
    assert list(until(["a\n", "us", "e", " x\nuser", ": b"], ["\nuser:"], lambda: halted.append(1))) == ["a", "", "", "\nuse x", ""]
    assert halted == [1]
    assert "".join(until(["ab", "\nus"], ["\nuser:"], lambda: None)) == "ab\nus"


def test_draws_follow_the_softened_distribution_and_their_seed() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    noise = torch.Generator().manual_seed(0)
    drawn = torch.stack([noisy(logits, 2.0, 1.0, noise).argmax() for _ in range(4000)])
    frequencies = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(frequencies, (logits[0] / 2).softmax(0), atol=0.03, rtol=0)
    kept = {int(noisy(logits, 2.0, 0.5, noise).argmax()) for _ in range(200)}  # p = .51, .31, .19: the first alone reaches a half
    assert kept == {2}
    model = toy()
    first, again, other = (whole(model, asked(temperature=1.0, seed=seed))["choices"] for seed in (1, 1, 2))
    assert first == again != other
    before = torch.random.get_rng_state()
    whole(model, asked(temperature=1.0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_template_without_system_messages_gets_them_with_the_first_turn() -> None:
    messages = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": "hi"}]
    assert toy(template=STRICT).prompt(messages) == "<user>Be short.\n\nhi\n<assistant>"
    assert toy(template=CHAT).prompt(messages) == "<system>Be short.\n<user>hi\n<assistant>"
    with pytest.raises(Mistake, match="template"):
        toy(template="{{ raise_exception('never') }}").prompt(messages)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (asked("x" * 500), "context_length_exceeded"),
        ([], "invalid_request"),
        ({"messages": []}, "invalid_request"),
        ({"messages": [{"content": "x"}]}, "invalid_request"),
        (asked(n=2), "invalid_request"),
        (asked(max_tokens="many"), "invalid_request"),
        (asked(max_tokens=-1), "invalid_request"),
        (asked(temperature="hot"), "invalid_request"),
        (asked(temperature=-1), "invalid_request"),
        (asked(top_p=2), "invalid_request"),
        (asked(seed="x"), "invalid_request"),
    ],
)
def test_what_cannot_be_done_is_refused_as_an_endpoint_would(body: Any, code: str) -> None:
    status, pieces = ask(toy(), body)
    assert status == 400
    assert json.loads(pieces[0])["error"]["code"] == code


def test_a_model_that_fails_is_no_endless_wait() -> None:
    model = toy()
    model.model.generate = None
    with pytest.raises(Exception, match="TypeError"):
        ask(model, asked())


def test_who_goes_away_frees_the_model_for_the_next() -> None:
    model = toy()

    async def run() -> int:
        first = await model.open("POST", "chat/completions", json.dumps(asked(max_tokens=110, stream=True)).encode(), {})
        pieces = aiter(first.pieces)
        await anext(pieces)
        await anext(pieces)
        second = await model.open("POST", "chat/completions", json.dumps(asked(max_tokens=2)).encode(), {})
        await first.close()
        return len([piece async for piece in second.pieces])

    assert asyncio.run(run()) == 1


def test_a_folder_is_an_upstream_and_lists_itself(tmp_path: Path) -> None:
    save_model(toy_lm("llama", vocab=99), toy_tokenizer(99), tmp_path / "toy")
    model = load_upstream(f"hf:{tmp_path / 'toy'}")
    assert json.loads(ask(model, None, "models")[1][0])["data"][0]["id"] == str(tmp_path / "toy")
    assert ask(model, None, "embeddings")[0] == 404
    assert whole(model, asked())["object"] == "chat.completion"
    with pytest.raises(Mistake):
        load_upstream(f"hf:{tmp_path / 'nothing'}")


def test_a_real_model_tells_a_story_behind_the_proxy(tmp_path: Path, real_data: Path) -> None:
    embedder = load_embedder("hashing:64")
    store = SqliteStore(tmp_path / "store", embedder=embedder.name, dim=embedder.dim)
    recall = Recall(store, embedder, tokenizer=load_tokenizer("plain"))
    recall.add("Lily has a red ball.", conversation="old")
    router = make_proxy(recall, load_upstream(f"hf:{real_data / 'stories260k'}"), budget=150)
    body = {"model": "m", "messages": [{"role": "user", "content": "Once upon a time, Lily had a"}], "max_tokens": 40, "stream": True}
    with listening(make_app(recall, ServerSettings(), routers=[router])) as own:
        with httpx.stream("POST", f"{own}/v1/chat/completions", json=body, timeout=60) as answer:
            assert answer.headers["x-remanence-used"] == "1"
            pieces = list(answer.iter_raw())
        off = httpx.post(f"{own}/v1/chat/completions", json={**body, "stream": False, "remanence": {"memory": "off"}}, timeout=60)
    assert len(pieces) > 5
    assert pieces[-1].endswith(b"data: [DONE]\n\n")
    user, reply = store.messages(Selection(conversation="default"))
    assert (user.role, reply.role) == ("user", "assistant")
    for text in (reply.text, off.json()["choices"][0]["message"]["content"]):
        words = [word.strip('.,!?"') for word in text.lower().split()]
        assert sum(len(word) > 1 and word in KNOWN for word in words) >= 3, text
    assert reply.text != off.json()["choices"][0]["message"]["content"]  # what it was told changes what it says
    recall.close()
