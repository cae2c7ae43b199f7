"""A shift register as a short convolution: one product per lag instead of one step per token.

y_t = sum_d (C_t S^d B_{t-d}) u_{t-d} + C_t S^t h_0,    S^d = 0 for d >= n / amount
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsf.transitions._base import mm
from dsf.transitions.shift import Shift


def scan_shift(
    A: Shift, B: Tensor, C: Tensor, values: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and final state, O(length * lags * (state + channel)); coefficients may vary.

    Later values meet no product that an earlier output takes part in, so NaN cannot leak back.
    """
    length, n = values.shape[1], A.n_state
    if length == 0:
        return values.new_zeros(*values.shape[:3], C.shape[-2], values.shape[-1]), state
    lags = min(-(-n // A.amount), length)

    def moved(steps: int) -> Shift:
        return Shift(n, A.amount * steps)

    def last(x: Tensor, lag: int) -> Tensor:
        return x[:, -1 - lag if x.shape[1] > 1 else 0]

    head = torch.stack([moved(t + 1).apply(state) for t in range(lags)], 1)
    y = pad(mm(C[:, :lags], head), (0, 0) * 3 + (0, length - lags))
    end = moved(length).apply(state)
    for d in range(lags):
        kept = max(n - d * A.amount, 0)
        late = C[:, d:] if C.shape[1] > 1 else C
        early = B[:, : length - d] if B.shape[1] > 1 else B
        weight = mm(late[..., n - kept :], early[..., :kept, :])
        y = y + pad(mm(weight, values[:, : length - d]), (0, 0) * 3 + (d, 0))
        end = end + moved(d).apply(mm(last(B, d), last(values, d)))
    return y, end
