"""The server lets in who may come, serves every route of the memory, and answers whatever is asked with a sentence and no 5xx."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import socket
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.testclient import TestClient

from remanence.errors import Mistake
from remanence.recall.access import Buckets, Keys, loopback
from remanence.recall.items import Selection
from remanence.recall.server import ServerSettings, make_app, serve
from remanence.recall.service import Recall

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.odd_requests import HOSTILE, odd_request
from benchmarks.serving import Serving, start


@dataclasses.dataclass
class Served:
    recall: Recall
    settings: ServerSettings
    app: FastAPI
    keys: dict[str, str]

    def client(self, who: str | None = "all", **options) -> TestClient:
        headers = {"authorization": f"Bearer {self.keys[who]}"} if who else {}
        return TestClient(self.app, headers=headers, **options)


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("REMANENCE_KEY", str(tmp_path / "no-key.pem"))
    recall = Recall.open(tmp_path / "memory", embedder="hashing")
    settings = ServerSettings(keys=tmp_path / "access.json", rate=0)
    keys = {"all": Keys(settings.keys).make("all"), "ours": Keys(settings.keys).make("ours", ["ours"])}
    yield Served(recall, settings, make_app(recall, settings), keys)
    recall.close()


@pytest.fixture
def ask(served):
    return served.client()


def say(ask, text, space="ours", **rest):
    answer = ask.post(f"/v1/spaces/{space}/messages", json={"text": text, **rest})
    assert answer.status_code == 201, answer.text
    return answer.json()


# Who is let in.


def test_key_is_kept_as_a_hash_in_a_file_of_its_owner(served):
    held = served.settings.keys.read_text()
    assert served.keys["all"] not in held
    assert stat.S_IMODE(served.settings.keys.stat().st_mode) == 0o600


def test_no_route_but_the_page_answers_without_a_key(served):
    stranger = served.client(None)
    paths = stranger.get("/openapi.json").json()["paths"]
    assert len(paths) > 15
    for path, methods in paths.items():
        for method in methods:
            status = stranger.request(method, path.replace("{space}", "ours").replace("{number}", "1")).status_code
            assert status == (200 if path == "/health" else 401), path
    assert stranger.get("/v1/spaces", headers={"authorization": "Bearer rk_wrong"}).status_code in (401, 429)
    assert "text/html" in stranger.get("/").headers["content-type"]


def test_a_key_is_taken_from_either_header_and_never_from_the_address(served):
    key = served.keys["all"]
    stranger = served.client(None)
    assert stranger.get("/v1/spaces", headers={"x-api-key": key}).status_code == 200
    assert stranger.get("/v1/spaces", headers={"authorization": f"bearer {key}"}).status_code == 200
    assert stranger.get(f"/v1/spaces?key={key}").status_code == 401
    assert stranger.get("/v1/spaces", headers={"authorization": key}).status_code == 401


def test_a_revoked_key_is_refused_at_once(served):
    ours = served.client("ours")
    assert ours.get("/v1/spaces").status_code == 200
    Keys(served.settings.keys).revoke("ours")
    assert ours.get("/v1/spaces").status_code == 401
    with pytest.raises(Mistake, match="has no key named"):
        Keys(served.settings.keys).revoke("ours")


def test_every_key_is_compared_in_constant_time(served, monkeypatch):
    from remanence.recall import access

    compared = []
    real = access.hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    assert Keys(served.settings.keys).find(served.keys["all"]).name == "all"
    assert len(compared) == 2


def test_a_broken_file_of_keys_is_a_sentence(tmp_path):
    (tmp_path / "access.json").write_text("{")
    with pytest.raises(Mistake, match="is no file of keys"):
        Keys(tmp_path / "access.json").all()


def test_tenants_never_see_each_other(served, ask):
    theirs = say(ask, "The launch is on Friday", space="theirs", person="bo")
    say(ask, "Ours", space="ours")
    ask.post("/v1/spaces/theirs/facts", json={"text": "secret fact"})
    ours = served.client("ours")
    assert [one["name"] for one in ours.get("/v1/spaces").json()] == ["ours"]
    there, nowhere = (
        [
            ours.get(f"/v1/spaces/{space}/messages"),
            ours.get(f"/v1/spaces/{space}/messages/{theirs['id']}"),
            ours.put(f"/v1/spaces/{space}/messages/{theirs['id']}", json={"text": "x"}),
            ours.delete(f"/v1/spaces/{space}/messages/{theirs['id']}"),
            ours.post(f"/v1/spaces/{space}/messages", json={"text": "x"}),
            ours.post(f"/v1/spaces/{space}/search", json={"query": "launch"}),
            ours.post(f"/v1/spaces/{space}/prompt", json={"user": "launch"}),
            ours.get(f"/v1/spaces/{space}/export"),
            ours.get(f"/v1/spaces/{space}/facts"),
            ours.get(f"/v1/spaces/{space}/gist?conversation=default"),
            ours.post(f"/v1/spaces/{space}/forget/preview", json={}),
            ours.put(f"/v1/spaces/{space}", json={}),
        ]
        for space in ("theirs", "nowhere")
    )
    for one, other in zip(there, nowhere):
        assert one.status_code == 404
        assert one.text == other.text  # not even whether it exists
    # by an id of another space
    assert ours.get(f"/v1/spaces/ours/messages/{theirs['id']}").status_code == 404
    assert ours.delete(f"/v1/spaces/ours/messages/{theirs['id']}").status_code == 404
    assert ours.put(f"/v1/spaces/ours/messages/{theirs['id']}", json={"text": "x"}).status_code == 404
    assert ours.post("/v1/spaces/ours/search", json={"query": "launch", "ids": [theirs["id"]]}).json() == []
    answer = ours.post("/v1/spaces/ours/facts", json={"text": "f", "sources": [theirs["id"]]})
    assert answer.status_code == 400
    # above spaces
    for path, body in (("/v1/forget/preview", {"person": "bo"}), ("/v1/forget", {"person": "bo", "confirm": "0" * 64})):
        assert ours.post(path, json=body).status_code == 403
    assert [ours.get(path).status_code for path in ("/v1/stats", "/v1/log", "/v1/receipts")] == [403] * 3
    assert ask.get(f"/v1/spaces/theirs/messages/{theirs['id']}").json()["text"] == "The launch is on Friday"


def test_without_keys_only_this_machine_is_answered(served):
    app = make_app(served.recall, ServerSettings(keys=None))
    local = TestClient(app, base_url="http://127.0.0.1:8765")
    assert local.get("/v1/spaces").status_code == 200
    assert TestClient(app, base_url="http://evil.example").get("/v1/spaces").status_code == 403  # a rebound name
    assert local.post("/v1/spaces/ours/messages", json={"text": "x"}, headers={"origin": "https://evil.example"}).status_code == 403
    assert local.get("/v1/spaces", headers={"origin": "http://localhost:8765"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:80", True),
        ("localhost:1", True),
        ("[::1]:9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:80", False),
        ("", False),
        ("::", False),
    ],
)
def test_loopback_is_known(host, ours):
    assert loopback(host) is ours


def test_rates_are_limited_per_key(served):
    app = make_app(served.recall, dataclasses.replace(served.settings, rate=1, burst=5))
    one = TestClient(app, headers={"authorization": f"Bearer {served.keys['all']}"})
    other = TestClient(app, headers={"authorization": f"Bearer {served.keys['ours']}"})
    statuses = [one.get("/v1/spaces").status_code for _ in range(8)]
    assert statuses[:5] == [200] * 5
    assert statuses[-1] == 429
    assert int(one.get("/v1/spaces").headers["retry-after"]) >= 1
    assert other.get("/v1/spaces").status_code == 200


def test_buckets_fill_again_and_forget_the_longest_unseen():
    buckets = Buckets(rate=2, burst=3, most=2)
    assert [buckets.wait("a", 0.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.wait("a", 0.5) == 0  # one token in half a second
    assert buckets.wait("a", 0.5) == 0.5
    buckets.wait("b", 1.0)
    buckets.wait("c", 1.0)
    assert len(buckets._held) == 2


def test_guessing_keys_is_slowed_and_those_who_have_one_are_not(served):
    app = make_app(served.recall, dataclasses.replace(served.settings, rate=100))
    stranger = TestClient(app)
    assert {stranger.get("/v1/spaces").status_code for _ in range(40)} == {401, 429}
    assert TestClient(app, headers={"authorization": f"Bearer {served.keys['all']}"}).get("/v1/spaces").status_code == 200


def test_bodies_are_limited_whatever_their_header_says(served):
    app = make_app(served.recall, dataclasses.replace(served.settings, body_limit=2048))
    ask = TestClient(app, headers={"authorization": f"Bearer {served.keys['all']}", "content-type": "application/json"})
    assert ask.post("/v1/spaces/ours/messages", json={"text": "x" * 3000}).status_code == 413
    pieces = (b'{"text": "', *[b"x" * 500] * 10, b'"}')  # chunked: no length is told
    assert ask.post("/v1/spaces/ours/messages", content=iter(pieces)).status_code == 413
    assert ask.post("/v1/spaces/ours/messages", content=b"{}", headers={"content-length": "9" * 30}).status_code == 413
    assert ask.post("/v1/spaces/ours/messages", json={"text": "x" * 1000}).status_code == 201


def test_no_key_and_no_text_in_any_log_line(served, ask, caplog):
    caplog.set_level(logging.DEBUG)
    say(ask, "my secret is marmalade", person="zoe")
    ask.get("/v1/spaces/ours/messages", params={"contains": "marmalade", "person": "zoe"})
    ask.post("/v1/spaces/ours/search", json={"query": "marmalade"})
    ask.post("/v1/spaces/ours/messages", json={"text": "marmalade", "role": "marmalade"})
    served.client(None).get("/v1/spaces/ours/messages?contains=marmalade", headers={"authorization": "Bearer rk_marmalade"})
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith(("remanence", "uvicorn")))
    assert "POST /v1/spaces/{space}/messages 201" in ours
    for word in ("marmalade", "zoe", served.keys["all"], "rk_"):
        assert word not in ours


def test_a_failure_inside_is_one_sentence_without_its_words(served, ask, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("marmalade")

    monkeypatch.setattr(served.recall, "search", broken)
    answer = ask.post("/v1/spaces/ours/search", json={"query": "x"})
    assert answer.status_code == 404  # there is no such space yet
    say(ask, "x")
    answer = ask.post("/v1/spaces/ours/search", json={"query": "x"})
    assert answer.status_code == 500
    assert answer.json()["error"]["problem"] == "the server failed (RuntimeError)"
    assert "marmalade" not in answer.text + caplog.text


def test_errors_never_give_the_input_back(ask):
    answer = ask.post("/v1/spaces/ours/messages", json={"text": "x", "role": "marmalade"})
    assert answer.status_code == 422
    assert "marmalade" not in answer.text


def test_answers_carry_a_strict_policy_and_are_not_kept(ask):
    answer = ask.get("/v1/spaces")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_openapi_page_says_how_to_sign_in_and_documents_every_route(ask):
    told = ask.get("/openapi.json").json()
    assert "HTTPBearer" in told["components"]["securitySchemes"]
    for path, methods in told["paths"].items():
        for method, route in methods.items():
            assert route["description"], (method, path)
            assert path == "/health" or route["security"] == [{"HTTPBearer": []}]


# What it serves.


def test_a_message_comes_back_as_it_was_said(ask):
    for text in HOSTILE:
        made = say(ask, text, conversation="odd", person="O'Brien", meta={"n": [1, {"a": None}]})
        assert made["text"] == text
        assert ask.get(f"/v1/spaces/ours/messages/{made['id']}").json() == made
    listed = ask.get("/v1/spaces/ours/messages", params={"conversation": "odd"}).json()
    assert [one["text"] for one in listed] == list(HOSTILE)
    assert [one["turn"] for one in listed] == list(range(1, len(HOSTILE) + 1))


def test_injection_strings_never_leave_their_place(ask):
    say(ask, "A quiet sentence about harbours")
    for text in HOSTILE:
        assert ask.post(
            "/v1/spaces/ours/search", json={"query": text, "conversation": text.strip() if text.isprintable() else "c"}
        ).status_code in (200, 422)
        assert ask.get("/v1/spaces/ours/messages", params={"contains": text}).json() == []
        prompt = ask.post("/v1/spaces/ours/prompt", json={"user": text, "preview": True}).json()
        assert prompt["text"].count("<system>") == 0
    assert len(ask.get("/v1/spaces/ours/messages").json()) == 1


def test_a_key_of_the_client_stores_once(ask):
    first = say(ask, "once", key="k-1")
    again = say(ask, "once", key="k-1")
    assert again["id"] == first["id"]
    assert len(ask.get("/v1/spaces/ours/messages").json()) == 1


def test_pages_of_messages(ask):
    made = ask.post("/v1/spaces/ours/messages/batch", json={"conversation": "c", "messages": [{"text": f"m{n}"} for n in range(30)]}).json()
    assert [one["text"] for one in made] == [f"m{n}" for n in range(30)]
    page = ask.get("/v1/spaces/ours/messages", params={"after": made[9]["id"], "limit": 5}).json()
    assert [one["text"] for one in page] == [f"m{n}" for n in range(10, 15)]
    last = ask.get("/v1/spaces/ours/messages", params={"newest": True, "limit": 2, "conversation": "c", "last": 20}).json()
    assert [one["text"] for one in last] == ["m18", "m19"]
    assert ask.get("/v1/spaces/ours/messages", params={"first": 1}).status_code == 400  # turns of which conversation?
    assert ask.get("/v1/spaces/ours/conversations").json()[0]["messages"] == 30


def test_search_prompt_gist_facts_stats(ask):
    say(ask, "My sister Ana moved to Lisbon", person="eva")
    say(ask, "The weather is fine")
    hits = ask.post("/v1/spaces/ours/search", json={"query": "sister Ana Lisbon", "k": 1}).json()
    assert hits[0]["chunk"]["text"] == "My sister Ana moved to Lisbon"
    assert ask.post("/v1/spaces/ours/search", json={"query": "sister", "person": "nobody"}).json() == []
    prompt = ask.post("/v1/spaces/ours/prompt", json={"user": "Where does Ana live?", "system": "Be kind."}).json()
    assert prompt["parts"]["system"] == "Be kind."
    assert "Lisbon" in prompt["text"]
    refused = ask.post("/v1/spaces/ours/prompt", json={"user": "Where does Ana live?", "budget": 1})
    assert refused.status_code == 400
    assert set(refused.json()["error"]) == {"place", "problem", "remedy"}
    assert "Lisbon" in ask.get("/v1/spaces/ours/gist", params={"conversation": "default"}).json()["gist"]
    fact = ask.post("/v1/spaces/ours/facts", json={"text": "Ana lives in Lisbon", "sources": [1], "pinned": True}).json()
    assert ask.get("/v1/spaces/ours/facts", params={"pinned": True}).json() == [fact]
    assert ask.delete(f"/v1/spaces/ours/facts/{fact['id']}").status_code == 200
    assert ask.delete(f"/v1/spaces/ours/facts/{fact['id']}").status_code == 404
    assert ask.get("/v1/spaces/ours/stats").json()["messages"] == 2
    assert ask.get("/v1/stats").json()["spaces"] == 1


def test_export_is_what_import_takes(served, ask, tmp_path):
    for n in range(5):
        say(ask, f"line {n}\nnext", conversation="c")
    lines = ask.get("/v1/spaces/ours/export").text
    assert [json.loads(line)["message"]["text"] for line in lines.splitlines()] == [f"line {n}\nnext" for n in range(5)]
    (tmp_path / "out.jsonl").write_text(lines, encoding="utf-8")
    from remanence.recall.transfer import load

    assert load(served.recall, tmp_path / "out.jsonl", "copy") == 5


def test_an_export_that_is_refused_is_refused_before_it_begins(ask):
    say(ask, "something")
    answer = ask.get("/v1/spaces/ours/export", params={"first": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["problem"]


def test_forgetting_needs_a_preview_and_takes_what_it_showed(ask):
    for n in range(3):
        say(ask, f"from eva {n}", person="eva")
    say(ask, "from bo", person="bo")
    seen = ask.post("/v1/spaces/ours/forget/preview", json={"person": "eva"}).json()
    assert len(ask.get("/v1/spaces/ours/messages").json()) == 4  # a preview changes nothing
    assert ask.post("/v1/spaces/ours/forget", json={"person": "eva"}).status_code == 422
    assert ask.post("/v1/spaces/ours/forget", json={"person": "eva", "confirm": "0" * 64}).status_code == 409
    assert ask.post("/v1/spaces/ours/forget", json={"person": "bo", "confirm": seen["confirm"]}).status_code == 409
    say(ask, "from eva, later", person="eva")
    assert ask.post("/v1/spaces/ours/forget", json={**seen["selection"], "confirm": seen["confirm"]}).status_code == 409
    seen = ask.post("/v1/spaces/ours/forget/preview", json={"person": "eva"}).json()
    receipt = ask.post("/v1/spaces/ours/forget", json={**seen["selection"], "confirm": seen["confirm"], "reason": "asked"})
    assert receipt.status_code == 200, receipt.text
    assert [one["text"] for one in ask.get("/v1/spaces/ours/messages").json()] == ["from bo"]
    assert "from eva" not in receipt.text
    checked = ask.post("/v1/receipts/verify", json={"receipt": receipt.json()}).json()
    assert checked
    assert all(one["holds"] for one in checked), checked
    assert ask.get("/v1/log").json()
    assert [one["id"] for one in ask.get("/v1/receipts").json()] == [receipt.json()["id"]]


def test_a_person_is_forgotten_in_every_space(ask):
    say(ask, "one", space="a", person="eva")
    say(ask, "two", space="b", person="eva")
    say(ask, "three", space="b", person="bo")
    seen = ask.post("/v1/forget/preview", json={"person": "eva"}).json()
    assert ask.post("/v1/forget", json={**seen["selection"], "confirm": seen["confirm"]}).status_code == 200
    assert [one["text"] for space in "ab" for one in ask.get(f"/v1/spaces/{space}/messages").json()] == ["three"]


def test_forgetting_by_query_and_by_id_and_editing(ask):
    say(ask, "The passport number is 123")
    say(ask, "Nothing of the kind")
    third = say(ask, "A third thing")
    seen = ask.post("/v1/spaces/ours/forget/preview", json={"query": "passport number", "k": 1}).json()
    assert seen["selection"] == {"ids": [1]}
    assert ask.post("/v1/spaces/ours/forget", json={**seen["selection"], "confirm": seen["confirm"]}).status_code == 200
    edited = ask.put(f"/v1/spaces/ours/messages/{third['id']}", json={"text": "The third thing, corrected"}).json()
    assert edited["edited"]
    assert edited["text"] == "The third thing, corrected"
    assert ask.delete("/v1/spaces/ours/messages/2").status_code == 200
    assert [one["text"] for one in ask.get("/v1/spaces/ours/messages").json()] == ["The third thing, corrected"]
    assert ask.delete("/v1/spaces/ours/messages/2").status_code == 404


def test_a_receipt_that_is_none_is_told(ask):
    for receipt in ({}, {"kind": "deletion"}, {"signature": 3}, {"kind": ["x"], "format": None, "counts": "x"}):
        answer = ask.post("/v1/receipts/verify", json={"receipt": receipt})
        assert answer.status_code == 200
        assert not all(one["holds"] for one in answer.json())


def test_routers_and_mounts_stand_behind_the_guard(served):
    begun = []

    class Mounted(FastAPI):
        pass

    async def lifespan(app):
        begun.append("in")
        yield
        begun.append("out")

    import contextlib

    mounted = Mounted(lifespan=contextlib.asynccontextmanager(lifespan))

    @mounted.get("/who")
    def who(request: Request) -> str:
        return request.state.key.name

    router = APIRouter()

    @router.get("/v1/models")
    def models(request: Request) -> list[str]:
        return [request.state.key.name, type(request.app.state.recall).__name__]

    app = make_app(served.recall, served.settings, routers=[router], mounts={"/mcp": mounted})
    with TestClient(app, headers={"authorization": f"Bearer {served.keys['ours']}"}) as ask:
        assert ask.get("/v1/models").json() == ["ours", "Recall"]
        assert ask.get("/mcp/who").json() == "ours"
        assert ask.get("/mcp/who", headers={"authorization": "none"}).status_code == 401
    assert begun == ["in", "out"]


def test_many_threads_lose_and_double_nothing(ask):
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda n: say(ask, f"thread message {n}", conversation=f"c{n % 4}", key=f"k{n // 2}"), range(120)))
    assert len({one["id"] for one in made}) == 60  # each key twice
    listed = ask.get("/v1/spaces/ours/messages", params={"limit": 1000}).json()
    assert len(listed) == 60
    for name in range(4):
        turns = [one["turn"] for one in listed if one["conversation"] == f"c{name}"]
        assert turns == list(range(1, len(turns) + 1))


# Odd requests.


def test_odd_requests_are_answered_without_a_5xx(served, ask):
    say(ask, "something to find", person="eva")
    paths = [(method.upper(), path) for path, methods in ask.get("/openapi.json").json()["paths"].items() for method in methods]
    draw = np.random.default_rng(5)
    statuses: dict[int, int] = {}
    for _ in range(600):
        method, path, options = odd_request(draw, paths)
        answer = ask.request(method, path, **options)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (method, path, options, answer.text)
        assert "Traceback" not in answer.text
        if answer.status_code >= 400 and method != "HEAD":
            assert set(answer.json()["error"]) == {"place", "problem", "remedy"}
    assert statuses.get(200, 0) + statuses.get(201, 0) > 60, statuses  # and many of them are served


@pytest.mark.parametrize(
    "body",
    [
        {"text": ""},
        {"text": "  \n"},
        {"text": "\ud800"},
        {"text": "a\0b"},
        {"text": 5},
        {"text": "x" * 100_001},
        {"text": "x", "role": "root"},
        {"text": "x", "at": float("nan")},
        {"text": "x", "at": 1e300},
        {"text": "x", "meta": {"a": float("inf")}},
        {"text": "x", "meta": {"a": "y" * 20_000}},
        {"text": "x", "meta": [1]},
        {"text": "x", "turn": 0},
        {"text": "x", "turn": 2**63},
        {"text": "x", "person": "a\nb"},
        {"text": "x", "conversation": ""},
        {"text": "x", "conversation": "c" * 201},
        {"text": "x", "sender": "eva"},
        {},
        [],
        None,
    ],
)
def test_what_no_memory_can_hold_is_refused_with_a_sentence(ask, body):
    answer = ask.post("/v1/spaces/ours/messages", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]["problem"]
    assert ask.get("/v1/spaces").json() == []  # nothing was written, not even the space


# Starting and ending.


def test_another_host_is_refused_without_an_explicit_option(served):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(Mistake, match="would let other machines in"):
            serve(served.recall, host, 0, served.settings)
    with pytest.raises(Mistake, match="without a key"):
        serve(served.recall, "0.0.0.0", 0, ServerSettings(keys=None), network=True)


def test_a_taken_port_is_a_sentence(served):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Mistake, match="cannot be listened on"):
            serve(served.recall, "127.0.0.1", taken.getsockname()[1], served.settings)


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"rate": -1}, {"burst": 0}, {"body_limit": 0}, {"patience": -1}, {"rate": float("nan")}):
        with pytest.raises(Mistake, match="must be at least"):
            ServerSettings(**wrong)


def test_what_was_answered_is_there_after_any_end_and_the_key_is_printed_once(tmp_path):
    acknowledged: list[str] = []
    key = None
    for end in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        serving = start(tmp_path, key)
        key = serving.key

        def write(who: int, serving: Serving = serving, end: str = end.name) -> None:
            with serving.client() as ask:
                for n in range(10_000):
                    try:
                        answer = ask.post("/v1/spaces/ours/messages", json={"text": f"{end}-{who}-{n}", "conversation": str(who)})
                    except httpx.TransportError:
                        return
                    assert answer.status_code == 201
                    acknowledged.append(answer.json()["text"])

        with ThreadPoolExecutor(4) as pool:
            enough = len(acknowledged) + 30
            writers = [pool.submit(write, who) for who in range(4)]
            while len(acknowledged) < enough and not any(one.done() for one in writers):
                time.sleep(0.02)
            code = serving.end(end)
            assert all(one.exception() is None for one in writers)
        assert code == (0 if end != signal.SIGKILL else -end)
        assert (tmp_path / "said").read_text() == ""  # neither the key once more nor a traceback
    with Recall.open(tmp_path / "memory") as recall:
        held = [one.text for one in recall.messages(Selection(space="ours"))]
    assert set(acknowledged) <= set(held)
    assert len(held) == len(set(held))
