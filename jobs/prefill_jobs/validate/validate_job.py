"""`validate`: checks a corpus, outcomes and a pool, and reports every problem before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from prefill_jobs.options import ValidateConfig
from prefill_jobs.validate import findings
from prefill_jobs.validate.findings import CorpusFacts, Finding, OutcomeFacts
from prefill_router.common.errors import UserError
from prefill_router.policy.pool import load_pool

T = TypeVar("T")


def validate(config: ValidateConfig) -> list[Finding]:
    """Returns all findings on the files that are given. One that cannot be read is a finding, and others are read."""
    if not (config.corpus or config.outcomes or config.pool):
        raise UserError("validate: give --corpus, --outcomes, --pool, or several of them")
    found: list[Finding] = []

    def read(of: Callable[[str], T], uri: str | None) -> T | None:
        try:
            return None if uri is None else of(uri)
        except UserError as error:
            found.append(Finding(str(error), is_error=True))
            return None

    corpus = read(partial(CorpusFacts.of, max_prompt_bytes=config.max_prompt_bytes), config.corpus)
    outcomes = read(OutcomeFacts.of, config.outcomes)
    pool = read(partial(load_pool, prices_optional=True), config.pool)
    found += [] if corpus is None else corpus.findings()
    found += [] if outcomes is None else outcomes.findings()
    found += [] if pool is None or outcomes is None else findings.of_pool(pool, outcomes)
    found += [] if corpus is None or outcomes is None else findings.of_both(corpus, outcomes)
    return found
