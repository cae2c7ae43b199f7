"""How strongly do the weights answer to a small change of the query?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfUnsupportedError
from dsf.factors import MixingRows, SoftmaxRows
from dsf.maps import system_attrs
from dsf.measures._judged_rows import (
    Division,
    check_system,
    division_of,
    one_rows,
    part_of,
    positions_of,
)
from dsf.measures._maps import precision_of, with_length
from dsf.measures._row_jacobians import rows_jacobian
from dsf.measures._size_checks import require_states
from dsf.measures._softmax_queries import softmax_jacobian
from dsf.measures._state_queries import reach_at, real_map
from dsf.measures._verdicts import tolerances
from dsf.wrappers import Gated, System, core

__all__ = ["local_modulus"]


def local_modulus(
    system: System,
    positions: Sequence[int] | str | None = None,
    *,
    normalised: bool | None = None,
    length: int | None = None,
) -> xr.DataArray:
    """The smallest singular value of the Jacobian from the query to its weights, where it is.

        softmax  J = scale (diag(w) - w w^T) K          finite state  J = R_t^T
        divided  J = (I - w 1^T) R_t^T / sum,  w the row (rows divided by their sum)

    Other rows that are made from queries (sigmoid, ZeroS, reflected keys, ...): by automatic
    differentiation of the row in its query, in its own dtype.

    The continuous form of the injectivity verdict: 0 where some small change of the query leaves
    the weights alone, its inverse the sensitivity of the query to noise in the weights. For
    softmax it falls to 0 as rows saturate. For a finite state the query is the output row C_t,
    in the gauge that attrs name.

    positions, normalised and length as in `injectivity`. Returns (batch, head, query), in 1 /
    units of the query, with a coordinate `rounding` of the same axes: what rounding adds, so that
    a value below it is not told from 0 (in float64, more where the row itself was made in less).
    NaN where a row is divided by a sum of 0. Raises DsfUnsupportedError for rows that are given,
    not made from queries.
    Cost: one SVD of keys x width (or states) a batch, head and position. Source: Han et al.
    (2024), with the Jacobians derived for each form.
    """
    require_states("local_modulus", system)
    check_system("dsf.local_modulus", system)
    system = with_length(system, length)
    inner = system.system if isinstance(system, Gated) else system
    r = core(inner)
    batch, _, head = r.lead_shape()
    chosen = positions_of("dsf.local_modulus", positions, max(r.length, 1))
    divided = division_of(inner, normalised)
    values, rounding = torch.zeros(2, batch, head, len(chosen), dtype=torch.float64)
    for i, t in enumerate(chosen):
        for (b, h), J in _jacobians(inner, t, divided):
            if not bool(J.isfinite().all()):  # divided by a sum of 0: no weights here
                values[b, h, i] = torch.nan
                continue
            sigma = torch.linalg.svdvals(J)
            values[b, h, i] = sigma[-1] if J.shape[0] >= J.shape[1] else 0.0
            low, _ = tolerances(J.dtype, J.shape[1], None)
            rounding[b, h, i] = low * float(sigma[0]) if len(sigma) else 0.0
    return to_xarray(
        values, ("batch", "head", "query"), name="local_modulus",
        coords={"query": ("query", np.array(chosen)),
                "rounding": (("batch", "head", "query"), rounding.numpy())},
        attrs={**system_attrs(system), "method": "singular values of the Jacobian in float64",
               "precision": precision_of(r), "units": "1/query",
               "space": "query" if isinstance(r.C, MixingRows) else "output row C_t",
               "long_name": "smallest answer of the weights to a change of the query"},
    )  # fmt: skip


def _jacobians(system: System, position: int, divided: Division) -> list:
    """((batch, head), J (key, feature)) of every row at a position."""
    r = core(system)
    batch, _, head = r.lead_shape()
    index = [(b, h) for b in range(batch) for h in range(head)]
    if isinstance(r.C, MixingRows) and not one_rows(system):
        raise DsfUnsupportedError(
            "dsf.local_modulus: system: expected both directions to read the same rows, got two "
            "maps. Measure system.causal and system.anticausal."
        )
    if isinstance(r.C, SoftmaxRows):
        part = part_of(system)
        return [((b, h), softmax_jacobian(r.C, b, h, position, part=part)) for b, h in index]
    if isinstance(r.C, MixingRows):
        part = part_of(system)
        return [((b, h), rows_jacobian(r.C, b, h, position, part=part)) for b, h in index]
    R, c = real_map(r, *reach_at(system, position))
    return [((b, h), _divided(R[b, h], c[b, h]) if divided[b][h] else R[b, h].T) for b, h in index]


def _divided(R: Tensor, c: Tensor) -> Tensor:
    """Jacobian of c R / (c R 1)."""
    weights = c @ R
    total = weights.sum()
    return (R - R.sum(-1, keepdim=True) * (weights / total)).T / total


MEASURES = (local_modulus,)
