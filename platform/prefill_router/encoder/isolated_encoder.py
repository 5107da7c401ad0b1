"""Fault-tolerant encoding in a child process: finds the prompts that crash the encoder, so that they can be skipped.

A prompt that exhausts memory or crashes a kernel kills its process. In the worker itself, every retry would kill the
worker again.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.prefill_encoder import EncodedPrompts, PrefillEncoder

_MEMORY_SHARE = 0.8  # of the available memory, which the child may use
_MAX_CRASHES = 8  # crashing prompts per shard; with more, the prompts are not the cause


class EncoderDied(Exception):  # noqa: N818 - an event, not an error of the caller
    """The child process crashed or raised while it encoded some prompts."""


class IsolatedEncoder:
    """Encodes as `PrefillEncoder.read` does, in a child process that starts on first use."""

    def __init__(self, spec: EncoderSpec, threads: int) -> None:
        self.spec, self.threads = spec, threads
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def read(self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]) -> EncodedPrompts:
        """Encodes prompts in the child. Raises EncoderDied, with the reason, if it crashes or raises."""
        connection = self._start()
        try:
            connection.send((list(prompts), list(columns)))
            answer = connection.recv()
        except (EOFError, OSError):
            raise EncoderDied(self._exit_reason()) from None
        if isinstance(answer, Exception):
            raise EncoderDied(str(answer) or type(answer).__name__)
        reading: EncodedPrompts = answer
        return reading

    def read_survivors(
        self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]
    ) -> tuple[EncodedPrompts, dict[int, str]]:
        """Encodes all prompts except those that crash the encoder. Returns the reasons of these by prompt index.

        Raises UserError if too many prompts crash it, or if the remaining ones crash it only together.
        """
        try:
            return self.read(prompts, columns), {}
        except EncoderDied:
            crashes = self._find_crashes(prompts, columns)
        try:
            return self.read([prompt for i, prompt in enumerate(prompts) if i not in crashes], columns), crashes
        except EncoderDied as death:
            raise UserError(
                f"the prompts of a shard crash the encoder together, but not one by one: {death}: "
                "give its workers more memory"
            ) from None

    def _find_crashes(self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]) -> dict[int, str]:
        """Finds the prompts that crash the encoder alone, twice in a row, by bisection."""
        crashes: dict[int, str] = {}

        def search(indices: range) -> None:
            try:
                self.read([prompts[i] for i in indices], columns)
                return
            except EncoderDied as death:
                reason = f"crashes the encoder: {death}"
            if len(indices) > 1:
                middle = indices.start + len(indices) // 2
                search(range(indices.start, middle))
                search(range(middle, indices.stop))
            elif self._crashes_again(prompts[indices.start], columns):
                crashes[indices.start] = reason
            if len(crashes) > _MAX_CRASHES:
                raise UserError(
                    f"more than {_MAX_CRASHES} prompts of a shard fail, the last one {reason}: "
                    "check the encoder and its workers' memory"
                )

        search(range(len(prompts)))
        return crashes

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _crashes_again(self, prompt: Prompt, columns: Sequence[ActivationColumn]) -> bool:
        """Rules out other causes of a single crash, such as a node short of memory or an external kill."""
        try:
            self.read([prompt], columns)
        except EncoderDied:
            return True
        return False

    def _start(self) -> Connection:
        if self._process is None or self._connection is None or not self._process.is_alive():
            self.close()
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self.spec, self.threads), daemon=True)
            self._process.start()
            theirs.close()
        return self._connection

    def _exit_reason(self) -> str:
        assert self._process is not None
        self._process.join(timeout=10)
        code = self._process.exitcode
        self.close()
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit status {code}"


def _serve(connection: Connection, spec: EncoderSpec, threads: int) -> None:
    """Runs in the child: answers requests until the parent exits."""
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(threads)
    encoder = PrefillEncoder.load(spec)
    if encoder.device.type == "cpu":
        _limit_memory()
    while True:
        prompts, columns = connection.recv()
        answer: Any
        try:
            answer = encoder.read(prompts, columns)
        except Exception as error:  # a prompt can raise any exception
            answer = EncoderDied(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        connection.send(answer)


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _limit_memory() -> None:
    """Limits the address space, so that this process runs out of memory before the node does."""
    if sys.platform != "linux":
        return
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + int(_MEMORY_SHARE * available)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
