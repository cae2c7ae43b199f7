"""ZeroS-SM: softmax attention whose orders are reweighted, so that rows sum to zero."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.errors import DsfShapeError, DsfUnsupportedError
from dsf.factors import SoftmaxRows
from dsf.models._cached import CachedMixer, CacheState, ScoredRows, cache_recurrence
from dsf.models._heads import check_query_key
from dsf.shapes import Bool, Float, Inexact
from dsf.transitions._base import register
from dsf.wrappers import Bidirectional, System

SYSTEM = "zeros_softmax"


@register
@dataclasses.dataclass(frozen=True)
class ZeroSumRows(ScoredRows):
    """Rows of softmax with its orders reweighted, none stored; they sum to the zero gate.

        r_tj = g1_t d_tj / n_t + gh_t (p_tj - 1/n_t - d_tj / n_t) + g0_t / n_t

    p is the softmax of the logits z that `scores` has (no sink), d_tj = z_tj - their mean over
    the n_t keys seen. Gates (batch, time, head); zero_gate None is 0. A row without any key is
    zero.
    """

    scores: SoftmaxRows
    first_gate: Tensor
    higher_gate: Tensor
    zero_gate: Tensor | None = None

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """All logits of the asked rows, then the asked columns."""
        z = self.scores.logits(queries, slice(0, self.n_key))
        hidden = z == -torch.inf
        z = z.masked_fill(hidden, 0.0)
        count = (~hidden).sum(-1, keepdim=True).clamp(min=1).to(z.dtype)
        deviation = (z - z.sum(-1, keepdim=True) / count).masked_fill(hidden, 0.0) / count
        p = torch.softmax(z.masked_fill(hidden & ~hidden.all(-1, keepdim=True), -torch.inf), -1)
        first, higher = (
            g[:, queries].transpose(1, 2)[..., None] for g in (self.first_gate, self.higher_gate)
        )
        weights = first * deviation + higher * (p - 1 / count - deviation)
        if self.zero_gate is not None:
            weights = weights + self.zero_gate[:, queries].transpose(1, 2)[..., None] / count
        return weights.masked_fill(hidden, 0.0)[..., keys]

    def time_slice(self, start: int, stop: int) -> ZeroSumRows:
        """The rows of steps start..stop-1 over the same keys."""
        zero = None if self.zero_gate is None else self.zero_gate[:, start:stop]
        return ZeroSumRows(
            self.scores.time_slice(start, stop), self.first_gate[:, start:stop],
            self.higher_gate[:, start:stop], zero,
        )  # fmt: skip

    def shape_faults(self) -> list[str]:
        """Those of the logits, and one gate a query and head."""
        faults = self.scores.shape_faults()
        batch, time, head, _, _ = self.shape
        for name in ("first_gate", "higher_gate", "zero_gate"):
            gate = getattr(self, name)
            if not faults and gate is not None and tuple(gate.shape) != (batch, time, head):
                faults = [
                    f"C.{name}: expected axes (batch={batch}, time={time}, head={head}), got "
                    f"{tuple(gate.shape)}; query and key fix them."
                ]
        return faults


def zeros_softmax_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    first_gate: Float[Tensor, "batch time head"],
    higher_gate: Float[Tensor, "batch time head"],
    zero_gate: Float[Tensor, "batch time head"] | None = None,
    *,
    causal: bool = True,
    key_mask: Bool[Tensor, "batch time"] | None = None,
    scale: float | None = None,
) -> System:
    """ZeroS-SM over values (batch, time, head, channel), one state per token.

        A = I,   B_t = e_t,   C_t = r_t,   D = 0,   r_tj = g1_t d_tj / n_t + gh_t (p_tj - 1/n_t
        - d_tj / n_t) + g0_t / n_t

    with p the softmax of z_tj = scale q_t.k_j, d_tj = z_tj - its mean over the n_t keys seen:
    the zero-sum weights of ZeroS on ordinary logits. Gates are numbers (after sigmoid or tanh);
    without the zero order every row sums to zero. scale is width^(-1/2) unless given. Cost
    O(length^2 width), memory O(length width). Raises DsfShapeError. Source: Lu et al. (2025),
    which names the variant; its details are not public, and this is the same reweighting applied
    to the logits of softmax attention, without an angular factor.
    """
    check_query_key(f"dsf.{SYSTEM}_recurrence", query, key)
    scores = SoftmaxRows(query, key, key_mask=key_mask, scale=scale, causal=causal)
    rows = ZeroSumRows(scores, first_gate, higher_gate, zero_gate)
    if faults := rows.shape_faults():
        raise DsfShapeError(f"dsf.{SYSTEM}_recurrence: " + "\n  ".join(faults))
    r = cache_recurrence(SYSTEM, rows)
    return r if causal else Bidirectional.from_rows(r)


class ZerosSoftmax(CachedMixer):
    """Multi-head ZeroS-SM: sigmoid gates g1, gh (and tanh g0 with zero_order), a pair a head.

    token_gates makes them from the token, as ZeroS does, instead of one learned pair a head (0 at
    the start: both gates 1/2). Cost O(length^2 width); `step` O(cache). Source: see
    `zeros_softmax_recurrence`.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I (one state per token)", "B": "eₜ",
        "C": "g₁ₜdₜⱼ/t + gₕₜ(pₜⱼ − 1/t − dₜⱼ/t), p = softmaxⱼ(qₜ·kⱼ/√d)", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ exp; rows sum to 0"
    source: ClassVar[str] = "Lu et al. (2025), ZeroS-SM; details derived"

    def __init__(
        self, width: int, n_head: int = 4, *, n_group: int | None = None, causal: bool = True,
        token_gates: bool = False, zero_order: bool = False, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(width, n_head, n_group=n_group, bias=bias)
        self.is_causal, self.n_order = causal, 3 if zero_order else 2
        size = n_head * self.n_order
        self.gate = nn.Linear(width, size) if token_gates else None
        self.gate_logits = None if token_gates else nn.Parameter(torch.zeros(size))

    def gates(self, x: Tensor) -> list[Tensor]:
        """First, higher and, with zero_order, zero gate, (batch, time, head) each."""
        logits = self.gate_logits if self.gate is None else self.gate(x)
        assert logits is not None
        logits = logits.expand(*x.shape[:2], -1).unflatten(-1, (self.n_head, self.n_order))
        first, higher, *zero = logits.unbind(-1)
        return [torch.sigmoid(first), torch.sigmoid(higher), *map(torch.tanh, zero)]

    def rows(self, x: Tensor, query: Tensor, seen: tuple[Tensor, ...], start: int) -> ZeroSumRows:
        """The softmax logits of these queries, reweighted by the gates of their tokens."""
        scores = SoftmaxRows(query, seen[0], causal=self.is_causal, query_start=start)
        return ZeroSumRows(scores, *self.gates(x))

    def recurrence(self, x: Tensor) -> tuple[System, Tensor]:
        """The cache system and the values (batch, time, head, channel)."""
        r, values = super().recurrence(x)
        return r if self.is_causal else Bidirectional.from_rows(r), values

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, CacheState]:
        """One token against the cache. Raises DsfUnsupportedError for a layer that looks ahead."""
        if not self.is_causal:
            raise DsfUnsupportedError(
                "dsf.ZerosSoftmax.step: causal: expected a causal layer, got causal=False."
            )
        return super().step(x_t, state)


LAYER = ZerosSoftmax
