"""Softmax tied over pairs of siblings of a tree: passes up and down, and the rows they give."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from dsf.mixing_rows import MixingRows
from dsf.shapes import Inexact
from dsf.transitions._base import register, static
from dsf.trees import Tree


class Passes(NamedTuple):
    """What the tree passes give.

    block (batch, head, family, child A, child B): the weight of one leaf of B in a row of a leaf
    of A. own (batch, head, leaf): the weight of a leaf in its own row. value (batch, head): g of
    the root, so that tokens x value = <M, S> + entropy(M), the maximum over block-tied matrices.
    """

    block: Tensor
    own: Tensor
    value: Tensor


def node_sums(leaves: Tensor, tree: Tree) -> Tensor:
    """Sums over the leaves of every node: (batch, head, leaf, ...) -> (..., node + 1, ...).

    The last entry is an empty node of zeros, for empty slots of families.
    """
    inner = tree.n_node + 1 - tree.n_leaf
    total = torch.cat([leaves, leaves.new_zeros(*leaves.shape[:2], inner, *leaves.shape[3:])], 2)
    for level in reversed(tree.levels):
        children = total[:, :, level.child.to(leaves.device)].sum(3)
        total = total.index_copy(2, level.parent.to(leaves.device), children)
    return total


def node_means(leaves: Tensor, counts: Tensor, tree: Tree) -> Tensor:
    """Means over real leaves; leaves are zero where they are not real, empty nodes stay zero."""
    return node_sums(leaves, tree) / counts.clamp(min=1)[..., None]


def tree_passes(
    query: Tensor, key: Tensor, real: Tensor, tree: Tree, *, scale: float, self_term: bool,
    causal: bool, family_bias: Tensor | None,
) -> Passes:  # fmt: skip
    """Up: means, family scores, g. Down: log of what reaches each node. All in logarithms.

    query, key (batch, head, leaf, width); real (batch, leaf). With siblings A, B of a family

        S_AB = scale qbar_A.kbar_B + bias_AB + log n_B,   lambda_A = log sum_{B != A} exp S_AB
        mu_A = sigmoid(g_A - lambda_A),   g_P = sum_A n_A/n_P log(e^g_A + e^lambda_A)

    Source: Amizadeh et al. (2025), algorithms 1 to 3, restated.
    """
    weight = real[:, None].to(query.dtype)
    counts = node_sums(weight, tree)
    q, k = (node_means(x * weight[..., None], counts, tree) for x in (query, key))
    table = tree.table.to(query.device)
    n = counts[:, :, table]  # batch 1 family slot
    S = scale * q[:, :, table] @ k[:, :, table].mT
    S = S if family_bias is None else S + family_bias
    log_n = torch.log(n.clamp(min=1)).masked_fill(n == 0, -torch.inf)
    slot = torch.arange(table.shape[1], device=query.device)
    other = slot[:, None] > slot if causal else slot[:, None] != slot
    closed = ~other | (n == 0)[..., None, :] | (n == 0)[..., None]
    S = (S + log_n[..., None, :]).masked_fill(closed, -torch.inf)
    lam, log_w = log_total(S)
    score = scale * (query * key).sum(-1) if self_term else torch.zeros_like(query[..., 0])
    g = score.masked_fill(~real[:, None], -torch.inf)
    g = g if self_term else torch.full_like(g, -torch.inf)
    g = torch.cat([g, g.new_full((*g.shape[:2], tree.n_node + 1 - tree.n_leaf), -torch.inf)], 2)
    for level in reversed(tree.levels):
        f, child = level.family.to(g.device), level.child.to(g.device)
        total = _log_sum(g[:, :, child], lam[:, :, f])
        share = n[:, :, f]
        part = torch.where(share > 0, share * total, 0.0).sum(-1) / share.sum(-1).clamp(min=1)
        empty = (share.sum(-1) == 0).expand_as(part)
        g = g.index_copy(2, level.parent.to(g.device), part.masked_fill(empty, -torch.inf))
    stay, leave = _log_sigmoids(g[:, :, table], lam)
    reach = torch.zeros_like(g)
    for level in tree.levels:
        f, child = level.family.to(g.device), level.child.to(g.device)
        below = reach[:, :, level.parent.to(g.device)][..., None] + stay[:, :, f]
        reach = reach.index_copy(2, child.flatten(), below.flatten(2))
    top = reach[:, :, tree.n_leaf : tree.n_node][..., None]
    log_block = (top + leave)[..., None] + log_w - log_n.masked_fill(n == 0, 0.0)[..., None, :]
    own = torch.exp(reach[:, :, : tree.n_leaf]).masked_fill(~real[:, None], 0.0)
    own = own if self_term else torch.zeros_like(own)
    return Passes(torch.exp(log_block), own, g[:, :, tree.n_node - 1])


def log_total(scores: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp over the last axis and scores minus it; rows of -inf stay, with gradients."""
    closed = scores == -torch.inf
    empty = closed.all(-1)
    total = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), -1)
    log_w = (scores.masked_fill(closed, 0.0) - total[..., None]).masked_fill(closed, -torch.inf)
    return total.masked_fill(empty, -torch.inf), log_w


