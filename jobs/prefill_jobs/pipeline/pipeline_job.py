"""`pipeline`: builds and publishes a router from a corpus and outcomes, running only the steps that are out of date.

A step is up to date if its output exists and its inputs have not changed: its settings, and its files by size and
modification time or ETag, or else by content. A restart resumes, and new prompts cost only their own work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any, TypeVar

import numpy as np

from prefill_jobs.evaluate.evaluate_job import evaluate
from prefill_jobs.evaluate.log_job import evaluate_log
from prefill_jobs.extract.extract_cost import ExtractionCost, extraction_cost
from prefill_jobs.extract.extract_job import each_encoder, extract_stores
from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.graded.prompt_split import split_groups_of, split_of
from prefill_jobs.options import EvaluateConfig, ExtractConfig, PipelineConfig, ProbeConfig, TrainConfig, load_command
from prefill_jobs.pipeline.gathered_feedback import GatheredFeedback, is_folder_of_feedback
from prefill_jobs.pipeline.publish_gate import PublishGate
from prefill_jobs.train.probe_job import TABLE as PROBES
from prefill_jobs.train.probe_job import load_probes, run_probe
from prefill_jobs.train.train_job import train
from prefill_router import storage
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import SENTENCE, ActivationColumn
from prefill_router.common.validation import StrictModel, validate
from prefill_router.corpus.reader import corpora, files
from prefill_router.corpus.split import Part
from prefill_router.outcomes import check_columns
from prefill_router.policy.answer_cost import check_prices
from prefill_router.policy.pool import load_pool
from prefill_router.probe.layer_scores import LayerProbe, by_encoder, joint_columns
from prefill_router.router.artifact import MANIFEST as ROUTER
from prefill_router.router.artifact import Router
from prefill_router.storage.lease import Lease
from prefill_router.storage.parquet_objects import MANIFEST

C = TypeVar("C", bound=StrictModel)

_STATE = "pipeline.json"
_STAGES = ("extract", "probe", "train", "evaluate")
_INPUTS = ("corpus", "outcomes", "pool", "encoder", "correct_at")  # keys that [pipeline] shares with its steps


@dataclass(frozen=True)
class Step:
    name: str
    outputs: Sequence[str]  # URIs of files that exist once it has run
    reads: Callable[[], Mapping[str, Any]]  # settings and file stamps, cheap to compute
    run: Callable[[], str]  # returns a summary for the log
    content: Callable[[], str] | None = None  # digest of its input's content, if `reads` may change without it
    cost: Callable[[], ExtractionCost] | None = None


class StepRecord(StrictModel):
    """Digests of a step's inputs when it ran."""

    reads: str
    content: str | None = None


def pipeline(config: PipelineConfig) -> list[str]:
    """Runs the steps that are out of date and returns their names. With `config.plan`, only prints them.

    Raises UserError if the gate rejects the new router.
    """
    whole = Pipeline(config)
    if config.plan and whole.feedback is None:
        return whole.plan()
    with Lease.acquire(config.out, "pipeline"):
        if whole.feedback is not None:
            whole.feedback.update()
        return whole.plan() if config.plan else whole.run()


