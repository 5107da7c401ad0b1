"""The command line: errors for invalid input, which leave no output that could be mistaken for a result."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from command import Command
from prefill_jobs.cli import command_line
from prefill_jobs.cli.command_line import main
from prefill_jobs.options import command_options
from prefill_jobs.runtime import cluster
from prefill_router.common.errors import UserError
from prefill_router.common.money import usd
from prefill_router.router.artifact import Router
from tiny import save_tiny_model

pytestmark = pytest.mark.usefixtures("in_process")


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"prompt_id": "a", "prompt": "one two"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the corpus is empty"),
        ([GOOD, {"prompt_id": "b", "prompt": None}], "row 2: prompt = null, must be a non-empty string"),
        ([GOOD, {"prompt_id": "b", "prompt": 7}], "row 2: prompt = 7, must be a non-empty string"),
        ([GOOD, {"prompt_id": "b"}], "row 2: has neither prompt nor messages"),
        ([GOOD, GOOD], 'prompt_id "a" occurs more than once'),
    ],
)
def test_a_bad_corpus_is_one_line_and_status_1(
    command: Command, tmp_path: Path, tiny_model: Path, rows: list[object], message: str
) -> None:
    corpus = jsonl(tmp_path / "corpus.jsonl", *rows)
    result = command("extract", corpus=corpus, encoder=tiny_model, out=tmp_path / "out", max_bad_fraction=0)
    assert (result.status, result.out) == (1, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_file(command: Command, tmp_path: Path) -> None:
    result = command("extract", corpus=tmp_path / "nothing.jsonl", out=tmp_path / "out")
    assert result.status == 1
    assert result.err == f"prefill-router: {tmp_path}/nothing.jsonl: no such corpus\n"


def test_an_encoder_that_does_not_exist(command: Command, tmp_path: Path) -> None:
    corpus = jsonl(tmp_path / "corpus.jsonl", GOOD)
    result = command("extract", corpus=corpus, encoder="package:no_such_model", out=tmp_path / "out")
    assert result.status == 1
    assert "prefill-router: encoder package:no_such_model: not installed" in result.err


def test_a_target_without_a_price(command: Command, activations: str, small_data: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.toml"
    pool.write_text('[[pool]]\nname = "big"\ninput_price = 1.0\n')
    options = {"activations": activations, "outcomes": small_data / "outcomes.parquet", "pool": pool}
    result = command("train", **options, out=tmp_path / "router")
    assert result.status == 1
    assert result.err.endswith('pool.toml: target "big": output_price is missing\n')
    assert not (tmp_path / "router").exists()


def test_an_outcome_of_an_unknown_prompt(command: Command, activations: str, small_data: Path, tmp_path: Path) -> None:
    outcomes = pq.read_table(small_data / "outcomes.parquet")
    stray = pa.table({"prompt_id": ["nobody"], "target": ["big"], "correct": [1.0], "output_tokens": [5]})
    pq.write_table(pa.concat_tables([outcomes, stray.cast(outcomes.schema)]), tmp_path / "outcomes.parquet")
    options = {"activations": activations, "outcomes": tmp_path / "outcomes.parquet", "pool": small_data / "pool.toml"}
    for name in ("probe", "train"):
        result = command(name, **options, out=tmp_path / "out")
        assert result.status == 1
        assert 'prompt_id "nobody" has outcomes but no activations' in result.err
        assert not (tmp_path / "out").exists()


def test_a_misspelled_key_names_the_nearest(command: Command, tmp_path: Path) -> None:
    (tmp_path / "router.toml").write_text('[extract]\ncorpus = "c.jsonl"\nshard_row = 3\n')
    result = command("extract", config=tmp_path / "router.toml", out=tmp_path / "out")
    assert result.status == 1
    assert result.err.endswith('router.toml: extract: unknown key "shard_row", did you mean "shard_rows"?\n')


def test_a_router_whose_encoder_changed(command: Command, router: str, tiny_model: Path, tmp_path: Path) -> None:
    loaded = Router.load(router)
    identity = loaded.encoders[""]
    moved = identity.spec.model_copy(update={"model": str(save_tiny_model(tmp_path / "model", seed=1))})
    changed = replace(loaded, encoders={"": identity.model_copy(update={"spec": moved})})
    changed.save(str(tmp_path / "router"))
    log = jsonl(tmp_path / "log.jsonl", GOOD)
    result = command("label", router=tmp_path / "router", log=log, out=tmp_path / "out")
    assert result.status == 1
    assert f"is not {identity.fingerprint}" in result.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_flags_win_over_the_file(command: Command, tmp_path: Path, tiny_model: Path) -> None:
    corpus = jsonl(tmp_path / "corpus.jsonl", GOOD, {**GOOD, "prompt_id": "b"}, {**GOOD, "prompt_id": "c"})
    (tmp_path / "router.toml").write_text(
        f'[extract]\ncorpus = "{corpus}"\nencoder = "{tiny_model}"\nlayers = "1"\nlimit = 1\n[train]\nseeds = 3\n'
    )
    result = command("extract", config=tmp_path / "router.toml", out=tmp_path / "out", limit=2)
    assert result.status == 0
    assert "2 prompts" in result.out
    assert "2 columns" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract"], "extract: --corpus is missing: give it, or set corpus in table [extract] of --config"),
        (["extract", "--limit", "many"], "extract: invalid value for '--limit': "),
        (["extract", "--nonsense"], "extract: no such option: --nonsense: see prefill-router extract --help"),
        (["extract", "--corpus"], "option '--corpus' requires an argument: see prefill-router --help"),
        (
            ["label", "--tolerence", "0.1"],
            'label: no such option: --tolerence, did you mean "--tolerance"? See prefill',
        ),
        (["train", "--fold", "3"], 'train: no such option: --fold, did you mean "--folds"? See prefill-router train'),
        (["train", "--tolerence", "0.1"], "train: no such option: --tolerence: see prefill-router train --help"),
        (["submit", "lgs"], "submit: no such command 'lgs'. Did you mean 'logs'? See prefill-router submit --help"),
        (["no-such-command"], "no such command 'no-such-command': see prefill-router --help"),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(command: Command, arguments: list[str], message: str) -> None:
    result = command(*arguments)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(f"prefill-router: {message}")


@pytest.mark.parametrize("arguments", [[], ["submit"]])
def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "Usage: prefill-router" in "".join(capsys.readouterr())


def test_an_error_of_a_job_is_a_line_even_where_a_pipe_breaks(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """click exits silently with status 1 on EPIPE, which a lost connection to a store raises too."""

    def fail(_config: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe", "s3://bucket/corpus.jsonl")

    monkeypatch.setitem(command_line._JOBS, "demo", fail)
    result = command("demo")
    assert (result.status, result.out) == (1, "")
    assert result.err == "prefill-router: [Errno 32] Broken pipe: 's3://bucket/corpus.jsonl'\n"


def test_an_interrupt_says_how_to_go_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(command_line._JOBS, "demo", interrupted)
    result = command("demo")
    assert (result.status, result.err) == (130, "demo: interrupted: the same command goes on from what is finished\n")


def test_an_error_is_told_before_the_ray_of_its_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shutting down Ray may end the process, so the error is reported first."""
    monkeypatch.setattr(cluster.ray, "is_initialized", iter([False, True]).__next__)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: pytest.fail("Ray was ended first"))
    with pytest.raises(UserError, match="layer 99"), cluster.result_on_stdout():
        raise UserError("layer 99 is out of range")


