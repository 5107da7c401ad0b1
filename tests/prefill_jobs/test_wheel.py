"""The wheel that jobs are sent with, installed as Ray does it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from prefill_jobs.wheel import write_wheel


def test_the_installed_wheel_is_the_code_that_runs_here(tmp_path: Path) -> None:
    wheel, target = write_wheel(tmp_path), tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", str(wheel), f"--target={target}"]
    subprocess.run(install, check=True)
    code = (
        "import prefill_router.report, prefill_jobs.cli, prefill_serve, importlib.metadata as m;"
        "print(prefill_jobs.cli.__file__); print(m.version('prefill-router'));"
        "print(*(e.name for e in m.entry_points(group='prefill_router.commands')))"
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    file, version, commands = run.stdout.splitlines()
    assert file.startswith(str(target))
    assert version in wheel.name
    assert set(commands.split()) == {"serve", "key"}
    assert (target / "prefill_router" / "templates" / "report.html").exists()
    assert (target / "prefill_serve" / "playground" / "index.html").exists()


def test_the_same_code_is_the_same_file_and_asks_for_no_requirements(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    wheel, again = write_wheel(tmp_path), write_wheel(tmp_path / "again")
    assert wheel.name == again.name
    assert wheel.read_bytes() == again.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        assert "Requires-Dist" not in archive.read(metadata).decode()
