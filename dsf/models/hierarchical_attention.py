"""Hierarchical attention: softmax tied over the groups of a tree, or streaming over columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsf.errors import DsfShapeError, DsfUnsupportedError, DsfValueError
from dsf.factors import OneHot, SoftmaxRows
from dsf.mixing_rows import block_rows
from dsf.models._heads import (
    check_divides,
    check_query_key,
    merge_heads,
    share_groups,
    split_heads,
)
from dsf.models._hierarchical_core import (
    HierarchicalRows,
    tree_passes,
)
from dsf.models._hierarchical_stream import (
    free_weights,
    streaming_system,
    tied_weights,
)
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.scanning import scan
from dsf.shapes import Bool, Float
from dsf.transitions import Identity
from dsf.trees import Tree, tree_from_branching
from dsf.wrappers import Bidirectional, System

SYSTEM = "hierarchical_attention"
ROWS = ("tied", "free")


def hierarchical_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    tree: Tree,
    *,
    rows: str = "tied",
    causal: bool = False,
    self_term: bool = True,
    key_mask: Bool[Tensor, "batch time"] | None = None,
    scale: float | None = None,
    family_bias: Float[Tensor, "#batch #head family child child"] | None = None,
) -> System:
    """Hierarchical self-attention over values (batch, time, head, channel), tree from `dsf.trees`.

    tied: the matrix nearest to softmax in sum_t KL(M_t || softmax_t) among those with one number
    per pair of siblings of the tree, by the dynamic programme of `tree_passes`; self_term=False
    leaves j = t out (the published form). Not causal: rows read from a cache, `mix` costs the
    scores of the families only. causal: left siblings only, as a finite recurrence,

        h_t: one sum of values per left sibling on the ancestor line of t, and the token's own
        A_t merges the groups that ended at t - 1 (zeros and ones), B_t = e_last
        C_t = weight of row t on one token of each group

    **causal tied leaks**: its means run over whole groups, so a later token of the same group
    changes earlier rows; the matrix is lower triangular all the same. rows="free" (causal only)
    ties the columns of each group but no rows, C_t = softmax_G(scale q_t.kbar_G + log n_G)/n_G:
    past tokens only, and nearer to softmax.

    key_mask: True for real tokens, others are taken out of the tree. family_bias is added to the
    scores of `tree.table`'s families (tied). Raises DsfShapeError, DsfValueError. Source:
    Amizadeh et al. (2025), arXiv 2509.15448, theorem 3.2; self term, masks and streaming derived.
    """
    check_query_key("dsf.hierarchical_attention_recurrence", query, key)
    _check(query, tree, rows, causal, self_term, key_mask)
    if query.shape[1] == 0:  # no token, no group: the empty cache of softmax attention
        empty = Recurrence(
            Identity(0), OneHot(0, 0), SoftmaxRows(query, key, causal=causal), system=SYSTEM,
            gauge="one state per token",
        )  # fmt: skip
        return empty if causal else Bidirectional.from_rows(empty)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, real = _leaves(query, key, key_mask)
    if rows == "free":
        weights = free_weights(q, k, real, tree, factor)
        return streaming_system(tree, weights, real).replace(system=SYSTEM)
    passes = tree_passes(
        q, k, real, tree, scale=factor, self_term=self_term, causal=causal, family_bias=family_bias
    )
    length = query.shape[1]
    if causal:
        return streaming_system(tree, tied_weights(passes, tree), real).replace(system=SYSTEM)
    r = Recurrence(
        Identity(length), OneHot(length, length),
        HierarchicalRows(
            passes.block, passes.own, real.to(passes.own.dtype), tree=tree, n_row=length
        ),
        system=SYSTEM, gauge="one state per token",
    )  # fmt: skip
    return Bidirectional.from_rows(r)


def hierarchical_divergence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    tree: Tree,
    *,
    causal: bool = False,
    self_term: bool = True,
    key_mask: Bool[Tensor, "batch time"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch head"]:
    """The loss of the tied projection, sum_t KL(M_t || softmax_t) = sum_t LSE_t - N g_root.

    Over real rows; without M. The LSEs cost O(time^2 width), by blocks of rows, the rest the
    scores of the families. Source: derived, hierarchical self-attention, section 4.
    """
    _check(query, tree, "tied", causal, self_term, key_mask)
    q, k, real = _leaves(query, key, key_mask)
    if query.shape[1] == 0:
        return q.new_zeros(q.shape[:2])
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    passes = tree_passes(
        q, k, real, tree, scale=factor, self_term=self_term, causal=causal, family_bias=None
    )
    rows = SoftmaxRows(query, key, key_mask=key_mask, scale=scale, causal=causal)
    length, size = query.shape[1], block_rows(rows)
    parts = []
    for start in range(0, length, size):
        z = rows.logits(slice(start, start + size), slice(0, length))
        if not self_term:
            at = torch.arange(length, device=z.device)
            z = z.masked_fill(at[start : start + size, None] == at, -torch.inf)
        parts.append(torch.logsumexp(z, -1))
    lse = torch.cat(parts, -1).masked_fill(~real[:, None], 0.0)
    return lse.sum(-1) - real.sum(-1)[:, None] * passes.value


def _check(
    query: Tensor, tree: Tree, rows: str, causal: bool, self_term: bool, mask: Tensor | None
) -> None:
    name = "dsf.hierarchical_attention_recurrence"
    if tree.n_leaf != query.shape[1]:
        raise DsfShapeError(
            f"{name}: tree: expected {query.shape[1]} leaves, one a token, got {tree.n_leaf}."
        )
    if rows not in ROWS or (rows == "free" and not causal):
        raise DsfValueError(
            f"{name}: rows: expected 'tied', or 'free' for causal=True, got {rows!r}, "
            f"causal={causal}."
        )
    if causal and not (self_term and tree.is_ordered):
        raise DsfValueError(
            f"{name}: causal: expected a self term (the first token sees nothing else) and a tree "
            f"whose nodes cover tokens without a gap, got self_term={self_term}, "
            f"is_ordered={tree.is_ordered}."
        )
    least = query.shape[1] if mask is None else int(mask.sum(-1).min())
    if not self_term and (least == 1 or query.shape[1] == 1):
        raise DsfValueError(f"{name}: self_term: expected True where a sequence has one token.")


def _leaves(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    q, k = query.transpose(1, 2), share_groups(key, query.shape[2]).transpose(1, 2)
    if mask is None:
        mask = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
    return q.to(dtype), k.to(dtype), mask


# -- the layer ---------------------------------------------------------------------------------


class GroupState(NamedTuple):
    """What `step` keeps: sums of keys and values of each group (batch, head, group, width).

    starts: the first token of every group; position: tokens seen.
    """

    key: Tensor
    value: Tensor
    starts: tuple[int, ...]
    position: int


class HierarchicalAttention(SequenceMixer):
    """Multi-head hierarchical attention over windows of windows, or any given tree.

    branching: sizes from top to bottom (16, 8, 4, 2 in the paper); `tree` of `recurrence` and
    `forward` replaces it. rows and self_term as in the recurrence; causal layers are to take
    rows="free", which alone do not look ahead. Source: Amizadeh et al. (2025).
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I (encoder), or merges of finished groups (0 and 1)", "B": "eₜ, or e_last",
        "C": "row t tied over the tree's groups", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ exp, over groups"
    source: ClassVar[str] = "Amizadeh et al. (2025), arXiv 2509.15448; causal free form derived"

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        branching: Sequence[int] = (16, 8, 4, 2),
        rows: str = "tied",
        causal: bool = False,
        self_term: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_divides("HierarchicalAttention", "n_head", n_head, "width", width)
        self.n_head, self.branching, self.rows = n_head, tuple(branching), rows
        self.is_causal, self.self_term = causal, self_term
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    @classmethod
    def small(cls, width: int) -> HierarchicalAttention:
        """Four heads, causal with free rows, windows of 2 and 6."""
        return cls(width, 4, branching=(2, 3, 2), rows="free", causal=True)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by head: (batch, time, head, width)."""
        q, k, v = (split_heads(f(x), self.n_head) for f in (self.query, self.key, self.value))
        return q, k, v

    def recurrence(
        self, x: Tensor, *, tree: Tree | None = None, key_mask: Tensor | None = None
    ) -> tuple[System, Tensor]:  # fmt: skip
        """The system of this tree and the values (batch, time, head, channel)."""
        q, k, v = self.project(x)
        tree = tree_from_branching(x.shape[1], self.branching) if tree is None else tree
        system = hierarchical_attention_recurrence(
            q, k, tree, rows=self.rows, causal=self.is_causal, self_term=self.self_term,
            key_mask=key_mask,
        )  # fmt: skip
        return system, v

    def forward(
        self, x: Tensor, *, tree: Tree | None = None, key_mask: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """(batch, time, width). key_mask (batch, time) is True for real tokens."""
        return self.readout(scan(*self.recurrence(x, tree=tree, key_mask=key_mask)), x)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads merged, output projection."""
        return self.out(merge_heads(y))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, GroupState]:
        """One token of the free-row form: finished windows are merged, then the token is added.

        Raises DsfUnsupportedError for tied rows, which need the tokens to come.
        """
        if self.rows != "free":
            raise DsfUnsupportedError(
                "dsf.HierarchicalAttention.step: rows: expected 'free', got 'tied', whose rows "
                "depend on later tokens of their groups."
            )
        x = x_t[:, None]
        q, k, v = (part.transpose(1, 2) for part in self.project(x))
        if state is None:
            state = GroupState(k[:, :, :0], v[:, :, :0], (), 0)
        t, window = state.position, 1
        for b in self.branching[:0:-1]:
            window *= b
            if t and t % window == 0:
                state = _merged(state, t - window)
        keys, values = torch.cat([state.key, k], 2), torch.cat([state.value, v], 2)
        starts = (*state.starts, t)
        ends = torch.tensor([*starts[1:], t + 1], dtype=k.dtype, device=k.device)
        n = ends - torch.tensor(starts, dtype=k.dtype, device=k.device)
        z = q.shape[-1] ** -0.5 * (q @ (keys / n[:, None]).mT) + n.log()
        y = (torch.softmax(z, -1) / n) @ values
        return self.readout(y.transpose(1, 2), x)[:, 0], GroupState(keys, values, starts, t + 1)


def _merged(state: GroupState, first: int) -> GroupState:
    """All groups from token `first` on made one."""
    at = state.starts.index(first)
    key, value = (torch.cat([z[:, :, :at], z[:, :, at:].sum(2, keepdim=True)], 2)
                  for z in (state.key, state.value))  # fmt: skip
    return GroupState(key, value, state.starts[: at + 1], state.position)


LAYER = HierarchicalAttention
