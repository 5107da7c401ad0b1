"""Converts graded answers, in a table of one's own or another project's format, into a corpus and outcomes.

One module per format reads records and cites the source of the format; `tables` validates and writes the records of all
formats. Start reading at `records`, then `toolkit`, the simplest format.
"""

from __future__ import annotations

from prefill_router.corpus.grades import RawAnswer
from prefill_router.ingest import (
    answer_table,
    llmrouter,
    llmrouterbench,
    lm_eval,
    mmlu_pro,
    openai_log,
    paretobandit,
    routellm,
    routerarena,
    routerbench,
    toolkit,
)
from prefill_router.ingest.records import Format, Ignored, Item, Options, Record

__all__ = ["FORMATS", "Format", "Ignored", "Item", "Options", "RawAnswer", "Record"]

_MODULES = (
    answer_table,
    toolkit,
    mmlu_pro,
    routerbench,
    routellm,
    llmrouter,
    llmrouterbench,
    routerarena,
    lm_eval,
    openai_log,
    paretobandit,
)
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in _MODULES}
