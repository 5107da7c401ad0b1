"""The wheel that is sent with a job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefill_jobs
import prefill_router
import prefill_serve
from prefill_jobs.submit import wheel
from prefill_jobs.submit.wheel import write_wheel


def test_the_code_that_runs_here_wins_over_what_is_installed(tmp_path: Path) -> None:
    version = write_wheel(tmp_path)
    code = (
        "import prefill_router.common.errors, prefill_jobs.cli.command_line, prefill_serve, importlib.metadata as m;"
        "print(prefill_jobs.cli.command_line.__file__); print(m.version('prefill-router'));"
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
    assert (tmp_path / "prefill_router" / "reports" / "templates" / "report.html").exists()
    assert (tmp_path / "prefill_serve" / "playground" / "index.html").exists()


def test_the_same_code_has_the_same_version_and_asks_for_no_requirements(tmp_path: Path) -> None:
    assert write_wheel(tmp_path / "one") == write_wheel(tmp_path / "again")
    (metadata,) = (tmp_path / "one").glob("*.dist-info/METADATA")
    assert "Requires-Dist" not in metadata.read_text()


def test_what_is_no_code_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout may have keys, dumps and editor backups, which everyone on the cluster could read."""
    package = tmp_path / "here" / "prefill_example"
    (package / ".ipynb_checkpoints").mkdir(parents=True)
    code = ("__init__.py", "page.html", "page.css", "page.js")
    others = (
        ".env",
        "keys.toml",
        "id_rsa",
        "server.pem",
        "module.py~",
        "module.py.bak",
        "#module.py#",
        ".module.py.swp",
    )
    others += (".hidden.py", ".ipynb_checkpoints/module.py", "dump.parquet", "outcomes.csv", "notes.md")
    for name in (*code, *others):
        (package / name).write_text("# hunter2")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(wheel, "_PACKAGES", (package.name,))
    write_wheel(tmp_path / "sent")
    sent = {path.name for path in (tmp_path / "sent" / package.name).rglob("*")}
    assert sent == {*code}


def test_all_code_goes_along(tmp_path: Path) -> None:
    write_wheel(tmp_path)
    suffixes = {".py", ".html", ".css", ".js"}
    for name, module in (
        ("prefill_router", prefill_router),
        ("prefill_jobs", prefill_jobs),
        ("prefill_serve", prefill_serve),
    ):
        here, sent = Path(module.__path__[0]), tmp_path / name
        expected = {path.relative_to(here) for path in here.rglob("[!.]*.*") if path.suffix in suffixes}
        assert {path.relative_to(sent) for path in sent.rglob("*.*")} == expected
