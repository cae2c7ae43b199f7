"""How far is a kernel of features from the similarity, and how far could it be?"""

from __future__ import annotations

import math

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfShapeError, DsfValueError
from dsf.measures._size_checks import require_copies
from dsf.shapes import Float

__all__ = ["feature_error", "feature_row_error", "features_for_accuracy"]


def feature_error(
    similarity: Float[Tensor, "*lead point point"],
    approximation: Float[Tensor, "*lead point point"],
    regularisation: float | int,
    *,
    probability: Float[Tensor, " point"] | None = None,
    value: Float[Tensor, "*lead point"] | None = None,
    smoothness: float = 0.0,
    n_feature: int | None = None,
) -> xr.Dataset:
    """Measured errors of a feature kernel beside their bounds, in L2 of the points.

        D = (S + lambda)^-1/2 (S - S^) (S + lambda)^-1/2,    t = |D|
        (i')  |K - K^|^2 <= t (|S| + lambda)(tr S + tr S^)
        (ii') |(S^ - S) v|^2 <= t^2 (|S| + lambda)^(2(1 - alpha)) |h|^2,  v = (S + lambda)^-alpha h

    K (`similarity`) and K^ (`approximation`) symmetric at the same points, positive up to
    rounding; S = W^1/2 K W^1/2, W the points' `probability` (equal by default). `value` is v, one
    value channel at the points, and `smoothness` alpha in [0, 1/2]. The bounds hold for every
    pair of matrices with |D| = t; they replace the published displays, which are unknown.

    Returns a Dataset over the leading axes (batch, head): `operator_error` t; `kernel_error` and
    `kernel_bound` (left and right of (i'), squared); `value_error` and `value_bound` (of (ii'));
    `best_possible`, sum_(i > n_feature) mu_i^2, below which no kernel of so many features comes
    (Eckart and Young). Raises DsfValueError, DsfShapeError. Cost: O(point^3). Source: derived from
    Nishikawa et al. (2025), theorem 3.
    """
    require_copies("feature_error", similarity, approximation)
    _check(similarity, approximation, regularisation, smoothness)
    n = similarity.shape[-1]
    p = torch.full((n,), 1 / max(n, 1)).double() if probability is None else probability.double()
    root = p.sqrt().to(similarity.device)
    S, S_hat = (root[:, None] * x.double() * root for x in (similarity, approximation))
    mu, U = torch.linalg.eigh((S + S.mT) / 2)
    mu = mu.clamp(min=0)
    shifted = mu + regularisation
    whitener = (U / shifted.sqrt()[..., None, :]) @ U.mT
    t = torch.linalg.matrix_norm(whitener @ (S - S_hat) @ whitener, ord=2)
    top = shifted.amax(-1)
    found = {
        "operator_error": t,
        "kernel_error": (S - S_hat).square().sum((-2, -1)),
        "kernel_bound": t * top * (mu.sum(-1) + S_hat.diagonal(dim1=-2, dim2=-1).sum(-1)),
    }
    if value is not None:
        v = root * value.double()
        h = (U * shifted[..., None, :] ** smoothness) @ (U.mT @ v[..., None])
        found["value_error"] = ((S_hat - S) @ v[..., None]).square().sum((-2, -1))
        found["value_bound"] = (
            t**2 * top ** (2 * (1 - smoothness)) * h.square().sum((-2, -1)))  # fmt: skip
    if n_feature is not None:
        found["best_possible"] = mu.flip(-1)[..., n_feature:].square().sum(-1)
    dims = ("batch", "head")[2 - t.ndim :] if t.ndim <= 2 else None
    if dims is None:
        raise DsfShapeError(
            f"dsf.feature_error: similarity: expected at most (batch, head) before the points, "
            f"got {tuple(similarity.shape)}."
        )
    meta = {"units": "1", "regularisation": regularisation, "smoothness": smoothness,
            "precision": "float64",
            "method": "eigenvalues of the kernel at all points"}  # fmt: skip
    return xr.Dataset({name: to_xarray(x, dims, name=name, attrs=meta)
                       for name, x in found.items()})  # fmt: skip


