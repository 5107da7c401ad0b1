"""The wheel that jobs are sent with, where a job runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prefill_jobs.wheel import write_wheel


def test_the_code_that_runs_here_wins_over_what_is_installed(tmp_path: Path) -> None:
    version = write_wheel(tmp_path)
    code = (
        "import prefill_router.report, prefill_jobs.cli, prefill_serve, importlib.metadata as m;"
        "print(prefill_jobs.cli.__file__); print(m.version('prefill-router'));"
        "print(*(e.name for e in m.entry_points(group='prefill_router.commands')))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    file, found, commands = run.stdout.splitlines()
    assert file.startswith(str(tmp_path))
    assert found == version
    assert set(commands.split()) == {"serve", "key"}
    assert (tmp_path / "prefill_router" / "templates" / "report.html").exists()
    assert (tmp_path / "prefill_serve" / "playground" / "index.html").exists()


def test_the_same_code_has_the_same_version_and_asks_for_no_requirements(tmp_path: Path) -> None:
    assert write_wheel(tmp_path / "one") == write_wheel(tmp_path / "again")
    (metadata,) = (tmp_path / "one").glob("*.dist-info/METADATA")
    assert "Requires-Dist" not in metadata.read_text()
