"""Fault-tolerant encoding: finds and refuses the prompts of a shard that crash the worker."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from prefill_router.activations.shard_builder import ShardBuilder
from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder.isolated_encoder import IsolatedEncoder
from prefill_router.encoder.prefill_encoder import EncodedPrompts
from prefill_router.encoder.prefill_work import Work
from prefill_router.encoder.sensors import Sensor

log = logging.getLogger(__name__)

_ATTEMPTS_IN_PROCESS = 2  # later attempts suspect the shard's prompts and encode them in another process


class GuardedEncoder:
    """Reads prompts with `encoder`, and returns the reasons for the prompts that it cannot read.

    After a crash, prompts are read in another process with `threads` threads.
    """

    def __init__(self, encoder: Sensor, threads: int) -> None:
        self.encoder = encoder
        self.isolated = IsolatedEncoder(encoder.spec, threads)

    def read(
        self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn], attempt: int
    ) -> tuple[EncodedPrompts, dict[int, str]]:
        """Returns the readable prompts' activations, and the reason for each refused prompt, by its index."""
        if attempt <= _ATTEMPTS_IN_PROCESS:
            try:
                return self._read_in_process(prompts, columns)
            except (UserError, OSError):
                raise
            except Exception:  # such as running out of memory, or a kernel failure
                log.exception("the encoder failed on a shard: retrying its prompts in another process")
        try:
            return self.isolated.read_survivors(prompts, columns)
        finally:
            self.isolated.close()

    def complete(self, builder: ShardBuilder, attempt: int) -> Work:
        """Computes the activations that `builder` lacks, and returns the work done."""
        work = Work()
        for rows, columns in builder.missing():
            reading, refused = self.read([builder.prompts[i] for i in rows], columns, attempt)
            work += reading.work
            builder.refused.update({rows[i]: reason for i, reason in refused.items()})
            builder.fill([row for i, row in enumerate(rows) if i not in refused], reading)
        return work

    def _read_in_process(
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
