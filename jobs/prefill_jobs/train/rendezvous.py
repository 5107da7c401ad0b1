"""Rendezvous of training workers through a file, if all workers are on this machine.

Torch's default rendezvous, which Ray Train uses, opens a port without authentication on all interfaces of rank 0's
machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

from prefill_router.common.addresses import is_loopback
from prefill_router.common.scratch import ScratchFolder


def torch_config(backend: str) -> TorchConfig:
    """The process group's configuration: a file on a Ray that listens on loopback only, a port otherwise."""
    is_alone = is_loopback(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    return FileConfig(backend=backend) if is_alone else TorchConfig(backend=backend)


@dataclass
class FileConfig(TorchConfig):
    """A process group with file rendezvous."""

    @property
    def backend_cls(self) -> type[FileBackend]:
        return FileBackend


class FileBackend(_TorchBackend):
    """Sets up and shuts down the process group of each worker group."""

    _folder: ScratchFolder | None = None

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchConfig)
        self._folder = ScratchFolder()
        worker_group.execute(_set_torch_distributed_env_vars)
        group = {
            "backend": backend_config.backend,
            "world_size": len(worker_group),
            "init_method": (self._folder.path / "workers").as_uri(),
            "timeout_s": backend_config.timeout_s,
        }
        setup = _setup_torch_process_group
        ranks = range(len(worker_group))
        ray.get([worker_group.execute_single_async(rank, setup, world_rank=rank, **group) for rank in ranks])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        try:
            super().on_shutdown(worker_group, backend_config)
        finally:
            if self._folder is not None:
                self._folder.remove()
