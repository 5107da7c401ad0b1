"""A submission sends a command line, small files, and only the names of secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import Command
from prefill_jobs.options import CompareConfig, ExtractConfig, LabelConfig, SubmitConfig, TrainConfig
from prefill_jobs.submit.submit_request import SubmitRequest, require_secrets
from prefill_router.common.errors import UserError

EXTRACT = ExtractConfig(corpus="s3://b/corpus", out="s3://b/out", layers="15,16", overwrite=True)
SECRET_NAMES = (
    "DB_PASS",
    "PASS",
    "SMTP_PWD",
    "MY_CREDENTIALS",
    "db_creds",
    "GPG_PASSPHRASE",
    "AZURE_CONNECTION_STRING",
)
SECRET_VALUES = (
    "postgresql://ann:hunter2@db:5432/prompts",
    "redis://:hunter2@cache",
    "amqp://one:1234,amqp://ann:hunter2@two",
    "host=db user=ann password=hunter2",
    "Endpoint=https://bus;SharedAccessKey=hunter2",
    "https://bucket.example.com/corpus?X-Amz-Signature=hunter2",
)


def test_a_config_becomes_the_command_line_that_makes_it() -> None:
    entrypoint = SubmitRequest.of(EXTRACT, SubmitConfig()).entrypoint
    assert entrypoint == (
        "python -m prefill_jobs extract --corpus s3://b/corpus --layers 15,16 --out s3://b/out --overwrite"
    )


def test_several_encoders_and_stores_are_one_argument() -> None:
    config = TrainConfig(activations="s3://b/x/m,s3://b/x/n", outcomes="s3://b/o", pool="s3://b/p", out="s3://b/r")
    assert "--activations s3://b/x/m,s3://b/x/n" in SubmitRequest.of(config, SubmitConfig()).entrypoint
    extract = EXTRACT.model_copy(update={"encoder": "org/m,package:n"})
    assert "--encoder org/m,package:n" in SubmitRequest.of(extract, SubmitConfig()).entrypoint


def test_several_values_of_an_argument_stand_without_a_flag() -> None:
    config = CompareConfig(
        routers=("s3://b/a", "s3://b/b c"), activations="s3://b/x", outcomes="s3://b/o", out="s3://b/r"
    )
    assert "compare s3://b/a 's3://b/b c' --activations" in SubmitRequest.of(config, SubmitConfig()).entrypoint


def test_a_pool_that_lies_here_goes_with_the_job(tmp_path: Path) -> None:
    (tmp_path / "my pool.toml").write_text("[[p]]\n")
    config = LabelConfig(router="s3://b/r", log="s3://b/l", out="s3://b/o", pool=f"{tmp_path}/my pool.toml#p")
    request = SubmitRequest.of(config, SubmitConfig())
    assert request.files == {"pool.toml": b"[[p]]\n"}
    assert request.arguments[-2:] == ["--pool", "pool.toml#p"]


def test_a_pool_that_is_missing_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    config = LabelConfig(router="s3://b/r", log="s3://b/l", out="s3://b/o", pool=f"{tmp_path}/none.toml")
    with pytest.raises(UserError, match=r"none\.toml: no such file"):
        SubmitRequest.of(config, SubmitConfig())


def test_the_same_request_has_the_same_digest_and_another_one_another() -> None:
    digest = SubmitRequest.of(EXTRACT, SubmitConfig()).digest
    assert SubmitRequest.of(EXTRACT, SubmitConfig(address="http://elsewhere:1", submission_id="x")).digest == digest
    assert SubmitRequest.of(EXTRACT, SubmitConfig(env=("A=1",))).digest != digest
    assert SubmitRequest.of(EXTRACT.model_copy(update={"limit": 3}), SubmitConfig()).digest != digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": ("AWS_SECRET_ACCESS_KEY=hunter2",)}, "AWS_SECRET_ACCESS_KEY or its value looks like a secret"),
        ({"env": ("MY_API_KEY=hunter2",)}, "use --secrets MY_API_KEY"),
        ({"env": ("HUNTER2",)}, "must be NAME=VALUE"),
        *(({"env": (f"{name}=hunter2",)}, f"use --secrets {name}") for name in SECRET_NAMES),
        *(({"env": (f"PLACE={value}",)}, "use --secrets PLACE") for value in SECRET_VALUES),
        ({"secrets": "HF_TOKEN=hunter2"}, "secrets: HF_TOKEN: must be the name of an environment variable"),
    ],
)
def test_a_value_that_is_secret_is_refused_and_not_repeated(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        SubmitRequest.of(EXTRACT, SubmitConfig(**options))
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("value", SECRET_VALUES)
def test_an_argument_that_holds_a_secret_is_refused_and_not_repeated(value: str) -> None:
    """The dashboard shows a job's command line to everyone who can open it."""
    with pytest.raises(UserError, match="corpus: contains a secret") as raised:
        SubmitRequest.of(EXTRACT.model_copy(update={"corpus": value}), SubmitConfig())
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "setting",
    [
        "COMPASS=north",
        "BYPASS=1",
        "ENDPOINT=http://store:9000/a@b",
        "MIRROR=https://mirror.example.com/?page=2",
        "PWD=/",
    ],
)
def test_what_is_no_secret_is_sent(setting: str) -> None:
    name, _, value = setting.partition("=")
    assert SubmitRequest.of(EXTRACT, SubmitConfig(env=(setting,))).env == {name: value}


def test_a_job_looks_for_its_secrets_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    env = SubmitRequest.of(EXTRACT, SubmitConfig(secrets="ONE_KEY,OTHER_KEY")).env
    monkeypatch.setenv("ONE_KEY", "there")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="secret OTHER_KEY is not set on the cluster"):
        require_secrets()
    monkeypatch.setenv("OTHER_KEY", "there")
    require_secrets()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:9", "no Ray dashboard answers: check"),
        ("ray://127.0.0.1:10001", "must be the URL of the Ray dashboard"),
        ("local --detach", "omit --detach"),
    ],
)
def test_where_nothing_answers_is_said_in_a_line(command: Command, address: str, message: str) -> None:
    address, *flags = address.split()
    result = command("submit", "extract", *flags, corpus="s3://b/c", out="s3://b/o", address=address)
    assert result.status == 1
    assert message in result.err
    assert result.err.count("\n") == 1


def test_a_job_needs_its_own_flags(command: Command) -> None:
    result = command("submit", "extract", out="s3://b/o", address="http://127.0.0.1:9")
    assert result.status == 2
    assert "--corpus" in result.err


def test_a_table_of_options_goes_as_the_json_that_the_job_reads() -> None:
    config = EXTRACT.model_copy(update={"template_arguments": {"enable_thinking": False}})
    arguments = SubmitRequest.of(config, SubmitConfig()).arguments
    given = arguments[arguments.index("--template-arguments") + 1]
    assert ExtractConfig(corpus="c", out="o", template_arguments=given).template_arguments == {"enable_thinking": False}
