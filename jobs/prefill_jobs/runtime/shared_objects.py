"""Hosts objects that all workers of a job call.

This module and those of the objects import little: an object's process does nothing else.
"""

from __future__ import annotations

import pickle
import uuid
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prefill_router.common.scratch import ScratchFolder

_ANSWERS_KEPT = 1000  # per shared object: Ray retries no call after this many others


class Shared:
    """An object that all workers of a job call. It runs in its own process on the driver's node, as long as the driver.

    If its process is killed, for example when memory runs out, Ray restarts it: in its initial state or, if `is_kept`,
    in its last state, with each call made exactly once. The kept state is written on every call and must be small.
    """

    def __init__(self, kind: type, *arguments: Any, is_kept: bool = False) -> None:
        place = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0)(_Object)
        options = {"scheduling_strategy": place, "max_restarts": -1, "max_task_retries": -1}
        folder = ScratchFolder() if is_kept else None
        if folder is not None:
            weakref.finalize(self, folder.remove)
        self._actor = actor.options(**options).remote(kind, arguments, folder and str(folder.path))

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the object and returns its result."""
        return ray.get(self._actor.call.remote(uuid.uuid4().hex, method, *arguments))

    async def call_async(self, method: str, *arguments: Any) -> Any:
        """Like `call`, without blocking the event loop."""
        return await self._actor.call.remote(uuid.uuid4().hex, method, *arguments)


class _Object:
    """The process of a shared object. With a folder, it keeps the object and its latest answers there."""

    def __init__(self, kind: type, arguments: tuple[Any, ...], folder: str | None) -> None:
        self._file = Path(folder, "object.pickle") if folder else None
        is_restart = self._file is not None and self._file.exists()
        self._object, self._answers = self._load() if is_restart else (kind(*arguments), OrderedDict())

    def _load(self) -> tuple[Any, OrderedDict[str, Any]]:
        assert self._file is not None
        return pickle.loads(self._file.read_bytes())  # type: ignore[no-any-return]

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """Calls a method; a call that Ray retries gets the kept answer."""
        if self._file is None:
            return getattr(self._object, method)(*arguments)
        if name not in self._answers:
            self._answers[name] = getattr(self._object, method)(*arguments)
            if len(self._answers) > _ANSWERS_KEPT:
                self._answers.popitem(last=False)
            new = self._file.with_suffix(".new")
            new.write_bytes(pickle.dumps((self._object, self._answers)))
            new.replace(self._file)
        return self._answers[name]
