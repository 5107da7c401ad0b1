"""A Ray that a job starts on the user's machine: it listens on loopback alone, and wants a token made for it."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_NETWORKED = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's one switch for the address that all its processes bind
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # by which the workers of a training talk
_NAMES = (_NETWORKED, *_INTERFACES, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")  # Ray itself sets RAY_AUTH_MODE


def set_environment() -> None:
    """Sets what a Ray that starts here should know, unless the environment says otherwise."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray ends a worker after an idle second, and to start another takes longer than most stages of a job on one machine
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")


@contextmanager
def private() -> Iterator[None]:
    """Closes the Ray that starts in this block to other machines and other users.

    Its processes bind 127.0.0.1 and inherit a random token. Afterwards this process's environment is as before, so that
    its next Ray has another token. A token of the user's is kept, and so is RAY_AUTH_MODE=disabled.
    """
    before, is_networked = {name: os.environ.get(name) for name in _NAMES}, ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_NETWORKED] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray reads the variable while it is imported, long before
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
