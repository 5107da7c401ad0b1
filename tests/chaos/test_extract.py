"""`extract` with killed processes and failing storage: the store is the same, and nothing is computed twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from chaos.job import ExtractJob
from command import Command
from corpora import write_corpus
from faults import FaultProxy, Faults
from prefill_jobs.extract.extract_job import extract
from prefill_jobs.options import ExtractConfig
from prefill_router import storage
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.activations.commit_log import CommitLog
from tiny import random_prompts

DRIVER_KILLS, WORKER_KILLS = 2, 4  # tests/crashes kills a job at every point; here Ray and its workers die as well
FAULTS = Faults(error_500=0.04, slow_down=0.04, reset_before=0.04, reset_after=0.04, cut_body=0.04)


def num_committed(proxy: FaultProxy) -> int:
    paths = {request.path for request in proxy.puts("chaos/commits/") if request.status == 200}
    return sum("/segments/" not in path for path in paths)


class Killer:
    """Kills WORKER_KILLS workers, with at least one new shard between two kills."""

    def __init__(self, proxy: FaultProxy, rng: random.Random) -> None:
        self.proxy, self.rng = proxy, rng
        self.kills, self.seen = 0, -1

    def strike(self, job: ExtractJob) -> None:
        workers = job.workers()
        if self.kills >= WORKER_KILLS or not workers or num_committed(self.proxy) <= self.seen:
            return
        with suppress(ProcessLookupError):
            os.kill(self.rng.choice(workers), signal.SIGKILL)
            self.kills += 1
            self.seen = num_committed(self.proxy)


def disturbed(options: dict[str, object], proxy: FaultProxy, folder: Path) -> None:
    """Runs the job to its end while killing its driver and workers."""
    rng = random.Random(0)
    killer = Killer(proxy, rng)
    for attempt in range(DRIVER_KILLS + 1):
        job = ExtractJob(folder / f"driver-{attempt}.log", saboteur=True, slow_s=0.5, **options)
        is_last = attempt == DRIVER_KILLS
        # The first driver dies while its Ray starts, the others between shards.
        until = num_committed(proxy) + (rng.choice([1, 2, 3]) if attempt else 0)
        while job.process.poll() is None:
            time.sleep(0.2)
            killer.strike(job)
            if not is_last and num_committed(proxy) >= until and job.starts_ray():
                job.kill()
        if is_last:
            job.wait(300)
        elif job.process.returncode != -signal.SIGKILL:
            job.end(300)  # it failed by itself
    assert killer.kills == WORKER_KILLS, "the job was done before every worker was killed: make it longer"


@pytest.mark.slow("three Rays, two killed drivers and four killed workers, on a storage that fails")
def test_the_store_equals_the_undisturbed_one_bit_for_bit(
    in_process: None, faulty_s3: FaultProxy, s3_bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    prompts = random_prompts(440, seed=5)
    corpus = write_corpus(tmp_path / "corpus.jsonl", [*prompts, *prompts[:40], ""])
    options = {"corpus": str(corpus), "encoder": str(tiny_model), "shard_rows": 12, "workers": 2, "layers": "1,3"}
    calm = tmp_path / "calm"
    extract(ExtractConfig(**options, out=str(calm)))

    faulty_s3.only = lambda _method, path: "/chaos/" in path
    faulty_s3.faults = FAULTS
    out = f"{s3_bucket}/chaos"
    disturbed({**options, "out": out}, faulty_s3, tmp_path)
    assert {request.fault for request in faulty_s3.faulted()} == {
        "error_500", "slow_down", "reset_before", "reset_after", "cut_body"
    }  # fmt: skip
    faulty_s3.faults = Faults()

    expected, store = ActivationStore.open(str(calm)), ActivationStore.open(out)
    assert store.manifest.rows == 480
    assert store.manifest.model_dump(exclude={"encoder"}) == expected.manifest.model_dump(exclude={"encoder"})
    for shard in expected.manifest.shards:
        name = shard.file.name
        assert storage.read_bytes(f"{out}/{name}") == (calm / name).read_bytes()
    kept = {shard.file.name for shard in store.manifest.shards}
    assert {name for name in storage.list_names(out) if name.startswith("part-")} == kept
    assert len(storage.list_names(f"{out}/commits/segments")) >= 8  # two objects per 8 records
    assert len([name for name in storage.list_names(f"{out}/commits") if name.endswith(".json")]) < 8
    assert_nothing_was_computed_twice(faulty_s3)


def test_what_a_killed_job_has_done_is_kept_and_the_rest_is_done_by_the_next(
    in_process: None, tiny_model: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", random_prompts(80, seed=7))
    options = {"corpus": str(corpus), "encoder": str(tiny_model), "shard_rows": 8, "layers": "1,3"}
    calm, out = tmp_path / "calm", tmp_path / "out"
    extract(ExtractConfig(**options, out=str(calm)))
    job = ExtractJob(tmp_path / "log", saboteur=True, reads=3, **options, out=out)
    job.kill_all_after(lambda: num_kept(out) > 0)
    kept = num_kept(out)
    assert not (out / "manifest.json").exists()
    assert 0 < kept < 80
    assert extract(ExtractConfig(**options, out=str(out)))[str(out)].num_reused == kept
    expected, store = ActivationStore.open(str(calm)), ActivationStore.open(str(out))
    assert store.manifest == expected.manifest
    for shard in expected.manifest.shards:
        assert (out / shard.file.name).read_bytes() == (calm / shard.file.name).read_bytes()


def num_kept(out: Path) -> int:
    return sum(CommitLog.open(str(out)).records["rows"].to_pylist())


def assert_nothing_was_computed_twice(proxy: FaultProxy) -> None:
    """Checks that no shard is sent again once its record is in the store."""
    for record in proxy.puts("chaos/commits/"):
        if record.status == 200 or record.fault == "reset_after":
            name = record.path.rpartition("/")[2].replace(".json", ".parquet")
            assert not [put for put in proxy.puts(f"chaos/part-{name}") if put.time > record.time]


@pytest.mark.slow("a Ray whose worker is killed and started again, three times")
def test_a_prompt_that_ends_its_process_is_quarantined(tiny_model: Path, tmp_path: Path) -> None:
    prompts = random_prompts(20, seed=6)
    prompts[11] = "one SABOTAGE two"
    corpus, out = write_corpus(tmp_path / "corpus.jsonl", prompts), tmp_path / "out"
    job = ExtractJob(
        tmp_path / "log", saboteur=True, corpus=corpus, encoder=tiny_model, shard_rows=4, layers="1", out=out
    )
    summary = json.loads(job.wait(600).splitlines()[-1])
    assert (summary["prompts"], summary["quarantined"]) == (19, 1)
    assert summary["retries"] >= 2
    rows = duckdb.sql(f"select row, prompt_id, reason from '{out}/quarantine/*.parquet'").fetchall()
    assert rows == [(11, "p11", "the encoder ended its process: killed by SIGKILL")]
    ids = [i for shard in ActivationStore.open(str(out)).manifest.shards for i in ids_of(out / shard.file.name)]
    assert ids == [f"p{i}" for i in range(20) if i != 11]


def ids_of(path: Path) -> list[str]:
    ids: list[str] = pq.read_table(path)["prompt_id"].to_pylist()
    return ids


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    in_process: None, command: Command, tiny_model: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", random_prompts(200, seed=8))
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=192k none {disk}") != 0:
        pytest.fail("this test mounts a small file system: run it as root, or deselect it")
    try:
        options = {"corpus": corpus, "encoder": tiny_model, "shard_rows": 20, "out": disk / "out"}
        full = command("extract", **options)
        assert full.status == 1
        assert "No space left on device" in full.err.splitlines()[-1]
        os.system(f"mount -o remount,size=64m {disk}")
        summary = json.loads(command("extract", **options).out.splitlines()[-1])
        assert summary["prompts"] == 200
        assert summary["reused"] > 0
    finally:
        os.system(f"umount {disk}")
