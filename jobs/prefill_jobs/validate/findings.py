"""What `validate` reports about a corpus, outcomes and a pool, and about how they fit together."""

# N prompts, R rows of outcomes

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefill_router.common.console import doing
from prefill_router.common.errors import some_of
from prefill_router.common.schema import CORRECT, COST_USD, OUTPUT_TOKENS, PROMPT_ID, TARGET
from prefill_router.corpus import plan as corpus_plan
from prefill_router.corpus.plan import CorpusPlan
from prefill_router.corpus.reader import BadRow, content_bits
from prefill_router.corpus.row_keys import have_own_hash, row_keys
from prefill_router.corpus.split import Part, PromptHashes, Split, prompt_hashes
from prefill_router.corpus.split_groups import SplitGroups, by_content
from prefill_router.metrics import ENOUGH_VALIDATION
from prefill_router.outcomes import is_feedback, tables
from prefill_router.policy.pool import Pool
from prefill_router.predictor.answer_length import without_lengths

_EXAMPLES, _SHARD_ROWS = 3, 4096


@dataclass(frozen=True)
class Finding:
    """A fact about the data, or with `is_error`, something that stops a job."""

    text: str
    is_error: bool = False


@dataclass
class CorpusFacts:
    """A corpus as `extract` would read it."""

    uri: str
    plan: CorpusPlan

    @classmethod
    def of(cls, uri: str, max_prompt_bytes: int) -> CorpusFacts:
        """Reads all prompts. Raises UserError if there is no valid one, or a file cannot be read."""
        return cls(uri, corpus_plan.plan(uri, _SHARD_ROWS, max_prompt_bytes=max_prompt_bytes))

    @cached_property
    def groups(self) -> SplitGroups:
        """The split groups by which `train` divides the ids that have activations after `extract`."""
        again = [row_keys(repeats.prompt_ids, repeats.contents) for repeats in self.plan.repeats]
        ids, contents, _ = np.concatenate([self.plan.keys, *again]).T
        return by_content(ids, contents)

    @property
    def contents(self) -> PromptHashes:
        """64 bits (N,) of each distinct prompt."""
        return self.plan.keys[:, 1]

    @property
    def examples(self) -> list[str]:
        return [row.prompt_id for row in corpus_plan.read_shard(self.plan.shards[0])[:_EXAMPLES]]

    def findings(self) -> Iterator[Finding]:
        yield Finding(f"{self.uri}: {self.plan.num_rows - len(self.plan.bad):,} prompts")
        if have_own_hash(self.plan.keys).all():
            yield Finding(f"{self.uri}: ids are hashes of the prompts")
        if self.plan.num_repeated:
            yield Finding(f"{self.uri}: {self.plan.num_repeated:,} prompts occur earlier, and are computed once")
        for rows in by_reason(self.plan.bad):
            yield Finding(
                f"{self.uri}: {len(rows):,} rows are invalid and left out, such as row {rows[0].row + 1}: "
                f"{rows[0].reason}"
            )


def by_reason(bad: Sequence[BadRow]) -> list[list[BadRow]]:
    """Invalid rows grouped by the kind of their reason, the most frequent first."""
    kinds: dict[str, list[BadRow]] = {}
    for row in bad:
        kinds.setdefault(re.sub(r'"[^"]*"|\d[\d,.]*', "", row.reason), []).append(row)
    return sorted(kinds.values(), key=len, reverse=True)


