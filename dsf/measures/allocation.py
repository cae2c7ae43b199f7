"""How should a budget of features be spread over layers and heads?"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfValueError

__all__ = ["feature_allocation"]


def feature_allocation(
    freedom: xr.DataArray | Tensor,
    budget: float | int,
    *,
    keep_budget: bool = False,
    per_head: bool = False,
    cap: int | None = None,
) -> xr.DataArray:
    """Feature counts in proportion to degrees of freedom: M_s = round(C N_s / mean_s N_s).

    freedom: N, (layer,) or (layer, head), for instance `degrees_of_freedom` of all layers stacked;
    a layer's value is its largest head (as published: all heads of a layer share M_s), or with
    `per_head` each head has its own. budget: C, the mean count. `cap` bounds every count from
    above after that, as the paper's clipped variant does (at the width of a head); what it takes
    off is not spread again.

    The published rounding (half to even) may miss the budget by half a feature a layer.
    `keep_budget` rounds down and gives what is left to the largest remainders (ties to the
    earlier), so that the sum is round(C times the number of counts) exactly.

    Returns (layer,) or (layer, head) in features, at least 0; attrs: `mean` after rounding,
    `exact_mean`, the mean before it. Raises DsfValueError on negative, non-finite or all-zero N.
    Source: Nishikawa et al. (2025), algorithm 1.
    """
    N = np.asarray(freedom.detach().cpu() if isinstance(freedom, Tensor) else freedom.values)
    N = N.astype(np.float64)
    if N.ndim not in (1, 2) or not N.size or not np.isfinite(N).all() or (N < 0).any():
        raise DsfValueError(
            f"dsf.feature_allocation: freedom: expected finite numbers >= 0 over (layer,) or "
            f"(layer, head), got shape {N.shape}, smallest {N.min() if N.size else 'none'}."
        )
    if not budget > 0 or N.sum() == 0:
        raise DsfValueError(
            f"dsf.feature_allocation: budget: expected above 0 and some degree of freedom, got "
            f"budget {budget}, sum {N.sum()}."
        )
    if N.ndim == 2 and not per_head:
        N = N.max(1)
    exact = budget * N / N.mean()
    counts = _to_sum(exact, round(budget * N.size)) if keep_budget else np.rint(exact)
    counts = counts.astype(np.int64)
    if cap is not None:
        counts = np.minimum(counts, cap)
    return to_xarray(
        torch.from_numpy(counts), ("layer", "head")[: N.ndim], name="feature_allocation",
        attrs={"units": "1", "budget": budget, "mean": float(counts.mean()),
               "exact_mean": float(exact.mean()), "cap": cap, "precision": "float64",
               "method": "largest remainders" if keep_budget else "rounded to nearest",
               "long_name": "number of features"},
    )  # fmt: skip


def _to_sum(exact: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers nearest to `exact` with the given sum."""
    floor = np.floor(exact)
    left = total - int(floor.sum())
    order = np.argsort(floor - exact, axis=None, kind="stable")  # stable: ties go to the earlier
    counts = floor.ravel()
    counts[order[:left]] += 1
    return counts.reshape(exact.shape)


MEASURES = ()
