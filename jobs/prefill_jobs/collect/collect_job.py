"""`collect`: sends a corpus to the targets of a pool and writes their answers and outcomes.

The driver recovers the answers of interrupted runs, makes every call that has no answer within the rate limits and the
budget, then grades all answers. Answers are keyed by the call, so that none is paid for twice and regrading is free.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefill_jobs.collect.collector import AskedShard, AskShard, AskTask
from prefill_jobs.collect.grading import JUDGE_ASKED, ROW_COLUMNS, GradeTask, Grading, JudgeShard, grade_shard, unasked
from prefill_jobs.label.estimation import Estimation, Held
from prefill_jobs.option_fields import names_in
from prefill_jobs.options import CollectConfig
from prefill_jobs.runtime import cluster
from prefill_jobs.runtime.progress import Progress
from prefill_router import storage
from prefill_router.baselines import any_router
from prefill_router.collection.answers import ShardPlace, load_states, write_states
from prefill_router.collection.purse import Purse
from prefill_router.collection.target_calls import Asked, Spent, call_key
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import COST_USD, TARGET
from prefill_router.common.validation import StrictModel
from prefill_router.corpus.plan import CorpusPlan, in_order, plan, read_shard
from prefill_router.corpus.quarantine import write_quarantine
from prefill_router.corpus.reader import MAX_PROMPT_BYTES, BadRow, refuse_output, report_unread
from prefill_router.encoder.prefill_work import Work
from prefill_router.graders import BoundedGrader, Grader, bounded, load_grader
from prefill_router.policy.pool import Pool, Target, load_pool
from prefill_router.query_log.estimates import Contents, PromptEstimates
from prefill_router.query_log.sampling import active, at_random, stratified
from prefill_router.storage.lease import Lease
from prefill_router.storage.parquet_objects import MANIFEST, ShardFile, remove_shards

_CALLS = 4  # concurrent shards per actor, so that it always has calls to make
_JUDGEMENTS = 2  # per answer: one with the reference first, one with it last
_NO_LIMIT = Spent(1e15, 1 << 60)


class Spending(StrictModel):
    """Spending on one target by all runs."""

    answers: int
    cost_usd: float
    lost_usd: float  # upper bound for failed attempts that may have been billed
    tokens: int  # of answers and failed attempts


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
        _estimation(config, pool).check()
    asked = Asked(config.max_output_tokens, config.temperature, config.seed)
    storage.require(config.corpus, "corpus")
    refuse_output(config.out, config.corpus)
    report_unread(config.corpus, "collect")
    with Lease.acquire(config.out, "collect") as lease, cluster.connected():
        planned = plan(config.corpus, config.shard_rows, config.limit, keep_repeats=True, spread=cluster.spread)
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

    def run(self) -> CollectManifest:
        self._take_in()
        answered = self._answered()
        wanted = self._wanted(answered)
        left_out = 0
        if not self.config.regrade:
            left_out = self._ask(answered, wanted)
            answered = self._answered()
        tasks = self._grade_tasks(answered)
        grading = self._grading(answered)
        if self.judge is not None:
            left_out += self._judge(tasks, grading)
            grading = replace(grading, answered=self._answered())
        self.lease.check()
        return self._grade(tasks, grading, self._num_missing(answered, wanted), left_out)

    @cached_property
    def _contents(self) -> Contents:
        return np.ascontiguousarray(self.plan.keys[:, 1:])

    def _keys(self, content: NDArray[np.uint64]) -> list[str]:
        """The keys of one prompt's calls, one per target."""
        digest = content.tobytes().hex()
        return [call_key(digest, target.name, self.asked) for target in self.pool.targets]

    def _wanted(self, answered: dict[str, str]) -> NDArray[np.bool_]:
        """Whether each row (N,) of the corpus is sent: the first gradable row of each content, or a sample of these."""
        contents, size = self._contents, self.config.sample
        rows, wanted = self._askable(), np.zeros(len(self._contents), np.bool_)
        if size is None:
            wanted[rows] = True
            return wanted
        is_asked = np.array([any(key in answered for key in self._keys(contents[row])) for row in rows], np.bool_)
        kept, others = rows[is_asked], rows[~is_asked]
        drawn = others[self._draw(others, max(0, size - len(kept)))]
        wanted[kept] = wanted[drawn] = True
        return wanted

    def _askable(self) -> NDArray[np.int64]:
        """The first gradable row of each content. Raises UserError if the grader can grade no row."""
        fit = np.flatnonzero([bad is None for bad in self._unfit])
        if not len(fit):
            raise UserError(
                f"{self.config.corpus}: grader {self.config.grader} can grade none of {len(self._unfit):,} prompts "
                f"({_first(self._unfit)}), so that none is sent: fix the corpus, or name its columns in "
                "--grader-options; existing answers are kept for --regrade"
            )
        if len(fit) < len(self._unfit):
            say(
                f"collect: {len(self._unfit) - len(fit):,} prompts cannot be graded and are not sent "
                f"({_first(self._unfit)}): see quarantine/rows.parquet"
            )
        _, firsts = np.unique(self._contents[fit], axis=0, return_index=True)
        return np.sort(fit[firsts])

    @cached_property
    def _unfit(self) -> list[BadRow | None]:
        """For each row (N,) the reason why it cannot be graded, or None."""
        if self.grader is None:
            return [None] * len(self._contents)
        return [bad for rows in cluster.spread(self._grading({}).unfit, self.plan.shards) for bad in rows]

    def _draw(self, rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Samples `size` of these rows, and returns their indices in `rows`."""
        contents = self._contents[rows]
        if self.config.sample_by == "random":
            return at_random(contents, size)
        if self.config.sample_by == "stratified":
            return stratified(contents, [self._strata[row] for row in rows], size)
        return active(contents, self._p_correct(contents), size)

    @cached_property
    def _strata(self) -> list[str]:
        """The stratum of each row (N,)."""
        shards = (read_shard(shard, extras=[self.config.stratum]) for shard in self.plan.shards)
        strata = [row.extras[0] for rows in shards for row in rows]
        if all(value is None for value in strata):
            raise UserError(
                f"{self.config.corpus}: column {self.config.stratum} is missing: name another with --stratum"
            )
        return [str(value) for value in strata]

    def _p_correct(self, contents: Contents) -> NDArray[np.float32]:
        """The router's P(correct) (N, T) of prompts, for the targets that are both in its pool and to be called."""
        estimation = _estimation(self.config, self.pool)
        estimation.run(self.plan, self.lease, "sample")
        held = Held.read(estimation.out)
        p = np.concatenate([PromptEstimates.load(estimation.out, name).p_correct for name in held.names])
        names = estimation.router.pool.target_names
        known = [t for t, name in enumerate(names) if name in self.pool.target_names]
        return p[held.index.find(contents)][:, known]

    def _take_in(self) -> None:
        """Recovers answers from the journals of interrupted runs into their shards."""
        for name in storage.list_names(storage.join(self.out, "journal")):
            place = ShardPlace(self.out, name)
            write_states(place, load_states(place))

    def _answered(self) -> dict[str, str]:
        """Maps the key of each answered call to the shard that has its answer."""
        answered = {}
        for name in self._objects():
            table = storage.read_table(storage.join(self.out, "answers", name), ["key", "answer"])
            is_answered = table["answer"].is_valid().to_pylist()
            for key, has in zip(table["key"].to_pylist(), is_answered, strict=True):
                if has:
                    answered[key] = name.removeprefix("part-").removesuffix(".parquet")
        return answered

    def _objects(self) -> list[str]:
        names = storage.list_names(storage.join(self.out, "answers"))
        return [name for name in names if name.endswith(".parquet")]

    def _spending(self) -> dict[str, Spending]:
        uris = [storage.join(self.out, "answers", name) for name in self._objects()]
        tables = [storage.read_table(uri, _SPENT) for uri in uris]
        if not tables:
            return {}
        wanted = [("answer", "count"), *((name, "sum") for name in _SPENT[2:])]
        sums = pa.concat_tables(tables).group_by(TARGET).aggregate(wanted)
        return {
            row[TARGET]: Spending(
                answers=row["answer_count"],
                cost_usd=row[f"{COST_USD}_sum"],
                lost_usd=row["lost_usd_sum"],
                tokens=row["tokens_sum"] + row["lost_tokens_sum"],
            )
            for row in sums.sort_by(TARGET).to_pylist()
        }

    def _ask(self, answered: dict[str, str], wanted: NDArray[np.bool_]) -> int:
        """Makes every call that has no answer. Returns how many calls the budget did not allow."""
        tasks, num_calls = self._tasks(answered, wanted)
        return self._make(AskShard, tasks, self.pool, self.asked, "collect", num_calls)

    def _judge(self, tasks: Sequence[GradeTask], grading: Grading) -> int:
        """Asks the judge about every answer. Returns how many calls the budget did not allow."""
        assert self.judge is not None
        pool = self.pool.model_copy(update={"targets": (self.judge,)})
        num_calls = _JUDGEMENTS * len(grading.targets) * sum(task.shard.rows for task in tasks)
        return self._make(JudgeShard, tasks, pool, JUDGE_ASKED, "judge", num_calls, grading=grading)

    def _make(
        self, worker: type, tasks: Sequence[Any], pool: Pool, asked: Asked, what: str, num_calls: int, **more: Any
    ) -> int:
        """Makes the calls of tasks on actors of type `worker`. Returns how many calls the budget did not allow."""
        progress = Progress(what, num_calls, unit="calls")
        if not tasks:
            return 0
        left = self._budget()
        for spending in self._spending().values():
            left -= Spent(spending.cost_usd + spending.lost_usd, spending.tokens)
        arguments = {
            "pool": pool,
            "asked": asked,
            "out": self.out,
            "attempts": self.config.attempts,
            "num_workers": self.config.workers,
            "max_prompt_bytes": MAX_PROMPT_BYTES,
            "purse": cluster.Shared(Purse, left, is_kept=True),
            **more,
        }
        items = [{"task": pickle.dumps(task)} for task in tasks]
        options = cluster.caller_resources(self.config.workers, _CALLS)
        left_out, reasons = 0, Counter[str]()
        for row in cluster.map_rows(items, worker, fn_constructor_kwargs=arguments, **options):
            self.lease.check()
            done: AskedShard = pickle.loads(row["done"])
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
            keys = [key for content in self._contents[span][rows] for key in self._keys(content)]
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
        return sum(key not in answered for content in self._contents[wanted] for key in self._keys(content))

    def _grade_tasks(self, answered: dict[str, str]) -> list[GradeTask]:
        """A task per shard that has an answer to any of its prompts, including repeated ones."""
        tasks = []
        for shard, rows in self.plan.spans():
            keys = (key for content in self._contents[rows] for key in self._keys(content))
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
        items = [{"task": pickle.dumps(task)} for task in tasks]
        arguments = {"grading": grading}
        found = list(cluster.map_rows(items, grade_shard, fn_kwargs=arguments)) if items else []
        files = sorted((pickle.loads(row["file"]) for row in found if row["outcomes"]), key=lambda file: file.name)
        write_quarantine(self.config.out, in_order([*self.plan.bad, *filter(None, self._unfit)]))
        outcomes = sum(row["outcomes"] for row in found)
        manifest = CollectManifest(
            asked=asdict(self.asked),
            spending=self._spending(),
            missing=num_missing,
            left_out=left_out,
            outcomes=outcomes,
            graded=sum(row["graded"] for row in found),
            files=files,
        )
        self.lease.check()
        storage.write_json(storage.join(self.config.out, MANIFEST), manifest.model_dump())
        remove_shards(storage.join(self.out, "outcomes"), keep={file.name for file in files})
        return manifest


_SPENT = [TARGET, "answer", COST_USD, "lost_usd", "tokens", "lost_tokens"]


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


def _estimation(config: CollectConfig, pool: Pool) -> Estimation:
    """The router's estimation of the corpus. Raises UserError if it has none of the targets to call."""
    assert config.router is not None
    router = any_router.load(config.router)
    if not set(router.pool.target_names) & set(pool.target_names):
        raise UserError(f"{config.router}: has none of the targets to call: give a router for this pool")
    return Estimation(router, config.router, storage.join(storage.absolute(config.out), "estimates", router.version))


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


def _first(unfit: Sequence[BadRow | None]) -> str:
    bad = next(filter(None, unfit))
    return f"{bad.prompt_id}: {bad.reason}"


def _named(grader: Grader | BoundedGrader | None) -> list[str]:
    """Option values of a grader that may be names of columns."""
    return [] if grader is None else [value for value in grader.options.values() if isinstance(value, str)]
