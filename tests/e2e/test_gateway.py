"""The gateway as `prefill-router serve` runs it: its replicas share a ledger, and processes are killed.

The tests share one endpoint, and the last one kills it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.parquet as pq
import pytest

from family import descendants
from gateway import PRICES, write_pool
from serving import Serve, serving, wait_until
from upstream import Upstream

pytestmark = pytest.mark.slow("an endpoint with two replicas and a ledger, which is killed and started again")


@pytest.fixture(scope="module")
def upstreams() -> Iterator[dict[str, Upstream]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in ("big", "small")}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, upstreams: dict[str, Upstream]) -> dict[str, Any]:
    """An endpoint's: two upstreams, a budget, and a folder for what it keeps."""
    folder = tmp_path_factory.mktemp("gateway")
    budgets = folder / "budgets.toml"
    budgets.write_text("usd_per_day = 1000.0\n")
    patient = {"upstream": {"timeout_s": 120.0}}  # none fails here: whoever is late waited for the machine
    pool = write_pool(folder / "pool.toml", upstreams, big=patient, small=patient)
    kept = {"pool": pool, "budgets": budgets, "feedback": folder / "kept"}
    waits = {"max_wait_s": 120, "route_timeout_s": 120}
    return {**kept, **waits, "replicas": 2, "threads": 1, "stick_margin": 1.0}


def at_once(call: Callable[[], Any], upstreams: Sequence[Upstream]) -> list[Any]:
    """The results of twelve calls, none of which an upstream answers before each is refused or under way."""
    before = sum(len(upstream.completions) for upstream in upstreams)
    for upstream in upstreams:
        upstream.slow_s, upstream.hurry = 100.0, False
    with ThreadPoolExecutor(12) as callers:
        calls = [callers.submit(call) for _ in range(12)]

        def all_are_known() -> bool:
            num_asked = sum(len(upstream.completions) for upstream in upstreams) - before
            return num_asked + sum(call.done() for call in calls) >= 12

        wait_until(all_are_known, "twelve calls")
        for upstream in upstreams:
            upstream.hurry = True
        return [call.result() for call in calls]


@pytest.fixture(scope="module")
def serve(router: str, flags: dict[str, Any]) -> Iterator[Serve]:
    with serving(router, **flags) as serve:
        wait_until(lambda: len(serve.replicas()) >= 2, "two replicas")
        yield serve


class Critics:
    """Callers that ask, and say of each answer whether it was right; what was acknowledged is remembered."""

    def __init__(self, url: str, threads: int = 4) -> None:
        self.url = url
        self.acknowledged: dict[str, bool] = {}
        self.answers: Counter[Any] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._criticize, args=(number,)) for number in range(threads)]

    @contextmanager
    def at_work(self) -> Iterator[Critics]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def _criticize(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=300) as client:
            for turn in range(1_000_000):
                if self._stop.is_set():
                    return
                body = {"messages": [{"role": "user", "content": f"what is {turn % 50} plus {number}"}]}
                with suppress(httpx.TransportError):
                    answer = client.post("/v1/chat/completions", json=body)
                    self.answers["call", answer.status_code] += 1
                    if answer.status_code != 200:
                        continue
                    given = {"request_id": answer.headers["x-request-id"], "correct": turn % 3 == 0}
                    said = client.post("/v1/feedback", json=given)
                    self.answers["feedback", said.status_code] += 1
                    if said.status_code == 200:
                        self.acknowledged[given["request_id"]] = given["correct"]


def outcomes(folder: Path) -> dict[str, bool]:
    rows = pq.read_table(folder / "outcomes").to_pylist()
    found = {row["request_id"]: row["correct"] == 1.0 for row in rows}
    assert len(found) == len(rows)
    return found


def journaled(folder: Path) -> list[str]:
    return [line for file in sorted(folder.glob("journal/*.jsonl")) for line in file.read_text().splitlines()]


def kill_all(serve: Serve) -> None:
    processes = descendants(psutil.Process(serve.process.pid))
    for process in [*processes, psutil.Process(serve.process.pid)]:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, 30)


