"""What signs have ZeroS's rows, at lengths where no map fits?"""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfShapeError, DsfValueError
from dsf.measures._prefix_order import prefix_sums, ranks_below, total_sums
from dsf.measures._rows import share
from dsf.measures._zero_sum import RadialRows, radial_rows
from dsf.measures._zero_sum_tiles import full_sums
from dsf.memory import require_memory
from dsf.shapes import Float

__all__ = ["zero_sum_bounds", "zero_sum_signs"]

_LABELS = {"units": "1", "gauge": "none", "system": "zeros"}
_RADIAL = "interval of logits and sums over dyadic blocks, float64, no map"
_FULL = "every weight of a row, in tiles, float64"
_UNIT = 1e-3  # how far from 1 the length of a unit vector may be
_PLANES = 64  # tensors of the size of the logits that are alive at once, at most


def zero_sum_signs(
    logits: Float[Tensor, "batch time head"],
    first_gate: Float[Tensor, "batch time head"],
    higher_gate: Float[Tensor, "batch time head"],
    zero_gate: Float[Tensor, "batch time head"] | None = None,
    *,
    query: Float[Tensor, "batch time head width"] | None = None,
    key: Float[Tensor, "batch time head width"] | None = None,
    causal: bool = True,
) -> xr.Dataset:
    """Negative mass, negative count share and l1 mass of every radial or full row, exact.

        w_tj = f_t(s_j) = gh_t (e^{s_j} / E_t - 1/n) + (g1_t - gh_t)(s_j - mean_t)/n + g0_t / n

    with E_t the sum of e^{s_j}, mean_t that of s_j, over the n keys that row t sees: j <= t, or
    all of an encoder (`causal=False`). f_t is convex, so the keys with negative weight are those
    whose logit lies in one interval; it is found by bisection among the ordered logits, and the
    sums of 1, s, e^s over the keys inside it come from dyadic blocks (of an encoder from running
    sums). Given unit vectors `query` and `key` the rows are the full ones, f_t(s_j) q_t.k_j, whose
    signs follow no order: every pair is looked at, in tiles. A weight within round-off of zero
    counts by its rounded sign. Agrees with `negative_mass`, `negative_count_share`, `l1_mass` of
    `zeros_radial_recurrence` and `zeros_recurrence`.

    Logits and gates (batch, time, head), gates of at least 0 (after the sigmoid); query, key
    (batch, time, head, width), both or none. Returns a Dataset of `negative_mass`,
    `negative_count_share`, `l1_mass`, (batch, head, query). Cost a head: O(length log^2 length)
    time and O(length) memory; full rows O(length^2 width) time, O(length width) memory (131,072
    tokens of width 16: 67 s of one core, 0.4 GB). Raises DsfShapeError, DsfValueError,
    DsfMemoryError. Source: Lu et al. (2025), equation of section 3.4; the method is dsf's.
    """
    function = "dsf.zero_sum_signs"
    rows = _rows(function, logits, first_gate, higher_gate, zero_gate, causal=causal)
    if query is None and key is None:
        return _dataset(logits, _RADIAL, _radial(rows, causal), causal=causal)
    unit = _unit_vectors(function, logits, query=query, key=key)
    sums = full_sums(rows, *unit, causal=causal)
    negative = ((sums.absolute - sums.total) / 2).clamp(min=0)
    found = negative, sums.n_negative / rows.t, sums.absolute
    return _dataset(logits, _FULL, _named(*found), part="full", causal=causal)


def _radial(rows: RadialRows, causal: bool) -> dict[str, tuple[Tensor, str]]:
    low, high = rows.negative_ranks()
    sums = prefix_sums if causal else total_sums
    found = sums(rows.s, low, high, -rows.log_total)
    negative = rows.higher * (found.count / rows.t - found.exponential)
    line = (rows.first - rows.higher) * (found.count * rows.mean - found.total)
    negative = (negative + (line - found.count * rows.zero) / rows.t).clamp(min=0)
    return _named(negative, found.count / rows.t, (rows.zero + 2 * negative).clamp(min=0))


def _named(negative: Tensor, count: Tensor, mass: Tensor) -> dict[str, tuple[Tensor, str]]:
    return {
        "negative_mass": (share(negative, mass), "negative share of the absolute weight"),
        "negative_count_share": (count, "share of the keys with negative weight"),
        "l1_mass": (mass, "absolute weight of a row"),
    }


