"""Hierarchical attention as a stream: one sum of values a finished group, and what reads them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsf.models._hierarchical_core import Passes, log_total, node_means, node_sums
from dsf.recurrence import Recurrence
from dsf.transitions import Dense
from dsf.trees import Tree


@functools.lru_cache(maxsize=32)
def group_table(tree: Tree) -> Tensor:
    """(time, slot): the nodes that every row sees, itself last, filled up with the empty node."""
    rows = tree.left_groups
    table = torch.full((len(rows), max(len(r) for r in rows)), tree.n_node)
    for t, row in enumerate(rows):
        table[t, : len(row)] = torch.tensor(row)
    return table


@functools.lru_cache(maxsize=32)
def merges(tree: Tree) -> Tensor:
    """(time, slot, slot): 1 where an old group (column) goes on as, or in, a new one (row)."""
    rows = tree.left_groups
    n_slot = max(len(r) for r in rows)
    A = torch.zeros(len(rows), n_slot, n_slot)
    for t in range(1, len(rows)):
        firsts = torch.tensor([tree.spans[g][0] for g in rows[t]])
        old = torch.tensor([tree.spans[g][0] for g in rows[t - 1]])
        new = torch.searchsorted(firsts, old, right=True) - 1
        A[t, new, torch.arange(len(old))] = 1
    return A


def streaming_system(tree: Tree, weights: Tensor, real: Tensor) -> Recurrence:
    """The group sums as a system; weights (batch, head, time, slot) read them.

    A_t puts the groups of t - 1 into those of t, B_t writes a real token into its own slot.
    """
    A = merges(tree).to(weights)[None, :, None]
    last = torch.tensor([len(r) - 1 for r in tree.left_groups], device=weights.device)
    own = torch.nn.functional.one_hot(last, weights.shape[3]) * real[..., None]
    C = weights.permute(0, 2, 1, 3)[..., None, :]
    B = own.to(weights)[:, :, None, :, None]
    return Recurrence(Dense(A), B, C, gauge="one sum per group")


def free_weights(q: Tensor, k: Tensor, real: Tensor, tree: Tree, scale: float) -> Tensor:
    """softmax_G(scale q_t.kbar_G + log n_G) / n_G, (batch, head, time, slot)."""
    groups = group_table(tree).to(q.device)
    weight = real[:, None].to(q.dtype)
    counts = node_sums(weight, tree)
    means = node_means(k * weight[..., None], counts, tree)
    n = counts[:, :, groups]
    z = scale * (q[:, :, :, None] * means[:, :, groups]).sum(-1) + n.clamp(min=1).log()
    _, log_weights = log_total(z.masked_fill(n == 0, -torch.inf))
    return torch.exp(log_weights) / n.clamp(min=1)


def tied_weights(passes: Passes, tree: Tree) -> Tensor:
    """Row t's weight on one token of each group it sees, (batch, head, time, slot)."""
    n_slot = group_table(tree).shape[1]
    weights = passes.own.new_zeros(*passes.own.shape, n_slot)
    token, slot, family, a, b = seen_siblings(tree).unbind(1)
    weights[:, :, token, slot] = passes.block[:, :, family, a, b]
    last = torch.tensor([len(r) - 1 for r in tree.left_groups])
    weights[:, :, torch.arange(tree.n_leaf), last] = passes.own
    return weights


@functools.lru_cache(maxsize=32)
def seen_siblings(tree: Tree) -> Tensor:
    """(row, 5): token, slot and family of a group that it sees, their two children there."""
    found = []
    for leaf, row in enumerate(tree.left_groups):
        slot, node = len(row) - 1, leaf
        while node != tree.n_node - 1:
            parent, child = tree.parents[node], tree.slots[node]
            slot -= child
            found += [(leaf, slot + s, parent - tree.n_leaf, child, s) for s in range(child)]
            node = parent
    return torch.tensor(found, dtype=torch.long).reshape(-1, 5)
