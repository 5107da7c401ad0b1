"""The answers that all runs of `collect` have written to one output, and what they cost."""

from __future__ import annotations

import pyarrow as pa

from prefill_router import storage
from prefill_router.collection.answers import ShardPlace, load_states, write_states
from prefill_router.common.schema import COST_USD, TARGET
from prefill_router.common.validation import StrictModel

_ANSWERS = "answers"
_SPENT = [TARGET, "answer", COST_USD, "lost_usd", "tokens", "lost_tokens"]


class Spending(StrictModel):
    """Spending on one target by all runs."""

    answers: int
    cost_usd: float
    lost_usd: float  # upper bound for failed attempts that may have been billed
    tokens: int  # of answers and failed attempts


def recover(out: str) -> None:
    """Recovers answers from the journals of interrupted runs into their shards."""
    for name in storage.list_names(storage.join(out, "journal")):
        place = ShardPlace(out, name)
        write_states(place, load_states(place))


def answered_calls(out: str) -> dict[str, str]:
    """Maps the key of each answered call to the shard that has its answer."""
    answered = {}
    for name in _files(out):
        table = storage.read_table(storage.join(out, _ANSWERS, name), ["key", "answer"])
        is_answered = table["answer"].is_valid().to_pylist()
        for key, has in zip(table["key"].to_pylist(), is_answered, strict=True):
            if has:
                answered[key] = name.removeprefix("part-").removesuffix(".parquet")
    return answered


def spending_by_target(out: str) -> dict[str, Spending]:
    tables = [storage.read_table(storage.join(out, _ANSWERS, name), _SPENT) for name in _files(out)]
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


def _files(out: str) -> list[str]:
    return [name for name in storage.list_names(storage.join(out, _ANSWERS)) if name.endswith(".parquet")]
