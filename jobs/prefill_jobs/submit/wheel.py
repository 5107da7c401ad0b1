"""Writes the running code as an unpacked wheel, for a cluster whose image may have another version of it.

It is sent in a job's working directory. A packed wheel would be installed by pip on each node, and two workers that
install it concurrently on a new node break the installation permanently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

DISTRIBUTION = "prefill-router"
_CODE = {".py", ".html", ".css", ".js"}  # other files may be private, such as keys and dumps
_PACKAGES = ("prefill_router", "prefill_jobs", "prefill_serve")


def write_wheel(folder: Path) -> str:
    """Writes the imported packages to `folder` and returns their version, which ends in a digest of the code.

    No requirements are declared: the image provides them.
    """
    files = dict(_sources())
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in files.items())).hexdigest()[:12]
    ours = distribution(DISTRIBUTION)
    version = f"{ours.version}+{digest}"
    info = f"{DISTRIBUTION.replace('-', '_')}-{version}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version}\n".encode()
    files[f"{info}/entry_points.txt"] = (ours.read_text("entry_points.txt") or "").encode()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return version


def _sources() -> Iterator[tuple[str, bytes]]:
    for package in _PACKAGES:
        module = import_module(package)
        root = Path(module.__path__[0])
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root)
            is_hidden = any(part.startswith(".") for part in name.parts)
            if path.suffix in _CODE and path.is_file() and not is_hidden:
                yield f"{package}/{name.as_posix()}", path.read_bytes()