def zero_sum_bounds(
    logits: Float[Tensor, "batch time head"],
    first_gate: Float[Tensor, "batch time head"],
    higher_gate: Float[Tensor, "batch time head"],
) -> xr.Dataset:
    """What ZeroS's weights cannot exceed, from its logits s and gates alone; no zero order.

        weight:  |w_tj| <= ( 2 S |g1 - gh| + gh (e^{2S} - 1) ) / t,   2 S = range of s_1..s_t
        mass:    sum_j |w_tj| <= |g1 - gh| (1/t) sum_j |d_tj| + 2 gh (1 - 1/t)

    d_tj = s_j - mean of s_1..s_t. Both hold for the radial weights and, as |cos| <= 1, for the
    full ones; values no longer than V make an output no longer than V times the mass. They stand
    for the bound printed as Lemma 3.4, which fails; half the range serves as S since a shift of
    the logits changes no weight. Returns a Dataset of `weight_bound` and `mass_bound`, (batch,
    head, query). Cost O(length log^2 length), memory O(length). Raises as `zero_sum_signs`.
    Source: Lu et al. (2025), Lemma 3.4, corrected.
    """
    rows = _rows("dsf.zero_sum_bounds", logits, first_gate, higher_gate, None)
    span = torch.cummax(rows.s, 1).values - torch.cummin(rows.s, 1).values
    gap = (rows.first - rows.higher).abs()
    weight = (span * gap + rows.higher * torch.expm1(span)) / rows.t
    none = torch.zeros(rows.s.shape, dtype=torch.long)
    middle = ranks_below(rows.s.sort(1).values, rows.mean)
    below = prefix_sums(rows.s, none, middle, -rows.log_total)
    deviation = 2 * (below.count * rows.mean - below.total)  # the deviations sum to zero
    mass = gap * deviation / rows.t + 2 * rows.higher * (1 - 1 / rows.t)
    return _dataset(logits, "bounds from logits and gates, float64", {
        "weight_bound": (weight, "bound of the largest weight of a row"),
        "mass_bound": (mass, "bound of the absolute weight of a row"),
    })  # fmt: skip


def _rows(function: str, logits: Tensor, *gates: Tensor | None, causal: bool = True
          ) -> RadialRows:  # fmt: skip
    require_memory(
        function, "sums", ("batch", "time", "head", "quantity"), (*logits.shape, _PLANES),
        torch.float64, advice="Measure fewer heads or samples at a time.",
    )  # fmt: skip
    first, higher, zero = gates
    assert first is not None
    assert higher is not None
    return radial_rows(function, logits, first, higher, zero, causal=causal)


def _unit_vectors(function: str, logits: Tensor, **given: Tensor | None) -> list[Tensor]:
    """query and key as (batch head, time, width) in float64, checked."""
    found = []
    for name, x in given.items():
        if x is None or x.ndim != 4 or x.shape[:3] != logits.shape:
            shape = None if x is None else tuple(x.shape)
            raise DsfShapeError(
                f"{function}: {name}: expected axes (batch, time, head, width) with (batch, time, "
                f"head) = {tuple(logits.shape)}, got {shape}; the logits fix them, and full rows "
                f"take both query and key."
            )
        x = x.detach().to("cpu", torch.float64)
        size = torch.linalg.vector_norm(x, dim=-1)
        if not bool(((size - 1).abs() <= _UNIT).all()):
            raise DsfValueError(
                f"{function}: {name}: expected vectors of length 1, got lengths from "
                f"{float(size.min()):.3g} to {float(size.max()):.3g}. Normalise them."
            )
        found.append(x.transpose(1, 2).flatten(0, 1).contiguous())
    return found


def _dataset(
    logits: Tensor, method: str, found: dict[str, tuple[Tensor, str]], *, part: str = "radial",
    causal: bool = True,
) -> xr.Dataset:  # fmt: skip
    batch, _, head = logits.shape
    labels = {**_LABELS, "method": method, "part": part,
              "direction": "causal" if causal else "bidirectional"}  # fmt: skip
    return xr.Dataset({
        name: to_xarray(
            values.unflatten(0, (batch, head)), ("batch", "head", "query"), name=name,
            attrs={**labels, "long_name": long_name},
        )
        for name, (values, long_name) in found.items()
    })  # fmt: skip


MEASURES = ()
