"""Which process of a run takes which tests: those that start a Ray of their own run one after another, in one of them.

Two at once start more workers than a small machine has cores for, and reach limits on time that Ray does not let us
set. Meanwhile the other processes take all other files.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

STARTS_RAY = (
    "tests/chaos/",
    *(f"tests/e2e/test_{name}.py" for name in ("demo", "errors", "gateway", "memory", "notebook", "road")),
    *(f"tests/e2e/test_{name}.py" for name in ("serving", "submit", "wheel_install")),
    "tests/infra/test_dev.py",
    "tests/infra/test_watch.py",
    "tests/prefill_jobs/runtime/test_local_ray.py",
)


class RaysInOneProcess(LoadScopeScheduling):
    """Gives a process a file at a time, as `--dist=loadfile` does, and all tests with a Ray of their own as one."""

    def _split_scope(self, nodeid: str) -> str:
        return "rays" if _starts_ray(nodeid) else nodeid.partition("::")[0]


def rays_first(items: list[pytest.Item]) -> None:
    """Those tests take longest."""
    items.sort(key=lambda item: not _starts_ray(item.nodeid))


def _starts_ray(nodeid: str) -> bool:
    return nodeid.startswith(STARTS_RAY)
