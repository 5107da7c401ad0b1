"""An encoder that prompts cannot end: what befalls its worker over a shard is found out, and the prompt is left out."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

from prefill_jobs.runtime.cluster import Shared
from prefill_router.activations.shard_builder import ShardBuilder
from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder.isolated_encoder import IsolatedEncoder
from prefill_router.encoder.prefill_encoder import EncodedPrompts, PrefillEncoder
from prefill_router.encoder.prefill_work import Work

log = logging.getLogger(__name__)

_ATTEMPTS_IN_PLACE = 2  # then a shard's prompts are suspected of what befell the worker
_MOST_ATTEMPTS = 20  # then the job is stopped


class ShardAttempts:
    """Counts how often each shard was begun. A job shares one, which outlives the workers."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)

    def begin(self, digest: str) -> int:
        self.counts[digest] += 1
        return self.counts[digest]


def begin(attempts: Shared, digest: str) -> int:
    """Which attempt at a shard this is. Raises UserError where there were too many."""
    attempt: int = attempts.call("begin", digest)
    if attempt > _MOST_ATTEMPTS:
        raise UserError(f"a worker ended {attempt - 1} times over one shard: see Ray's logs for what ends it")
    return attempt


class SafeReader:
    """Reads with `encoder`, which has `threads`; what it cannot read comes back with the reason."""

    def __init__(self, encoder: PrefillEncoder, threads: int) -> None:
        self.encoder = encoder
        self.isolated = IsolatedEncoder(encoder.spec, threads)

    def read(
        self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn], attempt: int
    ) -> tuple[EncodedPrompts, dict[int, str]]:
        """Reads all prompts but those that can't be, which come back by their place, with the reason."""
        if attempt <= _ATTEMPTS_IN_PLACE:
            try:
                return self._read_here(prompts, columns)
            except (UserError, OSError):
                raise
            except Exception:  # out of memory, or what else a prompt may do to a kernel
                log.exception("a shard failed in the encoder: its prompts are tried in another process")
        try:
            return self.isolated.read_survivors(prompts, columns)
        finally:
            self.isolated.close()

    def complete(self, draft: ShardBuilder, attempt: int) -> Work:
        """Computes what a draft misses."""
        work = Work()
        for rows, columns in draft.missing():
            reading, refused = self.read([draft.prompts[i] for i in rows], columns, attempt)
            work += reading.work
            draft.refused.update({rows[i]: reason for i, reason in refused.items()})
            draft.fill([row for i, row in enumerate(rows) if i not in refused], reading)
        return work

    def _read_here(
        self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]
    ) -> tuple[EncodedPrompts, dict[int, str]]:
        try:
            return self.encoder.read(prompts, columns), {}
        except UserError:
            refused = {i: reason for i, prompt in enumerate(prompts) if (reason := self._refusal(prompt))}
            return self.encoder.read([p for i, p in enumerate(prompts) if i not in refused], columns), refused

    def _refusal(self, prompt: Prompt) -> str | None:
        try:
            self.encoder.tokenize([prompt])
        except UserError as error:
            return str(error)
        return None
