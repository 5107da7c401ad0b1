"""`extract`: corpus to activations. Plan shards, encode each on an actor, commit them all in one manifest."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch

from prefill_jobs import cluster
from prefill_jobs.progress import Progress
from prefill_router import shards
from prefill_router.config import ExtractConfig
from prefill_router.console import say
from prefill_router.encoder import EncoderIdentity, EncoderSpec, PrefillEncoder
from prefill_router.errors import UserError
from prefill_router.features import ActivationShard, Manifest, write_activations, write_manifest
from prefill_router.plan import Shard, plan, read_shard
from prefill_router.schema import POOLINGS, Pooling, activation_columns


def extract(config: ExtractConfig) -> Manifest:
    """Writes the activations of a corpus to `config.out` and returns their manifest, which is written last."""
    layers = parse_layers(config.layers)
    pooling = parse_pooling(config.pooling)
    planned = plan(config.corpus, config.shard_rows, config.limit, keep_repeats=True)
    planned.require_all_good()
    if planned.num_repeated:
        say(f"extract: {planned.num_repeated:,} prompts repeat an earlier one")
    shards.claim_output(config.out, overwrite=config.overwrite)
    cluster.connect()
    progress = Progress("extract", planned.num_rows)
    arguments = {
        "encoder": EncoderSpec(model=config.encoder, max_tokens=config.max_tokens),
        "layers": layers,
        "pooling": pooling,
        "out": config.out,
        "threads": cluster.threads_per_worker(config.workers),
    }
    resources = cluster.encoder_resources(config.workers)
    committed: list[ActivationShard] = []
    identities: set[str] = set()
    items = [{"index": i, "shard": shard.to_json()} for i, shard in enumerate(planned.shards)]
    for row in cluster.map_rows(items, ExtractShard, fn_constructor_kwargs=arguments, **resources):
        committed.append(ActivationShard.model_validate_json(row["shard"]))
        identities.add(row["identity"])
        progress.add(committed[-1].file.rows, committed[-1].num_tokens)
    if len(identities) != 1:
        raise UserError("the workers' encoders differ (weights, tokenizer or dtype): give every node the same")
    identity = EncoderIdentity.model_validate_json(identities.pop())
    manifest = Manifest(
        encoder=identity,
        columns=[c.name for c in activation_columns(_indices(layers, identity), pooling)],
        corpus=config.corpus,
        is_sample=config.limit is not None,
        shards=sorted(committed, key=lambda shard: shard.file.name),
    )
    write_manifest(config.out, manifest)
    return manifest


def parse_layers(text: str) -> Literal["all"] | list[int]:
    if text.strip() == "all":
        return "all"
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f'layers = "{text}", must be "all" or indices like 0,15,30') from None


def parse_pooling(text: str) -> list[Pooling]:
    names = [name.strip() for name in text.split(",")]
    chosen = [pooling for pooling in POOLINGS if pooling in names]
    for name in names:
        if name not in chosen:
            raise UserError(f'pooling = "{name}", must be last, mean or both, as last,mean')
    return chosen


def _indices(layers: Literal["all"] | list[int], identity: EncoderIdentity) -> list[int]:
    return list(range(identity.num_layers + 1)) if layers == "all" else layers


class ExtractShard:
    """Encodes one shard of a corpus and writes it. The encoder is loaded at the first shard and kept."""

    def __init__(
        self, encoder: EncoderSpec, layers: Literal["all"] | list[int], pooling: list[Pooling], out: str, threads: int
    ) -> None:
        self.spec, self.layers, self.pooling, self.out = encoder, layers, pooling, out
        torch.set_num_threads(threads)

    @cached_property
    def encoder(self) -> PrefillEncoder:
        return PrefillEncoder.load(self.spec)

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        rows = read_shard(Shard.from_json(item["shard"]))
        tokens = self.encoder.tokenize([row.prompt for row in rows])
        encoded = self.encoder.forward(tokens, self.encoder.columns(self.layers, self.pooling))
        ids = [row.prompt_id for row in rows]
        written = write_activations(self.out, item["index"], ids, encoded, tokens.num_truncated)
        return {"shard": written.model_dump_json(), "identity": self.encoder.identity.model_dump_json()}
