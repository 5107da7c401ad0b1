"""The endpoint beside what it is made of: one client, saturated, at 70 % and 300 % of that, and recovery.

    python tests/benchmarks/serve.py --router ROUTER --prompts prompts.parquet

Every part takes turns with what it is compared with, in the same run: the bare truncated encode call, the offline
engine, and a FastAPI endpoint that serves the usual way (`peer_endpoint.py`). Load comes from Locust. The cache is
off, so that every prompt is read. One JSON line last goes to stdout. Locust must be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefill_router.common.console import say
from prefill_router.encoder.tokenization import Tokens
from prefill_router.router.artifact import Router

HERE = Path(__file__).parent
MS = 1e3


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.router = Router.load(options.router)
        table = pq.read_table(options.prompts, columns=["prompt"])["prompt"]
        shuffled = np.random.default_rng(options.seed).permutation(len(table))
        self.prompts: list[str] = table.take(shuffled).to_pylist()
        self.bodies = folder / "bodies.jsonl"
        self.bodies.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in self.prompts))
        self.ours, self.peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))

    # --- servers -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        command = [
            sys.executable,
            "-m",
            "prefill_jobs",
            "serve",
            "--router",
            self.options.router,
            "--port",
            port(self.ours),
        ]
        ours = [*command, "--cached-prompts", "0", "--max-wait-s", str(self.options.max_wait_s)]
        peer = [sys.executable, str(HERE / "peer_endpoint.py"), self.options.router, port(self.peer)]
        processes = [subprocess.Popen(command, start_new_session=True) for command in (ours, peer)]
        try:
            for url in (self.ours, self.peer):
                wait_for(url)
            yield
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(60)

    # --- parts ---------------------------------------------------------------------------------------------------

    def one_client(self) -> dict[str, float]:
        """p50 of a request, and of the bare truncated encode calls on the same prompts, one after the other."""
        route, bare, added = [], [], []
        connection = http.client.HTTPConnection("127.0.0.1", int(port(self.ours)))  # a client that adds next to nothing
        for prompt in self.prompts[: self.options.one_client]:
            body = json.dumps({"prompt": prompt})
            for _ in range(1 if route else 5):  # the first ones are warm-up
                time.sleep(0.02)  # the threads of the last call spin for a while
                started = time.perf_counter()
                connection.request("POST", "/v1/route", body, {"content-type": "application/json"})
                content = connection.getresponse().read()
                route_s = time.perf_counter() - started
                started = time.perf_counter()
                self.router.read(self.router.tokenize([prompt]))
                bare_s = time.perf_counter() - started
            route.append(route_s * MS)
            bare.append(bare_s * MS)
            added.append(route_s * MS - sum(json.loads(content)["metadata"]["timings_ms"].values()))
        p50 = {"route_ms": np.median(route), "bare_encode_ms": np.median(bare), "http_and_serve_ms": np.median(added)}
        # Prompts differ in length: with nobody else there, this is what p99 is of p50.
        p50 |= {"ratio": np.median(route) / np.median(bare), "p99_of_p50": np.quantile(route, 0.99) / np.median(route)}
        return {name: float(value) for name, value in p50.items()}

    def offline(self) -> float:
        """Prompts a second of the engine that `extract` and `label` run on, with the head."""
        prompts = self.prompts[: self.options.offline]
        started = time.perf_counter()
        tokens = self.router.tokenize(prompts)
        for start in range(0, len(prompts), 128):
            own = slice(start, start + 128)
            part = {name: Tokens(t.ids[own], t.full_lengths[own]) for name, t in tokens.items()}
            self.router.predict_activations(self.router.read(part))
        return len(prompts) / (time.perf_counter() - started)

    def load(self, url: str, users: int, seconds: float, period_s: float = 0.0) -> NDArray[Any]:
        """Rows of (time, status, latency, 1 if it says when to come back)."""
        out = self.folder / "answers.json"
        command = [sys.executable, "-m", "locust", "-f", str(HERE / "load.py"), "--headless", "--host", url]
        command += [
            "--users",
            str(users),
            "--spawn-rate",
            str(users),
            "--run-time",
            f"{seconds:.0f}s",
            "--only-summary",
        ]
        given = {"BODIES": str(self.bodies), "OUT": str(out), "PERIOD_S": str(period_s)}
        subprocess.run(command, env={**os.environ, **given}, check=True, capture_output=True, timeout=seconds + 120)
        rows = [(at, status, seconds, float(bool(after))) for at, status, seconds, after in json.loads(out.read_text())]
        return np.array(rows)

    def saturated(self, url: str, users: int) -> float:
        """Prompts a second, without the first fifth of the time."""
        rows = self.load(url, users, self.options.seconds)
        if not (rows[:, 1] == 200).all():
            raise SystemExit(f"{url}: statuses {np.unique(rows[:, 1], return_counts=True)}: give a longer --max-wait-s")
        at = rows[:, 0]
        begin = at[0] + 0.2 * (at[-1] - at[0])
        return float((at > begin).sum() / (at[-1] - begin))

    def paced(self, rate: float, seconds: float, users: int) -> dict[str, float]:
        rows = self.load(self.ours, users, seconds, period_s=users / rate)
        ok, refused = rows[rows[:, 1] == 200], rows[np.isin(rows[:, 1], (429, 503))]
        p50, p99 = np.quantile(ok[:, 2], [0.5, 0.99]) * MS
        return {
            "offered_per_s": len(rows) / (rows[-1, 0] - rows[0, 0]),
            "accepted_per_s": len(ok) / (rows[-1, 0] - rows[0, 0]),
            "accepted_p50_ms": p50,
            "accepted_p99_ms": p99,
            "accepted_longest_ms": ok[:, 2].max() * MS,
            "p99_of_p50": p99 / p50,
            "refused": len(refused),
            "refused_that_say_when": float(refused[:, 3].sum()),
            "other_statuses": len(rows) - len(ok) - len(refused),
        }

    def recovery_s(self, usual_ms: float) -> float:
        """Until five requests in a row take no more than one and a half times as long as usual."""
        started, in_a_row = time.perf_counter(), 0
        with httpx.Client(base_url=self.ours, timeout=60) as client:
            for prompt in self.prompts:
                asked = time.perf_counter()
                status = client.post("/v1/route", json={"prompt": prompt[:400]}).status_code
                is_usual = status == 200 and (time.perf_counter() - asked) * MS < 1.5 * usual_ms
                in_a_row = in_a_row + 1 if is_usual else 0
                if in_a_row == 5:
                    return time.perf_counter() - started
        return float("inf")

    def measure(self) -> dict[str, Any]:
        report: dict[str, Any] = {"benchmark": "serve", "cores": os.cpu_count(), "options": vars(self.options)}
        with self.serving():
            self.offline()
            report["one_client"] = self.one_client()
            say(json.dumps(report["one_client"]))
            rounds = []
            for _ in range(self.options.rounds):
                ours = self.saturated(self.ours, self.options.users)
                rounds.append({"ours": ours, "offline": self.offline(), "peer": self.saturated(self.peer, 4)})
                say(json.dumps(rounds[-1]))
            rates = {name: float(np.median([r[name] for r in rounds])) for name in rounds[0]}
            of_offline = np.median([r["ours"] / r["offline"] for r in rounds])
            of_peer = np.median([r["ours"] / r["peer"] for r in rounds])
            report["saturated"] = {"rounds": rounds, "of_offline": float(of_offline), "times_the_peer": float(of_peer)}
            report["at_70_percent"] = self.paced(0.7 * rates["ours"], self.options.paced_s, 100)
            say(json.dumps(report["at_70_percent"]))
            report["at_300_percent"] = self.paced(3 * rates["ours"], self.options.paced_s, 300)
            report["at_300_percent"]["recovery_s"] = self.recovery_s(report["one_client"]["route_ms"])
            say(json.dumps(report["at_300_percent"]))
        return report


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port(url: str) -> str:
    return url.rpartition(":")[2]


def wait_for(url: str) -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.post(f"{url}/v1/route", json={"prompt": "Hello."}, timeout=60).status_code == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(url)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", required=True)
    parser.add_argument("--prompts", required=True, help="Parquet with a column prompt")
    parser.add_argument("--one-client", type=int, default=150, help="requests of the only client")
    parser.add_argument("--offline", type=int, default=256, help="prompts of the offline engine, a round")
    parser.add_argument("--users", type=int, default=16, help="callers that ask without a pause")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a saturated run")
    parser.add_argument("--paced-s", type=float, default=60.0, help="of a run at a given rate")
    parser.add_argument("--max-wait-s", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Bench(parse(arguments), Path(folder)).measure()
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
