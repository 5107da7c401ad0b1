"""The world's graded answers, turned into a corpus and outcomes: one module a format, and one that writes them all.

A format's module says where its definition was taken from. What it yields is judged and written by `tables`.
"""

from __future__ import annotations

from prefill_router.ingest import (
    llmrouter,
    llmrouterbench,
    lm_eval,
    mmlu_pro,
    openai_log,
    routellm,
    routerarena,
    routerbench,
    toolkit,
)
from prefill_router.ingest.records import Format, Ignored, Item, Options, RawAnswer, Record

__all__ = ["FORMATS", "Format", "Ignored", "Item", "Options", "RawAnswer", "Record"]

_MODULES = (
    toolkit,
    mmlu_pro,
    routerbench,
    routellm,
    llmrouter,
    llmrouterbench,
    routerarena,
    lm_eval,
    openai_log,
)
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in _MODULES}
