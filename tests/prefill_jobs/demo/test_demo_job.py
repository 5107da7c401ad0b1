"""The data that the demo's steps get: published answers by default, simulated ones, or one's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from command import Command
from ingested import FIXTURES
from ports import free_port
from prefill_jobs.demo import demo_job, published_answers, simulation
from prefill_router.common.errors import UserError
from prefill_router.policy.pool import load_pool


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small package of the published one's name and form, which cannot be imported."""
    examples = tmp_path / "site" / "pareto_bandit" / "data" / "examples"
    examples.mkdir(parents=True)
    (examples.parents[1] / "__init__.py").write_text("raise AssertionError('imported')")
    shutil.copy(FIXTURES / "paretobandit.jsonl", examples)
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.fixture
def first_steps(command: Command, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts the demo with flags, and returns the options of its first two steps, extract and probe."""
    given: list[Any] = []

    def probe(config: Any) -> None:
        given.append(config)
        raise UserError("enough")

    monkeypatch.setattr(demo_job, "extract", given.append)
    monkeypatch.setattr(demo_job, "run_probe", probe)

    def start(*flags: object) -> Any:
        result = command("demo", *map(str, flags), encoder=tiny_model, out=tmp_path / "demo", port=free_port())
        assert "prefill-router: enough" in result.err
        return given

    return start


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("flags", "num_prompts"), [([], 2), (["--limit", "1"], 1)])
def test_by_default_it_reads_published_answers(
    first_steps: Any, tmp_path: Path, flags: list[str], num_prompts: int
) -> None:
    extract, probe = first_steps(*flags)
    assert extract.corpus == str(tmp_path / "demo" / "data" / "corpus")
    assert len(pq.read_table(extract.corpus)) == num_prompts
    assert extract.layers == "0,1,2"  # of the tiny model's four
    assert pq.read_table(probe.outcomes)["cost_usd"].to_pylist()[:2] == [3.8e-06, 0.0006155]
    assert [(t.name, t.input_price, t.output_price) for t in load_pool(probe.pool).targets] == [
        ("meta-llama/llama-3.1-8b-instruct", 0.1, 0.1),
        ("mistralai/mistral-large-2512", 0.5, 1.5),
        ("google/gemini-2.5-pro", 1.25, 10.0),
    ]


def test_simulated_answers_are_a_choice(first_steps: Any) -> None:
    extract, probe = first_steps("--simulated", "--prompts", "200")
    assert len(pq.read_table(extract.corpus)) == 200
    assert extract.layers == "all"
    assert simulation.NOTICE in Path(probe.pool).read_text()


@pytest.mark.parametrize("limit", [None, 10])
def test_a_part_of_your_own_data(first_steps: Any, small_data: Path, limit: int | None) -> None:
    files = {name: small_data / f"{name}.parquet" for name in ("corpus", "outcomes")} | {
        "pool": small_data / "pool.toml"
    }
    flags = [flag for name, file in files.items() for flag in (f"--{name}", file)]
    extract, probe = first_steps(*flags, *([] if limit is None else ["--limit", limit]))
    assert (extract.limit, extract.layers) == (limit, "all")
    assert probe.ignore_unknown == (limit is not None)  # the other outcomes have no activations


def test_without_the_package_it_says_how_to_install_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_answers, "find_spec", lambda _: None)
    result = command("demo", out=tmp_path / "demo", port=free_port())
    assert result.status == 1
    assert "pip install --no-deps paretobandit==0.1.1, or pass --simulated" in result.err
