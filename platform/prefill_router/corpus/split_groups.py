"""What a split may not tear apart: prompts that are the same, or nearly, are one unit, which lies on one side.

Otherwise a router is asked in the exam what it was taught, and an evaluation flatters it.
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

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.corpus import reader
from prefill_router.corpus.reader import Prompt, Row
from prefill_router.corpus.split import Keys, prompt_hashes

Kind = Literal["content", "text", "similarity"]

_NOT_WORDS = re.compile(r"[\W_]+")
_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Units:
    """The unit of each prompt, by the hashes of prompt_ids. A prompt that is not known is a unit of its own."""

    kind: Kind
    keys: Keys  # (N,) ascending
    units: Keys  # (N,)
    is_held_out: NDArray[np.bool_] | None = None  # (N,) prompts that are to be the test part, whatever the hash says

    def of(self, keys: Keys) -> Keys:
        place, is_known = self._places(keys)
        return np.where(is_known, self.units[place], keys) if len(self.keys) else keys

    def held_out(self, keys: Keys) -> NDArray[np.bool_]:
        """Which prompts (N,) are to be the test part, whatever the hash says."""
        if self.is_held_out is None:
            return np.zeros(len(keys), bool)
        place, is_known = self._places(keys)
        return np.asarray(is_known & self.is_held_out[place])

    def _places(self, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if not len(self.keys):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return place, np.asarray(self.keys[place] == keys)

    def joined_where_similar(self, keys: Keys, vectors: NDArray[Any], likeness: float) -> Units:
        """With prompts in one unit whose vectors (N, D), of unit length, have a cosine of `likeness` or more.

        So are prompts that a chain of such pairs joins. It compares all pairs: N² D products.
        """
        own = self.of(keys)
        groups = _components(vectors, likeness, own)
        first = np.full(groups.max(initial=-1) + 1, np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(first, groups, own)
        order = np.argsort(keys)
        return replace(self, kind="similarity", keys=keys[order], units=first[groups][order])


def by_content(prompts: Keys, contents: Keys) -> Units:
    """Groups prompts of equal content: (N,) hashes of their ids and of their texts, as `StoreKeys` has them."""
    known, first = np.unique(prompts, return_index=True)
    return Units("content", known, contents[first])


def of_corpus(uri: str, held_out: Sequence[str] = (), column: str = "category") -> Units:
    """By the prompts' text but for case, space and punctuation.

    With `held_out`, the prompts whose `column` is one of these values are to be the test part. Raises UserError where
    there is no such column or value.
    """
    found = list(_text_hashes(uri))
    keys, first = np.unique(np.array([key for key, _ in found], np.uint64), return_index=True)
    units = Units("text", keys, np.array([text for _, text in found], np.uint64)[first])
    if not held_out:
        return units
    # A prompt that stands in another category too must not be learnt from there.
    of_held_out = units.units[np.isin(keys, _of_categories(uri, held_out, column))]
    return replace(units, is_held_out=np.isin(units.units, of_held_out))


def text_hash(prompt: Prompt) -> int:
    """64 bits of a prompt's text but for case, space and punctuation; of all of it where nothing else is there."""
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = _NOT_WORDS.sub(" ", folded).strip()
    return int.from_bytes(hashlib.blake2b((words or folded).encode(), digest_size=8).digest(), "little")


def _text_hashes(uri: str) -> Iterator[tuple[int, int]]:
    storage.require(uri, "corpus")
    for file in reader.files(uri):
        for _, _, row in reader.read(file):
            if isinstance(row, Row):
                yield reader.prompt_hash(row.prompt_id), text_hash(row.prompt)


def _of_categories(uri: str, wanted: Sequence[str], column: str) -> Keys:
    """The hashes of the prompts in these categories."""
    rows = (row for file in reader.files(uri) for _, _, row in reader.read(file, extras=[column]))
    good = (row for row in rows if isinstance(row, Row) and row.extras[0] is not None)
    of_prompts = {row.prompt_id: str(row.extras[0]) for row in good}
    known = sorted(set(of_prompts.values()))
    if not known:
        raise UserError(f"{uri}: column {column} is missing, by which prompts are to be held out")
    for name in wanted:
        if name not in known:
            raise UserError(f'{uri}: no prompt has {column} "{name}"; it has {", ".join(known[:20])}')
    return prompt_hashes([prompt_id for prompt_id, name in of_prompts.items() if name in wanted])


def _components(vectors: NDArray[Any], likeness: float, units: Keys) -> NDArray[np.int64]:
    """The connected components (N,) of prompts that are similar, or of one unit."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    x = np.asarray(vectors, np.float32)
    pairs = []
    for start in range(0, len(x), _CHUNK_ROWS):
        row, column = np.nonzero(x[start : start + _CHUNK_ROWS] @ x.T >= likeness)
        pairs.append(np.column_stack([start + row, column]))
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    pairs.append(np.column_stack([np.arange(len(x)), first[unit]]))
    rows, columns = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(x), len(x)))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)
