"""Turns Ray's failures into one line with a remedy, and writes Ray's full output to a log file."""

from __future__ import annotations

import tempfile
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher as messages

from prefill_router.common.console import say
from prefill_router.common.errors import UserError

_STAYS = "run the job again to resume from the committed shards"
_MEMORY = ("OutOfMemoryError", "running low on memory", "memory pressure")
_NO_ROOM = ("cannot be scheduled", "infeasible")
_SHOWN_CHARACTERS = 300

_heard: deque[str] = deque(maxlen=1000)


def listen() -> None:
    """Collects what Ray would print for the log file: Ray prints every failed try, and most tries are retried."""
    messages.remove_handler("ray_print_logs")
    messages.remove_handler(__name__)
    messages.add_handler(__name__, _hear)


def _hear(message: Mapping[str, Any]) -> None:
    for line in message["lines"]:
        _heard.append(line)
        if any(words in line for words in _NO_ROOM):
            say(f"ray: {_shown(line)}")


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Raises Ray's exceptions as UserErrors. A UserError that Ray wrapped is raised unchanged.

    A bare Exception is Ray's too: it raises one if a node is not up within 30 s.
    """
    try:
        yield
    except Exception as error:
        is_rays = any(kind.__module__.startswith("ray.") for kind in type(error).__mro__)
        if not is_rays and type(error) is not Exception:
            raise
        cause = getattr(error, "cause", None)  # the exception of a task
        raise cause if isinstance(cause, UserError) else UserError(_line(error, cause or error)) from error


def _line(error: Exception, cause: Exception) -> str:
    details = "\n".join([*traceback.format_exception(error), "Ray's messages until then:", *_heard])
    with tempfile.NamedTemporaryFile("w", prefix="prefill-router-", suffix=".log", delete=False) as file:
        file.write(details)
    what, remedy = _shown(f"{type(cause).__name__}: {cause}"), _STAYS
    if any(words in details for words in _MEMORY):
        what, remedy = "a node ran out of memory", f"lower --workers, and {_STAYS}"
    return f"Ray failed the job: {what}: {remedy}; full log: {file.name}"


def _shown(text: str) -> str:
    line = text.strip().splitlines()[0]
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."
