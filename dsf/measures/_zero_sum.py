"""ZeroS's radial rows from their logits and gates: w_tj = f_t(s_j), convex in the logit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsf.errors import DsfShapeError, DsfValueError
from dsf.measures._prefix_order import ranks_below


class RadialRows(NamedTuple):
    """(row, length) each, a row for every batch and head: logits from the first one on, gates,
    log sum_j e^{s_j}, mean of s_j and number n of the keys j that row t sees: those up to t, or
    all."""

    s: Tensor
    first: Tensor
    higher: Tensor
    zero: Tensor
    log_total: Tensor
    mean: Tensor
    t: Tensor

    def weight(self, s: Tensor) -> Tensor:
        """f_t(s) = gh (e^s / E_t - 1/n) + (g1 - gh)(s - mean_t)/n + g0/n."""
        bent = self.higher * (torch.exp(s - self.log_total) - 1 / self.t)
        return bent + ((self.first - self.higher) * (s - self.mean) + self.zero) / self.t

    def negative_ranks(self) -> tuple[Tensor, Tensor]:
        """Ranks [low, high) of the logits at which f_t < 0: one interval, as f_t is convex.

        Bisection on the ordered logits at both sides of the minimum, e^s = E_t (gh - g1)/(n gh).
        """
        ordered = self.s.sort(1).values
        fall = (self.higher - self.first).clamp(min=0)
        lowest = self.log_total + torch.log(fall / (self.t * self.higher))
        lowest = torch.where(fall > 0, lowest, -torch.inf)
        middle = ranks_below(ordered, lowest)
        end = torch.full_like(middle, ordered.shape[1])
        low = self._bisect(ordered, torch.zeros_like(middle), middle, negative=True)
        return low, self._bisect(ordered, middle, end, negative=False)

    def _bisect(self, ordered: Tensor, start: Tensor, stop: Tensor, *, negative: bool) -> Tensor:
        """The first rank of start..stop-1 whose weight is negative (or is not), else stop."""
        for _ in range(ordered.shape[1].bit_length()):
            at = (start + stop) // 2
            value = self.weight(torch.gather(ordered, 1, at.clamp(max=ordered.shape[1] - 1)))
            hit = (value < 0) == negative
            open_ = start < stop
            stop = torch.where(open_ & hit, at, stop)
            start = torch.where(open_ & ~hit, at + 1, start)
        return stop


def radial_rows(
    function: str,
    logits: Tensor,
    first: Tensor,
    higher: Tensor,
    zero: Tensor | None,
    *,
    causal: bool = True,
) -> RadialRows:
    """The rows in float64, checked. Raises DsfShapeError, DsfValueError with `function`."""
    zero = torch.zeros_like(logits) if zero is None else zero
    shape = tuple(logits.shape)
    for name, x in (("logits", logits), ("first_gate", first), ("higher_gate", higher),
                    ("zero_gate", zero)):  # fmt: skip
        if x.ndim != 3 or tuple(x.shape) != shape:
            raise DsfShapeError(
                f"{function}: {name}: expected axes (batch, time, head) = {shape}, got "
                f"{tuple(x.shape)}; the logits fix them."
            )
        if not bool(torch.isfinite(x).all()):
            raise DsfValueError(f"{function}: {name}: expected finite numbers, got NaN or inf.")
        if name in ("first_gate", "higher_gate") and bool((x < 0).any()):
            raise DsfValueError(
                f"{function}: {name}: expected gates of at least 0, got {float(x.min()):.3g}."
            )
    flat, first, higher, zero = (
        x.detach().to("cpu", torch.float64).transpose(1, 2).flatten(0, 1)
        for x in (logits, first, higher, zero)
    )
    s = flat - flat[:, :1]
    t = torch.arange(1, s.shape[1] + 1, dtype=s.dtype).expand(s.shape)
    total, mean = torch.logcumsumexp(s, 1), s.cumsum(1) / t
    if not causal:
        t, total, mean = (x[:, -1:].expand(s.shape) for x in (t, total, mean))
    return RadialRows(s, first, higher, zero, total, mean, t)
