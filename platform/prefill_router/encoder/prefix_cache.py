"""A cache of computed prefixes across calls, for prompts that arrive one at a time."""

# D hidden size, P tokens of a prefix

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from prefill_router.encoder.attention import KeyValue
from prefill_router.encoder.pooling import PrefixSums
from prefill_router.encoder.prefixes import PrefixGroup, shared_tokens

_MAX_ENTRIES = 64  # of cached prefixes, and of recent prompts that are searched for common prefixes
_MIN_GAIN_TOKENS = 16  # a smaller saving does not pay for running prompts in separate packs

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Prefix:
    """A computed prefix: everything needed to continue it with another prompt."""

    ids: Ids
    keys_and_values: list[KeyValue]  # each (P, K, E), of the blocks up to the deepest requested layer
    sums: PrefixSums


class PrefixCache:
    """An LRU cache of prefixes that prompts had in common, with at most `max_tokens` tokens. Threads may share it.

    A prefix is computed separately once a second prompt begins with it.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._prefixes: OrderedDict[Ids, Prefix] = OrderedDict()
        self._recent: deque[list[int]] = deque(maxlen=_MAX_ENTRIES)
        self._lock = threading.Lock()

    @property
    def num_tokens(self) -> int:
        """Tokens of all cached prefixes."""
        return sum(map(len, self._prefixes))

    def groups(self, prompts: Sequence[list[int]]) -> list[PrefixGroup]:
        """Groups prompts by the prefix to use: a cached one, one found in recent prompts, or none (0 tokens)."""
        groups: dict[Ids, list[int]] = {}
        with self._lock:
            for i, ids in enumerate(prompts):
                groups.setdefault(tuple(ids[: self._prefix_length(ids)]), []).append(i)
                self._recent.append(ids)
        return [PrefixGroup(len(prefix), own) for prefix, own in groups.items()]

    def _prefix_length(self, ids: list[int]) -> int:
        """Returns the length of the prefix to use for a prompt."""
        cached = (len(p) for p in self._prefixes if len(p) < len(ids) and p == tuple(ids[: len(p)]))
        best = max(cached, default=0)
        for recent in self._recent:
            least = best + _MIN_GAIN_TOKENS
            if least < len(ids) and recent[:least] == ids[:least]:
                best = max(best, min(shared_tokens(ids, recent), self.max_tokens))
        return best

    def longest(self, ids: Ids, num_blocks: int) -> Prefix | None:
        """Returns the longest cached prefix of `ids`, possibly all of them, with at least `num_blocks` blocks."""
        with self._lock:
            deep = [p for p in self._prefixes.values() if len(p.keys_and_values) >= num_blocks]
            found = max((p for p in deep if p.ids == ids[: len(p.ids)]), key=lambda p: len(p.ids), default=None)
            if found is not None:
                self._prefixes.move_to_end(found.ids)
            return found

    def add(self, prefix: Prefix) -> None:
        """Adds a prefix and evicts the least recently used ones over the limits."""
        with self._lock:
            self._prefixes[prefix.ids] = prefix
            self._prefixes.move_to_end(prefix.ids)
            while self.num_tokens > self.max_tokens or len(self._prefixes) > _MAX_ENTRIES:
                self._prefixes.popitem(last=False)
