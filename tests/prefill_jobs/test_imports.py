"""Processes import only what they use: a job starts many processes, and each pays for its own imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_REPORT = "import json, sys; print(json.dumps(sorted(sys.modules)))"
_BARE = 120  # maximum number of modules that Python and the virtual environment load
# Upper bounds: torch without its compiler; Ray Data with pandas.
_SELDOM = {"transformers", "matplotlib", "sklearn", "scipy", "litellm", "torch._dynamo", "torch._inductor", "sympy"}
_FIT = """
import torch
from prefill_router.predictor.data_loader import Rows, WorkerRows
from prefill_router.predictor.recipe import Recipe
from prefill_router.predictor.training import Trainer, fit
rows = Rows(torch.randn(8, 3), torch.ones(8, 2), torch.arange(8, dtype=torch.int32))
recipe = Recipe(num_seeds=2, keep=1, max_epochs=2)
fit(WorkerRows([8], {0: rows}, {0: rows}, rows[:0]), Trainer(recipe, 3, [1.0, 1.0], 0), 0)
"""
_HELP = """
from prefill_jobs.cli.command_line import main
try:
    main(["--help"])
except SystemExit as ended:
    assert not ended.code
"""


def modules_after(code: str) -> set[str]:
    """The modules loaded in a new process after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{_REPORT}"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_core_imports_nothing_by_itself() -> None:
    assert len(modules_after("import prefill_router")) <= _BARE


@pytest.mark.parametrize("package", ["prefill_router", "prefill_jobs", "prefill_serve"])
@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_spin_briefly_unless_the_user_says_otherwise(
    package: str, given: dict[str, str], spins: str | None
) -> None:
    """OpenMP reads the variable when torch is imported, so each package sets it before."""
    code = f"import {package}, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(spins), "False"]


@pytest.mark.parametrize(
    ("workers", "unwanted"),
    [
        pytest.param(
            ("extract.extractor", "label.estimator", "graded.embeddings", "train.trunk_fit"), _SELDOM, id="encoding"
        ),
        pytest.param(
            ("label.decider", "collect.collector", "collect.grading"), _SELDOM | {"torch"}, id="without_an_encoder"
        ),
    ],
)
def test_a_worker_imports_what_it_uses(workers: tuple[str, ...], unwanted: set[str]) -> None:
    loaded = modules_after("".join(f"import prefill_jobs.{name}\n" for name in workers))
    assert {f"prefill_jobs.{name}" for name in workers} <= loaded
    assert not loaded & unwanted


def test_the_process_of_a_shared_object_imports_little() -> None:
    loaded = modules_after(
        "from prefill_jobs.runtime import shared_objects\n"
        "from prefill_jobs.extract.shard_attempts import ShardAttempts\n"
        "from prefill_router.collection.shared_budget import SharedBudget\n"
    )
    assert "ray" in loaded
    assert not loaded & {*_SELDOM, "torch", "pandas", "ray.data"}


def test_a_driver_checks_an_encoder_without_its_model_classes(tiny_model: Path) -> None:
    loaded = modules_after(
        "from prefill_router.encoder.encoder_spec import EncoderSpec, check_encoder\n"
        f"check_encoder(EncoderSpec(model={str(tiny_model)!r}))\n"
    )
    assert "transformers.models.auto" in loaded
    assert not loaded & {"transformers.modeling_utils", "scipy", "sklearn", "matplotlib"}


def test_training_never_imports_torchs_compiler() -> None:
    loaded = modules_after(_FIT)
    assert "prefill_router.predictor.training" in loaded
    assert not loaded & _SELDOM


def test_help_imports_no_library_of_the_jobs() -> None:
    loaded = modules_after(_HELP)
    assert "typer" in loaded
    assert not loaded & {*_SELDOM, "torch", "ray", "pandas", "httpx", "fastapi", "s3fs"}
    assert len(loaded) <= 660
