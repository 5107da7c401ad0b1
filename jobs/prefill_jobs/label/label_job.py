"""`label`: writes a decision for every line of a query log, and a report of the log's cost.

The driver plans the log, estimates each prompt that no earlier run has estimated, allocates the budget if there is one,
and decides for every line. Estimates are keyed by a prompt's content, decisions by a line's position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prefill_jobs.extract.extract_job import extract_for
from prefill_jobs.label.decider import DAY, DecideContext, DecidedShard, DecideTask, decide_shard, total_object
from prefill_jobs.label.estimation import Estimation, KeptEstimates
from prefill_jobs.option_fields import names_in
from prefill_jobs.options import ExtractConfig, LabelConfig
from prefill_jobs.runtime import cluster, ray_tasks
from prefill_jobs.runtime.progress import counted
from prefill_router import storage
from prefill_router.baselines import any_router
from prefill_router.baselines.baseline_router import BaselineRouter
from prefill_router.common.console import doing, say
from prefill_router.common.errors import UserError
from prefill_router.common.validation import StrictModel, validate
from prefill_router.corpus.plan import SHARD_ROWS, CorpusPlan, in_order, plan
from prefill_router.corpus.quarantine import read_quarantine, write_quarantine
from prefill_router.corpus.reader import BadRow, files, refuse_output, report_unread
from prefill_router.policy.decision import Policy
from prefill_router.policy.pool import load_pool
from prefill_router.query_log.aggregates import TOLERANCES, UNKNOWN, Tally
from prefill_router.query_log.allocation import Allocation, Totals, solve
from prefill_router.query_log.assignment import LogPolicy
from prefill_router.query_log.estimates import Contents
from prefill_router.reports.label_page import LabelReport, write_report
from prefill_router.router.artifact import Router
from prefill_router.storage import parquet_objects
from prefill_router.storage.lease import Lease
from prefill_router.storage.parquet_objects import ShardFile

_ESTIMATES, _DECISIONS = "estimates", "decisions"
_SHARD_LINES = 1024  # by default


class LogFile(StrictModel):
    """A file of the log whose lines are decided."""

    uri: str
    bytes: int


class LabelManifest(StrictModel):
    """manifest.json: commits the decisions, and is written last."""

    format: int = 2
    router_version: str
    settings: dict[str, Any] = Field(description="Options that determine the decisions")
    inputs: list[LogFile]
    files: list[ShardFile]
    lines: int
    repeated: int = Field(description="Lines whose prompt repeats an earlier one, computed once")
    computed: int = Field(description="Prompts that the encoder read in the latest run")
    quarantined: int
    decisions: dict[str, int]
    tally: list[dict[str, Any]] = Field(description="Aggregates of the report, to which later runs add")


def label(config: LabelConfig) -> LabelManifest:
    """Writes decisions and their report to `config.out`, and last the manifest, which it returns.

    Raises UserError if the log cannot be read, `config.out` has output of another kind, or the budget is too small.
    """
    router = any_router.load(config.router)
    policy = _policy(config, router)
    storage.require(config.log, "log")
    refuse_output(config.out, config.log)
    _estimation(config, router).check()
    report_unread(config.log, "label")
    with Lease.acquire(config.out, "label") as lease:
        before = _before(config, router, policy)
        inputs = _new_files(config, before)
        if before is not None and not inputs:
            say(f"label: no new file in {config.log}")
            _keep_activations(config, router)
            return before
        with cluster.connected():
            num_read = _keep_activations(config, router)
            planned = plan(
                config.log,
                config.shard_rows,
                config.limit,
                config.max_prompt_bytes,
                keep_repeats=True,
                only=[file.uri for file in inputs],
                spread=ray_tasks.spread,
                default_rows=_SHARD_LINES if config.activations is None else SHARD_ROWS,  # as in the store
            )
            planned.check_bad(planned.bad, config.max_bad_fraction)
            return _Labelling(config, router, policy, planned, inputs, before, lease).run(num_read)


class _Labelling:
    def __init__(
        self,
        config: LabelConfig,
        router: Router | BaselineRouter,
        policy: LogPolicy,
        planned: CorpusPlan,
        inputs: list[LogFile],
        before: LabelManifest | None,
        lease: Lease,
    ) -> None:
        self.config, self.router, self.policy, self.plan = config, router, policy, planned
        self.inputs, self.before, self.lease = inputs, before, lease
        self.estimation = _estimation(config, router)
        self.estimates = self.estimation.out
        self.decisions = storage.absolute(storage.join(config.out, _DECISIONS))

    def run(self, num_read: int) -> LabelManifest:
        """Estimates and decides. `num_read` prompts were already read for `--activations`."""
        self._say()
        computed = num_read + self.estimation.run(self.plan, self.lease, "label")
        held = KeptEstimates.read(self.estimates)
        places = held.index.find(self._contents)
        with doing("allocating the budget"):
            allocation = self._allocate(held, places)
        decided = self._decide(held, places, replace(self.policy, allocation=allocation))
        bad = in_order([*self.plan.bad, *decided.bad])
        self.plan.check_bad(bad, self.config.max_bad_fraction)
        self.lease.check()
        with doing("writing the report"):
            return self._finish(decided, bad, computed, allocation)

    def _say(self) -> None:
        num_lines, repeated = self.plan.num_rows - len(self.plan.bad), self.plan.num_repeated
        if repeated:
            say(f"label: {repeated:,} of {num_lines:,} lines repeat a prompt and are computed once")
        if self.plan.bad:
            say(f"label: {len(self.plan.bad):,} invalid lines go to the quarantine; {self.plan.bad[0].message}")

    @property
    def _contents(self) -> Contents:
        return self.plan.keys[:, 1:]

    def _allocate(self, held: KeptEstimates, places: NDArray[np.int64]) -> Allocation | None:
        """Allocates the budget, if there is one, in a few passes over the estimates of the log's prompts."""
        if self.config.budget_usd is None:
            return None
        weights = held.by_object(np.bincount(places, minlength=len(held.owners)))
        items = [(name, counts) for name, counts in weights.items() if counts.any()]

        def evaluate(prices: NDArray[np.float64]) -> Totals:
            task = partial(total_object, uri=self.estimates, policy=self.policy, prices=prices)
            found = list(ray_tasks.map_items(task, items))
            return Totals(*(np.sum(values, axis=0) for values in zip(*found, strict=True)))

        typical = self.policy.pool.expected_cost(np.array([1000]), np.full((1, len(self.policy.pool.targets)), 500.0))
        return solve(self.config.budget_usd, float(typical.mean()), evaluate)

    def _decide(self, held: KeptEstimates, places: NDArray[np.int64], policy: LogPolicy) -> DecidedShard:
        context = DecideContext(
            log=storage.absolute(self.config.log),
            out=self.decisions,
            estimates=self.estimates,
            policy=policy,
            router_version=self.router.version,
            max_prompt_bytes=self.config.max_prompt_bytes,
            by=names_in(self.config.by),
            time=self.config.time,
            partition_by=names_in(self.config.partition_by) or None,
        )
        tasks = [
            DecideTask(shard.located(), rows.start, held.names_of(places[rows])) for shard, rows in self.plan.spans()
        ]
        if self.before is None:  # removes the output of an earlier or unfinished run
            storage.remove(storage.join(self.config.out, parquet_objects.MANIFEST))
            parquet_objects.remove_shards(self.decisions, at_any_depth=True)
        whole = DecidedShard([], Tally(), [])
        found = ray_tasks.map_items(partial(decide_shard, context=context), tasks)
        for part in counted(found, "decide", len(tasks), "shards"):
            whole.files.extend(part.files)
            whole.bad.extend(part.bad)
            whole.tally.merge(part.tally)
        return whole

    def _finish(
        self, decided: DecidedShard, bad: Sequence[BadRow], computed: int, allocation: Allocation | None
    ) -> LabelManifest:
        before, config, out = self.before, self.config, self.config.out
        tally = decided.tally if before is None else Tally.from_json(before.tally).merge(decided.tally)
        names = self.policy.pool.target_names
        for column in tally.columns:
            if tally.values_of(column) == [UNKNOWN]:
                say(f"label: no line has a value in column {column}: check --by and --time for {config.log}")
        bad = [*self._bad_before(), *bad]
        write_quarantine(out, bad)
        report = LabelReport(
            router_version=self.router.version,
            pool=self.policy.pool,
            tolerance=self.policy.tolerance,
            allocation=allocation,
            tally=tally,
            num_quarantined=len(bad),
            about={"Log": config.log, "Router": config.router},
        )
        write_report(out, report)
        everything = tally.everything
        counts = {name: int(count) for name, count in zip(names, everything["chosen"], strict=True) if count}
        if undecided := int(everything["lines"] - everything["chosen"].sum()):
            counts["none"] = undecided
        files = sorted([*(before.files if before else []), *decided.files], key=lambda file: file.name)
        manifest = LabelManifest(
            router_version=self.router.version,
            settings=_settings(config, self.policy),
            inputs=[*(before.inputs if before else []), *self.inputs],
            files=files,
            lines=int(everything["lines"]),
            repeated=self.plan.num_repeated + (before.repeated if before else 0),
            computed=computed,
            quarantined=len(bad),
            decisions=counts,
            tally=tally.to_json(),
        )
        self.lease.check()
        storage.write_json(storage.join(out, parquet_objects.MANIFEST), manifest.model_dump())
        parquet_objects.remove_shards(self.decisions, keep={file.name for file in files}, at_any_depth=True)
        return manifest

    def _bad_before(self) -> list[BadRow]:
        """The quarantined lines of files decided by earlier runs."""
        known = {file.uri for file in self.before.inputs} if self.before is not None else set()
        return [row for row in read_quarantine(self.config.out) if row.uri in known]


