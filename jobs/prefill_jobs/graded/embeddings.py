"""Sentence embeddings of a corpus, for semantic baselines. Each prompt is embedded once, on Ray Data, and stored."""

# N prompts, D hidden size

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from prefill_jobs.runtime import cluster, ray_tasks
from prefill_jobs.runtime.progress import Progress
from prefill_router import storage
from prefill_router.common import validation
from prefill_router.common.schema import NUM_TOKENS, PROMPT_ID
from prefill_router.corpus.plan import Shard, plan, read_shard
from prefill_router.corpus.split import PromptHashes, prompt_hashes
from prefill_router.encoder.checkpoint import check_sentence_model, fetch
from prefill_router.encoder.prefill_work import Work
from prefill_router.encoder.sentence_encoder import SentenceEncoder
from prefill_router.storage import parquet_objects
from prefill_router.storage.parquet_objects import ShardFile

EMBEDDING = "embedding"
_SHARD_ROWS = 512


class EmbeddingsManifest(validation.StrictModel):
    """manifest.json: commits the embeddings of a corpus."""

    sentence_encoder: str
    fingerprint: str
    shards: list[ShardFile]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of unit length, sorted by prompt hash."""

    sentence_encoder: str
    fingerprint: str
    keys: PromptHashes  # (N,) ascending
    vectors: NDArray[np.float16]  # (N, D)
    num_tokens: NDArray[np.int32]  # (N,) tokens of the sentence encoder, before truncation

    def at(self, keys: PromptHashes) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.int32]]:
        """Which prompts have an embedding (N,), the embeddings (N, D) and lengths (N,), zeros for those without."""
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        known = self.keys[place] == keys
        vectors = np.where(known[:, None], self.vectors[place], 0.0).astype(np.float32)
        return known, vectors, np.where(known, self.num_tokens[place], 0)


def fetch_sentence_encoder(source: str) -> None:
    """Downloads the sentence encoder that `embed` loads. Raises UserError if that is impossible."""
    check_sentence_model(source)
    fetch(source)


def embed(corpus: str, sentence_encoder: str, out: str) -> Embeddings:
    """Embeds the prompts of a corpus that `out` lacks. Invalid rows are skipped."""
    fingerprint = SentenceEncoder.load(sentence_encoder).fingerprint
    shards_of_corpus = plan(corpus, keep_repeats=True, spread=ray_tasks.spread, default_rows=_SHARD_ROWS).shards
    create = partial(ShardEmbedder, sentence_encoder, fingerprint, out, cluster.threads_per_worker(1))
    written: dict[int, ShardFile] = {}
    num_rows = sum(shard.rows for shard in shards_of_corpus)
    with Progress("embed", num_rows, start="loading the sentence encoder").shown() as progress:
        for i, file, num_tokens in ray_tasks.map_on_actors(
            create, list(enumerate(shards_of_corpus)), **cluster.Actors(1).options(1)
        ):
            written[i] = file
            progress.add(file.rows, Work(tokens=num_tokens))
    files = [written[i] for i in sorted(written)]
    manifest = EmbeddingsManifest(sentence_encoder=sentence_encoder, fingerprint=fingerprint, shards=files)
    storage.write_json(storage.join(out, parquet_objects.MANIFEST), manifest.model_dump())
    return load_embeddings(out)


def load_embeddings(uri: str) -> Embeddings:
    path = storage.join(uri, parquet_objects.MANIFEST)
    storage.require(path, "embeddings")
    manifest = validation.validate(EmbeddingsManifest, storage.read_json(path), path)
    columns = (PROMPT_ID, NUM_TOKENS, EMBEDDING)
    table = pa.concat_tables(
        [parquet_objects.read_shard(uri, file, columns) for file in manifest.shards]
    ).combine_chunks()
    keys = prompt_hashes(table[PROMPT_ID].to_pylist())
    vectors = table[EMBEDDING].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    order = np.argsort(keys)
    lengths = np.asarray(table[NUM_TOKENS], np.int32)
    return Embeddings(manifest.sentence_encoder, manifest.fingerprint, keys[order], vectors[order], lengths[order])


class ShardEmbedder:
    """Embeds one shard at a time, unless its file exists. The encoder is loaded for the first shard to embed."""

    def __init__(self, sentence_encoder: str, fingerprint: str, out: str, threads: int) -> None:
        self.source, self.fingerprint, self.out = sentence_encoder, fingerprint, out
        torch.set_num_threads(threads)

    @cached_property
    def encoder(self) -> SentenceEncoder:
        return SentenceEncoder.load(self.source)

    def __call__(self, item: tuple[int, Shard]) -> tuple[int, ShardFile, int]:
        index, shard = item
        name = hashlib.sha256(f"{self.fingerprint} {shard.digest}".encode()).hexdigest()[:32]
        uri = storage.join(self.out, f"part-{name}.parquet")
        table = storage.read_table(uri) if storage.exists(uri) else self._table(shard)
        return index, parquet_objects.create_shard(self.out, name, table), int(np.sum(table[NUM_TOKENS]))

    def _table(self, shard: Shard) -> pa.Table:
        rows = read_shard(shard)
        tokens = self.encoder.tokenize([row.prompt for row in rows])
        vectors = self.encoder.embed_tokens(tokens).astype(np.float16)
        width = vectors.shape[1]
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float16()), width)
        ids = pa.array([row.prompt_id for row in rows], pa.string())
        return pa.table({PROMPT_ID: ids, NUM_TOKENS: pa.array(tokens.full_lengths), EMBEDDING: values})
