from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefill_router import storage
from prefill_router.activations import commit_log, store_keys
from prefill_router.activations.activation_store import ActivationStore, StoreManifest, write_manifest
from prefill_router.activations.commit_log import CommitLog
from prefill_router.activations.commit_records import Commit
from prefill_router.activations.shard_builder import ShardBuilder
from prefill_router.activations.shard_list import ActivationShard, ShardList
from prefill_router.common.schema import NUM_TOKENS, ActivationColumn
from prefill_router.corpus.plan import Repeats
from prefill_router.corpus.reader import content_hash
from prefill_router.corpus.row_keys import digest_of, row_keys
from prefill_router.corpus.split import prompt_hashes
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.encoder.prefill_encoder import EncodedPrompts
from prefill_router.encoder.prefill_work import Work
from prefill_router.storage import uris
from stores import content_groups

COLUMN = ActivationColumn("last", 1)
IDENTITY = EncoderIdentity(spec=EncoderSpec(model="m"), num_layers=1, hidden_size=4, fingerprint="f")
EARLIER = 3  # number of prompts that shards repeat under other ids


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_log, "SEGMENT_RECORDS", 4)


def rows(number: int) -> tuple[list[str], list[str]]:
    """The ids and the prompt digests of a shard's rows; the last prompt repeats one of another shard."""
    ids = [f"s{number}-{row}" for row in range(2 + number % 3)]
    return ids, [content_hash(prompt) for prompt in [*ids[:-1], f"s{number % EARLIER}-0"]]


CONTENTS = {prompt_id: content for number in range(40) for prompt_id, content in zip(*rows(number), strict=True)}


def commit(uri: str, number: int) -> Commit:
    """Commits a shard like a worker: each second refuses its first row, each seventh all rows."""
    ids, contents = rows(number)
    repeats = Repeats(tuple(ids), tuple(contents), (), digest_of(row_keys(ids, contents)))
    builder = ShardBuilder.of_repeats(repeats, [COLUMN])
    builder.places = {row: ("c.jsonl", row) for row in range(len(ids))}
    values, lengths = np.ones((len(ids), 4), np.float16), np.full(len(ids), 5, np.int32)
    values[: len(ids) if number % 7 == 6 else number % 2] = np.nan
    builder.fill(range(len(ids)), EncodedPrompts({COLUMN.name: values, NUM_TOKENS: lengths}, Work(), lengths))
    return builder.commit(uri)


def finish(uri: str, records: list[Commit]) -> ActivationStore:
    shards = [ActivationShard(file=r.file, num_tokens=r.num_tokens, num_truncated=0) for r in records if r.file]
    of_records = ShardList.of(shards)
    manifest = StoreManifest(encoder=IDENTITY, columns=[COLUMN.name], corpus="c", is_sample=False, shards=of_records)
    write_manifest(uri, manifest)
    return ActivationStore.open(uri)


def extracted(uri: str, num_shards: int) -> tuple[ActivationStore, CommitLog, list[Commit]]:
    """A finished store whose shards are in another order than in its commit log."""
    opened, records = CommitLog.open(uri), [commit(uri, number) for number in range(num_shards)]
    for record in records:
        opened.add(record)
    return finish(uri, records[::-1]), opened, records


def check(store: ActivationStore, unknown: Sequence[Commit] = ()) -> None:
    """`prompts` are hashes of ids; `contents` are those of the prompts, or hashes of ids for shards not in the log."""
    of_unknown = [record.file.name for record in unknown if record.file]
    ids, contents = [], []
    for shard in range(store.num_shards):
        ids += store.prompt_ids(shard).to_pylist()
        is_unknown = store.manifest.shards[shard].file.name in of_unknown
        new = ids[len(contents) :]
        contents += prompt_hashes(new).tolist() if is_unknown else [content_key(prompt_id) for prompt_id in new]
    keys = store_keys.read(store)
    np.testing.assert_array_equal(keys.prompts, prompt_hashes(ids), strict=True)
    np.testing.assert_array_equal(keys.contents, np.array(contents, np.uint64), strict=True)
    np.testing.assert_array_equal(content_groups(store.uri).of(keys.prompts), keys.contents)


def content_key(prompt_id: str) -> int:
    return int.from_bytes(bytes.fromhex(CONTENTS[prompt_id])[:8], "little")


def test_keys_of_segments_and_loose_records_match_the_ids(root: str) -> None:
    store, opened, _ = extracted(root, 15)
    assert len(storage.list_names(storage.join(root, "commits", "segments"))) == 6  # three segments of two files
    check(store)
    opened.gather()
    check(store)


def test_keys_of_a_tidied_store_match_its_ids(root: str) -> None:
    _, opened, records = extracted(root, 15)
    kept = records[2:4] + records[6:14]
    opened.tidy([record.name for record in kept])
    check(finish(root, kept))


def test_without_a_commit_log_the_ids_are_read(root: str) -> None:
    store, _, records = extracted(root, 15)
    storage.remove(storage.join(root, "commits"))
    check(store, unknown=records)


def test_ids_are_read_for_shards_that_are_not_in_the_log(root: str) -> None:
    store, opened, records = extracted(root, 15)
    assert {place.segment for place in opened.places(np.arange(12, 15))} == {None}
    storage.remove_many([storage.join(root, "commits", f"{record.name}.json") for record in records[12:]])
    check(store, unknown=records[12:])


def test_ids_are_read_for_a_shard_whose_record_describes_another_file(tmp_path: Path) -> None:
    _, _, records = extracted(str(tmp_path), 8)
    assert records[3].file is not None
    file = records[3].file.model_copy(update={"sha256": "0" * 64})
    other = records[3].model_copy(update={"file": file})
    check(finish(str(tmp_path), [other, records[0]]), unknown=[other])


def test_an_empty_store_has_no_keys(tmp_path: Path) -> None:
    check(finish(str(tmp_path), []))


def num_calls(uri: str, num_shards: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of storage calls while the keys of `num_shards` shards are read."""
    store, opened, _ = extracted(uri, num_shards)
    opened.gather()
    calls: Counter[str] = Counter()
    resolve = storage.resolve

    def counting(uri: str) -> Any:
        calls[uri] += 1
        return resolve(uri)

    with monkeypatch.context() as patch:
        patch.setattr(uris, "resolve", counting)
        store_keys.read(store)
    return calls.total()


def test_storage_calls_grow_with_segments_and_not_with_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_two, of_four = (num_calls(str(tmp_path / str(n)), n, monkeypatch) for n in (8, 16))
    assert of_four - of_two == 2 * 2  # the records and the keys of two more segments
    monkeypatch.setattr(commit_log, "SEGMENT_RECORDS", 16)
    assert num_calls(str(tmp_path / "32"), 32, monkeypatch) == of_two
