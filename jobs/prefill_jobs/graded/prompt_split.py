"""The split of a training's prompts, and the groups of prompts that it keeps on one side."""

from __future__ import annotations

from prefill_jobs.graded.embeddings import embed
from prefill_jobs.options import TrainConfig
from prefill_jobs.runtime import cluster
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.corpus import split_groups
from prefill_router.corpus.split import Split
from prefill_router.corpus.split_groups import SplitGroups


def split_of(config: TrainConfig, fold: int) -> Split:
    """The split of a training. Raises UserError for options that contradict each other."""
    held_out = config.held_out_categories
    if held_out and config.folds:
        raise UserError("train: --folds and --hold-out exclude each other: give one of them")
    if config.corpus is None and (config.likeness is not None or held_out):
        raise UserError("train: --likeness and --hold-out require --corpus")
    with_corpus = "text" if config.likeness is None else "similarity"
    return Split.model_validate(
        {
            "seed": config.seed,
            "test_fraction": 0.0 if held_out else 1.0 / config.folds if config.folds else config.test_fraction,
            "folds": config.folds,
            "fold": fold,
            "held_out": held_out,
            "units": "content" if config.corpus is None else with_corpus,
        }
    )


def split_groups_of(config: TrainConfig) -> SplitGroups | None:
    """Split groups by text, and by similarity with --likeness; None without --corpus, for groups of equal content."""
    if config.corpus is None:
        return None
    by_text = split_groups.of_corpus(config.corpus, config.held_out_categories, config.category)
    if config.likeness is None:
        return by_text
    cluster.connect()
    embeddings = embed(config.corpus, config.sentence_encoder, f"{config.out.rstrip('/')}-embeddings")
    joined = by_text.joined_where_similar(embeddings.keys, embeddings.vectors, config.likeness)
    num_groups = len(set(joined.groups.tolist()))
    say(f"train: {len(joined.keys):,} prompts in {num_groups:,} split groups at a cosine of {config.likeness}")
    return joined
