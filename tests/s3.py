"""A real S3 endpoint for tests: moto's server, in a thread of this process. Conftest files import the fixture."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any

import pytest

from prefill_router import storage

BUCKET = "prefill-router-tests"


def _one_at_a_time(call: Callable[..., Any]) -> Callable[..., Any]:
    lock = threading.Lock()

    @wraps(call)
    def locked(*arguments: Any) -> Any:
        with lock:
            return call(*arguments)

    return locked


@cache
def _endpoint() -> str:
    """Starts the one server of this process, however many conftest files import the fixture."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    # It looks whether something lies there, and then writes: as in S3, no other PUT may come between.
    S3Response.put_object = _one_at_a_time(S3Response.put_object)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # its line a request drowns a failure's report
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    atexit.register(server.stop)
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """The URI of an empty bucket; tests share it, each below a prefix of its own.

    It sets the AWS variables of this process, so that processes started under it reach the endpoint too.
    """
    variables = {
        "AWS_ENDPOINT_URL": _endpoint(),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        storage._s3.cache_clear()
        filesystem, bucket = storage.resolve(f"s3://{BUCKET}")
        if not filesystem.exists(bucket):
            filesystem.mkdir(bucket)
        yield f"s3://{BUCKET}"
    storage._s3.cache_clear()
