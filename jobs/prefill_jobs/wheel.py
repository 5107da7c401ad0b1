"""The code that runs here as a wheel, for a cluster whose image may hold another version of it.

It names no requirements, which Ray would install on every node with it: those are the image's. A cluster caches wheels
by their file names, so that the version ends in a digest of what the wheel holds.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

DISTRIBUTION = "prefill-router"
_PACKAGES = ("prefill_router", "prefill_jobs", "prefill_serve")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can tell: the same code is the same file


def write_wheel(folder: Path) -> Path:
    """Writes the packages, as they are imported here, as a wheel in `folder`, and returns its path."""
    files = dict(_sources())
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in files.items())).hexdigest()[:12]
    version = f"{distribution(DISTRIBUTION).version}+{digest}"
    stem = f"{DISTRIBUTION.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: prefill-router\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/entry_points.txt"] = (distribution(DISTRIBUTION).read_text("entry_points.txt") or "").encode()
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return path


def _sources() -> Iterator[tuple[str, bytes]]:
    for package in _PACKAGES:
        module = import_module(package)
        root = Path(module.__path__[0])
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package}/{path.relative_to(root).as_posix()}", path.read_bytes()


def _record(files: dict[str, bytes], own: str) -> bytes:
    """The name, hash and size of each file, as PEP 376 has them; the record's own line is without."""
    lines = [f"{name},sha256={_hash(data)},{len(data)}" for name, data in files.items()]
    return "\n".join([*lines, f"{own},,", ""]).encode()


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
