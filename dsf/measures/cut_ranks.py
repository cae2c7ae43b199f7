"""How many states must a recurrence carry across each moment to make this map?"""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr

from dsf.map_blocks import Criterion, Side
from dsf.measures._cut_values import chosen_cuts, cut_values, joint_axes, ranks_of_cuts
from dsf.measures._maps import MapLike, open_map, with_length

__all__ = ["cut_rank", "cut_singular_values", "epsilon_rank"]


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
        norm of the whole triangle: with fewer states no recurrence comes that close to the map;
        "absolute" counts singular values above the tolerance itself.
    cuts: the t to look at (0-based first row of the block), by default all up to 257 steps, else
        256 evenly spaced; attrs say which.
    side: "lower" (what a causal recurrence carries) or "upper" (an anticausal one); by default
        the only one there is, lower for a bidirectional map.
    sketch: start with so many random directions instead of the map, and double them until all
        that is left out is certainly below the tolerance; memory O(length x directions). By
        default systems of more than 2048 steps without few states start with 32. attrs say the
        `failure_probability` that some bound does not hold, and `n_undecided`, the blocks whose
        rank the bounds leave open.

    Returns (batch, head, [channel]): whole numbers, dimensionless. Several inputs or outputs are
    taken jointly (block Hankel matrices). Cost: as `cut_singular_values`.
    Source: Sieber et al. (2024), section 3; Dewilde and van der Veen (1998).
    """
    source, ranks, meta = ranks_of_cuts(
        "dsf.epsilon_rank", system, tolerance, criterion, cuts, side, length, max_memory, sketch
    )
    value = ranks.amax(-1) if ranks.shape[-1] else ranks.new_zeros(ranks.shape[:-1])
    return source.result(
        value, (), "epsilon_rank", lead=joint_axes(source), units="1",
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
    source, ranks, meta = ranks_of_cuts(
        "dsf.cut_rank", system, tolerance, criterion, cuts, side, length, max_memory, sketch
    )
    return source.result(
        ranks, ("time",), "cut_rank", lead=joint_axes(source), units="1",
        coords={"time": ("time", chosen_cuts(source, cuts))},
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
    the size when it would not fit. Returns (batch, head, [channel,] time, rank), falling along
    rank, in float64; the coordinate `n_trusted` (batch, head, [channel,] time) counts those that
    stand ten times above rounding (of a sketch: above the bound on what it left out), the others
    are noise.
    """
    system = with_length(system, length)
    source = open_map(system, length=length)
    chosen = chosen_cuts(source, cuts)
    found = cut_values(system, source, chosen, side, max_memory, sketch)
    lead = joint_axes(source)
    return source.result(
        found.sigma, ("time", "rank"), "cut_singular_values", lead=lead, units="1",
        coords={"time": ("time", chosen),
                "n_trusted": ((*lead, "time"), found.trusted.cpu().numpy())},
        long_name="singular values of the block across each cut", **found.meta,
    )  # fmt: skip


MEASURES = (epsilon_rank, cut_rank)