def test_replicas_share_conversations_and_budgets(
    serve: Serve, flags: dict[str, Any], upstreams: dict[str, Upstream]
) -> None:
    budgets, both = flags["budgets"], list(upstreams.values())
    answered: list[str] = []  # by which target
    with httpx.Client(base_url=serve.url, timeout=300) as client:

        def ask(messages: list[Any], **fields: Any) -> str:
            answer = client.post("/v1/chat/completions", json={"messages": messages, **fields})
            answered.append(answer.raise_for_status().headers["x-router-selected-model"])
            return answer.headers["x-router-selected-model"]

        def routed(text: str) -> tuple[list[Any], str, float]:
            messages = [{"role": "user", "content": text}]
            body = {"messages": messages, "tolerance": 0.0}
            answer = client.post("/v1/route", json=body).raise_for_status().json()
            return messages, answer["selected_model"], answer["expected_cost_usd"]["big"]

        def stats() -> Any:
            return client.get("/v1/stats").raise_for_status().json()

        def wait_for_records() -> None:
            """A call is recorded after its answer."""
            wait_until(lambda: stats()["answered"] == len(answered), "the records of all calls")

        said = [{"role": "user", "content": "what is one plus two"}]
        assert ask(said, models=["big"]) == "big"
        wait_for_records()
        follow_up = [*said, {"role": "assistant", "content": "Three."}, {"role": "user", "content": "commit it"}]
        assert {ask(follow_up, tolerance=1.0) for _ in range(12)} == {"big"}  # whichever replica is asked
        budgets.write_text("usd_per_day = 0.0\n")
        serve.reload("serve: reloaded")
        wait_until(lambda: ask(follow_up, tolerance=0.0) == "small", "a spent budget")
        wait_for_records()

        texts = (f"what is two plus {number} [[fault:slow_head]]" for number in range(100))
        slow, expected_usd = next((said, usd) for said, target, usd in map(routed, texts) if target == "big")
        budgets.write_text(f"usd_per_day = {stats()['spent_today_usd'] + 3.5 * expected_usd}\ntolerance = 1.0\n")
        serve.reload("serve: reloaded")
        burst = at_once(lambda: ask(slow, tolerance=0.0), both)
        assert burst.count("big") == 3, "what is under way with one replica counts with the other"
        wait_until(lambda: not stats()["reserved_usd"], "all to be settled")

        body = {"model": "big", "messages": slow, "max_tokens": 50}
        most_usd = (len(json.dumps(body)) + 4 * 50) * PRICES["big"] / 1e6
        budgets.write_text(f"[hard]\nusd_per_day = {stats()['spent_today_usd'] + 3.5 * most_usd}\n")
        serve.reload("serve: reloaded")
        statuses = at_once(lambda: client.post("/v1/chat/completions", json=body).status_code, both)
        assert Counter(statuses) == {200: 3, 429: 9}, "a hard limit holds for both replicas"
        wait_until(lambda: not stats()["reserved_usd"], "all to be settled")
        budgets.write_text("usd_per_day = 1000.0\n")
        serve.reload("serve: reloaded")


def test_feedback_survives_the_death_of_every_process(serve: Serve, router: str, flags: dict[str, Any]) -> None:
    kept = flags["feedback"]
    with Critics(serve.url).at_work() as critics:
        journaled_before = len(journaled(kept))
        # The journal comes a second after the calls.
        wait_until(lambda: len(critics.acknowledged) > 40 and len(journaled(kept)) > journaled_before + 20, "feedback")
        for process in serve.processes("ray::ServeReplica:prefill-router:Ledger"):
            process.send_signal(signal.SIGKILL)
        killed_at = len(critics.acknowledged)
        wait_until(lambda: len(critics.acknowledged) > killed_at + 40, "feedback after the ledger was killed")
        assert {status for kind, status in critics.answers if kind == "call"} == {200}
        os.kill(next(iter(serve.replicas())), signal.SIGKILL)
        killed_at = len(critics.acknowledged)
        wait_until(lambda: len(critics.acknowledged) > killed_at + 20, "feedback after a replica was killed")
        kill_all(serve)
    assert critics.acknowledged.items() <= outcomes(kept).items()
    with serving(router, **flags) as again, httpx.Client(base_url=again.url, timeout=300) as client:
        early = list(critics.acknowledged.items())[:20]
        for request_id, correct in early:  # known again, and not counted twice
            given = {"request_id": request_id, "correct": correct}
            assert client.post("/v1/feedback", json=given).json()["is_new"] is False
        stats = client.get("/v1/stats").json()
        assert stats["feedback"] == len(outcomes(kept))
        assert stats["answered"] >= len(early)
    assert critics.acknowledged.items() <= outcomes(kept).items()
