"""An activation store together with graded answers: what probes, training and evaluation all read."""

# N prompts, D hidden size, F features, T targets

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_router.activations import store_keys
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import NUM_TOKENS, ActivationColumn
from prefill_router.corpus.split import Keys, Part, Split, prompt_hashes
from prefill_router.corpus.split_groups import SplitGroups, by_content
from prefill_router.outcomes import Answers, Outcomes, load_outcomes
from prefill_router.policy.pool import Pool, load_pool
from prefill_router.probe.projection import Projection


class GradedRows(NamedTuple):
    """Prompts of a store with an outcome each."""

    keys: Keys  # (N,)
    num_tokens: NDArray[np.int32]  # (N,)
    features: NDArray[np.float32]  # (N, F)
    correct: NDArray[np.float32]  # (N, T), NaN where missing
    output_tokens: NDArray[np.float32]  # (N, T), NaN where missing


@dataclass(frozen=True)
class GradedStore:
    """An activation store, and the outcomes of some targets on its prompts.

    Of a split, only the outcomes of the parts `seen` are to be seen: those of other prompts read as missing.
    """

    store: ActivationStore
    pool: Pool
    outcomes: Outcomes
    groups: SplitGroups
    keys: Keys  # (N,) hashes of the store's prompts, in its order
    split: Split | None = None
    seen: tuple[Part, ...] = ()

    @classmethod
    def open(
        cls,
        activations: str,
        outcomes: str,
        pool: str | Pool,
        *,
        ignore_unknown: bool,
        more_targets: tuple[str, ...] = (),
        groups: SplitGroups | None = None,
    ) -> GradedStore:
        """The outcomes are those of the pool's targets, then those of `more_targets`.

        A split keeps each of the split groups on one side; by default, a group is a set of equal prompts.

        Raises UserError where an outcome's prompt has no activations; a sample's missing prompts are expected.
        """
        loaded = load_pool(pool) if isinstance(pool, str) else pool
        store = ActivationStore.open(activations)
        graded = load_outcomes(outcomes, [*loaded.target_names, *more_targets])
        keys = store_keys.read(store)
        opened = cls(
            store, loaded, graded, by_content(keys.prompts, keys.contents) if groups is None else groups, keys.prompts
        )
        unknown = graded.check_known(opened.keys, ignore_unknown=ignore_unknown or store.manifest.is_sample)
        if unknown == len(graded.keys):
            raise UserError(f"{outcomes}: grades no prompt of {activations}: are these the outcomes of that corpus?")
        if graded.num_other_targets:
            say(f"outcomes: {graded.num_other_targets} targets are not in pool {loaded.name} and are left out")
        if unknown:
            say(f"outcomes: {unknown:,} graded prompts have no activations and are left out")
        return opened

    @property
    def graded_keys(self) -> Keys:
        """Of the prompts that have at least one outcome to be seen."""
        keys = self.keys[np.isin(self.keys, self.outcomes.keys)]
        return keys[self._is_seen(keys)]

    def of_pool(self) -> GradedStore:
        """The same store, with the outcomes of the pool's targets alone."""
        return replace(self, outcomes=self.outcomes.of_first(len(self.pool.targets)))

    def only(self, split: Split, *parts: Part) -> GradedStore:
        """The same store, with the outcomes of these parts alone."""
        return replace(self, split=split, seen=parts)

    def parts(self, keys: Keys, split: Split) -> NDArray[np.int8]:
        """The Part of each prompt, by its hash."""
        return np.where(self.groups.held_out(keys), Part.TEST, split.parts(self.groups.of(keys))).astype(np.int8)

    def answers(self, keys: Keys) -> Answers:
        """The outcomes of prompts by their hashes, NaN where missing or of other parts."""
        found = self.outcomes.at(keys)
        is_hidden = ~self._is_seen(keys)
        for values in found:
            values[is_hidden] = np.nan
        return found

    def rows(self, shard: int, projections: Sequence[Projection]) -> GradedRows:
        """The prompts of a shard that have an outcome to be seen."""
        ids, encoded = self.store.read(shard, [projection.column for projection in projections])
        keys = prompt_hashes(ids.to_pylist())
        answers = self.answers(keys)
        graded = ~np.isnan(answers.correct).all(1)
        features = np.concatenate([project(encoded[project.column.name][graded]) for project in projections], axis=1)
        return GradedRows(
            keys[graded],
            encoded[NUM_TOKENS][graded],
            features,
            *(values[graded] for values in answers),
        )

    def _is_seen(self, keys: Keys) -> NDArray[np.bool_]:
        if self.split is None:
            return np.ones(len(keys), bool)
        return np.isin(self.parts(keys, self.split), self.seen)

    def batches(
        self, column: ActivationColumn, shards: Iterable[int]
    ) -> Iterator[tuple[NDArray[np.float16], NDArray[np.float32], Keys]]:
        """By shard the activations (N, D) of one column, whether targets were right (N, T), and the prompts' hashes."""
        for shard in shards:
            ids, encoded = self.store.read(shard, [column])
            keys = prompt_hashes(ids.to_pylist())
            yield encoded[column.name], self.answers(keys).correct, keys
