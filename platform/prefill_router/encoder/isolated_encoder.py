"""An encoder in a process of its own: what a prompt does to that process, it does not do to the one that asked.

A prompt that takes all memory, or crashes a kernel, ends its process. Tried in the worker again and again, it would end
the worker each time; tried here, it is found and left out.
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
from prefill_router.encoder.prefill_encoder import EncodedPrompts, EncoderSpec, PrefillEncoder

_MEMORY_SHARE = 0.8  # of the memory that is free, which the process may take
_MOST_KILLERS = 8  # in one shard: with more, it is not the prompts


class EncoderDied(Exception):  # noqa: N818 - what happened, of a process
    """The process ended, or raised, over some prompts."""


class IsolatedEncoder:
    """Encodes as `PrefillEncoder.read` does, in a child process that is started when it is needed."""

    def __init__(self, spec: EncoderSpec, threads: int) -> None:
        self.spec, self.threads = spec, threads
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def read(self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]) -> EncodedPrompts:
        """Raises EncoderDied, with the reason, where the process ends or raises."""
        connection = self._start()
        try:
            connection.send((list(prompts), list(columns)))
            answer = connection.recv()
        except (EOFError, OSError):
            raise EncoderDied(self._epitaph()) from None
        if isinstance(answer, Exception):
            raise EncoderDied(str(answer) or type(answer).__name__)
        reading: EncodedPrompts = answer
        return reading

    def read_survivors(
        self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]
    ) -> tuple[EncodedPrompts, dict[int, str]]:
        """Reads all prompts but those that end the process, which come back by their place, with how.

        Raises UserError where there are too many of them, or where the others end it together.
        """
        try:
            return self.read(prompts, columns), {}
        except EncoderDied:
            killers = self._find_killers(prompts, columns)
        try:
            return self.read([prompt for i, prompt in enumerate(prompts) if i not in killers], columns), killers
        except EncoderDied as death:
            raise UserError(
                f"the prompts of a shard end the encoder together, though none does alone: {death}"
            ) from None

    def _find_killers(self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]) -> dict[int, str]:
        """The prompts that end the process by themselves, twice. Halves them until they are found."""
        killers: dict[int, str] = {}

        def search(places: range) -> None:
            try:
                self.read([prompts[i] for i in places], columns)
                return
            except EncoderDied as death:
                reason = f"ends the encoder: {death}"
            if len(places) > 1:
                middle = places.start + len(places) // 2
                search(range(places.start, middle))
                search(range(middle, places.stop))
            elif self._kills_again(prompts[places.start], columns):
                killers[places.start] = reason
            if len(killers) > _MOST_KILLERS:
                raise UserError(f"more than {_MOST_KILLERS} prompts of a shard cannot be read: {reason}")

        search(range(len(prompts)))
        return killers

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _kills_again(self, prompt: Prompt, columns: Sequence[ActivationColumn]) -> bool:
        """One death may be another's doing: of a node that was short of memory, or of who killed the process."""
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

    def _epitaph(self) -> str:
        assert self._process is not None
        self._process.join(timeout=10)
        code = self._process.exitcode
        self.close()
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit status {code}"


def _serve(connection: Connection, spec: EncoderSpec, threads: int) -> None:
    """The child: answers until its parent is gone."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(threads)
    encoder = PrefillEncoder.load(spec)
    if encoder.device.type == "cpu":
        _limit_memory()
    while True:
        prompts, columns = connection.recv()
        answer: Any
        try:
            answer = encoder.read(prompts, columns)
        except Exception as error:  # what a prompt may raise is not known
            answer = EncoderDied(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        connection.send(answer)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _limit_memory() -> None:
    """So that this process fails before the node does."""
    if sys.platform != "linux":
        return
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + int(_MEMORY_SHARE * available)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
