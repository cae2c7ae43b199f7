"""The Jacobian of any row that is made from a query, by automatic differentiation."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dsf.errors import DsfUnsupportedError
from dsf.measures._softmax_queries import in_part
from dsf.measures._weight_functions import jacobian_of
from dsf.mixing_rows import MixingRows, Part


def rows_jacobian(rows: MixingRows, batch: int, head: int, position: int, *, part: Part) -> Tensor:
    """d weights / d query (key, feature) of one row, the keys and all else held.

    Raises DsfUnsupportedError for rows that hold no query.
    """
    one = rows.time_slice(position, position + 1)
    query = _query_of(one)
    if query is None:
        raise DsfUnsupportedError(
            f"dsf.local_modulus: system: expected rows made from a query they hold, or a finite "
            f"state, got {type(rows).__name__}, whose rows are given. `query_modulus` takes the "
            f"weights as a function of the query."
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    own = query.detach().to(dtype)
    b = batch if own.shape[0] > 1 else 0
    hit = torch.zeros_like(own, dtype=torch.bool)
    hit[b, 0, head] = True

    def row(x: Tensor) -> Tensor:
        changed = _with_query(one, torch.where(hit, x, own))
        return changed.tile(slice(0, 1), slice(0, rows.n_key))[b, head, 0]

    jacobian = jacobian_of(row, own[b, 0, head])
    return jacobian.masked_fill(~in_part(rows, position, part, jacobian.device)[:, None], 0)


def _query_of(rows: Any) -> Tensor | None:
    """The query (batch, 1, head, feature) that one row holds, itself or in what it scores by."""
    query = getattr(rows, "query", None)
    if isinstance(query, Tensor) and query.ndim == 4 and query.shape[1] == 1:
        return query
    inner = _inner(rows)
    return None if inner is None else _query_of(getattr(rows, inner))


def _with_query(rows: Any, query: Tensor) -> Any:
    if isinstance(getattr(rows, "query", None), Tensor):
        return dataclasses.replace(rows, query=query)
    inner = _inner(rows)
    assert inner is not None
    return dataclasses.replace(rows, **{inner: _with_query(getattr(rows, inner), query)})


def _inner(rows: Any) -> str | None:
    """The field that holds other rows."""
    names = [f.name for f in dataclasses.fields(rows)]
    return next((n for n in names if isinstance(getattr(rows, n), MixingRows)), None)
