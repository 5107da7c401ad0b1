"""The gate before a published router: another takes its place only where it is as good, on prompts new to both.

It is judged by the outcomes that were known when the published one was let through: outcomes that come in later,
should they be wrong, can teach a bad router, but not vouch for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefill_jobs.evaluate.compare_job import compare
from prefill_jobs.options import CompareConfig, PipelineConfig
from prefill_router import storage
from prefill_router.common.console import say
from prefill_router.common.schema import CORRECT, OUTCOMES, PROMPT_ID, TARGET
from prefill_router.corpus.split import prompt_hashes
from prefill_router.metrics import Interval
from prefill_router.outcomes import tables
from prefill_router.router.artifact import MANIFEST, Router

_HELD_OUT = "held_out.parquet"  # beside the published router: the outcomes that its successor is judged by
_PAIR = [PROMPT_ID, TARGET]


@dataclass(frozen=True)
class _Figure:
    name: str  # of evaluation.HEADLINES
    title: str
    sign: int  # 1 where more is better
    negligible: float  # a difference of so little is no reason

    def is_worse(self, difference: Interval) -> bool:
        """Is all of the interval on the worse side, and not by next to nothing?"""
        nearest = difference.high if self.sign > 0 else -difference.low
        return math.isfinite(nearest) and nearest < 0.0 and self.sign * difference.value < -self.negligible


_FIGURES = (
    _Figure("mdp_auccc", "MDP-AUCCC", 1, 0.001),
    _Figure("mean_auc", "mean AUC", 1, 0.002),
    _Figure("mean_brier", "mean Brier score", -1, 0.001),
)


class PublishGate:
    def __init__(self, config: PipelineConfig, router: str, activations: str) -> None:
        self.config, self.router, self.activations = config, router, activations

    @property
    def has_published(self) -> bool:
        return storage.exists(storage.join(self.config.publish, MANIFEST))

    def objections(self) -> list[str]:
        """Why the router should not take the published one's place; none where nothing is published yet."""
        if not self.has_published:
            return []
        out = storage.join(self.config.out, "gate")
        outcomes = storage.join(out, "outcomes.parquet")
        storage.write_bytes(outcomes, storage.encode_parquet(self._outcomes()))
        evaluation = compare(
            CompareConfig(
                routers=(self.router, self.config.publish),
                activations=self.activations,
                outcomes=outcomes,
                pool=self.config.pool,
                out=out,
                draws=self.config.draws,
            )
        )
        differences = evaluation.standings[1].router_less_this
        found = []
        for figure in _FIGURES:
            value, low, high = differences[figure.name]
            text = f"{figure.title} {value:+.4f} ({low:+.4f} to {high:+.4f})"
            say(f"gate: on {evaluation.num_held_out:,} prompts new to both, less the published router's: {text}")
            if figure.is_worse(differences[figure.name]):
                found.append(text)
        return found

    def publish(self) -> Router:
        """Puts the router in the published one's place, with the outcomes that its successor will be judged by."""
        router = Router.load(self.router)
        outcomes = self._outcomes() if not self.config.accept else self._given()
        is_new = ~np.isin(prompt_hashes(outcomes[PROMPT_ID].to_pylist()), router.training_prompts)
        held_out = storage.encode_parquet(outcomes.filter(pa.array(is_new)))
        storage.write_bytes(storage.join(self.config.publish, _HELD_OUT), held_out)
        router.save(self.config.publish)
        return router

    def _outcomes(self) -> pa.Table:
        """Those kept with the published router, and for pairs that it does not know those that are given now."""
        given, path = self._given(), storage.join(self.config.publish, _HELD_OUT)
        if not storage.exists(path):
            return given
        kept = storage.read_table(path)
        both = given.join(kept, _PAIR, join_type="inner", right_suffix="_kept")
        if changed := pc.sum(pc.not_equal(both[CORRECT], both[f"{CORRECT}_kept"])).as_py():
            say(
                f"gate: {changed:,} of {len(both):,} outcomes that the published router was judged by are others now; "
                "it goes by the old ones"
            )
        new = given.join(kept.select(_PAIR), _PAIR, join_type="left anti")
        return pa.concat_tables([kept, new.select(OUTCOMES.names).cast(OUTCOMES)])

    def _given(self) -> pa.Table:
        return pa.concat_tables([table.select(OUTCOMES.names).cast(OUTCOMES) for table in tables(self.config.outcomes)])
