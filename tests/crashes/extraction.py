"""An extraction without Ray and without an encoder: its shards, commit log, manifest and computed activations."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from crashes.enumeration import Scenario
from prefill_router import storage
from prefill_router.activations import activation_store, commit_log
from prefill_router.activations.activation_store import StoreManifest
from prefill_router.activations.commit_log import CommitLog, RecordLocation
from prefill_router.activations.commit_records import Commit, bad_rows, shard_name
from prefill_router.activations.reuse import Sources
from prefill_router.activations.shard_builder import ShardBuilder
from prefill_router.activations.shard_list import ShardList
from prefill_router.common.schema import NUM_TOKENS, ActivationColumn
from prefill_router.corpus.plan import Repeats
from prefill_router.corpus.quarantine import write_quarantine
from prefill_router.corpus.reader import BadRow, content_hash
from prefill_router.corpus.row_keys import digest_of, row_keys
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.encoder.prefill_encoder import EncodedPrompts
from prefill_router.encoder.prefill_work import Work
from prefill_router.storage import parquet_objects

COLUMNS = [ActivationColumn("last", 1), ActivationColumn("mean", 2)]
NAMES = [column.name for column in COLUMNS]
IDENTITY = EncoderIdentity(spec=EncoderSpec(model="tiny"), num_layers=2, hidden_size=4, fingerprint="f")


def part(prompt_ids: list[str]) -> Repeats:
    """Rows whose prompts are their ids; an id may end in the number of a repetition, which its prompt lacks."""
    contents = [content_hash(prompt_id.partition("'")[0]) for prompt_id in prompt_ids]
    return Repeats(tuple(prompt_ids), tuple(contents), (), digest_of(row_keys(prompt_ids, contents)))


PARTS = [part(["p0", "p1"]), part(["p2", "p3"]), part(["p4"]), part(["p1'", "p4'"])]
OLD = part(["p0"])  # of a smaller corpus, extracted by an earlier run


class Extraction(Scenario):
    """Extracts three shards, and a fourth that repeats their rows, into a store with an older shard."""

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self.computed: Counter[str] = Counter()  # number of times each prompt was computed
        self.committed: set[str] = set()  # names of shards whose commit returned

    def run(self) -> None:
        if activation_store.read_manifest(self.out) is None:
            self._extract([OLD])
        self._extract(PARTS)

    def _extract(self, parts: list[Repeats]) -> None:
        commit_log.claim_encoder(self.out, IDENTITY)
        opened = CommitLog.open(self.out)
        names = [shard_name(rows.digest, NAMES) for rows in parts]
        for i, (rows, name) in enumerate(zip(parts, names, strict=True)):
            if opened.positions([name])[0] < 0:
                sources = Sources(opened, [rows.digest for rows in parts])
                opened.add(self._done(rows, name, sources.of(i, row_keys(rows.prompt_ids, rows.contents))))
        self._finish(opened, names)

    def _done(self, rows: Repeats, name: str, sources: Sequence[RecordLocation]) -> Commit:
        """Processes a shard like a worker, which does not compute a committed shard again."""
        record = commit_log.find(self.out, name)
        if record is None:
            assert name not in self.committed, "a committed shard is computed again"
            builder = ShardBuilder.of_repeats(rows, COLUMNS)
            for place in sources:
                builder.copy(self.out, place)
            for missing, _ in builder.missing():
                builder.fill(missing, self._read([rows.contents[i] for i in missing]))
            record = builder.commit(self.out)
        self.committed.add(name)
        return record

    def _read(self, contents: list[str]) -> EncodedPrompts:
        """Stands in for an encoder: returns pseudo-random activations that depend on the prompt only."""
        self.computed.update(contents)
        seeds = [int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "little") for content in contents]
        values = np.stack([np.random.default_rng(seed).normal(size=4).astype(np.float16) for seed in seeds])
        lengths = np.full(len(contents), 7, np.int32)
        return EncodedPrompts({**dict.fromkeys(NAMES, values), NUM_TOKENS: lengths}, Work(), lengths)

    def _finish(self, opened: CommitLog, names: list[str]) -> None:
        records = opened.records.take(opened.positions(names))
        bad = [BadRow("corpus", 1, "", "no prompt"), *bad_rows(records)]
        manifest = StoreManifest(
            encoder=IDENTITY,
            columns=NAMES,
            corpus="corpus",
            is_sample=False,
            shards=ShardList(records),
            quarantine=write_quarantine(self.out, bad),
        )
        activation_store.write_manifest(self.out, manifest)
        opened.tidy(names)

    def check(self) -> None:
        """Committed shards are complete, and prompts are computed at most twice."""
        check_store(self.out)
        for digest in self.computed:
            assert self.computed[digest] <= 2  # again only for the shard in progress at the crash

    def result(self) -> Any:
        check_store(self.out)
        opened = CommitLog.open(self.out)
        records = {place.name: commit_log.read(self.out, place) for place in opened.places(np.arange(len(opened)))}
        return objects(self.out), records, len(opened), sorted(self.computed)


def objects(out: str) -> dict[str, bytes]:
    """The objects of a store, without its commit log, whose records may be grouped in many ways."""
    uris = [uri for uri in storage.find_files(out) if not uri.startswith(f"{out}/commits/")]
    return {uri.removeprefix(out): storage.read_bytes(uri) for uri in uris}


def check_store(out: str) -> None:
    """Asserts that each object in the manifest, if there is one, exists as described."""
    manifest = activation_store.read_manifest(out)
    if manifest is None:
        return
    for shard in manifest.shards:
        check_object(out, shard.file)
    if manifest.quarantine is not None:
        check_object(out, manifest.quarantine)


def check_object(out: str, file: parquet_objects.ShardFile) -> None:
    data = storage.read_bytes(storage.join(out, file.name))
    assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
    assert pq.read_metadata(io.BytesIO(data)).num_rows == file.rows
