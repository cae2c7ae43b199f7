"""Forgetting attention (FoX): softmax attention whose logits fade by a learned forget gate."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.coefficient_forms import cache_form, refuse_beyond_scores, scales, shared_keys
from dsf.coefficients import CoefficientDynamics
from dsf.factors import SoftmaxRows
from dsf.mixing_rows import MixingRows
from dsf.models._cached import CachedMixer, cache_recurrence
from dsf.models._fading import faded, fading
from dsf.models._heads import check_query_key
from dsf.recurrence import Recurrence
from dsf.shapes import Float, Inexact
from dsf.transitions import DiagonalLowRank
from dsf.transitions._base import register

SYSTEM = "forgetting_attention"


@register
@dataclasses.dataclass(frozen=True)
class ForgettingRows(MixingRows):
    """Softmax rows with sum_{j < i <= t} log f_i added to logit (t, j), no map of it stored.

    `scores` has the logits, causal; log_decay = log f (batch, key, head), -inf where everything
    before is forgotten. The sums are differences of one cumulative sum in float64, zeros of f
    counted apart. Memory O(length) and a block of rows.
    """

    scores: SoftmaxRows
    log_decay: Tensor
    causal: ClassVar[bool] = True

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, key)."""
        return self.scores.shape

    @property
    def query_start(self) -> int:  # type: ignore[override]
        """Position of the first row."""
        return self.scores.query_start

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """Softmax over all keys of the asked rows, then the asked columns."""
        rows = range(*queries.indices(self.shape[1]))
        first = self.query_start
        bias = fading(self.log_decay, slice(first + rows.start, first + rows.stop))
        scores = self.scores.time_slice(rows.start, rows.stop)
        bias = bias.to(torch.promote_types(scores.query.dtype, torch.float32))
        return dataclasses.replace(scores, bias=bias).tile(slice(0, len(rows)), keys)

    def time_slice(self, start: int, stop: int) -> ForgettingRows:
        """The rows of steps start..stop-1 over the same keys."""
        return ForgettingRows(self.scores.time_slice(start, stop), self.log_decay)

    def shape_faults(self) -> list[str]:
        """Those of the logits, and one gate a key and head."""
        faults = self.scores.shape_faults()
        batch, _, head, _, key = self.shape
        if not faults and tuple(self.log_decay.shape) != (batch, key, head):
            faults = [
                f"C.log_decay: expected axes (batch={batch}, key={key}, head={head}), got "
                f"{tuple(self.log_decay.shape)}; query and key fix them."
            ]
        return faults


@cache_form.register
def forgetting_form(rows: ForgettingRows) -> CoefficientDynamics:
    """Two more coordinates carry the gates: q^ = [q; 1; 0], k^ = [b k; 0; 1], n + 2 in all.

    A_t = I with log f_t in entry (n + 1, n + 2), so that q^_t.x_t = b q_t.k_j + sum log f_i.
    Raises DsfValueError on a gate of zero, whose logarithm no finite matrix holds. Source:
    derived.
    """
    scores = rows.scores
    refuse_beyond_scores(scores)
    fade = faded(scores.query, shared_keys(scores), scales(scores), rows.log_decay)
    return CoefficientDynamics(
        DiagonalLowRank(torch.zeros_like(fade.query), left=fade.left, right=fade.right),
        torch.ones_like(scales(scores)), fade.key, fade.query, sink=scores.sink, readout="exp",
        sums_to_one=True,
    )  # fmt: skip


def forgetting_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    log_decay: Float[Tensor, "batch time head"],
    *,
    scale: float | None = None,
    window: int | None = None,
    sink: Float[Tensor, " head"] | None = None,
) -> Recurrence:
    """Forgetting attention over values (batch, time, head, channel), one state per token.

        A = I,   B_t = e_t,   C_t = softmax_j(scale q_t.k_j + sum_{j<i<=t} log f_i),   D = 0

    log_decay = log f <= 0; -inf at i hides every token before i. scale is width^(-1/2) unless
    given; window and sink as in `SoftmaxRows`; groups of keys serve consecutive heads. Cost
    O(length^2 width), memory O(length). Raises DsfShapeError. Source: Lin et al. (2025), eq. 7.
    """
    check_query_key(f"dsf.{SYSTEM}_recurrence", query, key)
    scores = SoftmaxRows(query, key, sink=sink, scale=scale, window=window)
    return cache_recurrence(SYSTEM, ForgettingRows(scores, log_decay))


class ForgettingAttention(CachedMixer):
    """The forgetting attention layer: no positions, log f_t = logsigmoid(W_f x_t + b) a head.

    Cost O(length^2 width); `step` O(cache). Source: Lin et al. (2025), section 3.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I (one state per token)", "B": "eₜ",
        "C": "softmaxⱼ(qₜ·kⱼ/√d + Σ log fᵢ), j < i ≤ t", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ exp"
    source: ClassVar[str] = "Lin et al. (2025), arXiv 2503.02130, eq. 7"

    def __init__(
        self, width: int, n_head: int = 4, *, n_group: int | None = None, bias: bool = False
    ) -> None:
        super().__init__(width, n_head, n_group=n_group, bias=bias)
        self.forget = nn.Linear(width, n_head)

    def seen(self, x: Tensor) -> tuple[Tensor, ...]:
        """Keys and log forget gates."""
        return (*super().seen(x), functional.logsigmoid(self.forget(x)))

    def rows(self, x: Tensor, query: Tensor, seen: tuple[Tensor, ...], start: int) -> MixingRows:
        """Fading softmax rows."""
        key, log_decay = seen
        return ForgettingRows(SoftmaxRows(query, key, query_start=start), log_decay)


LAYER = ForgettingAttention
