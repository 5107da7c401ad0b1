"""Load on an endpoint, by Locust: each user asks, waits, asks again, and every answer is written down.

    locust -f tests/benchmarks/load.py --headless --host URL --users N --spawn-rate N --run-time 30s

BODIES names a file of JSON bodies, a line each; OUT the file of answers; PERIOD_S how often a user asks (0: at once).
"""

from __future__ import annotations

import json
import os
import random
import time
from itertools import count
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant, events, task

BODIES = Path(os.environ["BODIES"]).read_text().splitlines()
PERIOD_S = float(os.environ.get("PERIOD_S", "0"))

_next = count()
_answers: list[tuple[float, int, float, str]] = []


class Caller(FastHttpUser):
    wait_time = constant(0)
    network_timeout = connection_timeout = 120.0

    def on_start(self) -> None:
        time.sleep(random.expovariate(1 / PERIOD_S) if PERIOD_S else 0.0)

    @task
    def ask(self) -> None:
        body = BODIES[next(_next) % len(BODIES)]
        started = time.perf_counter()
        headers = {"content-type": "application/json"}
        with self.client.post("/v1/route", data=body, headers=headers, catch_response=True) as response:
            ended = time.perf_counter()
            after = (response.headers or {}).get("retry-after", "")
            _answers.append((time.time(), response.status_code, ended - started, after))
            response.success()
        if PERIOD_S:  # Poisson arrivals, as long as answers take less than a period
            time.sleep(max(0.0, random.expovariate(1 / PERIOD_S) - (ended - started)))


@events.quitting.add_listener
def write(**_: Any) -> None:
    Path(os.environ["OUT"]).write_text(json.dumps(_answers))
