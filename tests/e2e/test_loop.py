"""The closed loop, without Ray: calls with feedback, a round of the pipeline, an endpoint that serves the result."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from command import Command
from gateway import Gateway, gateway_of_two
from prefill_router.router.artifact import Router
from prefill_serve import endpoint

pytestmark = [
    pytest.mark.usefixtures("in_process"),
    pytest.mark.slow("some hundred calls with feedback, and two rounds of a pipeline"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, router: str, tiny_model: Path) -> Path:
    """A published router, and the file of a pipeline that reads the gateway's feedback."""
    folder = tmp_path_factory.mktemp("loop")
    shutil.copytree(router, folder / "published")
    (folder / "router.toml").write_text(
        f"""
        [pipeline]
        outcomes = "{folder}/feedback"
        pool = "{folder}/pool.toml"
        encoder = "{tiny_model}"
        out = "{folder}/work"
        publish = "{folder}/published"
        sample = 100
        draws = 100
        [extract]
        shard_rows = 64
        [train]
        max_epochs = 20
        """
    )
    return folder


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[Gateway]:
    """A gateway that serves the published router, explores, and keeps prompts beside its feedback."""
    settings = {"ledger": {"folder": str(folder / "feedback"), "keep_prompts": True}, "route_timeout_s": 300.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoint, "_RANDOM", Random(0))
        with gateway_of_two(str(folder / "published"), folder, explore=0.5, gateway=settings) as (gateway, _):
            yield gateway


def prompts(small_data: Path, first: int, stop: int) -> list[str]:
    return [f"{text} ?" for text in pq.read_table(small_data / "corpus.parquet")["prompt"].to_pylist()[first:stop]]


def call(gateway: Gateway, asked: list[str]) -> list[str]:
    """Calls the gateway, and grades as if `small` had got worse: it is right once in ten times, `big` nine times.

    Returns the targets that answered.
    """
    targets = []
    for number, prompt in enumerate(asked):
        answer = gateway.chat(prompt)
        targets.append(answer.headers["x-router-selected-model"])
        is_right = (targets[-1] == "big") != (number % 10 == 0)
        grade: dict[str, Any] = {"request_id": answer.headers["x-request-id"], "correct": is_right}
        gateway.post("/v1/feedback", grade).raise_for_status()
    return targets


def choices(gateway: Gateway, asked: list[str]) -> list[str]:
    """The targets with the highest P(correct)."""
    answers = [gateway.post("/v1/route", {"prompt": prompt}).raise_for_status().json() for prompt in asked]
    return [max(answer["p_correct"], key=answer["p_correct"].get) for answer in answers]


def test_feedback_is_published_and_served_after_one_round(
    gateway: Gateway, folder: Path, small_data: Path, command: Command
) -> None:
    before = Router.load(str(folder / "published")).version
    targets = call(gateway, prompts(small_data, 0, 160))
    assert {*targets} == {"big", "small"}
    result = command("pipeline", str(folder / "router.toml"))
    assert result.status == 0, result.err
    assert "feedback on 160 calls, 160 made while exploring, makes" in result.err
    assert "made while exploring (doubly robust), new minus published: MDP-AUCCC" in result.err
    new = Router.load(str(folder / "published"))
    assert new.version != before
    asyncio.run_coroutine_threadsafe(gateway.endpoint.refresh(), gateway._loop).result(300)
    assert gateway.http.get("/v1/status").json()["router_version"] == new.version
    assert np.mean([target == "big" for target in choices(gateway, prompts(small_data, 160, 200))]) > 0.9
    assert "all steps are up to date" in command("pipeline", str(folder / "router.toml")).err


def test_the_next_round_reads_what_is_new(gateway: Gateway, folder: Path, small_data: Path, command: Command) -> None:
    call(gateway, prompts(small_data, 150, 200))  # ten of them for the second time
    result = command("pipeline", str(folder / "router.toml"))
    assert "feedback on 210 calls" in result.err
    assert "40 prompts are new" in result.err
    assert "extract: 200 prompts, 40 of them computed" in result.err
    assert "gate: on " in result.err
