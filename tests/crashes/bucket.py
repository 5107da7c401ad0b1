"""An in-memory object store with crash points, which behaves like S3 as `storage` uses it.

Writes are atomic, objects can be created exclusively, and there are neither renames nor folders. A bulk deletion
deletes one object after another, in an arbitrary order. A program can also die between a change and its response.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fsspec import AbstractFileSystem

from crashes.life import Life, here
from crashes.machine import Machine


class Bucket(Machine):
    """A machine whose storage is one bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.uri = "s3://bucket/out"
        self.filesystem = ObjectStore()

    @contextmanager
    def watched(self, life: Life | None = None) -> Iterator[None]:
        self.filesystem.life = life
        try:
            yield
        finally:
            self.filesystem.life = None


class ObjectStore(AbstractFileSystem):
    """Stores objects by path. With `loses_answers`, each creation looks as if its first response was lost."""

    protocol = "s3"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self.life: Life | None = None
        self.loses_answers = False

    def write(self, path: str, data: bytes) -> None:
        with self._change("put", path):
            self.objects[path] = bytes(data)

    def create(self, path: str, data: bytes) -> bool:
        with self._change("create", path):
            was_there = path in self.objects
            self.objects.setdefault(path, bytes(data))
        return not was_there and not self.loses_answers

    def rm_file(self, path: str) -> None:
        with self._change("delete", path):
            self.objects.pop(path, None)

    def remove_many(self, paths: Sequence[str]) -> None:
        for path in sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest()):
            self.rm_file(path)

    def remove_below(self, path: str) -> None:
        self.remove_many(self.find(path))

    def find(self, path: str, *_: Any, **__: Any) -> list[str]:
        self._look("list", path)
        return sorted(key for key in list(self.objects) if key == path or key.startswith(f"{path}/"))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._look("list", path)
        if path in self.objects:
            return [self._file(path)] if detail else [path]
        rests = (key.removeprefix(f"{path}/").split("/") for key in list(self.objects) if key.startswith(f"{path}/"))
        is_file = {rest[0]: len(rest) == 1 for rest in rests}
        if not is_file:
            raise FileNotFoundError(path)
        names = [f"{path}/{name}" for name in sorted(is_file)]
        return [self._entry(name) for name in names] if detail else names

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._look("look at", path)
        return self._entry(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self._look("read", path)
        return self._bytes(path)[start:end]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        assert mode == "rb"
        self._look("read", path)
        return io.BytesIO(self._bytes(path))

    def _bytes(self, path: str) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def _entry(self, path: str) -> dict[str, Any]:
        if path in self.objects:
            return self._file(path)
        if any(key.startswith(f"{path}/") for key in list(self.objects)):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def _file(self, path: str) -> dict[str, Any]:
        data = self.objects[path]
        return {"name": path, "size": len(data), "type": "file", "ETag": hashlib.sha256(data).hexdigest()}

    @contextmanager
    def _change(self, what: str, path: str) -> Iterator[None]:
        life = here() or self.life
        if life is not None:
            life.reach(f"{what} {path}")
        yield
        if life is not None:
            life.reach(f"answer: {what} {path}")

    def _look(self, what: str, path: str) -> None:
        if (life := here() or self.life) is not None:
            life.look(f"{what} {path}")
