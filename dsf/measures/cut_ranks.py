"""How many states must a recurrence carry across each moment to make this map?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import xarray as xr
from einops import rearrange
from torch import Tensor

from dsf.errors import DsfTypeError, DsfValueError
from dsf.measures._maps import MapLike, MapSource, open_map, whole_map, with_length
from dsf.measures._sketch import sketched_singular_values
from dsf.realisation import Side, block_singular_values, epsilon_ranks, hankel_singular_values
from dsf.recurrence import Recurrence
from dsf.wrappers import Anticausal, Bidirectional, Gated

__all__ = ["cut_rank", "cut_singular_values", "epsilon_rank"]

Criterion = Literal["sigma", "frobenius"]
MANY_CUTS = 256
"""Up to this many cuts all are taken by default; above, this many evenly spaced ones."""


def epsilon_rank(
    system: MapLike,
    tolerance: float = 0.01,
    *,
    criterion: Criterion = "sigma",
    cuts: Sequence[int] | None = None,
    side: Side | None = None,
    sketch: int | None = None,
    length: int | None = None,
    max_memory: int | None = None,
) -> xr.DataArray:
    """The largest numerical rank of the blocks map[t:, :t]: states needed at this tolerance.

    Parameters
    ----------
    system: a dsf system, a map tensor or a DataArray map (square).
    tolerance: relative; 0.01 means states needed at 1 %.
    criterion: "sigma" counts singular values above tolerance times the largest over all cuts;
        "frobenius" the fewest n whose tail sqrt(sum_{k>n} sigma_k^2) is within tolerance times the
        norm of the whole triangle: with fewer states no recurrence comes that close to the map.
    cuts: the t to look at (0-based first row of the block), by default all up to 257 steps, else
        256 evenly spaced; attrs say which.
    side: "lower" (what a causal recurrence carries) or "upper" (an anticausal one); by default
        the only one there is, lower for a bidirectional map.
    sketch: for long softmax systems: start with so many random directions instead of the map, and
        double them until the tolerance is reached; memory O(length x directions).

    Returns (batch, head, [channel]): whole numbers, dimensionless. Several inputs or outputs are
    taken jointly (block Hankel matrices). Cost: as `cut_singular_values`.
    Source: Sieber et al. (2024), section 3; Dewilde and van der Veen (1998).
    """
    source, ranks, meta = _ranks(
        system, tolerance, criterion, cuts, side, length, max_memory, sketch
    )
    value = ranks.amax(-1) if ranks.shape[-1] else ranks.new_zeros(ranks.shape[:-1])
    return source.result(
        value, (), "epsilon_rank", lead=_joint_axes(source), units="1",
        long_name=f"states needed at {100 * tolerance:g} %", **meta,
    )  # fmt: skip


def cut_rank(
    system: MapLike,
    tolerance: float = 0.01,
    *,
    criterion: Criterion = "sigma",
    cuts: Sequence[int] | None = None,
    side: Side | None = None,
    sketch: int | None = None,
    length: int | None = None,
    max_memory: int | None = None,
) -> xr.DataArray:
    """The numerical rank of map[t:, :t] at every cut t: states needed across each moment.

    Parameters and cost as `epsilon_rank`, its largest value. Returns (batch, head, [channel,]
    time) with the cuts as `time` coordinate.
    """
    source, ranks, meta = _ranks(
        system, tolerance, criterion, cuts, side, length, max_memory, sketch
    )
    return source.result(
        ranks, ("time",), "cut_rank", lead=_joint_axes(source), units="1",
        coords={"time": ("time", _chosen(source, cuts))},
        long_name="states needed across each cut", **meta,
    )  # fmt: skip


def cut_singular_values(
    system: MapLike,
    *,
    cuts: Sequence[int] | None = None,
    side: Side | None = None,
    sketch: int | None = None,
    length: int | None = None,
    max_memory: int | None = None,
) -> xr.DataArray:
    """The singular values of map[t:, :t] at every cut t: Hankel singular values.

    From the coefficients, O(length state^3) and without a length x length array, when a causal
    or anticausal system has fewer than half as many states as steps; else from the whole map, one
    decomposition a cut; with `sketch` the so many leading values from scans alone. Refused with
    the size when it would not fit. Returns (batch, head, [channel,]
    time, rank), falling along rank, in float64.
    """
    system = with_length(system, length)
    source = open_map(system, length=length)
    chosen = _chosen(source, cuts)
    sigma, method, used = _singular_values(system, source, chosen, side, max_memory, sketch)
    return source.result(
        sigma, ("time", "rank"), "cut_singular_values", lead=_joint_axes(source), units="1",
        coords={"time": ("time", chosen)}, method=method, side=used,
        long_name="singular values of the block across each cut",
    )  # fmt: skip


# -- the work ----------------------------------------------------------------------------------


def _ranks(
    system: MapLike, tolerance: float, criterion: Criterion, cuts: Sequence[int] | None,
    side: Side | None, length: int | None, max_memory: int | None, sketch: int | None,
) -> tuple[MapSource, Tensor, dict[str, Any]]:  # fmt: skip
    if not 0 < tolerance < 1:
        raise DsfValueError(f"dsf.epsilon_rank: tolerance: expected in (0, 1), got {tolerance}.")
    if criterion not in ("sigma", "frobenius"):
        raise DsfValueError(
            f"dsf.epsilon_rank: criterion: expected sigma or frobenius, got {criterion!r}."
        )
    if sketch is not None and criterion == "frobenius":
        raise DsfValueError(
            "dsf.epsilon_rank: sketch: expected criterion='sigma', got frobenius, whose tails a "
            "sketch does not see."
        )
    system = with_length(system, length)
    source = open_map(system, length=length)
    chosen = _chosen(source, cuts)
    while True:
        sigma, method, used = _singular_values(system, source, chosen, side, max_memory, sketch)
        if sketch is None or _resolved(sigma, tolerance) or 2 * sketch >= source.n_query:
            break
        sketch *= 2
    scale = _triangle_norm(source, used) if criterion == "frobenius" else None
    ranks = epsilon_ranks(sigma, tolerance, criterion=criterion, scale=scale)
    relative = "largest singular value over all cuts" if criterion == "sigma" else (
        "Frobenius norm of the triangle")  # fmt: skip
    meta = {"method": method, "criterion": criterion, "tolerance": tolerance,
            "relative_to": relative, "side": used, "n_cuts": len(chosen)}  # fmt: skip
    return source, ranks, meta


def _singular_values(
    system: MapLike, source: MapSource, cuts: list[int], side: Side | None,
    max_memory: int | None, sketch: int | None,
) -> tuple[Tensor, str, Side]:  # fmt: skip
    direction = source.attrs.get("direction")
    used: Side = side or ("upper" if direction == "anticausal" else "lower")
    if sketch is not None:
        if isinstance(system, Tensor | xr.DataArray):
            raise DsfTypeError(
                "dsf.epsilon_rank: sketch: expected a dsf system, got a map. Leave sketch= out."
            )
        sigma = sketched_singular_values(system, cuts, sketch, used)
        return sigma, f"randomised sketch of {sketch} directions, scans only", used
    r = _finite(system, used)
    if r is not None and r.length == source.n_query:
        states = r.n_state * (2 if r.real_output and r.dtype.is_complex else 1)
        if 2 * states < source.n_query:
            if used == "upper":
                r, at = r.flip_time(), [source.n_query - t for t in cuts]
            else:
                at = cuts
            sigma = hankel_singular_values(r, at, max_memory=max_memory)
            return _unfold(system, sigma), "triangular factors of the states, no map", used
    if source.n_query != source.n_key:
        raise DsfValueError(
            f"dsf.epsilon_rank: map: expected as many queries as keys, got {source.n_query} and "
            f"{source.n_key}. Pass the whole map, not a tile."
        )
    advice = "Pass sketch=32, which needs no map, or measure fewer heads."
    weights, size = _joint(source, whole_map(source, max_memory, advice))
    sigma = block_singular_values(weights, [t * size for t in cuts], side=used)
    return sigma, "singular values of map blocks", used


def _finite(system: MapLike, side: Side) -> Recurrence | None:
    """The recurrence with dense B and C that makes this side of the map, gates folded in."""
    if isinstance(system, Gated):
        inner = _finite(system.system, side)
        return None if inner is None else _fold_gate(inner, system.gate)
    if isinstance(system, Bidirectional):
        system = system.causal if side == "lower" else system.anticausal
    if isinstance(system, Anticausal) and side == "upper":
        system = system.recurrence
    elif not (isinstance(system, Recurrence) and side == "lower"):
        return None
    dense = isinstance(system.B, Tensor) and isinstance(system.C, Tensor)
    return system if dense else None


def _fold_gate(r: Recurrence, gate: Tensor) -> Recurrence:
    """Every (head, channel) pair as a head of its own."""
    head = r.n_head
    channel = gate.shape[-1]

    def spread(x: Tensor) -> Tensor:
        return x if x.shape[2] == 1 else x.repeat_interleave(channel, 2)

    assert isinstance(r.B, Tensor)
    assert isinstance(r.C, Tensor)
    factor = gate.expand(-1, -1, head, -1).flatten(2)[..., None, None]
    C = factor * spread(r.C.expand(-1, -1, head, -1, -1))
    return r.replace(A=r.A.map_tensors(spread), B=spread(r.B), C=C, D=None, initial_state=None)


def _unfold(system: MapLike, sigma: Tensor) -> Tensor:
    if not isinstance(system, Gated):
        return sigma
    channel = system.gate.shape[-1]
    return sigma.unflatten(1, (sigma.shape[1] // channel, channel))


def _resolved(sigma: Tensor, tolerance: float) -> bool:
    """Whether at most half of the sketched values count: the trailing ones are too small."""
    counts = epsilon_ranks(sigma, tolerance)
    return bool((2 * counts <= sigma.shape[-1]).all())


def _joint(source: MapSource, weights: Tensor) -> tuple[Tensor, int]:
    """Outputs and inputs of one moment side by side: a map of (query output) x (key input)."""
    if "output" not in source.lead_axes:
        return weights, 1
    n_out, n_in = source.lead_shape[-2:]
    if n_out != n_in:
        raise DsfValueError(
            f"dsf.epsilon_rank: system: expected as many outputs as inputs, got {n_out} and "
            f"{n_in}, for a system with more states than half its steps."
        )
    return rearrange(weights, "... o i q k -> ... (q o) (k i)"), n_out


def _joint_axes(source: MapSource) -> tuple[str, ...]:
    return tuple(a for a in source.lead_axes if a not in ("output", "input"))


def _chosen(source: MapSource, cuts: Sequence[int] | None) -> list[int]:
    if cuts is not None:
        return [int(t) for t in cuts]
    last = source.n_query - 1
    if last <= MANY_CUTS:
        return list(range(1, last + 1))
    spaced = torch.linspace(1, last, MANY_CUTS, dtype=torch.float64).round().long()
    return sorted({*spaced.tolist(), source.n_query // 2})


def _triangle_norm(source: MapSource, side: Side) -> Tensor:
    """Frobenius norm of the map's triangle with the diagonal, by tiles."""
    total = torch.zeros(source.lead_shape, dtype=torch.float64)
    query, key = source.positions
    for rows, columns in source.tiles():
        for cols in columns:
            lag = query[rows.start : rows.stop, None] - key[cols.start : cols.stop]
            kept = (lag >= 0) if side == "lower" else (lag <= 0)
            total += (source.read(rows, cols).detach().abs().double() ** 2 * kept).sum((-2, -1))
    joint = [i for i, a in enumerate(source.lead_axes) if a in ("output", "input")]
    return total.sum(joint).sqrt() if joint else total.sqrt()


MEASURES = (epsilon_rank, cut_rank)
