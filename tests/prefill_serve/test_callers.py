"""Callers with their own keys: only administrators see what other callers do."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from pydantic import ValidationError

from gateway import Gateway, write_pool
from prefill_router.corpus.reader import content_hash
from prefill_serve.gateway.state import call_ledger as module
from prefill_serve.settings import Settings
from served import Api
from upstream import Upstream

KEYS = {name: f"sha256:{hashlib.sha256(name.encode()).hexdigest()}" for name in ("ann", "bob", "ops")}
CLOSED: dict[str, Any] = {"open": False, "keys": KEYS, "admins": ["ops"]}
ASKED = "what is one plus two"


def by(name: str, **headers: str) -> dict[str, dict[str, str]]:
    """Request options of a caller, whose key is its name."""
    return {"headers": {"authorization": f"Bearer {name}", **{key.replace("_", "-"): v for key, v in headers.items()}}}


@pytest.fixture
def closed(api: Api, router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """An endpoint with keys and feedback."""
    monkeypatch.setattr(module, "_POLL_S", 0.05)
    api.configure(router=router, **CLOSED)
    api.keep(folder=str(tmp_path / "kept"))
    yield api
    api.keep()


# --- request ids and feedback --------------------------------------------------------------------------------------


def test_callers_with_one_request_id_give_feedback_on_their_own_requests(closed: Api, tmp_path: Path) -> None:
    for name, prompt in (("ann", "what is one"), ("bob", "what is two")):
        closed.post({"prompt": prompt}, **by(name, x_request_id="same")).raise_for_status()
    closed.settle()
    for name, is_right in (("ann", True), ("bob", False)):
        given = closed.post({"request_id": "same", "correct": is_right}, "/v1/feedback", **by(name))
        assert given.json() == {"request_id": "same", "is_new": True}
    with duckdb.connect() as db:
        rows = db.execute(f"select caller, request_id, prompt_id, correct from '{tmp_path}/kept/outcomes/*.parquet'")
        assert sorted(rows.fetchall()) == [
            ("ann", "same", content_hash("what is one"), 1.0),
            ("bob", "same", content_hash("what is two"), 0.0),
        ]


def test_feedback_on_another_callers_request_is_answered_as_on_none(closed: Api) -> None:
    """For any guess, whether or not the request exists or already has feedback."""
    for request_id in ("judged", "not-judged"):
        closed.post({"prompt": ASKED}, **by("ann", x_request_id=request_id)).raise_for_status()
    closed.settle()
    closed.post({"request_id": "judged", "correct": True}, "/v1/feedback", **by("ann")).raise_for_status()
    answers = set()
    for request_id in ("judged", "not-judged", "of-nobody"):
        for guess in (True, False):
            for name in ("bob", "ops"):
                answer = closed.post({"request_id": request_id, "correct": guess}, "/v1/feedback", **by(name))
                answers.add((answer.status_code, answer.text.replace(request_id, "ID")))
    ((status, text),) = answers
    assert status == 404
    assert "request_not_found" in text


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_no_caller_learns_that_another_has_asked_the_same_prompt(closed: Api) -> None:
    def metadata(name: str) -> Any:
        return closed.post({"prompt": "name the river of the old town"}, **by(name)).json()["metadata"]

    assert not metadata("ann")["is_cached"]
    of_bob = metadata("bob")
    assert not of_bob["is_cached"]
    assert of_bob["timings_ms"]["tokenize"] > 0.0  # encoded again, so that timing reveals nothing
    assert metadata("ann")["is_cached"]
    assert metadata("bob")["is_cached"]


# --- figures and state -----------------------------------------------------------------------------------------------


def test_a_caller_sees_own_figures_and_an_administrator_those_of_all(closed: Api) -> None:
    def figures(name: str) -> tuple[int, int]:
        stats = closed.client.get("/v1/stats", **by(name)).raise_for_status().json()
        return stats["calls"], stats["feedback"]

    before = {name: figures(name) for name in KEYS}
    for name in ("ann", "ann", "bob"):
        asked = closed.post({"prompt": ASKED}, **by(name)).json()
        closed.settle()
        given = {"request_id": asked["request_id"], "correct": True}
        closed.post(given, "/v1/feedback", **by(name)).raise_for_status()
    grown = {name: tuple(now - was for now, was in zip(figures(name), before[name], strict=True)) for name in KEYS}
    assert grown == {"ann": (2, 2), "bob": (1, 1), "ops": (3, 3)}


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_tell_nothing_of_what_serves(closed: Api, tmp_path: Path, path: str) -> None:
    with pytest.raises(Exception, match="no router found"):
        closed.configure(router=str(tmp_path / "secret"), **CLOSED)
    for options in ({}, by("ann"), by("ops")):
        assert closed.client.get(path, **options).raise_for_status().json() == {"status": "ok"}


def test_what_serves_is_told_to_administrators(closed: Api, router: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no router found"):
        closed.configure(router=str(tmp_path / "secret"), **CLOSED)
    assert closed.client.get("/v1/status").status_code == 401
    refused = closed.client.get("/v1/status", **by("ann"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_admin")
    assert "secret" not in refused.text
    told = closed.client.get("/v1/status", **by("ops")).raise_for_status().json()
    assert "no router found" in told["refused"]
    assert told["targets"] == ["big", "small"]


def test_administrators_are_among_those_with_keys(router: str) -> None:
    for bad in ({**CLOSED, "admins": ["eve"]}, {"open": True, "admins": ["ops"]}):
        with pytest.raises(ValidationError, match="admins"):
            Settings.model_validate({"router": router, **bad})


# --- conversations ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upstreams() -> Iterator[dict[str, Upstream]]:
    with Upstream("big", models=("big-1",)) as big, Upstream("small", models=("small-1",)) as small:
        yield {"big": big, "small": small}


@pytest.fixture(scope="module")
def gateway(router: str, upstreams: dict[str, Upstream], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    pool = write_pool(tmp_path_factory.mktemp("callers") / "pool.toml", upstreams)
    with Gateway(router=router, pool=pool, **CLOSED) as gateway:
        yield gateway


def test_no_caller_goes_on_from_another_callers_answer(
    gateway: Gateway, upstreams: dict[str, Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstreams store all callers' answers under one key, and would continue any."""
    monkeypatch.setattr(module, "_POLL_S", 0.05)
    first = gateway.post("/v1/responses", {"input": ASKED, "models": ["big"]}, **by("ann")).raise_for_status().json()
    refusals = set()
    for body in ({"previous_response_id": first["id"]}, {"previous_response_id": "resp_of_nobody"}):
        for model in ("auto", "big"):
            for stream in (False, True):
                call = {"input": "repeat it", "model": model, "stream": stream, **body}
                answer = gateway.post("/v1/responses", call, **by("bob"))
                refusals.add((answer.status_code, answer.text.replace(body["previous_response_id"], "ID")))
    ((status, text),) = refusals
    assert status == 404
    assert "response_not_found" in text
    assert all("repeat it" not in str(call.body) for upstream in upstreams.values() for call in upstream.completions)


