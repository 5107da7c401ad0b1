"""A real Prometheus that scrapes a Ray on this machine, and the queries of panels and alerts."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from ending import ended
from manifests import INFRA
from ports import free_port

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
DASHBOARDS = sorted((INFRA / "grafana").glob("*.json"))

_QUOTED = re.compile(r'"[^"]*"')
_NAME = re.compile(r"\b(?:ray_\w+|up\b)")
_RUN_NAME = "ray_train_run_name"  # a label


def metrics_in(expression: str) -> set[str]:
    """The metrics in a PromQL expression: Ray's, and Prometheus' own `up`."""
    return set(_NAME.findall(_QUOTED.sub('""', expression))) - {_RUN_NAME}


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every panel, as "dashboard: title"."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            yield f"{path.stem}: {panel['title']}", panel


class Prometheus:
    """A client of a running Prometheus. Queries cover the time since its start."""

    def __init__(self, port: int) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=120)
        self.started = time.time()

    def get(self, path: str, **parameters: Any) -> Any:
        answer = self.client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def names(self) -> set[str]:
        return set(self.get("/label/__name__/values"))

    def has_data(self, expression: str) -> bool:
        """Whether the expression had a finite value at any time."""
        expression = expression.replace("$__rate_interval", "30s").replace("$task", ".*")
        found = self.get("/query_range", query=expression, start=self.started, end=time.time(), step=1)
        return any(math.isfinite(float(value)) for series in found["result"] for _, value in series["values"])


@contextmanager
def watching(ray_folder: Path, folder: Path) -> Iterator[Prometheus]:
    """Runs Prometheus with our config on the given Ray folder. It scrapes every 3 s, since Ray's agents may be busy."""
    assert PROMETHEUS is not None
    config = (INFRA / "prometheus" / "prometheus.yml").read_text()
    # Without /tmp/ray, where other Ray processes of this machine register.
    ours = config.replace("/tmp/ray-cluster/ray/", f"{ray_folder}/").replace("- /tmp/ray/", f"- {folder}/none-")
    (folder / "prometheus.yml").write_text(ours.replace(" 15s", " 3s"))
    shutil.copy(INFRA / "prometheus" / "alerts.yml", folder)
    port = free_port()
    command = [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"])
    prometheus = Prometheus(port)
    try:
        yield prometheus
    finally:
        prometheus.client.close()
        ended(process)
