"""Sigmoid attention: every key weighed by itself, rows that do not sum to one."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from dsf.coefficient_forms import cache_form, refuse_beyond_scores, scales, shared_keys
from dsf.coefficients import CoefficientDynamics
from dsf.errors import DsfUnsupportedError
from dsf.factors import SoftmaxRows
from dsf.mixing_rows import MixingRows
from dsf.models._cached import CachedMixer, ScoredRows, cache_recurrence
from dsf.models._heads import check_query_key
from dsf.shapes import Bool, Float, Inexact
from dsf.transitions import Identity
from dsf.transitions._base import register
from dsf.wrappers import Bidirectional, System

SYSTEM = "sigmoid_attention"


@register
@dataclasses.dataclass(frozen=True)
class SigmoidRows(ScoredRows):
    """Rows w_tj = sigmoid(z_tj) of the logits that `scores` has, none stored.

    Where a key is not seen (causality, window, mask) the weight is exactly zero.
    """

    scores: SoftmaxRows

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """Only the asked entries are computed: a row needs no other key."""
        return torch.sigmoid(self.scores.logits(queries, keys))

    def time_slice(self, start: int, stop: int) -> SigmoidRows:
        """The rows of steps start..stop-1 over the same keys."""
        return SigmoidRows(self.scores.time_slice(start, stop))

    def shape_faults(self) -> list[str]:
        """Those of the logits."""
        return self.scores.shape_faults()


@cache_form.register
def sigmoid_form(rows: SigmoidRows) -> CoefficientDynamics:
    """A = I, b = scale, phi = sigmoid(. + offset), eta = 1. Raises DsfUnsupportedError."""
    scores = rows.scores
    refuse_beyond_scores(scores, bias=True)
    bias = scores.bias
    if bias is not None and bias.numel() > 1:
        raise DsfUnsupportedError(
            "dsf.coefficient_dynamics: system: expected one offset for all logits, got a bias of "
            f"shape {tuple(bias.shape)}."
        )
    return CoefficientDynamics(
        Identity(scores.query.shape[-1]), scales(scores), shared_keys(scores), scores.query,
        readout="sigmoid", offset=0.0 if bias is None else float(bias),
    )  # fmt: skip


def sigmoid_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    *,
    offset: float | None = None,
    bias: Float[Tensor, "#batch #head #time #time"] | None = None,
    key_mask: Bool[Tensor, "batch time"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> System:
    """Sigmoid attention over values (batch, time, head, channel), one state per token.

        A = I,   B_t = e_t,   C_t = sigmoid(scale q_t.k_j + offset + bias_tj),   D = 0

    offset is -log(time) unless given, so that a row of flat logits sums to about one; give it
    where the length changes. scale is width^(-1/2) unless given; the rest as in `SoftmaxRows`.
    Cost O(length^2 width), memory O(length width). Raises DsfShapeError. Source: Ramapuram et al.
    (2024), eq. 3.
    """
    check_query_key(f"dsf.{SYSTEM}_recurrence", query, key)
    offset = -math.log(max(query.shape[1], 1)) if offset is None else offset
    bias = query.new_full((1, 1, 1, 1), offset) if bias is None else bias + offset
    rows = SigmoidRows(SoftmaxRows(
        query, key, bias, key_mask, scale=scale, causal=causal, window=window))  # fmt: skip
    r = cache_recurrence(SYSTEM, rows)
    return r if causal else Bidirectional.from_rows(r)


class SigmoidAttention(CachedMixer):
    """Multi-head causal sigmoid attention with a fixed offset of -log(context).

    context is the length it is made for. Cost O(length^2 width); `step` O(cache). Source:
    Ramapuram et al. (2024), section 3.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I (one state per token)", "B": "eₜ", "C": "σ(qₜ·kⱼ/√d − log n), j ≤ t", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Ramapuram et al. (2024), arXiv 2409.04431, eq. 3"

    def __init__(
        self, width: int, n_head: int = 4, *, n_group: int | None = None, context: int = 2048,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(width, n_head, n_group=n_group, bias=bias)
        self.offset = -math.log(context)

    @classmethod
    def small(cls, width: int) -> SigmoidAttention:
        """Four heads, made for 64 tokens."""
        return cls(width, 4, context=64)

    def rows(self, x: Tensor, query: Tensor, seen: tuple[Tensor, ...], start: int) -> MixingRows:
        """Sigmoid rows."""
        bias = query.new_full((1, 1, 1, 1), self.offset)
        return SigmoidRows(SoftmaxRows(query, seen[0], bias, query_start=start))


LAYER = SigmoidAttention
