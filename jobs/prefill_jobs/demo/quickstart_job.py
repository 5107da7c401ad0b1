"""`quickstart`: from a table of one's own graded answers to a router, a report and three routed prompts."""

from __future__ import annotations

import json

from prefill_jobs.demo.walkthrough import Inputs, step, walk
from prefill_jobs.ingest_job import ingest
from prefill_jobs.options import IngestConfig, QuickstartConfig, ValidateConfig
from prefill_jobs.validate.validate_job import validate
from prefill_router import storage
from prefill_router.common.addresses import require_free
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.ingest.tables import CORPUS_FOLDER, OUTCOMES_FOLDER, IngestSummary
from prefill_router.outcomes import check_columns
from prefill_router.policy.answer_cost import check_prices
from prefill_router.policy.pool import load_pool


def quickstart(config: QuickstartConfig) -> None:
    """Takes every step on the user's data. Raises UserError for data or a pool that training would refuse."""
    require_free(config.port)
    if config.pool is not None:
        load_pool(config.pool, prices_optional=True)
    inputs = _of_files(config) if config.answers is None else _of_table(config, config.answers)
    check_prices(load_pool(inputs.pool, prices_optional=True), inputs.outcomes)
    _require_valid(inputs)
    walk(inputs, config)


def _require_valid(inputs: Inputs) -> None:
    """Raises UserError for what would stop a later step, and says what is doubtful."""
    found = validate(ValidateConfig(corpus=inputs.corpus, outcomes=inputs.outcomes, pool=inputs.pool))
    if errors := [finding.text for finding in found if finding.is_error]:
        raise UserError("; ".join(errors))
    for finding in found:
        say(f"quickstart: {finding.text}")


def _of_files(config: QuickstartConfig) -> Inputs:
    if config.corpus is None or config.outcomes is None or config.pool is None:
        raise UserError("quickstart: give a table of graded answers, or --corpus, --outcomes and --pool")
    check_columns(config.outcomes)
    return Inputs(config.corpus, config.outcomes, config.pool)


def _of_table(config: QuickstartConfig, answers: str) -> Inputs:
    if config.corpus or config.outcomes:
        raise UserError("quickstart: --corpus and --outcomes take the place of the table of answers: give only one")
    step("Read: the table of graded answers")
    data = storage.join(config.out, "data")
    summary = ingest(IngestConfig(format="table", source=answers, out=data, limit=config.limit, overwrite=True))
    corpus, outcomes = (storage.join(data, folder) for folder in (CORPUS_FOLDER, OUTCOMES_FOLDER))
    return Inputs(corpus, outcomes, config.pool or _pool_of(summary, config.out))


def _pool_of(summary: IngestSummary, out: str) -> str:
    """Writes a pool of all models in the table, without prices: their costs have to be in the table."""
    pool = storage.join(out, "pool.toml")
    lines = ["# USD per million tokens. Without prices, each answer needs its cost_usd."]
    for name in summary.targets:
        lines += [
            "",
            "[[models]]",
            f"name = {json.dumps(name, ensure_ascii=False)}",
            "# input_price =",
            "# output_price =",
        ]
    storage.write_bytes(pool, "\n".join([*lines, ""]).encode())
    say(f"quickstart: wrote {pool} with the models of the table")
    return pool
