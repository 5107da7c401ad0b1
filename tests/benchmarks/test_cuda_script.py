"""cuda.sh runs its steps and merges what they print; a Python that only says what it is asked stands for the GPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cuda.sh")
PYTHON = """#!/bin/bash
case "$*" in
    -m\\ pytest*) echo '73 passed in 60.00s' ;;
    *extract.py*) echo 'a table' >&2; echo '{"agrees": true}'; exit "$EXTRACT_STATUS" ;;
    *roofline.py*) echo '{"waits": []}' ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.mark.parametrize(("status", "failed"), [(0, []), (1, ["extract"])])
def test_the_steps_become_one_line(tmp_path: Path, status: int, failed: list[str]) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    ours = {"PYTHON": str(python), "REAL_PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [SCRIPT], env={**os.environ, **ours, "EXTRACT_STATUS": str(status)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == bool(failed), done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "benchmark": "cuda",
        "device": "cuda",
        "tests": "73 passed in 60.00s",
        "extract": {"agrees": True},
        "roofline": {"waits": []},
        "failed": failed,
    }
    assert ("cuda: extract: status 1: a table" in done.stderr) == bool(failed)
