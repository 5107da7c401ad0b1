"""Runs `prefill-router serve` as users do: a process with Ray, HAProxy and replicas."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ending import ended
from family import descendants
from ports import free_port


class Serve:
    """A running `prefill-router serve`."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port, self.url = process, port, f"http://127.0.0.1:{port}"
        self.said: list[str] = []
        self.listener = threading.Thread(target=self._listen)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                self.said.append(line.strip())

    def processes(self, name: str) -> list[psutil.Process]:
        found = []
        for process in descendants(psutil.Process(self.process.pid)):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def answers(self) -> bool:
        """Whether the port accepts connections, which the kernel answers even if the server is busy."""
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def folder(self) -> Path | None:
        """The folder of HAProxy's files, None if `serve` joined an existing Ray."""
        configs = (Path(part) for proxy in self.processes("haproxy.cfg") for part in proxy.cmdline())
        return next((config.parents[1] for config in configs if config.name == "haproxy.cfg"), None)

    def replicas(self) -> set[int]:
        """The processes that answer requests, without the gateway's ledger."""
        return {process.pid for process in self.processes("ray::ServeReplica:prefill-router:Endpoint")}

    def reload(self, answer: str) -> None:
        before = len(self.said)
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: any(answer in line for line in self.said[before:]), f"{answer} among {self.said}")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.25)  # conditions may look at every process of the machine


@contextmanager
def serving(router: str, **flags: Any) -> Iterator[Serve]:
    """Serves in the context. Then checks a clean exit and, unless it joined an existing Ray, that the port is free."""
    port = free_port()
    command = [sys.executable, "-m", "prefill_jobs", "serve", "--router", router, "--port", str(port)]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    serve = Serve(process, port)
    try:
        wait_until(lambda: any("serve: POST" in line for line in serve.said) or process.poll() is not None, "ready")
        assert process.poll() is None, serve.said
        folder = serve.folder()
        yield serve
    finally:
        was_killed = process.poll() is not None
        ended(process)
        serve.listener.join(300)
    assert was_killed or process.returncode == 0, serve.said
    assert was_killed or "RAY_ADDRESS" in os.environ or not serve.answers(), serve.said
    if folder is not None and was_killed:  # else the next `serve` cleans up
        shutil.rmtree(folder, ignore_errors=True)
    assert folder is None or not folder.exists()
