"""Singular values of blocks across cuts: from states, from the map, or from sketches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from einops import rearrange
from torch import Tensor

from dsf.errors import DsfTypeError, DsfValueError
from dsf.hankel import count_trusted, values_and_noise
from dsf.map_blocks import Criterion, Side, block_singular_values, epsilon_ranks
from dsf.measures._maps import MapLike, MapSource, open_map, whole_map, with_length
from dsf.measures._sketch import FAILURE, sketch_gap, sketched_singular_values
from dsf.recurrence import Recurrence
from dsf.wrappers import Anticausal, Bidirectional, Gated

MANY_CUTS = 256
"""Up to this many cuts all are taken by default; above, this many evenly spaced ones."""
SKETCH_FROM, SKETCH = 2048, 32
"""Maps without few states are sketched from this length on, with so many directions at first."""


@dataclasses.dataclass(frozen=True)
class CutValues:
    """Singular values (*lead, cut, rank), what may be wrong with them (*lead, cut), and labels."""

    sigma: Tensor
    noise: Tensor
    method: str
    side: Side
    sketch: int | None = None

    @property
    def trusted(self) -> Tensor:
        """How many of each cut stand ten times above rounding, or above what a sketch left."""
        return count_trusted(self.sigma, self.noise)

    @property
    def meta(self) -> dict[str, Any]:
        """attrs; of a sketch with the chance that any of its bounds does not hold."""
        found: dict[str, Any] = {"method": self.method, "side": self.side}
        if self.sketch is not None:
            found["failure_probability"] = min(1.0, FAILURE * self.noise.numel())
        return found


def ranks_of_cuts(
    function: str, system: MapLike, tolerance: float, criterion: Criterion,
    cuts: Sequence[int] | None, side: Side | None, length: int | None, max_memory: int | None,
    sketch: int | None,
) -> tuple[MapSource, Tensor, dict[str, Any]]:  # fmt: skip
    """The map's source, the rank of every cut and attrs that say how it was found."""
    if not 0 < tolerance < (1 if criterion != "absolute" else float("inf")):
        within = "(0, 1)" if criterion != "absolute" else "(0, inf)"
        raise DsfValueError(f"{function}: tolerance: expected in {within}, got {tolerance}.")
    if criterion not in ("sigma", "frobenius", "absolute"):
        raise DsfValueError(
            f"{function}: criterion: expected sigma, frobenius or absolute, got {criterion!r}."
        )
    if sketch is not None and criterion == "frobenius":
        raise DsfValueError(
            f"{function}: sketch: expected criterion='sigma', got frobenius, whose tails a "
            f"sketch does not see."
        )
    system = with_length(system, length)
    source = open_map(system, length=length)
    chosen = chosen_cuts(source, cuts)
    if sketch is None and criterion != "frobenius" and max_memory is None:
        sketch = _own_sketch(system, source, side)
    while True:
        found = cut_values(system, source, chosen, side, max_memory, sketch)
        if sketch is None or _settled(found, tolerance, criterion) or 2 * sketch >= source.n_query:
            break
        sketch *= 2
    scale = _triangle_norm(source, found.side) if criterion == "frobenius" else None
    ranks = epsilon_ranks(found.sigma, tolerance, criterion=criterion, scale=scale)
    relative = {"sigma": "largest singular value over all cuts", "absolute": "1",
                "frobenius": "Frobenius norm of the triangle"}[criterion]  # fmt: skip
    meta = {**found.meta, "criterion": criterion, "tolerance": tolerance,
            "relative_to": relative, "n_cuts": len(chosen)}  # fmt: skip
    if sketch is not None:
        meta["n_undecided"] = _undecided(found, tolerance, criterion)
    return source, ranks, meta


