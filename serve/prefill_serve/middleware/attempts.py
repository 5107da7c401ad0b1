"""Counts attempts at a request: after two replicas died during it, the third refuses it and logs it.

HAProxy resends a request under the same id. A replica creates a file when it begins a request and deletes it at the
end, so a file that another replica of the machine finds is from one that died.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger("ray.serve")

HEADER = "x-router-call"  # set by HAProxy; overrides the caller's
FOLDER = "PREFILL_ROUTER_ATTEMPTS_PATH"
MOST_DEATHS = 2
MESSAGE = "this request ended two replicas and is not retried: the endpoint's log has its request id"
CODE = "replicas_lost"
NOT_AGAIN = {"x-should-retry": "false"}  # OpenAI's clients would try twice more
_NAME = re.compile(r"[0-9a-f-]{36}")


class TooManyDeaths(Exception):  # noqa: N818 - a refusal
    """Two replicas died while they had this request."""


class RequestAttempts:
    """The attempts on one machine; without a folder, none are counted."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @classmethod
    def of_environment(cls) -> RequestAttempts:
        folder = os.environ.get(FOLDER)
        return cls(Path(folder) if folder else None)

    @contextmanager
    def begun(self, name: str | None, request_id: str) -> Iterator[None]:
        """Counts an attempt at the request `name` until the block ends. Raises TooManyDeaths instead of a third."""
        if self._folder is None or name is None or not _NAME.fullmatch(name):
            yield
            return
        file = self._folder / name
        try:
            if (deaths := _note(file)) >= MOST_DEATHS:
                log.error("request ended replicas", extra={"route_id": request_id, "deaths": deaths})
                raise TooManyDeaths
            yield
        finally:
            with suppress(OSError):
                file.unlink()


def _note(file: Path) -> int:
    """Adds this process to those that began a request; returns how many were there. A full disk stops no request."""
    try:
        with file.open("ab", buffering=0) as attempts:
            before = file.read_bytes().count(b"\n")
            attempts.write(b"%d\n" % os.getpid())
            return before
    except OSError:
        return 0
