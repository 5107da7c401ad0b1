"""What each command says of an error while all of them run at once, more than the machine has cores for."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefill_jobs.options import command_options


def run(name: str, flags: list[object]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefill_jobs", name, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.slow("all commands at once, some with a Ray of their own")
def test_every_command_tells_its_error_on_a_busy_machine(
    router: str, activations: str, small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    corpus, outcomes, pool = (small_data / name for name in ("corpus.parquet", "outcomes.parquet", "pool.toml"))
    graded = ["--activations", activations, "--outcomes", outcomes]
    missing, nobody = tmp_path / "missing", "127.0.0.1:9"
    wrong: dict[str, tuple[list[object], str]] = {
        "ingest": (["mmlu-pro", missing], "missing"),
        "demo": (["--encoder", missing], "missing"),
        "quickstart": ([missing], "missing"),
        "validate": ([], "give --corpus"),
        "extract": (["--corpus", corpus, "--encoder", tiny_model, "--layers", "99"], "99"),
        "probe": (["--activations", activations, "--outcomes", corpus, "--pool", pool], "corpus.parquet"),
        "train": ([*graded, "--pool", missing], "missing"),
        "inspect": ([missing], "missing"),
        "evaluate": ([*graded, "--router", missing], "missing"),
        "compare": ([router, missing, *graded, "--pool", pool], "missing"),
        "collect": (["--corpus", corpus, "--pool", pool, "--grader", "choice"], "no upstream"),
        "label": (["--router", router, "--log", missing], "missing"),
        "pipeline": (["--corpus", missing, "--outcomes", outcomes, "--pool", pool, "--publish", tmp_path], "missing"),
        "key": (["somebody", "--keys", tmp_path], str(tmp_path)),
        "serve": (["--router", missing], "missing"),
        "submit": (["extract", "--corpus", corpus, "--out", tmp_path, "--address", f"http://{nobody}"], nobody),
    }
    assert wrong.keys() == command_options().keys() - {"clean", "completion"}  # which read no data
    commands = {
        name: [*flags, "--out", tmp_path / name] if "out" in command_options()[name].model_fields else flags
        for name, (flags, _) in wrong.items()
    }
    with ThreadPoolExecutor(len(commands)) as all_at_once:
        ended = dict(zip(commands, all_at_once.map(run, commands, commands.values()), strict=True))
    for name, process in ended.items():
        assert process.returncode == 1, process
        *progress, line = process.stderr.splitlines()
        assert line.startswith("prefill-router: "), process
        assert wrong[name][1] in line, process
        assert not any(said.startswith((" ", "Traceback")) for said in progress), process
