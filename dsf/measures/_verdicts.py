"""Three-valued verdicts: yes and no are only said where rounding cannot have decided them."""

from __future__ import annotations

import torch
from torch import Tensor

YES, UNDECIDED, NO = 1, 0, -1
FLAGS = {"flag_values": "-1 0 1", "flag_meanings": "no undecided yes"}
"""attrs of every verdict (the CF convention for coded flags)."""

RANK_WORDS = {YES: "is full", UNDECIDED: "is at the edge of rounding", NO: "is short"}

NOISE = 4.0
"""Rounding of stored numbers moves a singular value by at most about this many units."""
BAND = 64.0
"""Numbers that a few operations made may be off by this many times more: undecided."""


def tolerances(dtype: torch.dtype, size: int, unit_roundoff: float | None) -> tuple[float, float]:
    """(low, high): margins up to low mean dependent, from high on independent.

    The margin is a singular value of a matrix whose `size` columns (or rows) have norm 1, each
    stored to a relative unit_roundoff; rounding moves it by at most unit_roundoff sqrt(size).
    """
    u = torch.finfo(dtype).eps / 2 if unit_roundoff is None else unit_roundoff
    low = NOISE * u * max(size, 1) ** 0.5
    return low, BAND * low


def decide(margin: Tensor, low: float, high: float) -> Tensor:
    """YES from `high` on, NO up to `low`, UNDECIDED between (and for NaN)."""
    verdict = torch.zeros_like(margin, dtype=torch.int8)
    return verdict.masked_fill(margin >= high, YES).masked_fill(margin <= low, NO)


def rounding_level(largest: Tensor, size: int) -> Tensor:
    """What float64 adds to each singular value of a matrix: 4 u sqrt(size) of the largest."""
    return largest * tolerances(torch.float64, size, None)[0]
