"""Runs at the start of every Python that has this folder on PYTHONPATH, Ray's workers and their children too.

It makes the encoder slow by SABOTEUR_SLOW_S, so that there is time to kill who uses it, and lets a prompt that holds
the word SABOTAGE end its process, as one that takes all memory does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TARGET = "prefill_router.encoder"


class _Sabotage(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        spec = PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        encoder: Any = module.PrefillEncoder  # type: ignore[attr-defined]
        encoder.read = _sabotaged(encoder.read)


def _sabotaged(read: Any) -> Any:
    def sabotaged(self: Any, prompts: Any, columns: Any) -> Any:
        if any("SABOTAGE" in str(prompt) for prompt in prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("SABOTEUR_SLOW_S", "0")))
        return read(self, prompts, columns)

    return sabotaged


sys.meta_path.insert(0, _Sabotage())
