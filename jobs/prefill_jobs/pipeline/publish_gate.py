"""The publish gate: a new router replaces the published one only if it is not worse on prompts held out from both.

The gate uses the graded outcomes that were known when the published router passed. Wrong outcomes that arrive later can
train a bad router, but cannot get it published. On a gateway's feedback, which is final, it compares the routers as
`evaluate.call_comparison` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefill_jobs.evaluate.call_comparison import compare_on_calls
from prefill_jobs.evaluate.compare_job import compare
from prefill_jobs.options import CompareConfig, PipelineConfig
from prefill_router import storage
from prefill_router.common.console import say
from prefill_router.common.schema import CORRECT, OUTCOMES, PROMPT_ID, TARGET
from prefill_router.corpus.split import prompt_hashes
from prefill_router.metrics import Interval
from prefill_router.outcomes import tables
from prefill_router.router.artifact import MANIFEST, Router

_HELD_OUT = "held_out.parquet"  # kept with the published router: the outcomes for comparing its successor
_PAIR = [PROMPT_ID, TARGET]


@dataclass(frozen=True)
class _Figure:
    name: str  # key of evaluation.HEADLINES
    title: str
    sign: int  # 1 if higher is better, -1 if lower is
    negligible: float  # smaller differences are ignored

    def is_worse(self, difference: Interval) -> bool:
        """Whether the whole interval is on the worse side and the difference is not negligible."""
        nearest = difference.high if self.sign > 0 else -difference.low
        return math.isfinite(nearest) and nearest < 0.0 and self.sign * difference.value < -self.negligible


_FIGURES = (
    _Figure("mdp_auccc", "MDP-AUCCC", 1, 0.001),
    _Figure("mean_auc", "mean AUC", 1, 0.002),
    _Figure("mean_brier", "mean Brier score", -1, 0.001),
    _Figure("brier_of_calls", "Brier score of what callers got", -1, 0.001),
)


class PublishGate:
    def __init__(
        self, config: PipelineConfig, router: str, activations: str, graded: Sequence[str], calls: str | None
    ) -> None:
        self.config, self.router, self.activations = config, router, activations
        self.graded, self.calls = graded, calls  # URIs of graded outcomes, and of a gateway's calls

    @property
    def has_published(self) -> bool:
        return storage.exists(storage.join(self.config.publish, MANIFEST))

    def objections(self) -> list[str]:
        """The figures by which the router is worse than the published one; empty if none is published yet."""
        if not self.has_published:
            return []
        return (self._by_graded() if self.graded else []) + (self._by_calls() if self.calls is not None else [])

    def _by_graded(self) -> list[str]:
        out = storage.join(self.config.out, "gate")
        outcomes = storage.join(out, "outcomes.parquet")
        storage.write_bytes(outcomes, storage.encode_parquet(self._outcomes()))
        evaluation = compare(
            CompareConfig(
                routers=(self.router, self.config.publish),
                activations=self.activations,
                outcomes=outcomes,
                out=out,
                draws=self.config.draws,
            )
        )
        differences = evaluation.standings[1].router_less_this
        return _worse(f"{evaluation.num_held_out:,} prompts held out from both", differences)

    def _by_calls(self) -> list[str]:
        assert self.calls is not None
        routers = Router.load(self.router), Router.load(self.config.publish)
        compared = compare_on_calls(*routers, self.activations, self.calls, self.config.draws)
        if compared is None:
            without = "no call was made while exploring, on a prompt held out from both"
            say(f"gate: {without}: feedback does not compare them")
            return [] if self.graded else [f"{without}, so nothing compares them: start the endpoint with --explore"]
        calls = f"{compared.num_calls:,} calls held out from both"
        return _worse(f"{calls}, {compared.num_chance:,} made while exploring (doubly robust)", compared.differences)

    def publish(self) -> Router:
        """Publishes the router, with the outcomes for comparing its successor."""
        router = Router.load(self.router)
        outcomes = self._outcomes() if not self.config.accept else _graded(self.graded)
        is_new = ~np.isin(prompt_hashes(outcomes[PROMPT_ID].to_pylist()), router.training_prompts)
        held_out = storage.encode_parquet(outcomes.filter(pa.array(is_new)))
        storage.write_bytes(storage.join(self.config.publish, _HELD_OUT), held_out)
        router.save(self.config.publish)
        return router

    def _outcomes(self) -> pa.Table:
        """The outcomes kept with the published router, plus the given ones of other pairs of prompt and target."""
        given, path = _graded(self.graded), storage.join(self.config.publish, _HELD_OUT)
        if not storage.exists(path):
            return given
        kept = _graded([path])
        both = given.join(kept, _PAIR, join_type="inner", right_suffix="_kept")
        if changed := pc.sum(pc.not_equal(both[CORRECT], both[f"{CORRECT}_kept"])).as_py():
            say(
                f"gate: {changed:,} of {len(both):,} outcomes kept with the published router differ from the given: "
                "using the kept ones"
            )
        new = given.join(kept.select(_PAIR), _PAIR, join_type="left anti")
        return pa.concat_tables([kept, new.select(OUTCOMES.names).cast(OUTCOMES)])


def _worse(on: str, differences: Mapping[str, Interval]) -> list[str]:
    """Prints the differences of a new router from the published one, and returns those that are worse."""
    found = []
    for figure in _FIGURES:
        if figure.name not in differences:
            continue
        value, low, high = differences[figure.name]
        text = f"{figure.title} {value:+.4f} ({low:+.4f} to {high:+.4f})"
        say(f"gate: on {on}, new minus published: {text}")
        if figure.is_worse(differences[figure.name]):
            found.append(text)
    return found


def _graded(uris: Sequence[str]) -> pa.Table:
    graded = [table.select(OUTCOMES.names).cast(OUTCOMES) for uri in uris for table in tables(uri)]
    return pa.concat_tables([OUTCOMES.empty_table(), *graded])
