"""Fault-tolerant encoding in a child process: finds the prompts that crash the encoder, so that they can be skipped.

A prompt that exhausts memory or crashes a kernel kills its process. In the worker itself, every retry would kill the
worker again.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from prefill_router.common.child_process import Child, ChildDied
from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.prefill_encoder import EncodedPrompts
from prefill_router.encoder.sensors import load_sensor

_MEMORY_SHARE = 0.8  # of the available memory, which the child may use
_MAX_CRASHES = 8  # crashing prompts per shard; with more, the prompts are not the cause

_Request = tuple[list[Prompt], list[ActivationColumn]]


class EncoderDied(Exception):  # noqa: N818 - an event, not an error of the caller
    """The child process crashed or raised while it encoded some prompts."""


class IsolatedEncoder:
    """Encodes as `PrefillEncoder.read` does, in a child process that starts on first use."""

    def __init__(self, spec: EncoderSpec, threads: int) -> None:
        self._child = Child(_make_reader, (spec, threads), start_s=None)

    def read(self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]) -> EncodedPrompts:
        """Encodes prompts in the child. Raises EncoderDied, with the reason, if it crashes or raises."""
        try:
            encoded: EncodedPrompts = self._child.ask((list(prompts), list(columns)), None)
        except ChildDied as death:
            raise EncoderDied(f"the encoder {death}") from None
        return encoded

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
                reason = str(death)
            if len(indices) > 1:
                middle = indices.start + len(indices) // 2
                search(range(indices.start, middle))
                search(range(middle, indices.stop))
            elif self._crashes_again(prompts[indices.start], columns):
                crashes[indices.start] = reason
            if len(crashes) > _MAX_CRASHES:
                raise UserError(
                    f"more than {_MAX_CRASHES} prompts of a shard cannot be encoded (last reason: {reason}): "
                    "check the encoder and its workers' memory"
                )

        search(range(len(prompts)))
        return crashes

    def _crashes_again(self, prompt: Prompt, columns: Sequence[ActivationColumn]) -> bool:
        """Rules out other causes of a single crash, such as a node short of memory or an external kill."""
        try:
            self.read([prompt], columns)
        except EncoderDied:
            return True
        return False

    def close(self) -> None:
        self._child.close()


def _make_reader(setup: tuple[EncoderSpec, int]) -> Callable[[_Request], EncodedPrompts]:
    """Runs in the child: loads the encoder and returns a function that encodes with it."""
    spec, threads = setup
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(threads)
    encoder = load_sensor(spec)
    if encoder.device.type == "cpu":
        _limit_memory()

    def read(request: _Request) -> EncodedPrompts:
        try:
            return encoder.read(*request)
        except Exception as error:  # a prompt can raise any exception, which may not be picklable
            first_line = str(error).partition("\n")[0]
            raise EncoderDied(f"the encoder raised {type(error).__name__}: {first_line}") from None

    return read


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
