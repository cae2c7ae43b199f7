"""Does a mixer tell different queries apart, and if not, which two does it confuse?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfValueError
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
from dsf.measures._maps import with_length
from dsf.measures._size_checks import require_states
from dsf.measures._softmax_queries import Finding, examine, softmax_weights
from dsf.measures._state_queries import examine_state, reach_at, real_map, state_weights
from dsf.measures._verdicts import FLAGS, UNDECIDED, tolerances
from dsf.recurrence import Recurrence
from dsf.wrappers import Gated, System, core

__all__ = ["collision", "injectivity"]

_UNKNOWN = Finding(UNDECIDED, float("nan"), "rows are given, not made from queries", None, np.nan)


def injectivity(
    system: System,
    positions: Sequence[int] | str | None = None,
    *,
    normalised: bool | None = None,
    query_width: int | None = None,
    unit_roundoff: float | None = None,
    length: int | None = None,
) -> xr.Dataset:
    """Whether two different queries can get the same weights, with margin and, if so, a pair.

    Softmax, in the space of queries (after rotary positions): w(p) = w(q) iff K (p - q) = c 1, so
    injective iff rank [K, 1] = d + 1 over the keys that the row sees. At a causal position with
    t <= d keys it never is. Every finite state, in the space of output rows C_t: weights are
    C_t R_t with R_t = [A_t..A_2 B_1, ..., B_t], injective iff rank R_t = states; where rows are
    divided by their sum (linear attention with normaliser), C and 2 C collide. With D <= d
    features, or at a position with t <= d keys, no continuous feature map then is injective; with
    more it may be, so that the verdict is "undecided" when `query_width` d says so, and
    `query_injectivity` decides by the feature map itself.

    Parameters
    ----------
    system: a dsf system; gates do not matter, a bidirectional one is judged on all keys, in the
        space of both its output rows where its halves have different ones.
    positions: query positions (0-based, negative from the end), "all", or None for the last.
    normalised: whether rows are divided by their sum; None finds out (all rows sum to one, and no
        state counts the keys, which would make them sum to one without dividing).
    query_width: width d of the query before the feature map, if there is one.
    unit_roundoff: of the numbers stored; by default that of their dtype.
    length: number of steps of a time-invariant system.

    Returns a Dataset over (batch, head, query): `verdict` (1 yes, 0 undecided, -1 no; attrs
    flag_values, flag_meanings), `margin` (smallest singular value of the key or reachability
    matrix scaled to unit columns or rows), `reason`, `difference` (largest difference of the two
    weight rows), and `query_pair` (..., pair, feature), NaN where none is needed. No is said up
    to margin 4 u sqrt(size), yes from 64 times that, u the unit round-off: attrs `tolerance`.
    Cost: one SVD of keys x width (or states x keys) a batch, head and position.
    Source: Han et al. (2024), propositions 1 and 2, sharpened to conditions that decide both ways.
    """
    require_states("injectivity", system)
    check_system("dsf.injectivity", system)
    system = with_length(system, length)
    r = core(system)
    chosen = positions_of("dsf.injectivity", positions, max(core(system).length, 1))
    batch, _, head = r.lead_shape()
    divided = division_of(system, normalised)
    findings = [
        f for t in chosen for f in _examine(system, t, divided, query_width, unit_roundoff)
    ]
    softmax = isinstance(r.C, SoftmaxRows)
    grid = (len(chosen), batch, head)

    def fill(values: list[Any], dtype: Any) -> np.ndarray:
        return np.moveaxis(np.array(values, dtype=dtype).reshape(grid), 0, 2)

    width, size = _width(findings), _size(r)
    low, high = tolerances(_stored(r), size, unit_roundoff)
    meta = {
        **system_attrs(system), "precision": str(_stored(r)).removeprefix("torch."),
        "space": "query" if softmax else "output row C_t", "tolerance": [low, high],
        "method": "affine rank of the keys" if softmax else "rank of the reachability matrix",
    }  # fmt: skip
    dims = ("batch", "head", "query")
    coords = {"query": ("query", chosen)}

    def label(values: Any, name: str, extra: tuple[str, ...] = (), **attrs: Any) -> xr.DataArray:
        return to_xarray(values, (*dims, *extra), name=name, coords=coords,
                         attrs={**meta, **attrs})  # fmt: skip

    pairs = np.full((*grid, 2, width), np.nan, dtype=_pair_dtype(findings))
    for i, f in enumerate(findings):
        if f.pair is not None:
            pairs[np.unravel_index(i, grid)][:, : f.pair.shape[-1]] = f.pair.cpu().numpy()
    pairs = np.moveaxis(pairs, 0, 2)
    return xr.Dataset(
        {
            "verdict": label(fill([f.verdict for f in findings], np.int8), "verdict", (),
                             long_name="different queries always get different weights",
                             units="1", **FLAGS),
            "margin": label(fill([f.margin for f in findings], np.float64), "margin", (),
                            long_name="smallest singular value, columns scaled", units="1"),
            "difference": label(fill([f.difference for f in findings], np.float64), "difference",
                                (), long_name="largest difference of the pair's weights",
                                units="1"),
            "reason": label(fill([f.reason for f in findings], np.str_), "reason", units="1"),
            "query_pair": label(pairs, "query_pair", ("pair", "feature"),
                                long_name="two queries with the same weights", units="1"),
        },
        attrs=label(np.zeros(fill([0] * len(findings), np.int8).shape), "meta").attrs,
    )  # fmt: skip


def collision(
    system: System,
    position: int = -1,
    *,
    batch: int = 0,
    head: int = 0,
    normalised: bool | None = None,
    unit_roundoff: float | None = None,
    tolerance: float = 1e-12,
    length: int | None = None,
) -> xr.Dataset:
    """Two different queries that one row gives the same weights, checked on the weights.

    Softmax: p = q + s w with K w = c 1, q the actual query and s its length. A finite state: two
    output rows, c + s n with n R = 0, or c and 2 c where rows are divided by their sum. From keys
    and a feature map, `query_collision` gives two queries before the map.

    Returns a Dataset: `query_pair` (pair, feature), `weights` (pair, key) in float64, attrs
    `difference` (largest), `distance` of the two queries, `reason`. Raises DsfValueError when the
    row is injective, undecided, or when the weights differ by more than `tolerance` (rounded keys
    only nearly on a hyperplane): the message says by how much.
    """
    require_states("collision", system)
    check_system("dsf.collision", system)
    system = with_length(system, length)
    r = core(system)
    t = positions_of("dsf.collision", [position], max(core(system).length, 1))[0]
    divided = division_of(system, normalised)
    findings = list(_examine(system, t, divided, None, unit_roundoff))
    found = findings[batch * r.lead_shape()[2] + head]
    if found.pair is None or not found.difference <= tolerance:
        gap = "" if found.pair is None else (
            f"; the closest pair's weights differ by {found.difference:.2g}, more than "
            f"tolerance={tolerance:g}")  # fmt: skip
        raise DsfValueError(
            f"dsf.collision: system: expected a row that confuses two queries, got none at batch "
            f"{batch}, head {head}, position {t}: {found.reason} (margin {found.margin:.2g}){gap}."
        )
    weights = _weights_of(system, t, batch, head, found, bool(divided[batch][head]))
    distance = float(torch.linalg.vector_norm(found.pair[1] - found.pair[0]))
    difference = float((weights[0] - weights[1]).abs().max())
    meta = {**system_attrs(system), "units": "1", "difference": difference, "distance": distance,
            "reason": found.reason, "tolerance": tolerance, "position": t,
            "method": "weights of both queries computed in float64"}  # fmt: skip
    return xr.Dataset(
        {
            "query_pair": to_xarray(found.pair, ("pair", "feature"), name="query_pair",
                                    attrs=meta),
            "weights": to_xarray(weights, ("pair", "key"), name="weights", attrs=meta),
        },
        attrs=to_xarray(np.zeros(0), ("pair",), name="meta", attrs=meta).attrs,
    )  # fmt: skip


# -- the work ----------------------------------------------------------------------------------


def _examine(
    system: System, position: int, divided: Division, query_width: int | None,
    unit_roundoff: float | None,
) -> Iterator[Finding]:  # fmt: skip
    """Findings of every batch and head, heads fastest."""
    system = system.system if isinstance(system, Gated) else system
    r = core(system)
    batch, _, head = r.lead_shape()
    if isinstance(r.C, SoftmaxRows) and one_rows(system):
        for b in range(batch):
            for h in range(head):
                yield examine(
                    r.C, b, h, position, part=part_of(system), unit_roundoff=unit_roundoff
                )
        return
    if isinstance(r.C, MixingRows):
        yield from [_UNKNOWN] * (batch * head)
        return
    R, c = real_map(r, *reach_at(system, position))
    for b in range(batch):
        for h in range(head):
            yield examine_state(
                R[b, h], c[b, h], divided[b][h], dtype=_stored(r), unit_roundoff=unit_roundoff,
                query_width=query_width,
            )  # fmt: skip


def _weights_of(
    system: System, position: int, batch: int, head: int, found: Finding, divided: bool
) -> Tensor:
    system = system.system if isinstance(system, Gated) else system
    r = core(system)
    assert found.pair is not None
    if isinstance(r.C, SoftmaxRows):
        return softmax_weights(r.C, batch, head, position, found.pair, part=part_of(system))
    R, _ = real_map(r, *reach_at(system, position))
    return state_weights(R[batch, head], found.pair, divided)


def _stored(r: Recurrence) -> torch.dtype:
    dtype = r.C.key.dtype if isinstance(r.C, SoftmaxRows) else r.dtype
    return dtype.to_real() if dtype.is_complex else dtype


def _size(r: Recurrence) -> int:
    return r.C.key.shape[-1] if isinstance(r.C, SoftmaxRows) else (
        r.n_state * (2 if r.real_output and r.dtype.is_complex else 1))  # fmt: skip


def _width(findings: list[Finding]) -> int:
    return max((f.pair.shape[-1] for f in findings if f.pair is not None), default=1)


def _pair_dtype(findings: list[Finding]) -> Any:
    complex_pair = any(f.pair is not None and f.pair.is_complex() for f in findings)
    return np.complex128 if complex_pair else np.float64


MEASURES: tuple[Callable[..., xr.DataArray | xr.Dataset], ...] = (injectivity,)
