"""Shared prefixes: which prompts begin alike, so that what they share is computed once.

A chat template's system text, or an agent's long instructions, stand before every prompt of a corpus. This is for
prompts that are all at hand; for those that come one by one there is `memory`.
"""

# N prompts

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MAX_NESTING = 64  # of prefixes that continue each other


@dataclass(frozen=True)
class PrefixGroup:
    """Prompts (their indices) that share their first `num_tokens`; each has more tokens than that."""

    num_tokens: int
    prompts: list[int]


def shared_prefixes(prompts: Sequence[list[int]], min_saved_tokens: int) -> list[PrefixGroup]:
    """Groups that cover every prompt once, and save the most tokens, less `min_saved_tokens` for each that shares.

    A group computes its prefix whole, also what it has in common with another group's.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    shared = [0, *(shared_tokens(prompts[a], prompts[b]) for a, b in itertools.pairwise(order))]
    price = max(1, min_saved_tokens)
    groups = _best_groups(_tree(shared, 0, len(order), price, _MAX_NESTING), price)
    return [PrefixGroup(num_tokens, [order[i] for i in places]) for num_tokens, places in groups if places]


def shared_tokens(a: list[int], b: list[int]) -> int:
    """How many tokens may be shared: each keeps at least one of its own."""
    most = min(len(a), len(b)) - 1
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


@dataclass(frozen=True, eq=False)
class _Node:
    """The sorted prompts [start, end), which share `common` tokens; its children share more."""

    start: int
    end: int
    common: int
    children: list[_Node]


def _tree(shared: list[int], start: int, end: int, price: int, nesting: int) -> _Node:
    within = shared[start + 1 : end]
    common = min(within, default=0)
    # No group in here would be worth its price.
    is_poor = len(within) * max(within, default=0) < price
    runs = [] if is_poor or nesting == 0 else _runs(shared, start, end, common)
    return _Node(start, end, common, [_tree(shared, *run, price, nesting - 1) for run in runs])


def _runs(shared: list[int], start: int, end: int, common: int) -> Iterator[tuple[int, int]]:
    """Of prompts that share more than `common`."""
    first = start
    for place in range(start + 1, end):
        if shared[place] == common:
            yield first, place
            first = place
    yield first, end


def _best_groups(root: _Node, price: int) -> list[tuple[int, list[int]]]:
    """Tokens, and places in the sorted order, of each group; the first is of the prompts that share nothing.

    A prompt gains the tokens of the group it is in, the nearest above it; a group costs its tokens, and its price.
    """

    @functools.cache
    def gain(node: _Node, above: int) -> int:
        """The most that the node's prompts gain where they may join a group of `above` tokens."""
        return max(inside(node, above), as_group(node)) if node.common > above else inside(node, above)

    def inside(node: _Node, tokens: int) -> int:
        if not node.children:
            return (node.end - node.start) * tokens
        return sum(gain(child, tokens) for child in node.children)

    def as_group(node: _Node) -> int:
        return inside(node, node.common) - node.common - price

    groups: list[tuple[int, list[int]]] = [(0, [])]

    def assign(node: _Node, above: int, places: list[int]) -> None:
        if node.common > above and as_group(node) >= inside(node, above):
            above, places = node.common, []
            groups.append((above, places))
        if not node.children:
            places += range(node.start, node.end)
        for child in node.children:
            assign(child, above, places)

    assign(root, 0, groups[0][1])
    return groups
