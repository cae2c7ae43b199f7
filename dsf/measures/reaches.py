"""Which outputs can one head make of its values? How far is a target from that set?

With values v_1..v_n a softmax head reaches their convex hull and no more; weights that sum to 0
reach the span of differences, weights that sum to 1 the affine hull.
"""

from __future__ import annotations

import torch
import xarray as xr
from scipy.optimize import nnls
from torch import Tensor

from dsf.axes import to_numpy, to_xarray
from dsf.errors import DsfShapeError, DsfValueError
from dsf.measures._size_checks import require_copies
from dsf.shapes import Float

__all__ = ["distance_to_hull", "reach"]

SETS = {
    "convex": "weights >= 0 that sum to 1: a softmax head",
    "centred": "softmax weights minus 1/n: ZeroS with equal gates and no zero order",
    "zero_sum": "weights that sum to 0: ZeroS with different gates of first and higher order",
    "affine": "weights that sum to 1: the zero-sum span and one plain softmax head, or InLine",
    "span": "any weights: linear attention without normaliser",
}


def reach(values: Float[Tensor, "batch time head channel"], target: Tensor) -> xr.DataArray:
    """The distance of a target from what one head can output, for each kind of weights.

        d = min_w |sum_j w_j v_j - y|   over w >= 0, sum w = 1 (convex);   w = alpha - 1/n, alpha
        convex (centred);   sum w = 0 (zero_sum);   sum w = 1 (affine);   any w (span)

    values: what the head mixes, all of them visible to the query. target: y, (batch, head,
    channel).

    Returns (batch, head, system), `system` the kind of weights (attrs say which layers have them),
    in the units of the values; distances are exact up to rounding: below about 1e-14 of the
    largest value is 0. attrs `rank` are the dimensions of the zero-sum span.
    Cost a head: one SVD and one active-set least-squares problem of n x channel.
    Raises DsfShapeError and DsfValueError (no value, NaN).
    Source: ZeroS attention, Propositions 3.1, 3.3, Corollary 3.2 as corrected (it is the unequal
    gates that leave the convex set, not the missing zero order).
    """
    require_copies("reach", values)
    _check(values, target)
    found, ranks = [], []
    for batch in range(values.shape[0]):
        row = []
        for head in range(values.shape[2]):
            v, y = values[batch, :, head].double(), target[batch, head].double()
            centre = v.mean(0)
            row.append(torch.stack([
                distance_to_hull(v, y), distance_to_hull(v - centre, y), _to_span(v - centre, y),
                _to_span(v - centre, y - centre), _to_span(v, y),
            ]))  # fmt: skip
            ranks.append(int(torch.linalg.matrix_rank(v - centre)))
        found.append(torch.stack(row))
    return to_xarray(
        torch.stack(found), ("batch", "head", "system"), name="reach",
        coords={"system": list(SETS)},
        attrs={"units": "the values'", "long_name": "distance of a target from the reachable set",
               "method": "active-set least squares (hulls), SVD (spans), float64", "sets": SETS,
               "rank": ranks},
    )  # fmt: skip


def distance_to_hull(points: Float[Tensor, "time channel"], target: Tensor) -> Tensor:
    """The distance of `target` (channel,) from the convex hull of the rows of `points`.

    As a least-distance problem (Lawson and Hanson, 1974, chapter 23): x >= 0 that is nearest to
    [points - target; 1] x = [0; 1] is a multiple of the weights of the nearest point.
    """
    require_copies("distance_to_hull", points)
    moved = (points - target).double()
    scale = moved.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    system = torch.cat([moved.T / scale, torch.ones(1, len(points), dtype=torch.float64)])
    right = torch.zeros(system.shape[0], dtype=torch.float64)
    right[-1] = 1.0
    weights = torch.from_numpy(nnls(to_numpy(system), to_numpy(right))[0])
    return (weights @ moved / weights.sum()).norm()


def _to_span(rows: Tensor, target: Tensor) -> Tensor:
    """The distance of `target` from the span of `rows`, rank decided as `matrix_rank` does."""
    _, s, Vh = torch.linalg.svd(rows, full_matrices=False)
    kept = Vh[s > s[:1] * max(rows.shape) * torch.finfo(s.dtype).eps] if len(s) else Vh
    return (target - kept.T @ (kept @ target)).norm()


def _check(values: Tensor, target: Tensor) -> None:
    if values.shape[::2] != target.shape[:2] or values.shape[3] != target.shape[2]:
        raise DsfShapeError(
            f"dsf.reach: target: expected (batch={values.shape[0]}, head={values.shape[2]}, "
            f"channel={values.shape[3]}), got {tuple(target.shape)}; the values fix them."
        )
    if values.shape[1] == 0 or not bool(
        torch.isfinite(values).all() & torch.isfinite(target).all()
    ):
        raise DsfValueError(
            f"dsf.reach: values: expected at least one value and finite numbers, got "
            f"{values.shape[1]} values or NaN. A head that sees nothing reaches 0 alone."
        )


MEASURES = ()
