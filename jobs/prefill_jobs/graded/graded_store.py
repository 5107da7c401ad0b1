"""An activation store joined with graded answers, which probing, training and evaluation read."""

# N prompts, D hidden size, F features, T targets

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_router.activations.activation_store import ActivationStore
from prefill_router.activations.joined_stores import JoinedStores, open_stores
from prefill_router.common.console import doing, say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import NUM_TOKENS, ActivationColumn
from prefill_router.corpus.split import Part, PromptHashes, Split, prompt_hashes
from prefill_router.corpus.split_groups import SplitGroups, by_content
from prefill_router.encoder.encoder_spec import EncoderIdentity
from prefill_router.outcomes import Answers, Outcomes, load_outcomes
from prefill_router.policy.answer_cost import implied_lengths
from prefill_router.policy.pool import Pool, load_pool
from prefill_router.probe.projection import Projection


class GradedRows(NamedTuple):
    """Prompts of a store that have at least one outcome."""

    keys: PromptHashes  # (N,)
    num_tokens: NDArray[np.int32]  # (N,)
    features: NDArray[np.float32]  # (N, F)
    correct: NDArray[np.float32]  # (N, T), NaN where missing
    output_tokens: NDArray[np.float32]  # (N, T), NaN where missing, implied by a billed cost if only that is known
    cost_usd: NDArray[np.float32]  # (N, T) as billed, NaN where unknown


@dataclass(frozen=True)
class GradedStore:
    """An activation store, and the outcomes of some targets on its prompts.

    With a `split`, only outcomes of the parts in `seen` are visible; those of other prompts read as missing.
    """

    store: ActivationStore | JoinedStores
    pool: Pool
    outcomes: Outcomes
    groups: SplitGroups
    keys: PromptHashes  # (N,) hashes of the store's prompts, in its order
    split: Split | None = None
    seen: tuple[Part, ...] = ()

    @classmethod
    @doing("reading the outcomes")
    def open(
        cls,
        activations: str,
        outcomes: str,
        pool: str | Pool,
        *,
        ignore_unknown: bool,
        more_targets: tuple[str, ...] = (),
        groups: SplitGroups | None = None,
        correct_at: float | None = None,
    ) -> GradedStore:
        """Opens activations with the outcomes of the pool's targets, followed by those of `more_targets`.

        `activations` names one or more stores: see `open_stores`. With `correct_at`, rewards count as right or wrong,
        as in `load_outcomes`.

        A split keeps each of the split groups `groups` on one side; by default a group is the prompts of equal content.

        Raises UserError if the prompt of an outcome has no activations, unless `ignore_unknown` or the store is a
        sample.
        """
        loaded = load_pool(pool, prices_optional=True) if isinstance(pool, str) else pool
        store, keys = open_stores(activations)
        graded = load_outcomes(outcomes, [*loaded.target_names, *more_targets], correct_at)
        opened = cls(
            store, loaded, graded, by_content(keys.prompts, keys.contents) if groups is None else groups, keys.prompts
        )
        if not np.isin(graded.keys, opened.keys).any():
            opened = replace(opened, outcomes=graded.by_content(keys.prompts, keys.contents))
        if not np.isin(opened.outcomes.keys, opened.keys).any():
            raise UserError(
                f"{outcomes}: has no outcome for {activations}: its ids look like {graded.example}, those of the "
                f"activations like {store.read(0, [])[0][0]}: check that both are of one corpus"
            )
        unknown = opened.outcomes.check_known(opened.keys, ignore_unknown=ignore_unknown or store.is_sample)
        if graded.num_other_targets:
            say(f"outcomes: ignored {graded.num_other_targets} targets that are not in pool {loaded.name}")
        if unknown:
            say(f"outcomes: ignored {unknown:,} graded prompts that have no activations")
        return opened

    @property
    def graded_keys(self) -> PromptHashes:
        """The hashes of the prompts that have at least one visible outcome."""
        keys = self.keys[np.isin(self.keys, self.outcomes.keys)]
        return keys[self._is_seen(keys)]

    def of_pool(self) -> GradedStore:
        """This store with the outcomes of the pool's targets only."""
        return replace(self, outcomes=self.outcomes.of_first(len(self.pool.targets)))

    def of_encoders(self, encoders: Mapping[str, EncoderIdentity]) -> GradedStore:
        """This store with the columns of `encoders`, under their names. Raises UserError if it lacks one of them."""
        return replace(self, store=self.store.of(encoders))

    def only(self, split: Split, *parts: Part) -> GradedStore:
        """This store with the outcomes of these parts of `split` only."""
        return replace(self, split=split, seen=parts)

    def parts(self, keys: PromptHashes, split: Split) -> NDArray[np.int8]:
        """The Part of each prompt (N,), given its hash."""
        return np.where(self.groups.held_out(keys), Part.TEST, split.parts(self.groups.of(keys))).astype(np.int8)

    def answers(self, keys: PromptHashes) -> Answers:
        """The outcomes of prompts, given their hashes; NaN if missing or not visible."""
        found = self.outcomes.at(keys)
        is_hidden = ~self._is_seen(keys)
        for values in found:
            values[is_hidden] = np.nan
        return found

    def rows(self, shard: int, projections: Sequence[Projection]) -> GradedRows:
        """The prompts of a shard that have a visible outcome."""
        ids, encoded = self.store.read(shard, [projection.column for projection in projections])
        keys = prompt_hashes(ids.to_pylist())
        answers = self.answers(keys)
        graded = ~np.isnan(answers.correct).all(1)
        num_tokens = encoded[NUM_TOKENS][graded]
        projected = [project(encoded[project.column.name][graded]) for project in projections]
        features = np.concatenate([np.empty((len(num_tokens), 0), np.float32), *projected], axis=1)
        correct, lengths, costs = (values[graded] for values in answers)
        priced = slice(len(self.pool.targets))
        lengths[:, priced] = implied_lengths(self.pool, num_tokens, lengths[:, priced], costs[:, priced])
        return GradedRows(keys[graded], num_tokens, features, correct, lengths, costs)

    def _is_seen(self, keys: PromptHashes) -> NDArray[np.bool_]:
        if self.split is None:
            return np.ones(len(keys), bool)
        return np.isin(self.parts(keys, self.split), self.seen)

    def batches(
        self, column: ActivationColumn, shards: Iterable[int]
    ) -> Iterator[tuple[NDArray[np.float16], NDArray[np.float32], PromptHashes]]:
        """Yields, by shard, a column's activations (N, D), correctness by target (N, T) and prompt hashes (N,)."""
        for shard in shards:
            ids, encoded = self.store.read(shard, [column])
            keys = prompt_hashes(ids.to_pylist())
            yield encoded[column.name], self.answers(keys).correct, keys
