"""Rooted trees whose leaves are tokens: how hierarchical attention is told its groups."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsf.errors import DsfValueError


class Level(NamedTuple):
    """The families whose parents stand at one depth."""

    family: Tensor
    parent: Tensor
    child: Tensor
    """children (family, slot), the number of nodes where a slot is empty."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """Leaves 0..n_leaf-1 in the order of the tokens, inner nodes after them, the root last.

    parents[a] is the parent of node a, larger than a but for the root, which is its own. No inner
    node has a single child or none (but a root over one leaf or no token): such nodes say nothing
    and are spliced out by the constructors.
    """

    parents: tuple[int, ...]
    n_leaf: int

    @property
    def n_node(self) -> int:
        """Leaves and inner nodes."""
        return len(self.parents)

    @functools.cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The children of every inner node, in the order of their first leaves."""
        found: list[list[int]] = [[] for _ in range(self.n_leaf, self.n_node)]
        for node, parent in enumerate(self.parents[:-1]):
            found[parent - self.n_leaf].append(node)
        return tuple(tuple(sorted(c, key=self.spans.__getitem__)) for c in found)

    @functools.cached_property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """First leaf, one past the last, and number of leaves of every node."""
        spans = [(i, i + 1, 1) for i in range(self.n_leaf)]
        spans += [(self.n_leaf, 0, 0)] * (self.n_node - self.n_leaf)
        for node, parent in enumerate(self.parents[:-1]):
            a, b = spans[node], spans[parent]
            spans[parent] = (min(a[0], b[0]), max(a[1], b[1]), a[2] + b[2])
        return tuple(spans)

    @property
    def is_ordered(self) -> bool:
        """Whether every node covers tokens without a gap, as causal use needs."""
        return all(stop - start == count for start, stop, count in self.spans)

    @property
    def n_score(self) -> int:
        """Sum of squared family sizes: the scores that hierarchical attention computes."""
        return sum(len(c) ** 2 for c in self.children)

    @property
    def largest_family(self) -> int:
        """The most children a node has."""
        return max(len(c) for c in self.children)

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node, 0 at the root."""
        depth = [0] * self.n_node
        for node in range(self.n_node - 2, -1, -1):
            depth[node] = depth[self.parents[node]] + 1
        return tuple(depth)

    @functools.cached_property
    def slots(self) -> tuple[int, ...]:
        """Which child of its parent a node is, 0 for the root."""
        slot = [0] * self.n_node
        for family in self.children:
            for i, node in enumerate(family):
                slot[node] = i
        return tuple(slot)

    @functools.cached_property
    def table(self) -> Tensor:
        """children (family, slot) of all inner nodes, n_node where a slot is empty."""
        table = torch.full((len(self.children), self.largest_family), self.n_node)
        for f, family in enumerate(self.children):
            table[f, : len(family)] = torch.tensor(family)
        return table

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        """Families by the depth of their parent, the root's first."""
        by_depth: dict[int, list[int]] = {}
        for f in range(len(self.children)):
            by_depth.setdefault(self.depths[self.n_leaf + f], []).append(f)
        families = [torch.tensor(by_depth[d]) for d in sorted(by_depth)]
        return tuple(Level(f, f + self.n_leaf, self.table[f]) for f in families)

    @functools.cached_property
    def paths(self) -> Tensor:
        """(depth + 1, leaf): the ancestor of every leaf at every depth, the leaf itself below."""
        paths = torch.arange(self.n_leaf).repeat(max(self.depths) + 1, 1)
        for leaf in range(self.n_leaf):
            node = leaf
            while True:
                paths[self.depths[node], leaf] = node
                if node == self.n_node - 1:
                    break
                node = self.parents[node]
        return paths

    @functools.cached_property
    def left_groups(self) -> tuple[tuple[int, ...], ...]:
        """For every token the left siblings on its ancestor line, from the left, and itself."""
        rows = []
        for leaf in range(self.n_leaf):
            row, node = [leaf], leaf
            while node != self.n_node - 1:
                family = self.children[self.parents[node] - self.n_leaf]
                row = [*family[: self.slots[node]], *row]
                node = self.parents[node]
            rows.append(tuple(row))
        return tuple(rows)


