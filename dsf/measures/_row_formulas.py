"""Every quantity of a row that follows from its sums, by the name of its measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dsf.measures._row_totals import RowSums
from dsf.measures._rows import share


class Formula(NamedTuple):
    """What to make of the sums; whether it takes sums of |w|; whether scans can be enough."""

    of: Callable[[RowSums], Tensor]
    long_name: str
    units: str = "1"
    signed: bool = True
    scans: bool = True


def _spread(sums: RowSums) -> Tensor:
    return torch.sqrt(sums.squares / sums.count.clamp(min=1))


def _entropy(sums: RowSums) -> Tensor:
    total = sums.absolute.masked_fill(sums.absolute == 0, torch.nan)
    return (torch.log(total) - sums.log_moment / total).clamp(min=0)


def _participation(sums: RowSums) -> Tensor:
    # (l1 / l2)^2, not l1^2 / l2^2: less room is needed for small weights
    return share(sums.absolute, sums.power.sqrt()) ** 2


FORMULAS = {
    "row_sum": Formula(lambda s: s.count * s.mean, "sum of the weights of a row", signed=False),
    "spread": Formula(_spread, "spread of the weights of a row", signed=False),
    "scaled_spread": Formula(
        lambda s: s.count * _spread(s), "spread of the weights of a row times its keys",
        signed=False),
    "l1_mass": Formula(lambda s: s.absolute, "absolute weight of a row"),
    "negative_mass": Formula(
        lambda s: share(s.negative, s.absolute), "negative share of the absolute weight"),
    "negative_count_share": Formula(
        lambda s: share(s.n_negative, s.count), "share of the keys with negative weight"),
    "participation": Formula(_participation, "keys that take part in a row", "keys"),
    "first_token_share": Formula(
        lambda s: share(s.first, s.absolute), "share of the absolute weight on the first key"),
    "attention_distance": Formula(
        lambda s: share(s.distance, s.absolute), "mean distance of the absolute weight of a row",
        "step"),
    "entropy": Formula(
        _entropy, "entropy of the absolute weights of a row", "nat", scans=False),
    "perplexity": Formula(
        lambda s: torch.exp(_entropy(s)), "perplexity of the absolute weights of a row", "keys",
        scans=False),
}  # fmt: skip
