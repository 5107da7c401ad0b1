"""The data that the steps of `demo` and `quickstart` get: published answers, simulated ones, or one's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from command import Command
from ingested import FIXTURES
from ports import free_port
from prefill_jobs.demo import published_answers, simulation, walkthrough
from prefill_router.activations.commit_log import StoreConflictError
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
    """Starts a command, and returns the options of its first two steps, extract and probe."""
    given: list[Any] = []

    def probe(config: Any) -> None:
        given.append(config)
        raise UserError("enough")

    monkeypatch.setattr(walkthrough, "extract", given.append)
    monkeypatch.setattr(walkthrough, "run_probe", probe)

    def start(*arguments: object) -> Any:
        result = command(*map(str, arguments), encoder=tiny_model, out=tmp_path / "demo", port=free_port())
        assert "prefill-router: enough" in result.err
        return given

    return start


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("flags", "num_prompts"), [([], 2), (["--limit", "1"], 1)])
def test_by_default_it_reads_published_answers(
    first_steps: Any, tmp_path: Path, flags: list[str], num_prompts: int
) -> None:
    extract, probe = first_steps("demo", *flags)
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
    extract, probe = first_steps("demo", "--simulated", "--prompts", "200")
    assert len(pq.read_table(extract.corpus)) == 200
    assert extract.layers == "all"
    assert simulation.NOTICE in Path(probe.pool).read_text()


def test_activations_are_kept_unless_they_are_of_something_else(
    first_steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def extract(config: Any) -> None:
        tried.append(config)
        if not config.overwrite:
            raise StoreConflictError("activations of another encoder")

    monkeypatch.setattr(walkthrough, "extract", extract)
    first_steps("demo", "--simulated", "--prompts", "200")
    assert [config.overwrite for config in tried] == [False, True]


@pytest.mark.parametrize("limit", [None, 10])
def test_a_part_of_your_own_data(first_steps: Any, small_data: Path, limit: int | None) -> None:
    files = {name: small_data / f"{name}.parquet" for name in ("corpus", "outcomes")} | {
        "pool": small_data / "pool.toml"
    }
    flags = [flag for name, file in files.items() for flag in (f"--{name}", file)]
    extract, probe = first_steps("quickstart", *flags, *([] if limit is None else ["--limit", limit]))
    assert (extract.limit, extract.layers) == (limit, "all")
    assert probe.ignore_unknown == (limit is not None)  # the other outcomes have no activations


def test_without_the_package_it_says_how_to_install_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_answers, "find_spec", lambda _: None)
    result = command("demo", out=tmp_path / "demo", port=free_port())
    assert result.status == 1
    assert "pip install --no-deps paretobandit==0.1.1, or pass --simulated" in result.err


def a_table(path: Path, header: str, *rows: str) -> Path:
    path.write_text("\n".join([header, *rows, ""]))
    return path


def test_a_table_of_your_answers_becomes_corpus_outcomes_and_pool(
    first_steps: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = "prompt,small,small_cost_usd,big,big_cost_usd"
    rows = [f"{i} + 2?,{int(i < 20)},0.001,{i % 2},0.02" for i in range(40)]
    extract, probe = first_steps("quickstart", a_table(tmp_path / "answers.csv", header, *rows))
    assert sorted(pq.read_table(extract.corpus)["prompt"].to_pylist()) == sorted(f"{i} + 2?" for i in range(40))
    assert pq.read_table(probe.outcomes)["cost_usd"].to_pylist() == 40 * [0.001, 0.02]
    assert load_pool(probe.pool, prices_optional=True).target_names == ["big", "small"]


def test_a_table_without_costs_needs_prices(command: Command, tmp_path: Path) -> None:
    table = a_table(tmp_path / "answers.csv", "prompt,small,big", "2 + 2?,1,1")
    result = command("quickstart", str(table), out=tmp_path / "out", port=free_port())
    assert result.status == 1
    assert f"wrote {tmp_path}/out/pool.toml" in result.err
    assert 'target "big": input_price is missing' in result.err
    assert (
        "give input_price and output_price in a pool file, passed as --pool, or the cost of every answer" in result.err
    )


def test_a_pool_of_other_models_is_refused_before_any_work(command: Command, tmp_path: Path) -> None:
    table = a_table(tmp_path / "answers.csv", "prompt,small,big", "2 + 2?,1,1", "Prove it.,0,1")
    pool = tmp_path / "pool.toml"
    pool.write_text('[[mine]]\nname = "other"\ninput_price = 1.0\noutput_price = 1.0\n')
    result = command("quickstart", str(table), pool=pool, out=tmp_path / "out", port=free_port())
    assert result.status == 1
    assert "no outcome of other: grade their answers, or use only targets with outcomes: big, small" in result.err
    assert not (tmp_path / "out" / "activations").exists()


def test_too_little_data_is_refused_before_any_work(command: Command, tmp_path: Path) -> None:
    header = "prompt,small,small_cost_usd,big,big_cost_usd"
    table = a_table(tmp_path / "answers.csv", header, "2 + 2?,1,0.001,1,0.02", "Prove it.,0,0.002,1,0.03")
    result = command("quickstart", str(table), out=tmp_path / "out", port=free_port())
    assert result.status == 1
    assert 'target "big" has 2 answers, all right' in result.err
    assert "a router needs two prompts to train on and one for each other part" in result.err
    assert not (tmp_path / "out" / "activations").exists()


def test_answers_without_lengths_are_said_to_be_priced_roughly(
    first_steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"{i} + 2?,{int(i < 20)},{i % 2}" for i in range(40)]
    table = a_table(tmp_path / "answers.csv", "prompt,small,big", *rows)
    lines = [f'[[mine]]\nname = "{name}"\ninput_price = 1.0\noutput_price = 1.0' for name in ("small", "big")]
    (tmp_path / "pool.toml").write_text("\n".join(lines))
    said: list[str] = []
    monkeypatch.setattr("prefill_jobs.demo.quickstart_job.say", said.append)
    first_steps("quickstart", table, "--pool", tmp_path / "pool.toml")
    assert any("each is assumed to have 256 tokens" in line for line in said)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpus", "c.jsonl"], "give a table of graded answers, or --corpus, --outcomes and --pool"),
        (["--outcomes", "o.parquet", "--pool", "p.toml"], "p.toml: no such file"),
        (["answers.csv", "--corpus", "c.jsonl"], "give only one"),
    ],
)
def test_data_that_do_not_go_together(command: Command, tmp_path: Path, flags: list[str], message: str) -> None:
    result = command("quickstart", *flags, out=tmp_path / "out", port=free_port())
    assert result.status == 1
    assert message in result.err