class Pipeline:
    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self._tables = {name: load_command(config.file, name) if config.file else {} for name in _STAGES}
        self._state_uri = storage.join(config.out, _STATE)
        self._ignored: set[str] = set()
        uris = config.outcomes.split(",")
        folders = [uri for uri in uris if is_folder_of_feedback(uri)]
        self.graded = [uri for uri in uris if uri not in folders]
        self.feedback = (
            GatheredFeedback(folders, self.graded, self._below("feedback"), config.feedback_days) if folders else None
        )
        self._check_inputs()
        prompts = None if self.feedback is None else self.feedback.prompts
        self.corpus = ",".join(uri for uri in (config.corpus, prompts) if uri is not None)
        self.outcomes = config.outcomes if self.feedback is None else self.feedback.outcomes
        # Reports invalid options before any work.
        _ = self.samples, self.probe, self.extracts, self.train, self.evaluate
        if self._ignored:
            say(f"pipeline: {config.file}: ignored {', '.join(sorted(self._ignored))}: the pipeline sets these options")
        stored = storage.read_json(self._state_uri) if storage.exists(self._state_uri) else {}
        self._state = {name: validate(StepRecord, done, self._state_uri) for name, done in stored.items()}

    def _check_inputs(self) -> None:
        """Raises UserError for inputs that do not go together."""
        if self.graded and self.config.corpus is None:
            raise UserError(
                f"pipeline: {self.graded[0]} has no feedback yet, or outcomes without prompts: wait for feedback, or "
                "give --corpus"
            )
        if self.feedback is None and len(self.graded) > 1:
            raise UserError(
                f"pipeline: none of {self.config.outcomes} has a gateway's feedback yet: wait for it, or give one "
                "folder of outcomes"
            )

    def check(self) -> None:
        """Raises UserError for problems of later steps that can be found before the first step."""
        pool = load_pool(self.config.pool, prices_optional=True)
        check_columns(self.outcomes)
        check_prices(pool, self.outcomes)
        split_of(self.train, 0)
        storage.check_output(self.config.publish)

    def run(self) -> list[str]:
        self.check()
        ran = []
        for step in self.steps:
            if self._is_current(step):
                say(f"pipeline: {step.name}: up to date")
                continue
            say(f"pipeline: {step.name}")
            said = step.run()
            self._remember(step)
            say(f"pipeline: {step.name}: {said}")
            ran.append(step.name)
        say(f"pipeline: ran {', '.join(ran)}" if ran else "pipeline: all steps are up to date")
        return ran

    def plan(self) -> list[str]:
        """Prints the steps that would run, and returns their names. Steps after an outdated one count as outdated."""
        would: list[str] = []
        for step in self.steps:
            if not would and self._is_current(step):
                say(f"pipeline: {step.name}: up to date")
                continue
            would.append(step.name)
            say(f"pipeline: {step.name}: would run" + (f", {step.cost().text}" if step.cost is not None else ""))
        return would

    # --- steps -------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> Sequence[Step]:
        corpus, outcomes, pool = self.corpus, self.outcomes, self.config.pool.partition("#")[0]
        router = storage.join(self.train.out, ROUTER)
        return (
            Step(
                "sample",
                _manifests(self.samples),
                lambda: {"corpus": _stamps(corpus), "settings": _settings(*self.samples)},
                lambda: self._extract(self.samples),
                cost=lambda: reduce(add, (extraction_cost(sample, None) for sample in self.samples)),
            ),
            Step(
                "probe",
                [storage.join(self.probe.out, PROBES)],
                lambda: {
                    "outcomes": _stamps(outcomes),
                    "targets": load_pool(self.config.pool, prices_optional=True).target_names,
                    "sample": _digest(*_manifests(self.samples)),
                    "settings": _settings(self.probe),
                },
                self._probe,
                content=self._graded_sample,
            ),
            Step(
                "extract",
                _manifests(self.extracts),
                lambda: {"corpus": _stamps(corpus), "settings": _settings(*self.whole)},
                lambda: self._extract(self.whole, [sample.out for sample in self.samples]),
                cost=self._extraction_cost,
            ),
            Step(
                "train",
                [router],
                lambda: {
                    "activations": _digest(*_manifests(self.extracts)),
                    "outcomes": _stamps(outcomes),
                    "pool": _stamps(pool) | load_pool(self.config.pool, prices_optional=True).price_sources,
                    "settings": _settings(self.train),
                },
                lambda: f"router {train(self.train, keep_learnt=True).version}",
            ),
            Step(
                "evaluate",
                [storage.join(self.evaluate.out, name) for name in self._reports],
                lambda: {"router": _digest(router), "settings": _settings(self.evaluate)},
                self._evaluate,
            ),
            Step(
                "publish",
                [storage.join(self.config.publish, ROUTER)],
                lambda: {"router": _digest(router), "publish": self.config.publish},
                self._publish,
            ),
        )

    def _extract(self, configs: Sequence[ExtractConfig], others: Sequence[str] = ()) -> str:
        done = extract_stores(configs, others).values()
        return "; ".join(f"{of.manifest.rows:,} prompts, {of.work.prompts:,} of them computed" for of in done)

    def _probe(self) -> str:
        run_probe(self.probe, split_of(self.train, 0), split_groups_of(self.train))
        return "; ".join(f"layers {config.layers}, {config.pooling}" for config in self.whole)

    def _extraction_cost(self) -> ExtractionCost:
        is_probed = storage.exists(storage.join(self.probe.out, PROBES))
        probes = by_encoder(load_probes(self.probe.out)) if is_probed else {}
        chosen = [
            _reduced(e, self._needed(e.out, e.encoder, probes[e.encoder])) if e.encoder in probes else None
            for e in self.extracts
        ]
        return reduce(add, map(extraction_cost, self.extracts, self.samples, chosen))

    @property
    def _reports(self) -> list[str]:
        """The files of the reports on graded outcomes, and on feedback."""
        return ["report.json"] * bool(self.graded) + ["log.json"] * (self.feedback is not None)

    def _evaluate(self) -> str:
        if self.feedback is not None:
            values = evaluate_log(self.evaluate.model_copy(update={"outcomes": self.feedback.calls}))
            if not self.graded:
                return f"{self.evaluate.out}/log.html, {values[0].doubly_robust.value:.1%} right (doubly robust)"
        evaluation = evaluate(self.evaluate)
        low_high = evaluation.standings[0].intervals["mdp_auccc"]
        return f"{self.evaluate.out}/report.html, MDP-AUCCC x 1000 {low_high.value * 1000:.1f}"

    def _publish(self) -> str:
        calls = None if self.feedback is None else self.feedback.calls
        gate = PublishGate(self.config, self.train.out, self._activations, self.graded, calls)
        objections = [] if self.config.accept else gate.objections()
        if objections:
            report = self._below("gate/report.html") if self.graded else storage.join(self.evaluate.out, "log.html")
            raise UserError(
                f"gate: the new router is worse than the published one and is not published: {'; '.join(objections)}; "
                f"see {report}, or publish it with --accept"
            )
        return f"{self.config.publish}: router {gate.publish().version}"

    # --- configs of the steps ----------------------------------------------------------------------------------------

    @cached_property
    def samples(self) -> list[ExtractConfig]:
        """The extraction of every layer of a sample by each encoder."""
        given = {"layers": "all", "out": self._below("sample")}
        config = self._stage(ExtractConfig, "extract", corpus=self.corpus, encoder=self.config.encoder, **given)
        return each_encoder(config.model_copy(update={"limit": self.config.sample}))

    @cached_property
    def probe(self) -> ProbeConfig:
        data = {"activations": _stores(self.samples), "outcomes": self.outcomes, "pool": self.config.pool}
        return self._stage(
            ProbeConfig, "probe", **data, **self._threshold, out=self._below("probe"), ignore_unknown=True
        )

    @cached_property
    def extracts(self) -> list[ExtractConfig]:
        """The extraction of the whole corpus by each encoder, before the probe has chosen layers."""
        where = {"out": self._below("activations")}
        given = {"corpus": self.corpus, "encoder": self.config.encoder}
        return each_encoder(self._stage(ExtractConfig, "extract", **given, **where))

    @property
    def whole(self) -> list[ExtractConfig]:
        """The extraction of the whole corpus by each encoder, with the columns of `_needed`."""
        probes = by_encoder(load_probes(self.probe.out))
        models = [ActivationStore.open(sample.out).manifest.encoder.spec.model for sample in self.samples]
        return [
            _reduced(config, self._needed(config.out, model, probes[model]))
            for config, model in zip(self.extracts, models, strict=True)
        ]

    def _needed(self, store: str, model: str, probes: Sequence[LayerProbe]) -> set[ActivationColumn]:
        """The columns that the probe chose and, for the gate, those that the published router reads.

        All columns of the store, if these are among them: what a router no longer reads is no reason to start again.
        """
        needed = {column.unnamed for column in joint_columns(probes)}
        if storage.exists(storage.join(self.config.publish, ROUTER)):
            router = Router.load(self.config.publish)
            read = [name for name, identity in router.encoders.items() if identity.spec.model == model]
            needed |= {column.unnamed for column in router.columns if column.encoder in read}
        stored = set(ActivationStore.open(store).columns) if storage.exists(storage.join(store, MANIFEST)) else set()
        return stored if needed <= stored else needed

    @property
    def _activations(self) -> str:
        return _stores(self.extracts)

    @cached_property
    def train(self) -> TrainConfig:
        data = {"activations": self._activations, "outcomes": self.outcomes, "pool": self.config.pool}
        where = {"out": self._below("router"), "corpus": self.corpus}
        return self._stage(
            TrainConfig, "train", **data, **where, **self._threshold, ignore_unknown=True, overwrite=True
        )

    @cached_property
    def evaluate(self) -> EvaluateConfig:
        data = {"router": self.train.out, "activations": self._activations, "outcomes": self.outcomes}
        return self._stage(
            EvaluateConfig, "evaluate", **data, out=self._below("report"), probe=self.probe.out, ignore_unknown=True
        )

    @property
    def _threshold(self) -> dict[str, float]:
        return {} if self.config.correct_at is None else {"correct_at": self.config.correct_at}

    def _stage(self, model: type[C], command: str, **given: Any) -> C:
        """The config of a step: the options `given` by the pipeline, which override the file's table for the command.

        Raises UserError if that table has another input than [pipeline].
        """
        table = self._tables[command]
        others = [key for key in given if key in table and table[key] != given[key]]
        if inputs := [key for key in others if key in _INPUTS]:
            key = inputs[0]
            raise UserError(
                f'{self.config.file}: [{command}] {key} = "{table[key]}" contradicts [pipeline] {key} = '
                f'"{given[key]}": remove it from [{command}]'
            )
        self._ignored.update(f"[{command}] {key}" for key in others)
        return validate(model, {**table, **given}, command)

    def _below(self, name: str) -> str:
        return storage.join(self.config.out, name)

    # --- up-to-date steps ---------------------------------------------------------------------------------------------

    def _is_current(self, step: Step) -> bool:
        done = self._state.get(step.name)
        if done is None or not all(map(storage.exists, step.outputs)):
            return False
        if done.reads == _hash(step.reads()):
            return True
        if step.content is None or done.content != step.content():
            return False
        self._remember(step)
        return True

    def _remember(self, step: Step) -> None:
        content = step.content() if step.content is not None else None
        self._state[step.name] = StepRecord(reads=_hash(step.reads()), content=content)
        storage.write_json(self._state_uri, {name: done.model_dump() for name, done in self._state.items()})

    def _graded_sample(self) -> str:
        """A digest of the sample and its training outcomes, the only ones that affect the choice of layers."""
        graded = GradedStore.open(
            self.probe.activations,
            self.outcomes,
            self.config.pool,
            ignore_unknown=True,
            groups=split_groups_of(self.train),
            correct_at=self.probe.correct_at,
        )
        answers = graded.only(split_of(self.train, 0), Part.TRAIN).answers(np.sort(graded.keys))
        digest = hashlib.sha256(_digest(*_manifests(self.samples)).encode())
        digest.update(np.ascontiguousarray(answers.correct).tobytes())
        digest.update(_hash(_settings(self.probe)).encode())
        return digest.hexdigest()


