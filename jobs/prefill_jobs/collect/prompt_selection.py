"""Selects the prompts that `collect` sends: those that can be graded, or a sample of them."""

# N rows of the corpus, T targets

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.collect.grading import Grading, RowCheck
from prefill_jobs.label.estimation import Estimation, KeptEstimates
from prefill_jobs.options import CollectConfig
from prefill_jobs.runtime import ray_tasks
from prefill_router import storage
from prefill_router.baselines import any_router
from prefill_router.collection.target_calls import Asked, call_key
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.corpus.plan import CorpusPlan
from prefill_router.corpus.reader import BadRow
from prefill_router.policy.pool import Pool
from prefill_router.query_log.estimates import Contents, PromptEstimates
from prefill_router.query_log.sampling import active, at_random, stratified
from prefill_router.storage.lease import Lease


class PromptSelection:
    """Selects prompts of a corpus by their content. Workers read the corpus at most once for it."""

    def __init__(
        self, config: CollectConfig, pool: Pool, asked: Asked, planned: CorpusPlan, grading: Grading, lease: Lease
    ) -> None:
        self.config, self.pool, self.asked, self.plan = config, pool, asked, planned
        self.grading, self.lease = grading, lease
        self.contents: Contents = np.ascontiguousarray(planned.keys[:, 1:])

    def keys(self, row: int) -> list[str]:
        """The keys of the calls of a row (of N), one per target."""
        digest = self.contents[row].tobytes().hex()
        return [call_key(digest, target.name, self.asked) for target in self.pool.targets]

    def wanted(self, answered: Set[str]) -> NDArray[np.bool_]:
        """Whether each row (N,) is sent: the first gradable row of each content, or a sample of these.

        A sample includes the rows that have an answer already, given the keys of the `answered` calls.
        """
        rows, wanted, size = self._gradable(), np.zeros(len(self.contents), np.bool_), self.config.sample
        if size is None:
            wanted[rows] = True
            return wanted
        is_asked = np.array([any(key in answered for key in self.keys(row)) for row in rows], np.bool_)
        kept, others = rows[is_asked], rows[~is_asked]
        drawn = others[self._draw(others, max(0, size - len(kept)))]
        wanted[kept] = wanted[drawn] = True
        return wanted

    @property
    def bad(self) -> list[BadRow]:
        """The rows that cannot be graded."""
        return [check.bad for check in self._checks if check.bad is not None]

    def _gradable(self) -> NDArray[np.int64]:
        """The first gradable row of each content. Raises UserError if the grader can grade no row."""
        bad, num_rows = self.bad, len(self._checks)
        if bad:
            example = f"({bad[0].prompt_id}: {bad[0].reason})"
            if len(bad) == num_rows:
                raise UserError(
                    f"{self.config.corpus}: grader {self.config.grader} can grade none of {num_rows:,} prompts "
                    f"{example}, so that none is sent: fix the corpus, or name its columns in --grader-options; "
                    "existing answers are kept for --regrade"
                )
            say(
                f"collect: {len(bad):,} prompts cannot be graded and are not sent {example}: see "
                "quarantine/rows.parquet"
            )
        fit = np.flatnonzero([check.bad is None for check in self._checks])
        _, firsts = np.unique(self.contents[fit], axis=0, return_index=True)
        return np.sort(fit[firsts])

    @cached_property
    def _checks(self) -> Sequence[RowCheck]:
        """The check of each row (N,)."""
        is_stratified = self.config.sample is not None and self.config.sample_by == "stratified"
        if self.grading.grader is None and not is_stratified:
            return [RowCheck()] * len(self.contents)
        check = partial(self.grading.check, stratum=self.config.stratum if is_stratified else None)
        return [row for rows in ray_tasks.spread(check, self.plan.shards) for row in rows]

    def _draw(self, rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Samples `size` of these rows, and returns their indices in `rows`."""
        contents = self.contents[rows]
        if self.config.sample_by == "random":
            return at_random(contents, size)
        if self.config.sample_by == "stratified":
            if all(check.stratum is None for check in self._checks):
                raise UserError(
                    f"{self.config.corpus}: column {self.config.stratum} is missing: name another with --stratum"
                )
            return stratified(contents, [str(self._checks[row].stratum) for row in rows], size)
        return active(contents, self._p_correct(contents), size)

    def _p_correct(self, contents: Contents) -> NDArray[np.float32]:
        """The router's P(correct) (N, T) of prompts, for the targets that are both in its pool and to be called."""
        estimates = estimation(self.config, self.pool)
        estimates.run(self.plan, self.lease, "sample")
        held = KeptEstimates.read(estimates.out)
        p = np.concatenate([PromptEstimates.load(estimates.out, name).p_correct for name in held.names])
        names = estimates.router.pool.target_names
        known = [t for t, name in enumerate(names) if name in self.pool.target_names]
        return p[held.index.find(contents)][:, known]


def estimation(config: CollectConfig, pool: Pool) -> Estimation:
    """The router's estimation of the corpus. Raises UserError if it has none of the targets to call."""
    assert config.router is not None
    router = any_router.load(config.router)
    if not set(router.pool.target_names) & set(pool.target_names):
        raise UserError(f"{config.router}: has none of the targets to call: give a router for this pool")
    return Estimation(router, config.router, storage.join(storage.absolute(config.out), "estimates", router.version))
