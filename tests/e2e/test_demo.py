"""The demo as its user starts it: a process, with an endpoint of its own; here on the tiny model, to be quick."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from command import Command
from ports import free_port


@pytest.mark.slow("the demo as a whole: two Rays, training and an endpoint")
def test_it_ends_with_a_report_and_three_decisions(tiny_model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "prefill_jobs", "demo", "--encoder", str(tiny_model), "--prompts", "300"),
            *("--out", str(tmp_path / "demo"), "--port", str(free_port())),
        ],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("POST /v1/route") == 3
    assert done.stdout.count("-> simulated/") == 3
    assert "Simulated answers" in done.stdout
    page = (tmp_path / "demo" / "report" / "report.html").read_text()
    assert page.count("<svg") == 12  # six plots, for a desk and for a phone
    assert "Simulated answers" in page


@pytest.mark.parametrize("given", [{"corpus": "c.jsonl"}, {"outcomes": "o.parquet", "pool": "p.toml"}])
def test_your_own_data_comes_whole(command: Command, tmp_path: Path, given: dict[str, str]) -> None:
    result = command("demo", **given, out=tmp_path / "demo", port=free_port())
    assert result.status == 1
    assert "give --corpus, --outcomes and --pool together" in result.err


def test_a_port_in_use_is_said_before_any_work(command: Command, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = command("demo", out=tmp_path / "demo", port=taken.getsockname()[1])
    assert result.status == 1
    assert "is in use" in result.err
    assert not (tmp_path / "demo").exists()
