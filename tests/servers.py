"""Servers that all processes of a test run share: `python servers.py NAME PID FILE`.

A server writes its connection details to FILE once it is ready, and ends with the process PID.
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

from forks.server import lives

# Enough for jobs of two test processes at once. With more, Ray starts more workers, each with seconds of imports.
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
    """moto's S3 server."""
    import logging

    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    # moto's conditional PUT is not atomic, unlike S3's: a lock makes it so.
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
    """A Ray head on loopback, without dashboard or token. Its workers inherit this environment."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # Ray reads it on import
    import ray as started

    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    context = started.init("local", num_cpus=RAY_CPUS, object_store_memory=200_000_000, **quiet)
    try:
        yield {"address": context.address_info["address"]}
    finally:
        started.shutdown()


def main(name: str, pid: int, file: Path) -> None:
    with {"s3": s3, "ray": ray}[name]() as details:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(details))
        partial.rename(file)
        while lives(pid):
            time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
