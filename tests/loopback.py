"""An aiohttp server in a thread of this process, for fakes that reset connections and detect disconnects."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
import threading
from typing import Self

from aiohttp import web


class Lost(Exception):  # noqa: N818
    """Raised by a handler to reset the connection."""


class LoopbackServer:
    """Context manager that serves `app()` on a free port. Cancels a handler when its client disconnects."""

    def __init__(self) -> None:
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=type(self).__name__, daemon=True)

    async def app(self) -> web.Application:
        """The application; called in the server's event loop."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        self._runner = web.AppRunner(await self.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()
        return int(self._runner.addresses[0][1])


async def arrived(request: web.Request) -> None:
    """Waits until the client's kernel has all that was written, since a reset discards the rest."""
    transport = request.transport
    while transport is not None and not transport.is_closing():
        waiting = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        if not transport.get_write_buffer_size() and not any(waiting):
            return
        await asyncio.sleep(0.001)


def reset(request: web.Request) -> None:
    """Resets the request's connection; the handler's response is then discarded."""
    if request.transport is not None:  # None if the client has closed it
        no_linger = struct.pack("ii", 1, 0)  # makes closing send a reset
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        request.transport.abort()