def cut_values(
    system: MapLike, source: MapSource, cuts: list[int], side: Side | None,
    max_memory: int | None, sketch: int | None,
) -> CutValues:  # fmt: skip
    """The singular values of every cut in the cheapest way, or by the sketch asked for."""
    used = _side(source, side)
    if sketch is not None:
        if isinstance(system, Tensor | xr.DataArray):
            raise DsfTypeError(
                "dsf.epsilon_rank: sketch: expected a dsf system, got a map. Leave sketch= out."
            )
        sigma, left = sketched_singular_values(system, cuts, sketch, used)
        method = f"randomised sketch of {sketch} directions, scans only"
        return CutValues(sigma, left, method, used, sketch)
    r = few_states(system, source, used)
    if r is not None:
        at = cuts if used == "lower" else [source.n_query - t for t in cuts]
        sigma, noise = values_and_noise(r, at, max_memory=max_memory)
        method = "triangular factors of the states, no map"
        return CutValues(unfold(system, sigma), unfold(system, noise), method, used)
    if source.n_query != source.n_key:
        raise DsfValueError(
            f"dsf.epsilon_rank: map: expected as many queries as keys, got {source.n_query} and "
            f"{source.n_key}. Pass the whole map, not a tile."
        )
    advice = "Pass sketch=32, which needs no map, or measure fewer heads."
    weights, size = _joint(source, whole_map(source, max_memory, advice))
    sigma = block_singular_values(weights, [t * size for t in cuts], side=used)
    unit = torch.finfo(getattr(torch, source.attrs["precision"])).eps / 2
    largest = sigma[..., 0] if sigma.shape[-1] else sigma.new_zeros(sigma.shape[:-1])
    noise = unit * weights.shape[-1] * largest
    return CutValues(sigma, noise, "singular values of map blocks", used)


def few_states(system: MapLike, source: MapSource, side: Side) -> Recurrence | None:
    """The causal recurrence of this side, if it has fewer states than half its steps."""
    r = finite_part(system, side)
    if r is None or r.length != source.n_query:
        return None
    states = r.n_state * (2 if r.real_output and r.dtype.is_complex else 1)
    if 2 * states >= source.n_query:
        return None
    return r.flip_time() if side == "upper" else r


def _side(source: MapSource, side: Side | None) -> Side:
    return side or ("upper" if source.attrs.get("direction") == "anticausal" else "lower")


def _own_sketch(system: MapLike, source: MapSource, side: Side | None) -> int | None:
    """SKETCH for a long map that has no cheaper way and can be scanned."""
    long = source.n_query > SKETCH_FROM and not isinstance(system, Tensor | xr.DataArray)
    if not long or few_states(system, source, _side(source, side)) is not None:
        return None
    return None if sketch_gap(system) else SKETCH


def _thresholds(found: CutValues, tolerance: float, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """The smallest and the largest that the threshold may be, (*lead, 1)."""
    if criterion == "absolute":
        both = torch.full_like(found.noise[..., :1], tolerance)
        return both, both
    top = found.sigma[..., 0]
    most = torch.hypot(top, found.noise)
    return tolerance * top.amax(-1, keepdim=True), tolerance * most.amax(-1, keepdim=True)


def _settled(found: CutValues, tolerance: float, criterion: Criterion) -> bool:
    """Whether nothing outside the sketch can count."""
    return bool((found.noise <= _thresholds(found, tolerance, criterion)[0]).all())


def _undecided(found: CutValues, tolerance: float, criterion: Criterion) -> int:
    """Blocks whose rank the bounds leave open."""
    low, high = _thresholds(found, tolerance, criterion)
    certain = (found.sigma > high[..., None]).sum(-1)
    possible = (torch.hypot(found.sigma, found.noise[..., None]) > low[..., None]).sum(-1)
    return int(((certain != possible) | (found.noise > low)).sum())


def finite_part(system: MapLike, side: Side) -> Recurrence | None:
    """The recurrence with dense B and C that makes this side of the map, gates folded in."""
    if isinstance(system, Gated):
        inner = finite_part(system.system, side)
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


def unfold(system: MapLike, sigma: Tensor) -> Tensor:
    """Heads made of (head, channel) pairs apart again."""
    if not isinstance(system, Gated):
        return sigma
    channel = system.gate.shape[-1]
    return sigma.unflatten(1, (sigma.shape[1] // channel, channel))


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


def joint_axes(source: MapSource) -> tuple[str, ...]:
    """The leading axes of what is measured of outputs and inputs together."""
    return tuple(a for a in source.lead_axes if a not in ("output", "input"))


def chosen_cuts(source: MapSource, cuts: Sequence[int] | None) -> list[int]:
    """The cuts asked for; by default all, or many that are evenly spaced."""
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
