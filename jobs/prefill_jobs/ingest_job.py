"""`ingest`: graded answers in another project's format in, a corpus and outcomes out."""

from __future__ import annotations

from prefill_jobs.options import IngestConfig
from prefill_router import storage
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.ingest import FORMATS, Options
from prefill_router.ingest.source_files import find_source
from prefill_router.ingest.tables import IngestSummary, Tables, claim

_SHOWN = 8  # names of files that are said to be of another kind


def ingest(config: IngestConfig) -> IngestSummary:
    """Writes corpus/, outcomes/ and the quarantine below `config.out`, and last its summary, which it returns.

    Raises UserError for a source that is not of the format or holds no good record, where the output is taken, and for
    a target's name that the format has no use for.
    """
    kind = FORMATS[config.format]
    if config.target is not None and not kind.takes_target:
        raise UserError(f"target = {config.target!r}: the records of {kind.name} name their targets: leave it out")
    source = find_source(config.source, kind)
    options = Options(config.target, config.max_prompt_bytes)
    claim(config.out, overwrite=config.overwrite)
    if source.others:
        names = ", ".join(storage.name(file) for file in source.others[:_SHOWN])
        more = f" and {len(source.others) - _SHOWN:,} more" if len(source.others) > _SHOWN else ""
        say(f"ingest: ignored: files of another kind: {names}{more}")
    with Tables(config.out, kind, options) as tables:
        for file in source.files:
            for item in kind.read(file, options):
                tables.add(item)
        return tables.finish(config.source, len(source.files), len(source.others))
