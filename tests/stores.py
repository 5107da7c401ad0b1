"""Queries of an activation store, for tests."""

from __future__ import annotations

from prefill_router.activations import store_keys
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.corpus.split_groups import SplitGroups, by_content


def content_groups(uri: str) -> SplitGroups:
    """The split groups of a finished store's prompts by content, the default of `train`."""
    keys = store_keys.read(ActivationStore.open(uri))
    return by_content(keys.prompts, keys.contents)
