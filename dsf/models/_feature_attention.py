"""Attention by features of queries and keys: its projections, and one step of its sums."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

from torch import Tensor, nn

from dsf.models._heads import check_divides, merge_heads, share_groups, split_heads
from dsf.models._kernel_features import guarded_sum
from dsf.models._mixer import SequenceMixer


class FeatureState(NamedTuple):
    """What `step` keeps: sum of phi(k) v^T (batch, head, feature, channel) and of phi(k)."""

    memory: Tensor
    key_sum: Tensor


class FeatureAttention(SequenceMixer):
    """Query, key and value by head; a subclass says which `features` of them a map is made of.

    n_group key-value heads serve n_head heads. `step` divides by phi(q_t).(sum of phi(k)) + eps
    if `normalise`, and costs feature x (channel + 1) a head, as much as its state.
    """

    normalise: bool = True
    eps: float = 0.0

    def __init__(
        self, width: int, n_head: int, *, n_group: int | None, causal: bool, gauge: str, bias: bool
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_divides(name, "n_head", n_head, "width", width)
        n_group = n_head if n_group is None else n_group
        check_divides(name, "n_group", n_group, "n_head", n_head)
        self.n_head, self.n_group = n_head, n_group
        self.is_causal, self.gauge = causal, gauge
        shared = width // n_head * n_group
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, shared, bias=bias)
        self.value = nn.Linear(width, shared, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    @abc.abstractmethod
    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """phi of the queries (batch, time, head, feature) and of the keys, by group."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query by head, key by group, value by head: (batch, time, head or group, width)."""
        q = split_heads(self.query(x), self.n_head)
        k = split_heads(self.key(x), self.n_group)
        v = split_heads(self.value(x), self.n_group)
        return q, k, share_groups(v, self.n_head)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads merged, output projection."""
        return self.out(merge_heads(y))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, FeatureState]:
        """One token: memory and key sum grow by its own, then its query reads them."""
        x = x_t[:, None]
        q, k, v = self.project(x)
        q, k = self.features(q, k)
        q, k, v = q[:, 0], share_groups(k, self.n_head)[:, 0], v[:, 0]
        memory, key_sum = k[..., None] * v[..., None, :], k
        if state is not None:
            memory, key_sum = memory + state.memory, key_sum + state.key_sum
        y = (q[..., None, :] @ memory).squeeze(-2)
        if self.normalise:
            y = y / guarded_sum((q * key_sum).sum(-1, keepdim=True), self.eps)
        return self.readout(y[:, None], x)[:, 0], FeatureState(memory, key_sum)
