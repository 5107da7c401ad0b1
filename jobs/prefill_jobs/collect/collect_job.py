"""`collect`: sends a corpus to the targets of a pool and writes their answers and outcomes.

The driver recovers the answers of interrupted runs, makes every call that has no answer within the rate limits and the
budget, then grades all answers. Answers are keyed by the call, so that none is paid for twice and regrading is free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.collect import stored_answers
from prefill_jobs.collect.collector import AskTask, CallActor, ShardCaller
from prefill_jobs.collect.grading import JUDGE_ASKED, ROW_COLUMNS, GradeTask, Grading, ShardJudge, grade_shard, unasked
from prefill_jobs.collect.prompt_selection import PromptSelection, estimation
from prefill_jobs.collect.stored_answers import Spending
from prefill_jobs.option_fields import names_in
from prefill_jobs.options import CollectConfig
from prefill_jobs.runtime import cluster, ray_tasks, shared_objects
from prefill_jobs.runtime.progress import Progress, counted
from prefill_router import storage
from prefill_router.collection.shared_budget import SharedBudget
from prefill_router.collection.target_calls import Asked, Spent
from prefill_router.common.console import doing, say
from prefill_router.common.errors import UserError
from prefill_router.common.validation import StrictModel
from prefill_router.corpus.plan import CorpusPlan, in_order, plan
from prefill_router.corpus.quarantine import write_quarantine
from prefill_router.corpus.reader import MAX_PROMPT_BYTES, refuse_output, report_unread
from prefill_router.encoder.prefill_work import Work
from prefill_router.graders import BoundedGrader, Grader, bounded, load_grader
from prefill_router.policy.pool import Pool, Target, load_pool
from prefill_router.storage.lease import Lease
from prefill_router.storage.parquet_objects import MANIFEST, ShardFile, remove_shards

_CALLS = 4  # concurrent shards per actor, so that it always has calls to make
_JUDGEMENTS = 2  # per answer: one with the reference first, one with it last
_NO_LIMIT = Spent(1e15, 1 << 60)

T = TypeVar("T")


class CollectManifest(StrictModel):
    """manifest.json: commits the outcomes, and is written last."""

    format: int = 1
    asked: dict[str, Any]
    spending: dict[str, Spending]
    missing: int  # calls without an answer
    left_out: int  # missing calls that the budget did not allow, in the latest run
    outcomes: int
    graded: int
    files: list[ShardFile]


def collect(config: CollectConfig) -> CollectManifest:
    """Writes answers/ and outcomes/ below `config.out` and last the manifest, which it returns.

    Prompts that the grader cannot grade are not sent; they go to quarantine/.

    Raises UserError for a target without an upstream, an unknown grader, or a grader that can grade no prompt.
    """
    pool, grader, judge = _pool(config), _grader(config), _judge(config)
    if config.sample_by == "active" and config.sample is not None and config.router is None:
        raise UserError("sample_by = active: requires a router that estimates the prompts: give --router")
    if config.router is not None and config.sample_by == "active":
        estimation(config, pool).check()
    asked = Asked(config.max_output_tokens, config.temperature, config.seed)
    storage.require(config.corpus, "corpus")
    refuse_output(config.out, config.corpus)
    report_unread(config.corpus, "collect")
    with Lease.acquire(config.out, "collect") as lease, cluster.connected():
        planned = plan(config.corpus, config.shard_rows, config.limit, keep_repeats=True, spread=ray_tasks.spread)
        return _Collection(config, pool, asked, grader, judge, planned, lease).run()


class _Collection:
    def __init__(
        self,
        config: CollectConfig,
        pool: Pool,
        asked: Asked,
        grader: Grader | BoundedGrader | None,
        judge: Target | None,
        planned: CorpusPlan,
        lease: Lease,
    ) -> None:
        self.config, self.pool, self.asked, self.grader, self.judge = config, pool, asked, grader, judge
        self.plan, self.lease, self.out = planned, lease, storage.absolute(config.out)
        self._selection = PromptSelection(config, pool, asked, planned, self._grading({}), lease)

    def run(self) -> CollectManifest:
        with doing("looking for kept answers"):
            stored_answers.recover(self.out)
            answered = stored_answers.answered_calls(self.out)
        with doing("choosing prompts"):
            wanted = self._selection.wanted({*answered})
        left_out = 0
        if not self.config.regrade:
            left_out = self._ask(answered, wanted)
            answered = stored_answers.answered_calls(self.out)
        tasks = self._grade_tasks(answered)
        grading = self._grading(answered)
        if self.judge is not None:
            left_out += self._judge(tasks, grading)
            grading = replace(grading, answered=stored_answers.answered_calls(self.out))
        self.lease.check()
        return self._grade(tasks, grading, self._num_missing(answered, wanted), left_out)

    def _ask(self, answered: dict[str, str], wanted: NDArray[np.bool_]) -> int:
        """Makes every call that has no answer. Returns how many calls the budget did not allow."""
        tasks, num_calls = self._tasks(answered, wanted)
        return self._make(ShardCaller, tasks, self.pool, self.asked, "collect", num_calls)

    def _judge(self, tasks: Sequence[GradeTask], grading: Grading) -> int:
        """Asks the judge about every answer. Returns how many calls the budget did not allow."""
        assert self.judge is not None
        pool = self.pool.model_copy(update={"targets": (self.judge,)})
        num_calls = _JUDGEMENTS * len(grading.targets) * sum(task.shard.rows for task in tasks)
        return self._make(partial(ShardJudge, grading), tasks, pool, JUDGE_ASKED, "judge", num_calls)

    def _make(
        self,
        create: Callable[..., CallActor[T]],
        tasks: Sequence[T],
        pool: Pool,
        asked: Asked,
        what: str,
        num_calls: int,
    ) -> int:
        """Makes the calls of tasks on actors. Returns how many calls the budget did not allow."""
        at_once = self.config.workers * _CALLS
        progress = Progress(what, num_calls, unit="calls", at_once=at_once)
        if not tasks:
            return 0
        left = self._budget()
        for spending in stored_answers.spending_by_target(self.out).values():
            left -= Spent(spending.cost_usd + spending.lost_usd, spending.tokens)
        build = partial(
            create,
            pool=pool,
            asked=asked,
            out=self.out,
            attempts=self.config.attempts,
            num_workers=self.config.workers,
            max_prompt_bytes=MAX_PROMPT_BYTES,
            budget=shared_objects.Shared(SharedBudget, left, is_kept=True),
        )
        options = cluster.caller_resources(self.config.workers, _CALLS)
        left_out, reasons = 0, Counter[str]()
        with progress.shown():
            for done in ray_tasks.map_on_actors(build, tasks, **options):
                self.lease.check()
                left_out += done.left_out
                reasons.update(done.reasons)
                progress.add(done.answered + done.failed + done.left_out, Work())
        if reasons:
            (most_often, _), *_ = reasons.most_common(1)
            say(
                f"{what}: {reasons.total():,} calls failed (most often {most_often}): their answers are missing; run "
                "the job again to retry them"
            )
        if left_out:
            say(f"{what}: {left_out:,} calls were not made: the budget is used up")
        return left_out

    def _tasks(self, answered: dict[str, str], wanted: NDArray[np.bool_]) -> tuple[list[AskTask], int]:
        tasks, num_calls = [], 0
        for shard, span in self.plan.spans():
            rows = np.flatnonzero(wanted[span])
            keys = [key for row in (span.start + rows).tolist() for key in self._selection.keys(row)]
            missing = sum(key not in answered for key in keys)
            if missing:
                elsewhere = frozenset(key for key in keys if answered.get(key, shard.digest) != shard.digest)
                tasks.append(AskTask(shard, tuple(rows.tolist()), elsewhere))
                num_calls += missing
        return tasks, num_calls

    def _budget(self) -> Spent:
        usd, tokens = self.config.budget_usd, self.config.budget_tokens
        return Spent(_NO_LIMIT.usd if usd is None else usd, _NO_LIMIT.tokens if tokens is None else tokens)

    def _num_missing(self, answered: dict[str, str], wanted: NDArray[np.bool_]) -> int:
        return sum(key not in answered for row in np.flatnonzero(wanted).tolist() for key in self._selection.keys(row))

    def _grade_tasks(self, answered: dict[str, str]) -> list[GradeTask]:
        """A task per shard that has an answer to any of its prompts, including repeated ones."""
        tasks = []
        for shard, rows in self.plan.spans():
            keys = (key for row in range(rows.start, rows.stop) for key in self._selection.keys(row))
            sources = tuple(sorted({answered[key] for key in keys if key in answered}))
            if sources:
                tasks.append(GradeTask(shard, sources))
        return tasks

    def _grading(self, answered: dict[str, str]) -> Grading:
        return Grading(
            out=self.out,
            targets=self.pool.targets,
            asked=self.asked,
            grader=self.grader,
            columns=tuple(dict.fromkeys([*ROW_COLUMNS, *_named(self.grader)])),
            max_prompt_bytes=MAX_PROMPT_BYTES,
            judge=self.judge,
            answered=answered if self.judge is not None else {},
        )

    def _grade(self, tasks: Sequence[GradeTask], grading: Grading, num_missing: int, left_out: int) -> CollectManifest:
        found = ray_tasks.map_items(partial(grade_shard, grading=grading), tasks) if tasks else iter(())
        shards = list(counted(found, "grade", len(tasks), "shards"))
        files = sorted((shard.file for shard in shards if shard.file is not None), key=lambda file: file.name)
        write_quarantine(self.config.out, in_order([*self.plan.bad, *self._selection.bad]))
        manifest = CollectManifest(
            asked=asdict(self.asked),
            spending=stored_answers.spending_by_target(self.out),
            missing=num_missing,
            left_out=left_out,
            outcomes=sum(shard.outcomes for shard in shards),
            graded=sum(shard.graded for shard in shards),
            files=files,
        )
        self.lease.check()
        storage.write_json(storage.join(self.config.out, MANIFEST), manifest.model_dump())
        remove_shards(storage.join(self.out, "outcomes"), keep={file.name for file in files})
        return manifest


def _pool(config: CollectConfig) -> Pool:
    """The targets to call. Raises UserError for an unknown target or one without an upstream."""
    pool = load_pool(config.pool)
    names = names_in(config.targets) or pool.target_names
    if unknown := [name for name in names if name not in pool.target_names]:
        raise UserError(f'targets: "{unknown[0]}" is not in the pool: {", ".join(pool.target_names)}')
    targets = tuple(target for target in pool.targets if target.name in names)
    for target in targets:
        if target.upstream is None and not config.regrade:
            raise UserError(
                f'{config.pool}: target "{target.name}" has no upstream: add one, or exclude the target with --targets'
            )
    return pool.model_copy(update={"targets": targets})


def _grader(config: CollectConfig) -> Grader | BoundedGrader | None:
    if config.grader is None:
        if config.regrade:
            raise UserError("regrade: requires a grader: give --grader")
        return None
    options = storage.read_toml(config.grader_options) if config.grader_options else {}
    if config.grader == "judge" and config.judge is None:
        raise UserError("grader = judge: requires a target of the pool that judges: give --judge")
    return bounded(load_grader(config.grader, {**options, **({"ask": unasked} if config.judge else {})}))


def _judge(config: CollectConfig) -> Target | None:
    if config.judge is None:
        return None
    judge = next((target for target in load_pool(config.pool).targets if target.name == config.judge), None)
    if judge is None or judge.upstream is None:
        raise UserError(f'judge = "{config.judge}", must be a target of {config.pool} with an upstream')
    return judge


def _named(grader: Grader | BoundedGrader | None) -> list[str]:
    """Option values of a grader that may be names of columns."""
    return [] if grader is None else [value for value in grader.options.values() if isinstance(value, str)]
