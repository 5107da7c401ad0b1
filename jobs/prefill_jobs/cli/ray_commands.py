"""Commands of Ray's own programs that a user may look for in ours: the error names the command to run instead."""

from __future__ import annotations

from collections.abc import Sequence

from prefill_router.common.errors import UsageError

_OF_SERVE = ("build", "config", "controller-health", "deploy", "run", "shutdown", "start", "status")
_OF_RAY = (
    "attach",
    "dashboard",
    "down",
    "exec",
    "get",
    "job",
    "list",
    "logs",
    "memory",
    "start",
    "status",
    "stop",
    "summary",
    "timeline",
    "up",
)


def refuse_ray_commands(arguments: Sequence[str]) -> None:
    """Raises UsageError if `arguments` begin with a command of Ray's `serve` or `ray`."""
    first, second = (*arguments, "", "")[:2]
    if first == "serve" and second in _OF_SERVE:
        raise UsageError(f'"serve {second}" is a command of Ray: run {_usage("serve", second)}, see infra/README.md')
    if first in _OF_RAY:
        raise UsageError(f'"{first}" is a command of Ray: run {_usage("ray", first)}, or prefill-router submit')


def _usage(program: str, command: str) -> str:
    takes_config = program == "serve" and command in ("deploy", "run")
    return f'"{program} {command}{" infra/serve.yaml" if takes_config else ""}"'
