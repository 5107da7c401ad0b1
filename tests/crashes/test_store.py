"""Activation stores under crashes at any moment: a restart gives the same store, and computes nothing twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crashes.bucket import Bucket
from crashes.enumeration import Machines, Scenario, crash_everywhere
from crashes.extraction import IDENTITY, NAMES, PARTS, Extraction, check_store, objects
from prefill_router import storage
from prefill_router.activations import activation_store, commit_log, commit_records, commit_segments
from prefill_router.activations.activation_store import StoreManifest
from prefill_router.activations.commit_log import CommitLog
from prefill_router.activations.commit_records import Commit, shard_name
from prefill_router.activations.shard_list import ActivationShard, ShardList
from prefill_router.corpus.row_keys import row_keys
from prefill_router.storage.parquet_objects import ShardFile, file_name


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses segments of two records, and a separate object for lists of more than three shards."""
    monkeypatch.setattr(commit_log, "SEGMENT_RECORDS", 2)
    monkeypatch.setattr(activation_store, "MAX_LISTED", 3)


def test_a_store_is_the_same_whenever_its_writer_died(machines: Machines) -> None:
    assert crash_everywhere(machines, Extraction) > 50


def test_a_store_is_the_same_where_the_answers_to_all_creations_are_lost(buckets: Machines) -> None:
    """The retry finds the object that the first attempt created, and takes it for another writer's."""
    calm = Extraction((machine := buckets()).uri)
    machine.run(calm.run)
    expected = calm.result()
    machine = buckets()
    assert isinstance(machine, Bucket)
    machine.filesystem.loses_answers = True
    lossy = Extraction(machine.uri)
    machine.run(lossy.run)
    assert lossy.result() == expected
    assert lossy.computed == calm.computed


# --- the commit log ----------------------------------------------------------------------------------------------


def record(seed: int) -> Commit:
    """A record as a worker writes it, for a file that these tests do not read."""
    name = shard_name(f"rows-{seed}", NAMES)
    keys = row_keys([f"p{seed}"], [f"{seed:032x}"])
    return Commit(
        name=name,
        file=ShardFile(name=file_name(name), rows=1, bytes=seed, sha256=f"{seed:064x}"),
        columns=NAMES,
        num_tokens=seed,
        truncated=[],
        keys=Commit.encode_keys(keys),
        refused=[],
    )


RECORDS = [record(seed) for seed in range(5)]


class Gathering(Scenario):
    """Commits records, gathers them in pairs, and then deletes all but `kept`."""

    kept = RECORDS[:1] + RECORDS[2:]

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self.entered: set[str] = set()  # names of records whose commit returned

    def run(self) -> None:
        opened = CommitLog.open(self.out)
        for each in RECORDS:
            is_dropped = each not in self.kept and each.name in self.entered
            if opened.positions([each.name])[0] < 0 and not is_dropped:
                opened.add(commit_log.commit(self.out, each))
                self.entered.add(each.name)
        opened.tidy([each.name for each in self.kept])

    def check(self) -> None:
        """Records to keep are never lost, and each is found with its keys."""
        lost = {each.name for each in self.kept if each.name in self.entered} - set(_held(self.out))
        assert not lost

    def result(self) -> Any:
        names = storage.list_names(storage.join(self.out, "commits", "segments"))
        orphans = {name.partition(".")[0] for name in names if name.endswith(".keys")}
        orphans -= {name.partition(".")[0] for name in names if name.endswith(".parquet")}
        opened = CommitLog.open(self.out)
        opened.gather()
        return _held(self.out), len(opened), orphans, storage.list_names(storage.join(self.out, "commits"))


def _held(out: str) -> dict[str, Commit]:
    """All records of a commit log, as a worker reads them."""
    opened = CommitLog.open(out)
    held = {place.name: commit_log.read(out, place) for place in opened.places(np.arange(len(opened)))}
    assert {name: keys.tolist() for name, keys in _keys(opened).items()} == {
        name: each.row_keys.tolist() for name, each in held.items()
    }
    return held


def _keys(opened: CommitLog) -> dict[str, Any]:
    names = opened.records["name"].to_pylist()
    return {names[position]: keys for position, keys in opened.keys(np.arange(len(opened)))}


def test_no_record_is_lost_whenever_its_gathering_stops(machines: Machines) -> None:
    assert crash_everywhere(machines, Gathering, second_crashes=1) > 30


class Rewriting(Scenario):
    """Rewrites a segment without some of its records, and removes the old one."""

    def run(self) -> None:
        whole = commit_segments.write(self.out, commit_records.to_table(RECORDS), [each.row_keys for each in RECORDS])
        rest = whole.keep(np.arange(len(RECORDS)) % 2 == 0)
        assert rest is not None
        commit_segments.remove(self.out, set(commit_segments.list_digests(self.out)) - {rest.digest})

    def check(self) -> None:
        for segment in commit_segments.read_all(self.out):
            assert len(segment.read_keys()) == len(segment.records)

    def result(self) -> Any:
        return {name: storage.read_bytes(storage.join(self.out, name)) for name in storage.list_names(self.out)}


def test_a_segment_is_there_with_its_keys_or_not_at_all(machines: Machines) -> None:
    assert crash_everywhere(machines, Rewriting, second_crashes=3) >= 9


# --- the manifest ------------------------------------------------------------------------------------------------


def manifest(num_shards: int) -> StoreManifest:
    files = [each.file for each in RECORDS[:num_shards] if each.file is not None]
    listed = ShardList.of(ActivationShard(file=file, num_tokens=1, num_truncated=0) for file in files)
    return StoreManifest(encoder=IDENTITY, columns=NAMES, corpus="corpus", is_sample=False, shards=listed)


class Committing(Scenario):
    """Commits manifests of different sizes; lists of more than three shards are separate objects."""

    manifests = tuple(manifest(n) for n in (2, 4, 5, 3))

    def run(self) -> None:
        for each in self.manifests:
            activation_store.write_manifest(self.out, each)

    def check(self) -> None:
        """A reader sees one of the manifests, or none."""
        assert activation_store.read_manifest(self.out) in [None, *self.manifests]

    def result(self) -> Any:
        return activation_store.read_manifest(self.out), storage.list_names(storage.join(self.out, "shards"))


def test_a_reader_sees_one_manifest_or_another_and_always_its_list(machines: Machines) -> None:
    assert crash_everywhere(machines, Committing, second_crashes=1) >= 15


class Clearing(Scenario):
    """Deletes the store of an earlier run, like `--overwrite`."""

    def __init__(self, out: str) -> None:
        super().__init__(out)
        Extraction(out).run()
        storage.write_bytes(storage.join(out, "notes.txt"), b"mine")

    def run(self) -> None:
        commit_log.clear(self.out)

    def check(self) -> None:
        check_store(self.out)

    def result(self) -> Any:
        return objects(self.out), len(CommitLog.open(self.out))


def test_a_store_that_is_deleted_has_no_manifest_from_the_first_on(machines: Machines) -> None:
    assert crash_everywhere(machines, Clearing) > len(PARTS)
