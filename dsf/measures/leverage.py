"""Which tokens does the similarity of a softmax head lean on?"""

from __future__ import annotations

import math

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfValueError
from dsf.measures._similarities import (
    Form,
    Gauge,
    Relative,
    Similarity,
    check_options,
    heads_of,
    prepared,
    rows_of,
    shifted,
    similarity,
)

__all__ = ["token_leverage"]


def token_leverage(
    system: Similarity,
    regularisation: float | int = 2.0**-8,
    *,
    relative_to: Relative = "norm",
    form: Form = "cross",
    gauge: Gauge = "as given",
    centre: bool = True,
) -> xr.Dataset:
    """The leverage score of every query and key: its share in the degrees of freedom.

        cross   l_t = sum_i |U_ti|^2 s_i/(s_i + lambda),  l_j = sum_i |V_ji|^2 s_i/(s_i + lambda)
        pooled  l_t = [G/J (G/J + lambda)^-1]_tt

    with K/sqrt(n m) = U diag(s) V^T, K = exp(scale q.k). Between 0 (others say the same) and 1
    (nothing else does); the cross scores of all queries, and those of all keys, add up to
    `degrees_of_freedom`; the pooled ones of both together do. lambda = regularisation times the
    largest value, their sum, or 1, by `relative_to` (NaN where it is below rounding). Tokens may
    be drawn in proportion.

    Returns a Dataset: `of_query` (batch, head, query), `of_key` (batch, head, key), NaN for masked
    keys. Arguments and errors as `degrees_of_freedom`, all tokens taken. Cost: O(length^3) a head,
    memory O(length^2), refused when it does not fit. Source: Bach (2017), section 4; cross form
    derived.
    """
    check_options("token_leverage", regularisation, form, gauge)
    if relative_to not in Relative.__args__:  # type: ignore[attr-defined]
        raise DsfValueError(
            f"dsf.token_leverage: relative_to: expected norm, trace or absolute, got "
            f"{relative_to!r}."
        )
    rows, attrs = rows_of(system, "token_leverage")
    batch, n_query, n_head = rows.shape[:3]
    found = {"of_query": torch.zeros(batch, n_head, n_query, dtype=torch.float64),
             "of_key": torch.full((batch, n_head, rows.n_key), math.nan).double()}  # fmt: skip
    for head in heads_of(rows, centre=centre):
        both = _scores(prepared(head, form, gauge, "token_leverage"), form, n_query,
                       regularisation, relative_to)  # fmt: skip
        found["of_query"][head.batch, head.head] = both[0]
        found["of_key"][head.batch, head.head, head.keys] = both[1]
    meta = {
        **attrs, "form": form, "gauge": gauge if form == "pooled" else "none: same in every one",
        "regularisation": regularisation, "relative_to": relative_to, "keys_centred": centre,
        "units": "1", "method": "singular vectors" if form == "cross" else "solve with G/J",
    }  # fmt: skip
    return xr.Dataset({
        name: to_xarray(x, ("batch", "head", name[3:]), name=name, attrs={
            **meta, "long_name": f"leverage score of a {name[3:]}"})
        for name, x in found.items()
    })  # fmt: skip


def _scores(
    vectors: tuple[Tensor, Tensor], form: Form, n_query: int, regularisation: float | int,
    relative_to: Relative,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores of queries and of keys."""
    K, top = similarity(*vectors, "token_leverage")
    if not K.numel():
        zero = K.new_zeros(K.shape[0] + K.shape[1])
        return zero[:n_query], zero[n_query:]
    if form == "pooled":
        s, U = torch.linalg.eigh(K)
        s, V = s.clamp(min=0), U
    else:
        U, s, Vh = torch.linalg.svd(K, full_matrices=False)
        V = Vh.mT
    size = {"norm": s.max(), "trace": s.sum()}.get(relative_to)
    level = shifted(regularisation, top, s) if size is None else regularisation * size
    share = s / (s + level)
    of_row, of_column = U.square() @ share, V.square() @ share
    if form == "pooled":
        return of_row[:n_query], of_row[n_query:]
    return of_row, of_column


MEASURES = (token_leverage,)
