"""The source distribution and the wheel: what they hold, and that the wheel works where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".html", ".css", ".js"}
PACKAGES = ("platform/prefill_router", "jobs/prefill_jobs", "serve/prefill_serve")
_MAX_BYTES = 1_000_000
# Everything that is read from the packages: the API's pages, the playground, the templates of reports, the sandbox.
_USE = """
import sys
from starlette.testclient import TestClient
import prefill_serve
from prefill_router.reports import evaluation_page, label_page, log_page
from prefill_serve.api import create_api
from prefill_serve.endpoint import Endpoint
from prefill_serve.gateway.state.call_ledger import LocalLedger

assert prefill_serve.__file__.startswith(sys.prefix), prefill_serve.__file__
with TestClient(create_api(Endpoint(), LocalLedger()), "http://127.0.0.1") as client:
    print(*(client.get(path).status_code for path in ("/", "/playground.js", "/docs", "/openapi.json")))
"""


def run(command: Sequence[Any], cwd: Path) -> str:
    """Runs a command as one who has no checkout, and returns its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow("builds, installs and runs a wheel in a new environment")
def test_a_wheel_of_the_source_distribution_works_without_a_checkout(
    small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], ROOT)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        assert all(member.size < _MAX_BYTES for member in archive)
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / packed.name.removesuffix(".tar.gz")
    assert {path.name for path in source.iterdir()} == {
        *("PKG-INFO", "README.md", "LICENSE", "pyproject.toml", ".gitignore", "platform", "jobs", "serve")
    }

    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], source)
    (wheel,) = tmp_path.glob("*.whl")
    code = {
        path.relative_to(ROOT / package).as_posix()
        for package in (Path(name).parent for name in PACKAGES)
        for path in (ROOT / package).rglob("prefill_*/**/*")
        if path.suffix in SUFFIXES
    }
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == code

    python = installed(wheel, tmp_path / "venv")
    command = python.with_name("prefill-router")
    away = tmp_path / "away"
    away.mkdir()
    assert run([command, "--version"], away).startswith("prefill-router ")
    assert "quickstart" in run([command, "--help"], away)
    job = ["--corpus", small_data / "corpus.parquet", "--encoder", tiny_model, "--limit", 20, "--out", "store"]
    assert "20 prompts" in run([command, "extract", *job], away)
    assert run([python, "-c", _USE], away) == "200 200 200 200\n"


def installed(wheel: Path, environment: Path) -> Path:
    """Installs the wheel in a new environment that finds the dependencies of this one. Returns its Python."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], environment)
    places = {variable: str(environment) for variable in ("base", "platbase")}
    others = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))}
    Path(sysconfig.get_path("purelib", vars=places), "dependencies.pth").write_text("\n".join(sorted(others)))
    return python