def tree_from_parents(parents: Sequence[int], n_leaf: int) -> Tree:
    """A tree from the parent of every node (any numbering after the leaves; -1 for the root).

    Inner nodes without leaves are dropped, those with one child spliced out. Raises DsfValueError
    on a cycle or several roots.
    """
    if n_leaf < 1 or len(parents) <= n_leaf or list(parents).count(-1) != 1:
        raise DsfValueError(
            f"dsf.tree_from_parents: parents: expected one root (-1) above at least one leaf, got "
            f"{list(parents).count(-1)} roots and {n_leaf} leaves."
        )
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    found = 0

    def build(node: int) -> Any:
        nonlocal found
        if node < n_leaf:
            found += 1
            return node
        parts = [p for p in map(build, children.get(node, [])) if p is not None]
        return parts or None

    nested = build(children[-1][0])
    if found != n_leaf:
        raise DsfValueError(
            f"dsf.tree_from_parents: parents: expected {n_leaf} leaves below the root, got "
            f"{found}."
        )
    return _from_indexed(nested, n_leaf)


def tree_from_nested(nested: Any) -> Tree:
    """A tree from nested lists, tuples or dicts (their values): anything else inside is a token.

    Text: [[sentence tokens, ...] paragraphs, ...]; empty groups are dropped. Tokens are counted
    from left to right. Raises DsfValueError when there is none.
    """
    count = 0

    def number(part: Any) -> Any:
        nonlocal count
        if isinstance(part, Mapping):
            part = list(part.values())
        if isinstance(part, list | tuple):
            parts = [p for p in map(number, part) if p is not None]
            return parts or None
        count += 1
        return count - 1

    indexed = number(nested)
    if indexed is None:
        raise DsfValueError("dsf.tree_from_nested: nested: expected at least one token, got none.")
    return _from_indexed(indexed, count)


@functools.lru_cache(maxsize=128)
def tree_from_branching(length: int, branching: tuple[int, ...]) -> Tree:
    """Windows of branching[-1] tokens, windows of branching[-2] of those, ..., one root.

    branching runs from top to bottom. The last group of a level may be short, and the root takes
    as many groups as there are, so a longer sequence has the same groups at its start. Without
    tokens there is a root and nothing below. Raises DsfValueError.
    """
    if length < 0 or not branching or min(branching) < 1:
        raise DsfValueError(
            f"dsf.tree_from_branching: length, branching: expected a length of at least 0 and "
            f"positive numbers, got {length} and {branching}."
        )
    if not length:
        return Tree((0,), 0)
    level: list[Any] = list(range(length))
    for b in branching[:0:-1]:
        level = [level[i : i + b] for i in range(0, len(level), b)]
    return _from_indexed(level, length)


def quadtree(side: int) -> Tree:
    """Squares of 2 x 2 squares of ... over side x side tokens in raster order, side a power of 2.

    Its nodes do not cover the raster without gaps: not for causal use.
    """
    if side < 1 or side & (side - 1):
        raise DsfValueError(f"dsf.quadtree: side: expected a power of two, got {side}.")

    def square(row: int, column: int, size: int) -> Any:
        if size == 1:
            return row * side + column
        half = size // 2
        return [square(row + i * half, column + j * half, half) for i in (0, 1) for j in (0, 1)]

    return _from_indexed([square(0, 0, side)] if side == 1 else square(0, 0, side), side * side)


def _from_indexed(nested: Any, n_leaf: int) -> Tree:
    """From nested lists of leaf numbers: single children spliced out, parents after children."""
    parents: list[int] = [-1] * n_leaf

    def place(part: Any) -> int:
        if not isinstance(part, list):
            return part
        placed = [place(p) for p in part]
        if len(placed) == 1:
            return placed[0]
        parents.append(-1)
        node = len(parents) - 1
        for child in placed:
            parents[child] = node
        return node

    root = place(nested)
    if root < n_leaf:  # a single token: a root over one leaf
        parents.append(-1)
        parents[root] = root = len(parents) - 1
    parents[root] = root
    return Tree(tuple(parents), n_leaf)
