"""`clean`: removes unpacked encoders, scratch folders of killed processes, and logs of failed jobs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HUB_CACHE

from prefill_jobs.options import CleanConfig
from prefill_router.common import scratch
from prefill_router.common.console import doing, say
from prefill_router.encoder.checkpoint import PARTIAL, unpacked_folder


class Leftover(NamedTuple):
    path: Path
    what: str
    num_bytes: int


@doing("looking for leftovers")
def clean(config: CleanConfig) -> list[Leftover]:
    """Removes all leftovers that can be removed, and returns them; in a dry run, returns all."""
    found = [Leftover(path, what, _size(path)) for path, what in _leftovers()]
    return found if config.dry_run else [leftover for leftover in found if _removed(leftover.path)]


def kept() -> list[Leftover]:
    """Folders that other programs use as well: only the user can decide to remove them."""
    ray = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray")
    hub = Path(HF_HUB_CACHE)
    found = [
        Leftover(ray, "Ray's logs: remove it when no Ray runs", _size(ray)),
        Leftover(hub, "models of the hub: HF_HOME moves it, `hf cache` empties it", _size(hub)),
    ]
    return [leftover for leftover in found if leftover.num_bytes]


def _leftovers() -> Iterator[tuple[Path, str]]:
    for folder in sorted(unpacked_folder().glob("*/")):
        with suppress(Timeout), _unused(folder):
            yield folder, "an unpacked encoder, which is unpacked again when it is used"
    for folder in scratch.abandoned():
        yield folder, "files of a process that was killed"
    for log in sorted(Path(tempfile.gettempdir()).glob(f"{scratch.PREFIX}*.log")):
        yield log, "the log of a failed job"


def _unused(path: Path) -> AbstractContextManager[object]:
    """Keeps others from unpacking to this folder. Raises Timeout if a process does so now."""
    if path.parent != unpacked_folder():
        return nullcontext()
    return FileLock(f"{path.parent / path.name.removesuffix(PARTIAL)}.lock", blocking=False)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def _removed(path: Path) -> bool:
    """Removes a leftover, unless it is in use, or somebody else's, which is said."""
    try:
        with _unused(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except Timeout:
        return False
    except OSError as error:
        say(f"clean: {error.filename}: {error.strerror}")
        return False
    return True
