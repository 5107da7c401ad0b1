"""ParetoBandit's example data: JSONL with a line for each prompt, and the reward and the cost of every model's answer.

Source: ParetoBandit/ParetoBandit, pareto_bandit/data/examples/, which the package paretobandit on PyPI contains, under
the Apache License 2.0. `source` is the benchmark, with the task after a slash, and `arms` has an object for each model:
`reward` in [0, 1], the mean of a panel of judges (pareto_bandit/rewards.py), and `cost` in USD. Lengths of answers were
not published. The other keys follow from the rewards.
"""

from __future__ import annotations

from collections.abc import Iterator

from prefill_router.common.errors import shown
from prefill_router.corpus.grades import RawAnswer
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import Fields, read_jsonl
from prefill_router.ingest.records import CATEGORY, SOURCE, Format, Item, Options, Record, Unknown, text

_USED = ("prompt", "source", "arms")
_KNOWN = ("difficulty", "best_arm", "best_reward", "worst_reward", "reward_spread")


def read(uri: str, options: Options) -> Iterator[Item]:
    unknown = Unknown([*_USED, *_KNOWN])
    for row, _, fields in read_jsonl(uri, options.max_record_bytes):
        if isinstance(fields, str):
            yield BadRow(uri, row, None, fields)
            continue
        yield from unknown.among(fields)
        yield _record(uri, row, fields)


def _record(uri: str, row: int, fields: Fields) -> Record | BadRow:
    arms = fields.get("arms")
    if not isinstance(arms, dict) or not arms or not all(isinstance(arm, dict) for arm in arms.values()):
        return BadRow(uri, row, None, f"arms = {shown(arms)}, must be an object with an object for each model")
    answers = [RawAnswer(name, arm.get("reward"), cost_usd=arm.get("cost")) for name, arm in arms.items()]
    source = text(fields.get("source"))
    extras = {CATEGORY.name: source and source.partition("/")[0], SOURCE.name: source}
    return Record(uri, row, fields.get("prompt"), answers, extras=extras)


FORMAT = Format("paretobandit", (".jsonl",), read, (CATEGORY, SOURCE))
