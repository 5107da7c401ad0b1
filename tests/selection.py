"""Deselects tests that this machine cannot run."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from browsers import CHROMIUM
from manifests import KUBECTL
from prometheus import PROMETHEUS, PROMTOOL

COLLECTED = pytest.StashKey[frozenset[Path]]()  # files with collected tests, before deselection
LACKING = pytest.StashKey[frozenset[str]]()  # marks of the requirements that this machine lacks


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
    """Deselects tests that need a missing GPU or program. They do not count as skipped, which would fail the run."""
    config.stash[COLLECTED] = frozenset(item.path for item in items)
    config.stash[LACKING] = lacking = frozenset(mark for mark, is_there in _HAS.items() if not is_there())
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in lacking)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
