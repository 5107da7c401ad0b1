"""Fixtures that create machines with a local folder or a bucket."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from crashes.bucket import Bucket
from crashes.disk import Disk
from crashes.enumeration import Machines
from crashes.process import simulate
from prefill_router.storage import uris


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch)


@pytest.fixture
def disks(one_process: None, tmp_path: Path) -> Machines:
    """Makes machines whose storage is a local folder."""
    numbers = itertools.count()
    return lambda: Disk(tmp_path / f"disk-{next(numbers)}")


@pytest.fixture
def buckets(one_process: None, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Makes machines whose storage is a bucket."""

    def make() -> Bucket:
        bucket = Bucket()
        monkeypatch.setattr(uris, "_s3", lambda: bucket.filesystem)
        return bucket

    return make


@pytest.fixture(params=["disks", "buckets"])
def machines(request: pytest.FixtureRequest) -> Machines:
    made: Machines = request.getfixturevalue(request.param)
    return made
