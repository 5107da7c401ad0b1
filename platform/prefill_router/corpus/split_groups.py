"""Split groups: sets of equal or similar prompts that a split keeps on one side.

If a prompt were in training and a near copy of it in the test part, the evaluation would flatter the router.
"""

# N prompts, D dimensions

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prefill_router.common.console import doing
from prefill_router.common.errors import UserError
from prefill_router.corpus import reader
from prefill_router.corpus.reader import Prompt, Row
from prefill_router.corpus.split import PromptHashes, prompt_hashes

Kind = Literal["content", "text", "similarity"]

_NOT_WORDS = re.compile(r"[\W_]+")
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class SplitGroups:
    """Maps the hashes of prompt_ids to split groups. An unknown prompt is a group of its own."""

    kind: Kind
    keys: PromptHashes  # (N,) ascending
    groups: PromptHashes  # (N,)
    is_held_out: NDArray[np.bool_] | None = None  # (N,) prompts that are in the test part, whatever their hash

    def of(self, keys: PromptHashes) -> PromptHashes:
        """The split group of each prompt (N,)."""
        index, is_known = self._find(keys)
        return np.where(is_known, self.groups[index], keys) if len(self.keys) else keys

    def held_out(self, keys: PromptHashes) -> NDArray[np.bool_]:
        """Whether each prompt (N,) belongs to the test part, whatever its hash."""
        if self.is_held_out is None:
            return np.zeros(len(keys), bool)
        index, is_known = self._find(keys)
        return np.asarray(is_known & self.is_held_out[index])

    def _find(self, keys: PromptHashes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The index of each prompt in `self.keys`, and whether the prompt is known."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        index = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return index, np.asarray(self.keys[index] == keys)

    @doing("comparing embeddings")
    def joined_where_similar(self, keys: PromptHashes, vectors: NDArray[Any], likeness: float) -> SplitGroups:
        """Merges the groups of similar prompts, given their vectors (N, D) of unit length.

        Prompts are similar if their cosine is at least `likeness`, or if a chain of such pairs connects them.
        Compares all pairs: N² D products.
        """
        own = self.of(keys)
        component = _components(vectors, likeness, own)
        lowest = np.full(component.max(initial=-1) + 1, np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(lowest, component, own)
        order = np.argsort(keys)
        return replace(self, kind="similarity", keys=keys[order], groups=lowest[component][order])


def by_content(prompts: PromptHashes, contents: PromptHashes) -> SplitGroups:
    """Groups prompts of equal content, given hashes (N,) of their ids and of their texts, as in `StoreKeys`."""
    known, first = np.unique(prompts, return_index=True)
    return SplitGroups("content", known, contents[first])


@doing("reading the corpus")
def of_corpus(uri: str, held_out: Sequence[str] = (), column: str = "category") -> SplitGroups:
    """Groups the prompts of a corpus by text, ignoring case, white space and punctuation.

    Prompts whose `column` is one of the values `held_out` form the test part. Raises UserError if that column or
    value does not occur.
    """
    found = list(_text_hashes(uri))
    keys, first = np.unique(np.array([key for key, _ in found], np.uint64), return_index=True)
    split_groups = SplitGroups("text", keys, np.array([text for _, text in found], np.uint64)[first])
    if not held_out:
        return split_groups
    # A held-out prompt may also occur in another category: its whole group is held out.
    of_held_out = split_groups.groups[np.isin(keys, _of_categories(uri, held_out, column))]
    return replace(split_groups, is_held_out=np.isin(split_groups.groups, of_held_out))


def text_hash(prompt: Prompt) -> int:
    """A 64-bit hash of a prompt's words without case and punctuation; of the whole folded text if it has no words."""
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = _NOT_WORDS.sub(" ", folded).strip()
    return int.from_bytes(hashlib.blake2b((words or folded).encode(), digest_size=8).digest(), "little")


def _text_hashes(uri: str) -> Iterator[tuple[int, int]]:
    reader.require_corpus(uri)
    for file in reader.files(uri):
        for _, _, row in reader.read(file):
            if isinstance(row, Row):
                yield reader.prompt_hash(row.prompt_id), text_hash(row.prompt)


def _of_categories(uri: str, wanted: Sequence[str], column: str) -> PromptHashes:
    """The hashes of the prompts whose `column` is one of `wanted`."""
    rows = (row for file in reader.files(uri) for _, _, row in reader.read(file, extras=[column]))
    good = (row for row in rows if isinstance(row, Row) and row.extras[0] is not None)
    of_prompts = {row.prompt_id: str(row.extras[0]) for row in good}
    known = sorted(set(of_prompts.values()))
    if not known:
        raise UserError(
            f"{uri}: column {column} is missing, which --hold-out needs: add it, or name another with --category"
        )
    for name in wanted:
        if name not in known:
            raise UserError(f'{uri}: no prompt has {column} "{name}"; it has {", ".join(known[:20])}')
    return prompt_hashes([prompt_id for prompt_id, name in of_prompts.items() if name in wanted])


def _components(vectors: NDArray[Any], likeness: float, groups: PromptHashes) -> NDArray[np.int64]:
    """The connected component of each prompt (N,); edges join prompts that are similar or in one group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    x = np.asarray(vectors, np.float32)
    component = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    # One chunk of rows at a time: if all prompts are alike, all pairs together are N * N.
    for start in range(0, len(x), _CHUNK_ROWS):
        row, column = np.nonzero(x[start : start + _CHUNK_ROWS] @ x.T >= likeness)
        edges = component[start + row], component[column]
        graph = coo_array((np.ones(len(row), np.int8), edges), shape=(len(x), len(x)))
        component = connected_components(graph, directed=False)[1][component].astype(np.int64)
    return component
