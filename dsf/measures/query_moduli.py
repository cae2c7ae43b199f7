"""How strongly do the weights of one row answer to a small change of its query?"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfValueError
from dsf.feature_maps import FeatureMap
from dsf.measures._size_checks import require_copies
from dsf.measures._verdicts import rounding_level
from dsf.measures._weight_functions import check_queries, jacobian_of, weight_function
from dsf.shapes import Float

__all__ = ["query_modulus"]

MEASURES = ()


def query_modulus(
    queries: Float[Tensor, "query _feature"],
    keys: Float[Tensor, "key feature"] | None = None,
    kind: str = "softmax",
    *,
    feature_map: str | FeatureMap = "identity",
    scale: float = 1.0,
    normalised: bool = True,
    function: Callable[[Tensor], Tensor] | None = None,
) -> xr.Dataset:
    """The smallest singular value of the Jacobian from each query to its weights.

        softmax  scale (diag(w) - w w^T) K           inline  scale P Phi Dphi,  P = I - 1 1^T / n
        linear   (I - w 1^T) Phi Dphi / (phi(q).sum_s phi(k_s))

    Dphi by automatic differentiation. Of anything else that makes weights out of a query, pass
    `function`, (feature) -> (key), differentiable, in place of keys: its Jacobian is taken by
    automatic differentiation.

    0 where a small change of the query leaves the weights alone (linear attention with a
    positively homogeneous phi: everywhere, along the query); 1/modulus bounds how much noise in
    the weights moves the decoded query. For softmax it falls to 0 as a row saturates, for InLine
    with phi = identity it is one number for all queries.

    Returns a Dataset over (query), in 1/query: `modulus`, `largest` (the largest singular value),
    `rounding` (what float64 adds to either: a modulus below it is not told from 0). Raises
    DsfValueError unless one of keys and function is given, DsfShapeError. Cost: one SVD of key x
    feature a query. Source: Han et al. (2024), Jacobians derived.
    """
    require_copies("query_modulus", queries, keys)
    if (keys is None) == (function is None):
        raise DsfValueError(
            "dsf.query_modulus: keys, function: expected one of them, got "
            f"{'neither' if keys is None else 'both'}."
        )
    q = queries.detach().double()
    if keys is not None:
        f = weight_function("dsf.query_modulus", kind, keys, feature_map, scale, normalised)
        q, jacobian = check_queries("dsf.query_modulus", q, f, 2), f.jacobian
        method = "singular values of the closed Jacobian"
    else:
        assert function is not None
        jacobian = functools.partial(jacobian_of, function)
        kind, method = "function", "singular values of the Jacobian by automatic differentiation"
    least, most = torch.zeros(len(q)).double(), torch.zeros(len(q)).double()
    for i, row in enumerate(q):
        J = jacobian(row)
        sigma = torch.linalg.svdvals(J.double())
        most[i] = sigma[0] if len(sigma) else 0.0
        least[i] = sigma[-1] if 0 < J.shape[1] <= J.shape[0] else 0.0
    meta = {"units": "1/query", "kind": kind, "method": method + ", float64",
            "gauge": "none: a function of the query", "space": "query"}  # fmt: skip

    def label(values: Tensor, name: str, text: str) -> xr.DataArray:
        return to_xarray(values, ("query",), name=name, attrs={**meta, "long_name": text})

    return xr.Dataset({
        "modulus": label(least, "modulus", "smallest answer of the weights to the query"),
        "largest": label(most, "largest", "largest answer of the weights to the query"),
        "rounding": label(rounding_level(most, q.shape[1]), "rounding", "effect of rounding"),
    })  # fmt: skip
