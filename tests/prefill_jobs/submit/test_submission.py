"""Ray's token in requests to a dashboard. e2e/test_submit.py submits jobs to a real cluster."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray._private import ray_constants

from command import Command
from prefill_jobs.cli import submit_commands
from prefill_jobs.submit import submission
from prefill_router.common.errors import UserError

TOKEN = "0123456789abcdef" * 4


class Dashboard(BaseHTTPRequestHandler):
    """Answers like a dashboard started with a token: with its version, and that there is no job."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        if given is None:
            self._answer(401, b"Unauthorized: Missing authentication token")
        elif given != f"Bearer {TOKEN}":
            self._answer(403, b"Forbidden: Invalid authentication token")
        else:
            self._answer(200, json.dumps({"ray_version": "2.60.0"} if self.path == "/api/version" else []).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A dashboard's address, for a user without a token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_head_of_this_machine_is_sent_the_users_token(command: Command, dashboard: str, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    result = command("submit", "list", address=dashboard)
    assert (result.status, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize(("token", "problem"), [("", "Missing authentication token"), ("other", "Invalid auth")])
def test_a_token_that_is_wanted_is_one_line(
    command: Command, dashboard: str, monkeypatch: pytest.MonkeyPatch, token: str, problem: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    result = command("submit", "list", address=dashboard)
    assert result.status == 1
    assert result.err.startswith(f"prefill-router: {dashboard}: Authentication")
    assert problem in result.err
    assert result.err.endswith("set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's\n")
    assert result.err.count("\n") == 1


def test_a_local_head_ends_with_a_command_that_is_terminated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes are not children of this command, and would keep running."""
    ended = []

    class Head:
        def add_node(self, **_options: object) -> SimpleNamespace:
            assert ray_constants.ENABLE_RAY_CLUSTER is False  # it listens on loopback
            return SimpleNamespace(webui_url="127.0.0.1:1")

        def shutdown(self) -> None:
            ended.append(True)

    def terminated() -> None:
        with submission.local_head():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    monkeypatch.setattr(submission, "RayCluster", Head)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the command ended at once"))
    try:
        with pytest.raises(KeyboardInterrupt):
            terminated()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == [True]


@pytest.mark.parametrize(
    ("is_local", "said"), [(True, "was stopped with its local Ray"), (False, "is still running: follow it with")]
)
def test_an_interrupt_says_what_becomes_of_the_job(is_local: bool, said: str) -> None:
    class Job:
        submission_id = "extract-1"

        def follow(self, _write: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(UserError, match=f"extract-1 {said}"):
        submit_commands._follow(Job(), is_local=is_local)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1"])
def test_no_token_goes_to_another_machine_unasked(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert submission._token(f"http://{host}:8265") == {}