@dataclass
class OutcomeFacts:
    """Outcomes of all targets, without those of invalid values."""

    uri: str
    keys: PromptHashes = field(default_factory=lambda: np.empty(0, np.uint64))  # distinct, ascending
    contents: set[int] = field(default_factory=set)  # 64 bits of the prompts whose ids are hashes of their content
    examples: list[str] = field(default_factory=list)
    graded: Counter[str] = field(default_factory=Counter)  # answers by target
    right: Counter[str] = field(default_factory=Counter)  # sums of their grades
    unbilled: Counter[str] = field(default_factory=Counter)  # those without a cost
    invalid: Counter[str] = field(default_factory=Counter)  # values by column
    bad: list[BadRow] = field(default_factory=list)  # of files of text
    num_repeated: int = 0  # further grades of a pair
    num_measured: int = 0  # answers with a length or a cost

    @classmethod
    @doing("reading the outcomes")
    def of(cls, uri: str) -> OutcomeFacts:
        """Reads all rows. Raises UserError for a missing column, or one of another type."""
        facts, pairs, keys = cls(uri), [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for table in tables(uri, facts.bad):
            names, hashes = table[TARGET].to_pylist(), prompt_hashes(table[PROMPT_ID].to_pylist())
            ids = pc.unique(table[PROMPT_ID]).to_pylist()
            facts.contents.update(bits for bits in map(content_bits, ids) if bits is not None)
            facts.examples = facts.examples or ids[:_EXAMPLES]
            correct, costs = table[CORRECT].to_numpy(), table[COST_USD].fill_null(0.0).to_numpy()
            facts.invalid[CORRECT] += _num_outside(correct, 1.0)
            facts.invalid[COST_USD] += _num_outside(costs, np.finfo(np.float64).max)
            facts.invalid[OUTPUT_TOKENS] += _num_outside(table[OUTPUT_TOKENS].fill_null(0).to_numpy(), np.inf)
            facts.graded.update(names)
            is_unknown = pc.and_(pc.is_null(table[OUTPUT_TOKENS]), pc.is_null(table[COST_USD]))
            facts.num_measured += table.num_rows - pc.sum(is_unknown).as_py()
            facts.unbilled.update(table.filter(pc.is_null(table[COST_USD]))[TARGET].to_pylist())
            for name, grade in zip(names, np.nan_to_num(correct).tolist(), strict=True):
                facts.right[name] += grade
            keys.append(np.unique(hashes))
            pairs.append(hashes ^ prompt_hashes(names))
        facts.keys = np.unique(np.concatenate(keys))
        every = np.concatenate(pairs)
        facts.num_repeated = 0 if is_feedback(uri) else len(every) - len(np.unique(every))
        return facts

    def findings(self) -> Iterator[Finding]:
        if not self.graded:
            yield Finding(f"{self.uri}: no answer is graded: give each a grade in column {CORRECT}", is_error=True)
        for name in sorted(self.graded):
            share = self.right[name] / self.graded[name]
            yield Finding(f"{self.uri}: {name}: {self.graded[name]:,} answers, mean grade {share:.1%}")
        for rows in by_reason(self.bad):
            yield Finding(
                f"{self.uri}: {len(rows):,} rows are invalid, such as row {rows[0].row + 1}: {rows[0].reason}",
                is_error=True,
            )
        for column, allowed in ((CORRECT, "in [0, 1]"), (OUTPUT_TOKENS, "0 or more"), (COST_USD, "0 or more")):
            if count := self.invalid[column]:
                yield Finding(f"{self.uri}: {count:,} values of {column} are invalid: must be {allowed}", is_error=True)
        if self.graded and not self.num_measured:
            yield Finding(without_lengths(self.uri))
        if self.num_repeated:
            yield Finding(f"{self.uri}: {self.num_repeated:,} grades are of a pair that has one already", is_error=True)


def _num_outside(values: NDArray[Any], most: float) -> int:
    """How many values are not from 0 to `most`."""
    return int((~((values >= 0) & (values <= most))).sum())


def of_pool(pool: Pool, outcomes: OutcomeFacts) -> Iterator[Finding]:
    """What a pool and outcomes say of each other."""
    if ungraded := [name for name in pool.target_names if not outcomes.graded[name]]:
        yield Finding(
            f"pool {pool.name}: no outcome of {some_of(ungraded)}: grade their answers, or use only targets with "
            f"outcomes: {some_of(outcomes.graded)}",
            is_error=True,
        )
    for target in pool.targets:
        if not target.is_priced and (count := outcomes.unbilled[target.name]):
            yield Finding(
                f'pool {pool.name}: target "{target.name}" has no prices, and {count:,} of its outcomes no cost_usd: '
                "give input_price and output_price in the file of --pool, or the cost of every answer",
                is_error=True,
            )
    for name in pool.target_names:
        if (graded := outcomes.graded[name]) and outcomes.right[name] in (0, graded):
            grades = "right" if outcomes.right[name] else "wrong"
            yield Finding(
                f'pool {pool.name}: target "{name}" has {graded:,} answers, all {grades}: no activation can tell them '
                "apart: grade more prompts, or take it out of the pool",
                is_error=True,
            )
    if others := set(outcomes.graded) - set(pool.target_names):
        yield Finding(f"{outcomes.uri}: not in pool {pool.name}, and ignored: {some_of(others)}")


def of_both(corpus: CorpusFacts, outcomes: OutcomeFacts) -> Iterator[Finding]:
    """How many prompts have both, and whether they suffice."""
    is_known = np.isin(outcomes.keys, corpus.groups.keys)
    if not is_known.any() and (num_same := int(np.isin(corpus.contents, list(outcomes.contents)).sum())):
        yield Finding(f"{num_same:,} prompts have outcomes, which name them by their content")
        return
    if not is_known.any():
        yield Finding(
            f"no outcome is of a prompt of the corpus: ids of the corpus look like {', '.join(corpus.examples)}, those "
            f"of the outcomes like {', '.join(outcomes.examples)}",
            is_error=True,
        )
        return
    if unknown := int((~is_known).sum()):
        yield Finding(
            f"{outcomes.uri}: {unknown:,} prompts are not in the corpus: add them, or pass --ignore-unknown",
            is_error=True,
        )
    parts = Split().parts(corpus.groups.of(outcomes.keys[is_known]))
    counts = [int((parts == part).sum()) for part in Part]
    yield Finding(
        f"{sum(counts):,} prompts have outcomes: {counts[0]:,} to train on, {counts[1]:,} to validate and "
        f"{counts[2]:,} held out"
    )
    if min(counts) < 1 or counts[Part.TRAIN] < 2:
        yield Finding("a router needs two prompts to train on and one for each other part: grade more", is_error=True)
    elif counts[1] < ENOUGH_VALIDATION:
        few = f"a tolerance chosen on under {ENOUGH_VALIDATION} is mostly noise"
        yield Finding(f"{counts[1]:,} validation prompts are few: {few}")