def assert_shown(out: str, name: str) -> None:
    """Asserts that every field of a command's config is in its help."""
    for key, field in command_options()[name].model_fields.items():
        is_argument = "positional" in (field.json_schema_extra or {})
        assert (f"[{key}]" if is_argument else f"--{key.replace('_', '-')}") in out


@pytest.mark.parametrize("name", [name for name in command_options() if name != "submit"])
def test_help_shows_every_flag(command: Command, name: str) -> None:
    result = command(name, "--help")
    assert result.status == 0
    assert_shown(result.out, name)


@pytest.mark.parametrize("name", ["extract", "train", "pipeline", "compare"])
def test_help_of_a_submission_shows_the_jobs_flags_too(command: Command, name: str) -> None:
    result = command("submit", name, "--help")
    assert result.status == 0
    assert_shown(result.out, name)
    assert_shown(result.out, "submit")


# --- inspect -----------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_router_is(command: Command, router: str) -> None:
    loaded = Router.load(router)
    result = command("inspect", router)
    assert result.status == 0
    assert f"router      {loaded.version}, format 1" in result.out
    assert f"fingerprint {loaded.encoders[''].fingerprint}" in result.out
    rows = {line.split()[0]: line.split() for line in result.out.splitlines() if line}
    for target in loaded.pool.targets:
        assert rows[target.name][1:4] == [
            usd(target.input_price),
            usd(target.output_price),
            str(loaded.training["num_answers"][target.name]),
        ]
        assert float(rows[target.name][4]) == pytest.approx(loaded.training["validation"]["auc"][target.name], abs=6e-4)
    assert float(rows["small"][4]) > 0.8


def test_inspect_without_a_router(command: Command, tmp_path: Path) -> None:
    result = command("inspect", str(tmp_path))
    assert (result.status, result.out) == (1, "")
    assert "no router found" in result.err
    with pytest.raises(SystemExit) as usage:
        main(["inspect"])
    assert usage.value.code == 2


def test_train_wants_data_unless_it_extends(command: Command, small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["train", "--pool", str(small_data / "pool.toml"), "--out", str(tmp_path / "router")])
    assert usage.value.code == 2


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert out.startswith(f"prefill-router {metadata.version('prefill-router')} (Python ")
    assert all(f"{name} {metadata.version(name)}" in out for name in ("ray", "torch"))
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "deploy", "x.yaml"), 'run "serve deploy infra/serve.yaml", see infra/README.md'),
        (("serve", "status"), 'run "serve status", see infra/README.md'),
        (("job", "submit"), 'run "ray job", or prefill-router submit'),
    ],
)
def test_a_command_of_ray_is_refused_in_one_line_that_says_what_to_run(
    command: Command, arguments: tuple[str, ...], message: str
) -> None:
    result = command(*arguments)
    assert (result.status, result.err.count("\n"), result.out) == (2, 1, "")
    assert result.err.rstrip().endswith(message)