def _estimation(config: LabelConfig, router: Router | BaselineRouter) -> Estimation:
    """The router's estimation of the log."""
    out = storage.absolute(storage.join(config.out, _ESTIMATES, router.version))
    actors = cluster.Actors(config.workers, config.gpus_per_worker, config.accelerator, config.memory_per_worker)
    return Estimation(router, config.router, out, actors, config.max_prompt_bytes, config.activations)


def _keep_activations(config: LabelConfig, router: Router | BaselineRouter) -> int:
    """Extracts the whole log to `--activations`, if given, and returns how many prompts the encoders read."""
    if config.activations is None:
        return 0
    assert isinstance(router, Router)
    shared = {"limit", "max_prompt_bytes", "max_bad_fraction", "shard_rows"}
    workers = {"workers", "gpus_per_worker", "accelerator", "memory_per_worker"}
    extraction = ExtractConfig(corpus=config.log, out=config.activations, **config.model_dump(include=shared | workers))
    return max(summary.work.prompts for summary in extract_for(router, extraction).values())


def _policy(config: LabelConfig, router: Router | BaselineRouter) -> LogPolicy:
    pool = router.pool if config.pool is None else router.with_pool(load_pool(config.pool)).pool
    known = {name: t for t, name in enumerate(router.pool.target_names)}
    if config.incremental and config.limit is not None:
        raise UserError("incremental and limit: incremental runs decide whole files: give one of the two options")
    if config.budget_usd is not None and config.tolerance is not None:
        raise UserError("budget_usd and tolerance: a budget replaces the tolerance: give one of the two options")
    if config.activations is not None and not isinstance(router, Router):
        raise UserError(f"activations: {config.router} is a baseline, which reads no activations: omit --activations")
    if config.activations is not None and storage.absolute(config.activations) == storage.absolute(config.out):
        raise UserError(f"activations: {config.activations} is the --out folder: choose another folder")
    for column in names_in(config.partition_by):
        if column == DAY and config.time is None:
            raise UserError("partition_by = day: name the column with the timestamp: give --time")
        if column != DAY and column not in names_in(config.by):
            raise UserError(f"partition_by = {column}, must be day or a column of --by")
    return LogPolicy(
        pool=pool,
        outputs=tuple(known[name] for name in pool.target_names),
        tolerance=router.default_tolerance if config.tolerance is None else config.tolerance,
        allowed=Policy(allowed=names_in(config.targets) or None).mask(pool),
        max_cost_usd=config.max_cost,
        min_p_correct=config.min_p,
    )


