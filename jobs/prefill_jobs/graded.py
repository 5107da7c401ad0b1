"""An activation store together with graded answers: what probes, training and evaluation all read."""

# N prompts, D hidden size

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefill_router.console import say
from prefill_router.errors import UserError
from prefill_router.features import ActivationStore
from prefill_router.outcomes import Outcomes, load_outcomes
from prefill_router.pool import Pool, load_pool
from prefill_router.schema import ActivationColumn


@dataclass(frozen=True)
class GradedStore:
    """An activation store, and the outcomes of a pool on its prompts."""

    store: ActivationStore
    pool: Pool
    outcomes: Outcomes

    @classmethod
    def open(cls, activations: str, outcomes: str, pool: str | Pool, *, ignore_unknown: bool) -> GradedStore:
        """Raises UserError where an outcome's prompt has no activations; a sample's missing prompts are expected."""
        loaded = load_pool(pool) if isinstance(pool, str) else pool
        store = ActivationStore.open(activations)
        graded = load_outcomes(outcomes, loaded.target_names)
        ids = store.prompt_ids()
        unknown = graded.check_known(ids, outcomes, ignore_unknown=ignore_unknown or store.manifest.is_sample)
        if unknown == len(graded.prompt_ids):
            raise UserError(f"{outcomes}: grades no prompt of {activations}: are these the outcomes of that corpus?")
        if graded.num_other_targets:
            say(f"outcomes: {graded.num_other_targets} targets are not in pool {loaded.name} and are left out")
        if unknown:
            say(f"outcomes: {unknown:,} graded prompts have no activations and are left out")
        return cls(store, loaded, graded)

    @property
    def graded_ids(self) -> pa.Array:
        """The store's prompts that have at least one outcome."""
        ids = self.store.prompt_ids()
        return ids.filter(pa.array(~np.isnan(self.outcomes.align(ids).correct).all(1)))

    def only(self, prompt_ids: pa.Array) -> GradedStore:
        """The same store, with the outcomes of these prompts alone."""
        return replace(self, outcomes=self.outcomes.align(prompt_ids))

    def batches(self, column: ActivationColumn) -> Iterator[tuple[NDArray[np.float16], Outcomes]]:
        """The activations (N, D) of one column and their outcomes, shard by shard."""
        for shard in range(self.store.num_shards):
            ids, encoded = self.store.read(shard, [column])
            yield encoded[column.name], self.outcomes.align(ids)
