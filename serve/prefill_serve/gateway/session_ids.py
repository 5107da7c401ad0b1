"""Session ids: how agents and clients name the conversation that a request belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from prefill_serve.gateway.openai_calls import Body, json_object

# Ours and opencode's; Claude Code's; Codex's, twice; opencode's, twice; Cline's; Roo Code's; Kilo Code's; Copilot's
_SESSION_HEADERS = (
    "x-session-id",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "x-opencode-session",
    "x-session-affinity",
    "x-task-id",
    "x-roo-task-id",
    "x-kilocode-taskid",
    "x-client-session-id",
)
_AGENT_HEADERS = ("x-claude-code-agent-id", "thread-id")  # Claude Code, of sub-agents only; Codex, of each agent
_SESSION_OF_USER = re.compile(r"_session_(.+)$")  # older versions of Claude Code


def session_id(headers: Mapping[str, str], body: Body) -> str | None:
    """The id of a request's session, with that of the agent within it; None if neither headers nor metadata name one.

    `metadata.user_id` alone names a user: only a session within it counts. `prompt_cache_key` is no session id, since
    many conversations may share one.
    """
    given = dict(reversed([*headers.items()]))  # of a repeated header the first; a request's own search is slow
    session = _first(given.get(name) for name in _SESSION_HEADERS) or _session_of(body.get("metadata"))
    agent = _first(given.get(name) for name in _AGENT_HEADERS)
    return session if session is None or agent is None else f"{session}/{agent}"


def _session_of(metadata: Any) -> str | None:
    if not isinstance(metadata, dict):
        return None
    user = metadata.get("user_id")
    within = user if isinstance(user, str) else ""
    found = _SESSION_OF_USER.search(within)
    return _first(
        [
            metadata.get("session_id"),
            json_object(within.encode("utf-8", "replace")).get("session_id"),
            found and found[1],
        ]
    )


def _first(given: Iterable[Any]) -> str | None:
    return next((text for text in given if isinstance(text, str) and text.strip()), None)
