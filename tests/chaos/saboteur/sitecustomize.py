"""Runs at the start of every Python with this folder on PYTHONPATH, including Ray's workers and their children.

Slows each encoder call down by SABOTEUR_SLOW_S, or makes each process hang after SABOTEUR_READS calls, so that tests
have time to kill it. A prompt with the word SABOTAGE kills its process, as a prompt that exhausts memory does. Commit
logs use small segments.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_reads = itertools.count()


class _Sabotage(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name not in _SABOTAGES:
            return None
        spec = PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader = _Loader(spec.loader, _SABOTAGES[name])
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, sabotage: Callable[[Any], None]) -> None:
        self.loader, self.sabotage = loader, sabotage

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.sabotage(module)


def _slow_down(encoder: Any) -> None:
    read = encoder.PrefillEncoder.read

    def sabotaged(self: Any, prompts: Any, columns: Any) -> Any:
        if any("SABOTAGE" in str(prompt) for prompt in prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("SABOTEUR_SLOW_S", "0")))
        if next(_reads) == int(os.environ.get("SABOTEUR_READS", "-1")):
            time.sleep(3600)
        return read(self, prompts, columns)

    encoder.PrefillEncoder.read = sabotaged


def _gather_often(ledger: Any) -> None:
    ledger.SEGMENT_RECORDS = 8


_SABOTAGES = {
    "prefill_router.encoder.prefill_encoder": _slow_down,
    "prefill_router.activations.commit_log": _gather_often,
}
sys.meta_path.insert(0, _Sabotage())