def _settings(*configs: StrictModel) -> Any:
    """The options of each config that affect its output."""
    size = {"workers", "gpus_per_worker", "accelerator", "memory_per_worker", "overwrite"}
    each = [config.model_dump(mode="json", exclude=size) for config in configs]
    return each[0] if len(each) == 1 else each


def _stores(configs: Sequence[ExtractConfig]) -> str:
    return ",".join(config.out for config in configs)


def _manifests(configs: Sequence[ExtractConfig]) -> list[str]:
    return [storage.join(config.out, MANIFEST) for config in configs]


def _reduced(config: ExtractConfig, columns: Set[ActivationColumn]) -> ExtractConfig:
    """The extraction of some columns of its encoder."""
    layers, pooling = {column.layer for column in columns}, {column.pooling for column in columns}
    if pooling == {SENTENCE}:
        return config
    chosen = {"layers": ",".join(map(str, sorted(layers))), "pooling": ",".join(sorted(pooling))}
    return config.model_copy(update=chosen)


def _stamps(uri: str) -> dict[str, str]:
    for part in corpora(uri):
        storage.require(part, "file or folder")
    return {file: storage.stamp(file) for file in files(uri)}


def _digest(*uris: str) -> str:
    digest = hashlib.sha256()
    for uri in uris:
        digest.update(storage.read_bytes(uri))
    return digest.hexdigest()


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
