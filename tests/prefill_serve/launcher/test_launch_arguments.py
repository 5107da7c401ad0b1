"""Errors that `serve` tells before it imports Ray and torch."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from prefill_router.common.errors import UserError
from prefill_serve.launcher import command
from prefill_serve.launcher.serve_options import ServeConfig


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the import of what runs an endpoint fail."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "prefill_serve.launcher.foreground", None)


def serve(**options: Any) -> None:
    command.serve(lambda: ServeConfig(router="r", **options))


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use: choose another with --port"):
            serve(port=port)


def test_an_endpoint_without_keys_that_others_would_reach() -> None:
    with pytest.raises(UserError, match=r"host = 0.0.0.0 is reachable by others: set --keys"):
        serve(host="0.0.0.0")


@pytest.mark.parametrize("name", ["keys", "pool", "budgets"])
def test_a_file_that_is_missing(tmp_path: Path, name: str) -> None:
    files = {"budgets": {"feedback": str(tmp_path)}}.get(name, {})
    with pytest.raises(UserError, match=r"none\.toml: no such file"):
        serve(**files, **{name: str(tmp_path / "none.toml")})
