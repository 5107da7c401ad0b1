"""Which of the collected tests a machine can run."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from browsers import CHROMIUM
from manifests import KUBECTL
from prometheus import PROMETHEUS, PROMTOOL

COLLECTED = pytest.StashKey[frozenset[Path]]()  # the files whose tests were found, before any was left out
LACKING = pytest.StashKey[frozenset[str]]()  # the marks of tests that need what this machine lacks


@functools.cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


_HAS = {
    "cuda": _has_cuda,
    "browser": lambda: CHROMIUM is not None,
    "kubectl": lambda: KUBECTL is not None,
    "prometheus": lambda: PROMETHEUS is not None and PROMTOOL is not None,
}


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests of a GPU, or of a program, where there is none: not skipped, for nobody meant to run them."""
    config.stash[COLLECTED] = frozenset(item.path for item in items)
    config.stash[LACKING] = lacking = frozenset(mark for mark, is_there in _HAS.items() if not is_there())
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in lacking)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
