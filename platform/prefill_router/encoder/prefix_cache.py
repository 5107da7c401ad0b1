"""Prefixes from call to call: where prompts come one by one, what they had in common is kept for the next one."""

# D hidden size, P tokens of a prefix

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from prefill_router.encoder.attention import KeyValue
from prefill_router.encoder.pooling import PrefixSums
from prefill_router.encoder.prefixes import PrefixGroup, shared_tokens

_MAX_HELD = 64  # prefixes, and recent prompts that one may be found in
_MIN_GAIN_TOKENS = 16  # what a prefix saves must be worth prompts that run apart

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Prefix:
    """A prefix that was computed, as the prompts that continue it want it."""

    ids: Ids
    keys_and_values: list[KeyValue]  # each (P, K, E), of as many blocks as were asked for
    sums: PrefixSums


class PrefixMemory:
    """The prefixes that prompts had in common; threads may share it.

    A prefix is worth computing by itself once a second prompt begins with it. Where more than `max_tokens` are held,
    what was used longest ago is forgotten.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._prefixes: OrderedDict[Ids, Prefix] = OrderedDict()
        self._recent: deque[list[int]] = deque(maxlen=_MAX_HELD)
        self._lock = threading.Lock()

    @property
    def num_tokens(self) -> int:
        """Tokens that are held."""
        return sum(map(len, self._prefixes))

    def groups(self, prompts: Sequence[list[int]]) -> list[PrefixGroup]:
        """Groups that cover every prompt once, each of a prefix that is known or newly found, or of none."""
        groups: dict[Ids, list[int]] = {}
        with self._lock:
            for i, ids in enumerate(prompts):
                groups.setdefault(tuple(ids[: self._best(ids)]), []).append(i)
                self._recent.append(ids)
        return [PrefixGroup(len(prefix), own) for prefix, own in groups.items()]

    def _best(self, ids: list[int]) -> int:
        """How many tokens of a prompt to take from a prefix."""
        known = (len(held) for held in self._prefixes if len(held) < len(ids) and held == tuple(ids[: len(held)]))
        best = max(known, default=0)
        for recent in self._recent:
            least = best + _MIN_GAIN_TOKENS
            if least < len(ids) and recent[:least] == ids[:least]:
                best = max(best, min(shared_tokens(ids, recent), self.max_tokens))
        return best

    def longest(self, ids: Ids, num_blocks: int) -> Prefix | None:
        """The longest beginning of `ids`, or all of them, of which `num_blocks` blocks are known."""
        with self._lock:
            fit = [p for p in self._prefixes.values() if len(p.keys_and_values) >= num_blocks]
            found = max((p for p in fit if p.ids == ids[: len(p.ids)]), key=lambda p: len(p.ids), default=None)
            if found is not None:
                self._prefixes.move_to_end(found.ids)
            return found

    def keep(self, prefix: Prefix) -> None:
        with self._lock:
            self._prefixes[prefix.ids] = prefix
            self._prefixes.move_to_end(prefix.ids)
            while self.num_tokens > self.max_tokens or len(self._prefixes) > _MAX_HELD:
                self._prefixes.popitem(last=False)
