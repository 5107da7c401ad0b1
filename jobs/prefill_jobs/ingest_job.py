"""`ingest`: converts graded answers from another project's format to a corpus and outcomes."""

from __future__ import annotations

from itertools import chain

from prefill_jobs.options import IngestConfig
from prefill_router import storage
from prefill_router.common.console import doing, say
from prefill_router.common.errors import UserError
from prefill_router.ingest import FORMATS, Options
from prefill_router.ingest.source_files import find_source, located
from prefill_router.ingest.tables import IngestSummary, Tables, check_folder, refuse_own_output

_SHOWN = 8  # ignored files that are named


def ingest(config: IngestConfig) -> IngestSummary:
    """Writes corpus/, outcomes/ and the quarantine below `config.out`, and last the summary, which it returns.

    Raises UserError if the source has another format or no valid record, if the output exists, or if a target name is
    given for a format whose records name their targets.
    """
    kind = FORMATS[config.format]
    if config.target is not None and not kind.takes_target:
        raise UserError(f"target = {config.target!r}: records of format {kind.name} name their targets: omit --target")
    source = find_source(located(config.source), kind)
    refuse_own_output(source.files, config.out)
    options = Options(config.target, config.max_prompt_bytes)
    check_folder(config.out, overwrite=config.overwrite)
    if source.others:
        names = ", ".join(storage.name(file) for file in source.others[:_SHOWN])
        more = f" and {len(source.others) - _SHOWN:,} more" if len(source.others) > _SHOWN else ""
        say(f"ingest: ignored files of another format: {names}{more}")
    with Tables(config.out, kind, options) as tables, doing(lambda: f"ingest: {tables.num_records:,} records"):
        for item in chain.from_iterable(kind.read(file, options) for file in source.files):
            if tables.num_records == config.limit:
                break
            tables.add(item)
        return tables.finish(config.source, len(source.files), len(source.others))
