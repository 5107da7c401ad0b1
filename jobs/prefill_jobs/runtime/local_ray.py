"""Settings of a Ray that a job starts on the user's machine: it listens on loopback only and requires a token."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_NETWORKED = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's only setting for the address that all its processes bind
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # network interface of the training workers
_NAMES = (_NETWORKED, *_INTERFACES, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")  # Ray itself sets RAY_AUTH_MODE


def set_environment() -> None:
    """Sets Ray's environment variables for a local Ray, unless they are already set."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray Train gives workers 60 s to start, which may not do on a busy machine.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    # Ray ends a worker after 1 s of idling, and starting another takes longer than most stages of a local job.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")


@contextmanager
def private() -> Iterator[None]:
    """Makes a Ray started inside this block unreachable for other machines and other users.

    Its processes bind 127.0.0.1 and inherit a random token. The environment is restored afterwards, so that the next
    Ray gets another token. A token set by the user is kept, and so is RAY_AUTH_MODE=disabled.
    """
    before, is_networked = {name: os.environ.get(name) for name in _NAMES}, ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_NETWORKED] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray read the variable when it was imported
    for name in _INTERFACES:
        os.environ.setdefault(name, _LOOPBACK)
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = is_networked
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