def _settings(config: LabelConfig, policy: LogPolicy) -> dict[str, Any]:
    """The options that must not change between incremental runs."""
    return {
        "pool": policy.pool.model_dump(mode="json"),
        "tolerance": None if config.budget_usd is not None else policy.tolerance,
        "allowed": policy.allowed.tolist(),
        "grid of tolerances": len(TOLERANCES),  # the report adds up costs at each
        **config.model_dump(include={"log", "max_cost", "min_p", "by", "time", "partition_by"}),
    }


def _before(config: LabelConfig, router: Router | BaselineRouter, policy: LogPolicy) -> LabelManifest | None:
    """The finished run that this one adds to, or None. Raises UserError if the existing output must not be changed."""
    path = storage.join(config.out, parquet_objects.MANIFEST)
    finished = storage.exists(path)
    if not config.incremental:
        if finished and not config.overwrite:
            raise UserError(
                f"{config.out}: already has decisions: add those of new files with --incremental, or replace them with "
                "--overwrite"
            )
        return None
    if not finished:
        return None
    before = validate(LabelManifest, storage.read_json(path), path)
    settings = _settings(config, policy)
    changed = [name for name, value in settings.items() if before.settings.get(name) != value]
    if before.router_version != router.version:
        changed.insert(0, "router")
    if changed:
        raise UserError(
            f"{config.out}: was decided with another {changed[0]}, which must not change between incremental runs: "
            "replace all decisions with --overwrite"
        )
    return before


def _new_files(config: LabelConfig, before: LabelManifest | None) -> list[LogFile]:
    """The log's files that are not decided yet. Raises UserError if a decided file has changed."""
    known = {file.uri: file.bytes for file in before.inputs} if before is not None else {}
    new = []
    uris = files(config.log)
    for uri, size in zip(uris, storage.sizes_bytes(uris), strict=True):
        if known.get(uri, size) != size:
            raise UserError(f"{uri}: changed since it was decided: replace all decisions with --overwrite")
        if uri not in known:
            new.append(LogFile(uri=uri, bytes=size))
    return new