@pytest.mark.parametrize("model", ["auto", "small"])
def test_a_caller_goes_on_from_an_answer_at_once(gateway: Gateway, model: str) -> None:
    """Although the answer is recorded only after it was sent."""
    answer_id = None
    for turn in range(5):
        body = {"input": f"{turn} {ASKED}", "model": model, "previous_response_id": answer_id}
        answer_id = gateway.post("/v1/responses", body, **by("ann")).raise_for_status().json()["id"]


@pytest.mark.slow("two more endpoints, one after the other; state/test_call_ledger.py tests what a ledger reads again")
def test_an_answer_is_known_after_a_restart(gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path) -> None:
    settings = gateway.settings.model_dump() | {"gateway": {"ledger": {"folder": str(tmp_path)}}}
    with Gateway(**settings) as before:
        first = before.post("/v1/responses", {"input": ASKED, "models": ["small"]}, **by("ann")).json()
    body = {"input": "and then", "previous_response_id": first["id"]}
    with Gateway(**settings) as after:
        answer = after.post("/v1/responses", body, **by("ann")).raise_for_status()
        assert answer.headers["x-router-selected-model"] == "small"
        assert after.post("/v1/responses", body, **by("bob")).status_code == 404


def test_one_session_id_of_two_callers_is_two_conversations(gateway: Gateway) -> None:
    for name, target in (("ann", "big"), ("bob", "small")):
        body = {"messages": [{"role": "user", "content": ASKED}], "models": [target]}
        gateway.post("/v1/chat/completions", body, **by(name, x_session_id="s-1")).raise_for_status()
    deadline = time.monotonic() + 30.0
    while gateway.http.get("/v1/stats", **by("ops")).json()["answered"] < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    gateway.configure(gateway={"stick_margin": 1.0})
    for name, target in (("ann", "big"), ("bob", "small")):
        body = {"messages": [{"role": "user", "content": ASKED}]}
        answer = gateway.post("/v1/chat/completions", body, **by(name, x_session_id="s-1"))
        assert answer.headers["x-router-selected-model"] == target