def feature_row_error(
    similarity: Float[Tensor, "*lead query key"], approximation: Float[Tensor, "*lead query key"]
) -> xr.Dataset:
    """How far normalised rows are from the true ones, beside what the pointwise error allows.

        sum_j |p^_tj - p_tj| <= 2 e_t/(1 - e_t),    e_t = max_j |K^_tj - K_tj|/K_tj < 1

    p, p^: rows of K > 0 and K^ divided by their sums; keys with K = 0 (masked) must have K^ = 0
    too. An L2 error of the kernel alone bounds no row. Returns a Dataset over ([batch, head,]
    query): `row_error`, `row_bound` (inf from e = 1 on), `pointwise` e, and in nats the published
    row loss `cross_entropy` -sum_j p ln p^, least at the `entropy` of p (NaN where K^ is
    negative). Cost: O(query key). Source: Nishikawa et al. (2025), section 4; bound derived.
    """
    require_copies("feature_row_error", similarity, approximation)
    if similarity.shape != approximation.shape or not 2 <= similarity.ndim <= 4:
        raise DsfShapeError(
            f"dsf.feature_row_error: approximation: expected the axes of similarity "
            f"{tuple(similarity.shape)}, ([batch, head,] query, key), got "
            f"{tuple(approximation.shape)}."
        )
    K, K_hat = similarity.double(), approximation.double()
    if bool((K < 0).any()) or bool(((K == 0) & (K_hat != 0)).any()):
        raise DsfValueError(
            "dsf.feature_row_error: similarity: expected no negative number, and approximation 0 "
            "where it is 0."
        )
    e = torch.where(K > 0, (K_hat - K).abs() / torch.where(K > 0, K, 1.0), 0.0).amax(-1)
    rows = [x / torch.where(x.sum(-1) == 0, 1.0, x.sum(-1))[..., None] for x in (K, K_hat)]
    found = {
        "row_error": (rows[1] - rows[0]).abs().sum(-1),
        "row_bound": torch.where(e < 1, 2 * e / (1 - e).clamp(min=1e-300), math.inf),
        "pointwise": e,
        "cross_entropy": -torch.xlogy(rows[0], rows[1]).sum(-1),
        "entropy": -torch.xlogy(rows[0], rows[0]).sum(-1),
    }
    dims = (*("batch", "head")[4 - K.ndim :], "query")
    meta = {"units": "1", "precision": "float64", "method": "l1 distance of normalised rows"}
    return xr.Dataset({name: to_xarray(x, dims, name=name, attrs=meta)
                       for name, x in found.items()})  # fmt: skip


def features_for_accuracy(freedom: float | int, accuracy: float | int, failure: float) -> int:
    """The number of features that leaves |D| <= t with probability 1 - delta.

        M = ceil((4 N/t^2) ln(64 N/(delta t)))

    freedom N: the largest leverage over the sampling density, N_(q, lambda): the degrees of
    freedom where directions are drawn by leverage. accuracy t in (0, 3], failure delta in (0, 1).
    The printed 4 N/t is too few for small t (it fails almost always at t = 0.01). Plain Gaussian
    directions have N = inf. Raises DsfValueError. Source: Nishikawa et al. (2025), theorem 3,
    corrected.
    """
    if not (freedom > 0 and math.isfinite(freedom) and 0 < accuracy <= 3 and 0 < failure < 1):
        raise DsfValueError(
            f"dsf.features_for_accuracy: expected finite freedom > 0, accuracy in (0, 3] and "
            f"failure in (0, 1), got {freedom}, {accuracy}, {failure}."
        )
    return math.ceil(4 * freedom / accuracy**2 * math.log(64 * freedom / (failure * accuracy)))


def _check(K: Tensor, K_hat: Tensor, regularisation: float | int, smoothness: float) -> None:
    if K.shape != K_hat.shape or K.ndim < 2 or K.shape[-1] != K.shape[-2]:
        raise DsfShapeError(
            f"dsf.feature_error: approximation: expected the axes of similarity "
            f"{tuple(K.shape)}, ([batch, head,] point, point), got {tuple(K_hat.shape)}."
        )
    if not regularisation > 0 or not 0 <= smoothness <= 0.5:
        raise DsfValueError(
            f"dsf.feature_error: expected regularisation > 0 and smoothness in [0, 0.5], got "
            f"{regularisation} and {smoothness}."
        )


MEASURES = ()
