"""Finds shared prefixes in a batch of prompts, so that each is computed once.

Examples are a chat template's system text and an agent's long instructions. For prompts that arrive one at a time, see
`prefix_cache`.
"""

# N prompts

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MAX_NESTING = 64  # depth of prefixes that extend each other


@dataclass(frozen=True)
class PrefixGroup:
    """Indices of prompts that share their first `num_tokens` tokens. Each prompt is longer than that."""

    num_tokens: int
    prompts: list[int]


def shared_prefixes(prompts: Sequence[list[int]], min_saved_tokens: int) -> list[PrefixGroup]:
    """Partitions prompts into groups that save the most tokens, at a cost of `min_saved_tokens` per sharing group.

    A group computes its whole prefix, including any part in common with another group's prefix.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    shared = [0, *(shared_tokens(prompts[a], prompts[b]) for a, b in itertools.pairwise(order))]
    group_cost = max(1, min_saved_tokens)
    groups = _best_groups(_tree(shared, 0, len(order), group_cost, _MAX_NESTING), group_cost)
    return [PrefixGroup(num_tokens, [order[i] for i in positions]) for num_tokens, positions in groups if positions]


def shared_tokens(a: list[int], b: list[int]) -> int:
    """Returns the length of the longest common prefix that leaves each prompt at least one token of its own."""
    most = min(len(a), len(b)) - 1
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


@dataclass(frozen=True, eq=False)
class _Node:
    """The prompts [start, end) in sorted order, which share `common` tokens. Its children share more."""

    start: int
    end: int
    common: int
    children: list[_Node]


def _tree(shared: list[int], start: int, end: int, group_cost: int, nesting: int) -> _Node:
    within = shared[start + 1 : end]
    common = min(within, default=0)
    cannot_pay = len(within) * max(within, default=0) < group_cost  # no group below this node can save its cost
    runs = [] if cannot_pay or nesting == 0 else _runs(shared, start, end, common)
    return _Node(start, end, common, [_tree(shared, *run, group_cost, nesting - 1) for run in runs])


def _runs(shared: list[int], start: int, end: int, common: int) -> Iterator[tuple[int, int]]:
    """Yields the ranges of prompts that share more than `common` tokens."""
    first = start
    for position in range(start + 1, end):
        if shared[position] == common:
            yield first, position
            first = position
    yield first, end


def _best_groups(root: _Node, group_cost: int) -> list[tuple[int, list[int]]]:
    """Returns each group's prefix length and sorted positions. The first group holds the prompts that share nothing.

    A prompt saves the prefix length of its group, the nearest one above it. A group costs its prefix length plus
    `group_cost`.
    """

    @functools.cache
    def gain(node: _Node, above: int) -> int:
        """Returns the most that the node's prompts can save if they may join a group of `above` tokens."""
        return max(inside(node, above), as_group(node)) if node.common > above else inside(node, above)

    def inside(node: _Node, tokens: int) -> int:
        if not node.children:
            return (node.end - node.start) * tokens
        return sum(gain(child, tokens) for child in node.children)

    def as_group(node: _Node) -> int:
        return inside(node, node.common) - node.common - group_cost

    groups: list[tuple[int, list[int]]] = [(0, [])]

    def assign(node: _Node, above: int, positions: list[int]) -> None:
        if node.common > above and as_group(node) >= inside(node, above):
            above, positions = node.common, []
            groups.append((above, positions))
        if not node.children:
            positions += range(node.start, node.end)
        for child in node.children:
            assign(child, above, positions)

    assign(root, 0, groups[0][1])
    return groups
