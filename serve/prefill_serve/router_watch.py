"""Takes over routers that are published while the endpoint runs, so that no signal has to reach each replica."""

from __future__ import annotations

import asyncio
import logging

from prefill_serve.endpoint import Endpoint

log = logging.getLogger("ray.serve")


class RouterWatch:
    """Refreshes an endpoint every `watch_s` seconds of its settings. Bound to one event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._task: asyncio.Task[None] | None = None

    def restart(self) -> None:
        """Watches at the interval of the current settings, or stops watching if they have none."""
        if self._task is not None:
            self._task.cancel()
        every_s = self._endpoint.now.settings.watch_s
        self._task = None if every_s is None else asyncio.create_task(self._run(every_s))

    async def _run(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await self._endpoint.refresh()
            except Exception:  # such as a failure of the storage; the current router stays in use
                log.exception("published router not read: tried again", extra={"after_s": every_s})
