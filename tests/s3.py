"""An S3 endpoint for tests: the moto server of the run. Conftest files import the fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prefill_router import storage
from prefill_router.storage import uris
from run import Run

BUCKET = "prefill-router-tests"


@pytest.fixture(scope="session")
def s3_bucket(run: Run) -> Iterator[str]:
    """The URI of a bucket that tests share; each uses its own prefix.

    Sets the AWS variables of this process, so that its child processes reach the endpoint too.
    """
    variables = {
        "AWS_ENDPOINT_URL": run.serve("s3")["endpoint"],
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        uris._s3.cache_clear()
        filesystem, bucket = storage.resolve(f"s3://{BUCKET}")
        filesystem.makedirs(bucket, exist_ok=True)
        yield f"s3://{BUCKET}"
    uris._s3.cache_clear()
