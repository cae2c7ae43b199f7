"""How does the state grow with the order of a Taylor expansion of softmax, and what is gained?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfValueError
from dsf.factors import SoftmaxRows
from dsf.measures._similarities import Head, Similarity, heads_of, rows_of
from dsf.memory import require_memory

__all__ = ["taylor_growth"]

ORDERS = (1, 2, 3, 4, 6, 8)
_TILE = 2**21  # weights of a tile in float64: 16 MiB
_TEXTS = {
    "n_state": "features of the expansion: states a value channel",
    "pointwise_error": "largest relative error of the expanded exponential over the pairs seen",
    "pointwise_bound": "what the remainder allows for it",
    "row_error": "largest l1 distance of a row from the softmax row",
    "row_bound": "what the pointwise error allows for it",
}


def taylor_growth(
    system: Similarity, orders: Sequence[int] = ORDERS, *, centre: bool = True
) -> xr.Dataset:
    """States and errors of linear attention whose features expand exp(x) to order P.

        n_state = C(width + P, P),    T_P(x) = sum_{p<=P} x^p / p!,    x_tj = scale q_t.k_j
        |T_P(x)/e^x - 1| <= e^max(-x, 0) |x|^(P+1)/(P+1)! = e_tj,
        sum_j |p^_tj - p_tj| <= 2 e_t/(1 - e_t),    e_t = max_j e_tj

    with p^ the rows of T_P(x), p those of e^x, over the keys that causality, window and key mask
    leave; bias and sink do not enter (attrs `left_out`). The state grows as a power of the order
    and the error falls only once P exceeds the largest |x|: of odd orders rows may come near a
    sum of zero. Keys are centred unless centre=False: a shift of all keys is not noticed by
    softmax, and brings logits nearer to zero.

    Arguments as `degrees_of_freedom`; orders: P, at least 0 each. Returns a Dataset (batch, head,
    order): `n_state`, `pointwise_error`, `pointwise_bound` (inf where it overflows), `row_error`
    (inf where a row of T_P sums to zero), `row_bound` (inf from e = 1 on), each the largest over
    rows, 0 without any key. Raises DsfTypeError on systems without queries and keys,
    DsfUnsupportedError on capped logits, DsfValueError, DsfMemoryError. Cost: O(length^2 x (width
    + orders)) time a head, memory O(length). Source: Sieber et al. (2024), Lemma 1; remainder by
    Lagrange, the bound of rows derived.
    """
    chosen = sorted({int(p) for p in orders})
    if not chosen or chosen[0] < 0:
        raise DsfValueError(
            f"dsf.taylor_growth: orders: expected whole numbers of at least 0, got {list(orders)}."
        )
    rows, attrs = rows_of(system, "taylor_growth")
    require_memory(
        "dsf.taylor_growth", "row of logits", ("order", "key"), (len(chosen) + 4, rows.n_key),
        torch.float64, advice="Measure fewer keys.",
    )  # fmt: skip
    shape = (rows.shape[0], rows.shape[2], len(chosen))
    found = {name: torch.zeros(shape, dtype=torch.float64) for name in _TEXTS}
    for head in heads_of(rows, centre=centre):
        at = head.batch, head.head
        found["n_state"][at] = torch.tensor(
            [math.comb(head.query.shape[1] + p, p) for p in chosen], dtype=torch.float64
        )
        for x, seen in _tiles(rows, head):
            for name, values in _errors(x, seen, chosen).items():
                found[name][at] = torch.maximum(found[name][at], values)
    e = found["pointwise_bound"]
    found["row_bound"] = torch.where(e < 1, 2 * e / (1 - e).clamp(min=1e-300), math.inf)
    left_out = [n for n in ("bias", "sink") if getattr(rows, n) is not None]
    meta = {**attrs, "units": "1", "keys_centred": centre, "left_out": ", ".join(left_out)
            or "nothing", "method": "rows by tiles, float64"}  # fmt: skip
    return xr.Dataset({
        name: to_xarray(values, ("batch", "head", "order"), name=name,
                        coords={"order": ("order", chosen)},
                        attrs={**meta, "long_name": _TEXTS[name]})
        for name, values in found.items()
    })  # fmt: skip


def _tiles(rows: SoftmaxRows, head: Head) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of some rows over all keys, and which of them count."""
    bare = dataclasses.replace(rows, key_mask=None)
    block = max(1, _TILE // max(len(head.keys), 1))
    for start in range(0, len(head.query), block):
        stop = min(start + block, len(head.query))
        seen = bare._visible(range(start, stop), range(rows.n_key), head.keys.device)
        yield head.query[start:stop] @ head.key.mT, seen[:, head.keys]


def _errors(x: Tensor, seen: Tensor, orders: Sequence[int]) -> dict[str, Tensor]:
    """The largest errors of a tile, one for each order."""
    x = torch.where(seen, x, 0.0)
    decay = torch.exp(-x)
    shifted = torch.where(seen, x, -math.inf)
    true = torch.softmax(shifted, -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    term, total = torch.ones_like(x), torch.ones_like(x)
    found: dict[str, list[Tensor]] = {"pointwise_error": [], "pointwise_bound": [],
                                      "row_error": []}  # fmt: skip
    for order in range(max(orders) + 1):
        if order:
            term = term * x / order
            total = total + term
        if order not in orders:
            continue
        error = torch.where(seen, (total * decay - 1).abs(), 0.0)
        bound = torch.where(seen, decay.clamp(min=1) * (term * x).abs() / (order + 1), 0.0)
        weights = torch.where(seen, total, 0.0)
        sums = weights.sum(-1, keepdim=True)
        gap = (weights / sums - true).abs().sum(-1)
        gap = torch.where(sums[:, 0] == 0, math.inf, gap).masked_fill(~seen.any(-1), 0.0)
        for name, values in zip(found, (error, bound, gap), strict=True):
            found[name].append(values.max() if values.numel() else x.new_zeros(()))
    return {name: torch.stack(values) for name, values in found.items()}


MEASURES = (taylor_growth,)
