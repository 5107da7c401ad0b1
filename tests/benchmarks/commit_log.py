"""A ledger and a manifest of a million shards: what a shard costs to commit, what a resume and the rows' keys take.

    python tests/benchmarks/commit_log.py --shards 1000000 --rows 256

It plays the driver and its actors with the project's own code: records are committed one by one, on disk and against
moto's S3, but for most of them, which are handed to the driver as if they had been. Keys are as long as real ones and
random. `--rows` may be smaller to spare disk: keys take 24 bytes a row, and a resume reads none. Each step runs in a
process of its own, so that its peak memory is its own. One JSON line is printed last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from prefill_router.activations import commit_log, store_keys
from prefill_router.activations.activation_store import (
    ActivationStore,
    StoreManifest,
    read_manifest,
    to_table,
    write_manifest,
)
from prefill_router.activations.commit_log import CommitLog
from prefill_router.activations.commit_records import Commit, shard_name
from prefill_router.activations.reuse import Sources
from prefill_router.activations.shard_list import ActivationShard, ShardList
from prefill_router.common.schema import NUM_TOKENS, activation_columns
from prefill_router.corpus.split import prompt_hashes
from prefill_router.corpus.split_groups import by_content
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.reports.versions import versions
from prefill_router.storage import parquet_objects
from prefill_router.storage.s3 import S3

sys.path.insert(0, str(Path(__file__).parents[1]))

from run import Run
from s3 import s3_bucket

COLUMNS = [column.name for column in activation_columns(range(31), ("last", "mean"))]
IDENTITY = EncoderIdentity(spec=EncoderSpec(model="simulated"), num_layers=30, hidden_size=576, fingerprint="simulated")
_PENDING = 1000  # shards that the interrupted run has not done
_ONE_BY_ONE = 2000
_KEYS = np.random.default_rng(0).integers(0, 1 << 64, (1 << 16, 3), np.uint64)


def digest(index: int) -> str:
    return hashlib.blake2b(str(index).encode(), digest_size=16).hexdigest()


def record(index: int, rows: int) -> Commit:
    """Every tenth prompt was truncated; one in a thousand shards refused a row."""
    name = shard_name(digest(index), COLUMNS)
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    file = parquet_objects.ShardFile(
        name=parquet_objects.file_name(name), rows=rows, bytes=18_000_000 + index % 1000, sha256=sha256
    )
    start = index * 97 % (len(_KEYS) - rows)
    refused = {
        "uri": "corpus.jsonl",
        "row": index,
        "prompt_id": name,
        "content": name,
        "reason": "the encoder ended its process",
    }
    return Commit(
        name=name,
        file=file,
        columns=COLUMNS,
        num_tokens=200 * rows,
        truncated=list(range(0, rows, 10)),
        keys=Commit.encode_keys(_KEYS[start : start + rows] ^ np.uint64(index)),
        refused=[] if index % 1000 else [refused],
    )


def commit_one_by_one(uri: str, num_shards: int, rows: int) -> dict[str, Any]:
    """As one actor after another does; then the driver, which gathers them all."""
    records = [record(index, rows) for index in range(num_shards)]
    started = time.perf_counter()
    for each in records:
        commit_log.commit(uri, each)
    committed = time.perf_counter()
    opened = CommitLog.open(uri)
    alone = time.perf_counter()
    opened.gather()
    gathered = time.perf_counter()
    again = CommitLog.open(uri)
    reopened = time.perf_counter()
    assert len(again) == num_shards
    return {
        "commit_ms_a_shard": 1000 * (committed - started) / num_shards,
        "open_alone_s": alone - committed,
        "gather_s": gathered - alone,
        "open_gathered_s": reopened - gathered,
    }


def gather(uri: str, num_shards: int, rows: int) -> dict[str, Any]:
    """The driver's share of a run: its records come back one by one. The actors' objects are left out."""
    opened = CommitLog.open(uri)
    gathering_s = longest_s = 0.0
    for index in range(num_shards - _PENDING):
        each = record(index, rows)
        started = time.perf_counter()
        opened.add(each)
        took = time.perf_counter() - started
        gathering_s, longest_s = gathering_s + took, max(longest_s, took)
    opened.gather()
    files = [path for path in Path(uri).rglob("*") if path.is_file()]
    size = Counter({".parquet": 0, ".keys": 0})
    for path in files:
        size[path.suffix] += path.stat().st_size
    return {
        "gather_s": gathering_s,
        "longest_s": longest_s,
        "objects": len(files),
        "records_bytes": size[".parquet"],
        "keys_bytes": size[".keys"],
    }


def resume(uri: str, num_shards: int, rows: int) -> dict[str, Any]:
    """Opens the ledger, finds what is pending of the plan, and which records hold prompts of that: none."""
    digests = [digest(index) for index in range(num_shards)]  # which the plan has
    begun_bytes = peak_bytes()
    started = time.perf_counter()
    opened = CommitLog.open(uri)
    listed = time.perf_counter()
    positions = opened.positions([shard_name(each, COLUMNS) for each in digests])
    done = opened.records.take(positions[positions >= 0])
    num_rows = pc.sum(done["rows"]).as_py()
    pending = np.flatnonzero(positions < 0)
    found = time.perf_counter()
    sources = Sources(opened, digests)
    copied = [sources.of(int(index), _KEYS[:rows]) for index in pending]
    ended = time.perf_counter()
    assert len(pending) == _PENDING
    assert num_rows == (num_shards - _PENDING) * rows
    assert not any(copied)
    return {
        "open_s": listed - started,
        "find_pending_s": found - listed,
        "find_sources_s": ended - found,
        "resume_s": ended - started,
        "peak_over_start_bytes": peak_bytes() - begun_bytes,
    }


def finish(uri: str, num_shards: int, rows: int) -> dict[str, Any]:
    """The pending shards are done; the manifest is written from the ledger."""
    opened = CommitLog.open(uri)
    for index in range(num_shards - _PENDING, num_shards):
        opened.add(record(index, rows))
    opened.gather()
    names = [shard_name(digest(index), COLUMNS) for index in range(num_shards)]
    started = time.perf_counter()
    listed = ShardList(opened.records.take(opened.positions(names)))
    manifest = StoreManifest(encoder=IDENTITY, columns=COLUMNS, corpus="corpus", is_sample=False, shards=listed)
    write_manifest(uri, manifest)
    written = time.perf_counter()
    opened.tidy(names)
    tidied = time.perf_counter()
    assert manifest.rows == num_shards * rows
    size = sum(path.stat().st_size for path in [Path(uri, parquet_objects.MANIFEST), *Path(uri, "shards").glob("*")])
    return {"write_manifest_s": written - started, "tidy_s": tidied - written, "manifest_bytes": size}


def read(uri: str, num_shards: int, rows: int) -> dict[str, Any]:
    """The manifest, as every reader of a store begins; and whether a finished store keeps its rows, as extract asks."""
    begun_bytes = peak_bytes()
    started = time.perf_counter()
    manifest = read_manifest(uri)
    ended = time.perf_counter()
    assert manifest is not None
    assert manifest.rows == num_shards * rows
    peak = peak_bytes() - begun_bytes
    stay = pa.array(parquet_objects.file_name(shard_name(digest(index), COLUMNS)) for index in range(num_shards))
    assert pc.all(pc.is_in(manifest.shards.table["file"], value_set=stay)).as_py()
    checked = time.perf_counter()
    return {"read_manifest_s": ended - started, "nothing_is_lost_s": checked - ended, "peak_over_start_bytes": peak}


def keys(uri: str, num_shards: int, rows: int) -> dict[str, Any]:
    """The keys of all rows, as every reader of graded answers begins, and the split groups, which it may want."""
    store = ActivationStore.open(uri)
    begun_bytes = peak_bytes()
    started = time.perf_counter()
    held = store_keys.read(store)
    ended = time.perf_counter()
    peak = peak_bytes() - begun_bytes
    groups = by_content(held.prompts, held.contents)
    made = time.perf_counter()
    for index in range(0, num_shards, 1 + num_shards // 100):
        of_shard = slice(index * rows, (index + 1) * rows)
        expected = record(index, rows).row_keys
        np.testing.assert_array_equal(held.prompts[of_shard], expected[:, 0])
        np.testing.assert_array_equal(groups.of(held.prompts[of_shard]), expected[:, 1])
    return {"read_keys_s": ended - started, "peak_over_start_bytes": peak, "units_s": made - ended}


def hash_ids(uri: str, num_shards: int, rows: int) -> dict[str, Any]:
    """The same without a ledger, by reading and hashing the ids of few shards, one after another and concurrently."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(rows, IDENTITY.hidden_size)).astype(np.float16) for name in COLUMNS[:3]}
    values[NUM_TOKENS] = np.full(rows, 200, np.int32)
    written = []
    for index in range(num_shards):
        file = parquet_objects.write_shard(
            uri, index, to_table([f"{digest(index)}{row:03d}" for row in range(rows)], values)
        )
        written.append(ActivationShard(file=file, num_tokens=200 * rows, num_truncated=0))
    listed = ShardList.of(written)
    manifest = StoreManifest(encoder=IDENTITY, columns=COLUMNS[:3], corpus="corpus", is_sample=False, shards=listed)
    store = ActivationStore(uri, manifest)
    started = time.perf_counter()
    hashes = np.concatenate([prompt_hashes(store.prompt_ids(i).to_pylist()) for i in range(num_shards)])
    one_by_one = time.perf_counter()
    np.testing.assert_array_equal(store_keys.read(store).prompts, hashes)
    ended = time.perf_counter()
    return {
        "one_by_one_ms_a_shard": 1000 * (one_by_one - started) / num_shards,
        "concurrent_ms_a_shard": 1000 * (ended - one_by_one) / num_shards,
    }


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The requests that reach S3 meanwhile, by their method."""
    counts: Counter[str] = Counter()
    original = S3._call_s3

    async def counting(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        counts[method] += 1
        return await original(self, method, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3, "_call_s3", counting)
        yield counts


def on_s3(folder: str, num_shards: int, rows: int) -> dict[str, Any]:
    """Against moto, whose share of the time is most of it."""
    Path(folder).mkdir()
    for bucket in s3_bucket.__wrapped__(Run(Path(folder), os.getpid())):
        with counted() as requests:
            timed = commit_one_by_one(f"{bucket}/ledger", num_shards, rows)
        return {**timed, "requests": dict(requests)}
    raise AssertionError


def _in_process(step: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a step found, and the most memory it took, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return {**pool.apply(step, arguments), "peak_bytes": pool.apply(peak_bytes)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where it is written; a temporary folder where none is given")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    size = arguments.shards, arguments.rows
    few = min(_ONE_BY_ONE, arguments.shards), arguments.rows
    try:
        result = {
            "disk": _in_process(commit_one_by_one, str(folder / "few"), *few),
            "s3": _in_process(on_s3, str(folder / "s3"), *few),
            "hash_ids": _in_process(hash_ids, str(folder / "ids"), *few),
            **{s.__name__: _in_process(s, str(folder / "all"), *size) for s in (gather, resume, finish, read, keys)},
        }
    finally:
        shutil.rmtree(folder)
    settings = {"shards": arguments.shards, "rows": arguments.rows, "segment": commit_log.SEGMENT_RECORDS}
    print(json.dumps({**settings, **_rounded(result), "versions": versions()}))  # noqa: T201


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
