"""Servers that all processes of a test run share: `python servers.py NAME PID FILE`.

Each writes what its callers must know into FILE once it answers, and ends with the process PID.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

# For jobs of two processes of tests at once. With more, Ray starts more workers, each of which imports for seconds.
RAY_CPUS = 4


def _one_at_a_time(call: Callable[..., Any]) -> Callable[..., Any]:
    lock = threading.Lock()

    @wraps(call)
    def locked(*arguments: Any) -> Any:
        with lock:
            return call(*arguments)

    return locked


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """A real S3 endpoint: moto's server."""
    import logging

    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    # moto looks whether an object exists and writes then: as in S3, no other PUT may come between.
    S3Response.put_object = _one_at_a_time(S3Response.put_object)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield {"endpoint": f"http://{host}:{port}"}
    finally:
        server.stop()


@contextmanager
def ray() -> Iterator[dict[str, str]]:
    """A Ray head on loopback, without a dashboard or a token. Its workers have this process's environment."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # read while Ray is imported
    import ray as started

    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    context = started.init("local", num_cpus=RAY_CPUS, object_store_memory=200_000_000, **quiet)
    try:
        yield {"address": context.address_info["address"]}
    finally:
        started.shutdown()


def main(name: str, pid: int, file: Path) -> None:
    with {"s3": s3, "ray": ray}[name]() as told:
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(told))
        draft.rename(file)
        while _lives(pid):
            time.sleep(0.5)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
