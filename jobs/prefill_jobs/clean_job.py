"""`clean`: removes unpacked encoders, scratch folders of killed processes, and logs of failed jobs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HUB_CACHE

from prefill_jobs.options import CleanConfig
from prefill_router.common import scratch
from prefill_router.common.console import doing
from prefill_router.encoder.checkpoint import unpacked_folder


class Leftover(NamedTuple):
    path: Path
    what: str
    num_bytes: int


@doing("looking for leftovers")
def clean(config: CleanConfig) -> list[Leftover]:
    """Removes all leftovers, unless it is a dry run, and returns them."""
    found = [Leftover(path, what, _size(path)) for path, what in _leftovers()]
    if not config.dry_run:
        for leftover in found:
            _remove(leftover.path)
    return found


def kept() -> list[Leftover]:
    """What other programs use as well: only a user can say whether it may be removed."""
    ray = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray")
    hub = Path(HF_HUB_CACHE)
    found = [
        Leftover(ray, "Ray's logs: remove it when no Ray runs", _size(ray)),
        Leftover(hub, "models of the hub: HF_HOME moves it, `hf cache` empties it", _size(hub)),
    ]
    return [leftover for leftover in found if leftover.num_bytes]


def _leftovers() -> Iterator[tuple[Path, str]]:
    for folder in sorted(unpacked_folder().glob("*/")):
        if not _is_locked(folder):
            yield folder, "an unpacked encoder, which is unpacked again when it is used"
    for folder in scratch.abandoned():
        yield folder, "files of a process that was killed"
    for log in sorted(Path(tempfile.gettempdir()).glob(f"{scratch.PREFIX}*.log")):
        yield log, "the log of a failed job"


def _is_locked(folder: Path) -> bool:
    """Whether a process is unpacking to this folder."""
    try:
        with FileLock(f"{folder}.lock", blocking=False):
            return False
    except Timeout:
        return True


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        Path(f"{path}.lock").unlink(missing_ok=True)
    else:
        path.unlink(missing_ok=True)