def _log_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), -inf with finite gradients where both are -inf."""
    a, b = torch.broadcast_tensors(a, b)
    dead = (a == -torch.inf) & (b == -torch.inf)
    top = torch.maximum(a, b).detach().masked_fill(dead, 0.0)
    total = torch.exp(a - top) + torch.exp(b - top)
    return (top + torch.log(total.masked_fill(dead, 1.0))).masked_fill(dead, -torch.inf)


def _log_sigmoids(g: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """log mu and log(1 - mu), mu = sigmoid(g - lambda); mu is 1 where there are no siblings."""
    alone = lam == -torch.inf
    none = (g == -torch.inf) & ~alone
    gap = g.masked_fill(alone | none, 0.0) - lam.masked_fill(alone | none, 0.0)
    stay = torch.nn.functional.logsigmoid(gap).masked_fill(none, -torch.inf)
    leave = torch.nn.functional.logsigmoid(-gap).masked_fill(alone, -torch.inf)
    return stay.masked_fill(alone, 0.0), leave.masked_fill(none, 0.0)


@register
@dataclasses.dataclass(frozen=True)
class HierarchicalRows(MixingRows):
    """Rows tied over pairs of siblings of a tree; see `Passes` for block and own.

    real (batch, leaf): 1 for keys that count, 0 for others. Row r is that of leaf first + r.
    `mix` is one pass up and one down the tree: O(sum of squared family sizes x channel).
    """

    block: Tensor
    own: Tensor
    real: Tensor
    tree: Tree = dataclasses.field(metadata={"static": True})
    n_row: int = static(default=0)
    first: int = static(default=0)
    causal: bool = static(default=False)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, key)."""
        batch, head = self.own.shape[:2]
        return torch.Size((batch, self.n_row, head, 1, self.tree.n_leaf))

    @property
    def query_start(self) -> int:  # type: ignore[override]
        """The key that row 0 stands at."""
        return self.first

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """Every entry from the family where the two leaves part. O(depth x rows x keys)."""
        device = self.own.device
        paths = self.tree.paths.to(device)
        slots = torch.tensor(self.tree.slots, device=device)
        row = torch.arange(self.n_row, device=device)[queries] + self.first
        key = torch.arange(self.tree.n_leaf, device=device)[keys]
        same = row[:, None] == key
        weights = torch.where(same, self.own[:, :, row, None], 0.0)
        for depth in range(paths.shape[0] - 1):
            a, b = paths[depth, row][:, None], paths[depth, key]
            i, j = paths[depth + 1, row][:, None], paths[depth + 1, key]
            part = (a == b) & (i != j)
            family = (a - self.tree.n_leaf).clamp(min=0)
            found = self.block[:, :, family, slots[i], slots[j]]
            weights = torch.where(part, found, weights)
        return weights * self.real[:, None, None, keys].to(weights.dtype)

    def mix(
        self, values: Inexact[Tensor, "batch head key channel"]
    ) -> Inexact[Tensor, "out_batch out_head query channel"]:
        """Sums of values up the tree, family products, sums of those down to every leaf."""
        tree, device = self.tree, self.own.device
        dtype = torch.promote_types(self.own.dtype, values.dtype)
        v = values.to(dtype) * self.real[:, None, :, None].to(dtype)
        sums = node_sums(v, tree)
        mixed = self.block.to(dtype) @ sums[:, :, tree.table.to(device)]
        out = torch.zeros_like(mixed[:, :, 0, :1]).repeat(1, 1, tree.n_node + 1, 1)
        for level in tree.levels:
            f, child = level.family.to(device), level.child.to(device)
            below = out[:, :, level.parent.to(device)][:, :, :, None] + mixed[:, :, f]
            out = out.index_copy(2, child.flatten(), below.flatten(2, 3))
        y = out[:, :, : tree.n_leaf] + self.own.to(dtype)[..., None] * v
        return y[:, :, self.first : self.first + self.n_row]

    def time_slice(self, start: int, stop: int) -> HierarchicalRows:
        """Some rows; the tree stays."""
        return dataclasses.replace(self, n_row=stop - start, first=self.first + start)
