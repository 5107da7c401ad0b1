"""Session ids in the forms in which agents send them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.datastructures import Headers

from prefill_serve.gateway.session_ids import session_id

UUID = "0b2a4c1e-7d5f-4a51-9a3e-6f1f6f0c9d11"
USER = f"user_{'ab' * 32}_account_{UUID[::-1]}_session_{UUID}"


@pytest.mark.parametrize(
    "name",
    [
        "x-session-id",
        "X-Claude-Code-Session-Id",
        "session-id",
        "session_id",
        "x-opencode-session",
        "x-session-affinity",
        "X-Task-ID",
        "X-Roo-Task-ID",
        "X-KiloCode-TaskId",
        "X-Client-Session-Id",
    ],
)
def test_agents_name_their_session_in_a_header(name: str) -> None:
    assert session_id(Headers({name: UUID}), {}) == UUID


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"session_id": UUID}, UUID),
        ({"user_id": USER}, UUID),
        ({"user_id": json.dumps({"device_id": "d", "account_uuid": "", "session_id": UUID})}, UUID),
        ({"user_id": "user-17"}, None),
        ({"user_id": '{"session_id": 5}'}, None),
        ({"user_id": None, "session_id": 5}, None),
        ({"user_id": "half \ud83d"}, None),
        ({}, None),
        ("text", None),
        (None, None),
    ],
)
def test_metadata_names_a_session_but_a_user_is_none(metadata: Any, expected: str | None) -> None:
    assert session_id(Headers(), {"metadata": metadata}) == expected


def test_a_header_comes_before_metadata_and_ours_before_others() -> None:
    body = {"metadata": {"session_id": "in the body"}}
    assert session_id(Headers({"x-task-id": "task"}), body) == "task"
    assert session_id(Headers({"x-task-id": "task", "x-session-id": "ours"}), body) == "ours"
    assert session_id(Headers({"x-session-id": " "}), body) == "in the body"


@pytest.mark.parametrize("agent", ["x-claude-code-agent-id", "thread-id"])
def test_agents_of_one_session_are_told_apart_by_their_ids(agent: str) -> None:
    session = {"session-id": UUID}
    found = {session_id(Headers(session | of_agent), {}) for of_agent in ({agent: "a"}, {agent: "b"}, {})}
    assert len(found) == 3


def test_an_agents_id_alone_is_no_session() -> None:
    assert session_id(Headers({"thread-id": "a"}), {"prompt_cache_key": "app"}) is None
