"""Over how many directions does the whole map spread its strength?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from dsf.errors import DsfUnsupportedError, DsfValueError
from dsf.measures._maps import MapLike, MapSource, open_map, whole_map, with_length
from dsf.measures._rows import row_sums
from dsf.measures._sketch import FAILURE, MapSketch, sketch_gap, sketched_map
from dsf.wrappers import Bidirectional

__all__ = ["effective_rank", "stable_rank"]

SKETCH, MOST = 32, 128
"""Random directions of a sketch at first, and at most."""
SVD_UP_TO = 8192
"""Longer systems are sketched by default where every singular value counts."""
SKETCH_FROM = 2048
"""Longer systems are sketched by default where the largest one is enough."""
TOLERANCE = 1e-3

Bounds = tuple[Tensor, Tensor, Tensor]
"""A value and what it lies between, (batch, head)."""


def effective_rank(
    system: MapLike,
    *,
    length: int | None = None,
    sketch: int | None = None,
    tolerance: float = TOLERANCE,
) -> xr.DataArray:
    """exp of the entropy of the map's normalised singular values.

        exp(-sum_k p_k ln p_k),    p_k = sigma_k / sum_i sigma_i

    between 1 and the length; length for the identity, 1 for uniform full attention, 0 for a map
    of zeros. Returns (batch, head, [channel]).

    Parameters
    ----------
    system: a dsf system, a map tensor or a DataArray map.
    sketch: so many random directions instead of the whole map, doubled up to 128 until the bounds
        are within `tolerance`; by default for systems of more than 8192 steps. The s_k and e of
        the sketch (s_k <= sigma_k <= sqrt(s_k^2 + e^2), the others at most e) leave open no more
        of p than d = (sum_k (sqrt(s_k^2 + e^2) - s_k) + the others) / sum_k s_k, and the entropy
        no more than d ln(n - 1) + h(d), h the binary entropy (Audenaert). That is narrow where
        the rank is low: a causal map with a diagonal has full rank and is mostly undecided.
    tolerance: relative width that counts as decided.

    Where the bounds stay wider the value is NaN and attrs `undecided` say so; the coordinates
    `lower_bound` and `upper_bound` hold what is known, but with `failure_probability`. Cost: the
    whole map (refused with its size when it would not fit) and an O(length^3) decomposition of
    each head; sketched, scans and adjoint scans of so many channels, memory O(length x
    directions). Source: Roy and Vetterli (2007); Audenaert (2007); Halko et al. (2011).
    """
    return _rank(
        "effective_rank", system, length, sketch, tolerance, SVD_UP_TO, _perplexity, _entropic
    )


def stable_rank(
    system: MapLike,
    *,
    length: int | None = None,
    sketch: int | None = None,
    tolerance: float = TOLERANCE,
) -> xr.DataArray:
    """The squared Frobenius norm over the squared largest singular value of the map.

        ||M||_F^2 / ||M||_2^2

    between 1 and the rank, unmoved by small singular values; 0 for a map of zeros. Returns
    (batch, head, [channel]). Parameters as `effective_rank`; systems of more than 2048 steps are
    sketched by default: the Frobenius norm from the squares of the rows (scans, else tiles), the
    largest singular value from scans and adjoint scans, with a residual bound from above that
    is narrow where the sketch has met every singular value near the largest. Undecided where
    very many are of one size, as of an identity. Cost as `effective_rank`, and the squares:
    O(length x state^2) by scans, O(length^2) time and O(length) memory by tiles (softmax).
    Source: Rudelson and Vershynin (2007); Halko et al. (2011).
    """

    def whole(sigma: Tensor) -> Tensor:
        top = sigma.amax(-1) if sigma.shape[-1] else sigma.new_zeros(sigma.shape[:-1])
        return ((sigma / top.masked_fill(top == 0, 1.0)[..., None]) ** 2).sum(-1)

    return _rank("stable_rank", system, length, sketch, tolerance, SKETCH_FROM, whole, _stable)


# -- the two ways ------------------------------------------------------------------------------


def _rank(
    name: str, system: MapLike, length: int | None, sketch: int | None, tolerance: float,
    long: int, whole: Callable[[Tensor], Tensor], bounds: Callable[[MapSketch, Tensor], Bounds],
) -> xr.DataArray:  # fmt: skip
    if sketch is not None and sketch < 1:
        raise DsfValueError(f"dsf.{name}: sketch: expected at least 1, got {sketch}.")
    if not 0 < tolerance < 1:
        raise DsfValueError(f"dsf.{name}: tolerance: expected in (0, 1), got {tolerance}.")
    system = with_length(system, length)
    source = open_map(system, length=length)
    gap = sketch_gap(system)
    if sketch is not None and gap:
        raise DsfUnsupportedError(f"dsf.{name}: sketch: {gap}")
    label: dict[str, Any] = {"units": "1", "long_name": name.replace("_", " ") + " of the map"}
    if gap or (sketch is None and source.n_query <= long):
        values = whole(torch.linalg.svdvals(whole_map(source)))
        method = "singular values of the whole map in float64"
        return source.result(values, (), name, method=method, **label)
    energy: Tensor | None = None
    size = SKETCH if sketch is None else sketch
    while True:
        found = sketched_map(f"dsf.{name}", system, size)  # type: ignore[arg-type]
        energy = _energy(system, source) if energy is None else energy
        value, low, high = bounds(found, energy)
        open_ = ~(high - low <= tolerance * value)
        if not bool(open_.any()) or 2 * size > max(MOST, sketch or 0) or size >= source.n_query:
            break
        size *= 2
    ends = {"lower_bound": low, "upper_bound": high}
    coords = {key: (source.lead_axes, x.numpy()) for key, x in ends.items()}
    return source.result(
        value.masked_fill(open_, math.nan), (), name, coords=coords, **label,
        **_how(found, open_, tolerance),
    )  # fmt: skip


def _how(found: MapSketch, undecided: Tensor, tolerance: float) -> dict[str, Any]:
    many, heads = int(undecided.sum()), undecided.numel()
    words = f"{many} of {heads} heads: bounds wider than {tolerance:g} after {found.size} "
    words += "directions; pass dsf.materialise(system) for all values of the map"
    return {
        "method": f"randomised sketch of {found.size} directions, scans and adjoint scans, no map",
        "failure_probability": min(1.0, FAILURE * heads), "tolerance": tolerance,
        "n_undecided": many, "undecided": words if many else "none",
    }  # fmt: skip


def _energy(system: Any, source: MapSource) -> Tensor:
    """||M||_F^2 of every head; two halves that share no entry are summed apart, by scans."""
    if isinstance(system, Bidirectional) and not system.is_one_map:
        later = system.anticausal
        if later.strict and later.recurrence.D is None:
            return sum(_energy(half, open_map(half)) for half in (system.causal, later))  # type: ignore[return-value]
    return row_sums(source, signed=False).power.sum(-1).cpu()


def _stable(found: MapSketch, energy: Tensor) -> Bounds:
    """||M||_F^2 over s_1^2 from above and over the bound of sigma_1^2 from below."""
    top = found.sigma[..., 0]
    alive = top > 0
    high = energy / (top**2).masked_fill(~alive, 1.0)
    low = energy / (found.top**2).masked_fill(~alive, 1.0)
    return tuple(x * alive for x in (high, low.clamp(min=1.0), high))  # type: ignore[return-value]


def _entropic(found: MapSketch, energy: Tensor) -> Bounds:
    """The perplexity of the s_k, and how far what the sketch leaves open may move it."""
    s, e = found.sigma, found.left[..., None]
    n = max(found.n, 2)
    rest = (energy - (s**2).sum(-1)).clamp(min=0).sqrt() * math.sqrt(n - s.shape[-1])
    rest = torch.minimum(rest, (n - s.shape[-1]) * found.left)
    total = s.sum(-1)
    moved = ((torch.hypot(s, e) - s).sum(-1) + rest) / total.masked_fill(total == 0, 1.0)
    moved = moved.clamp(max=1 - 1 / n)
    slack = moved * math.log(n - 1) + torch.special.entr(moved) + torch.special.entr(1 - moved)
    value = _perplexity(s)
    low, high = (value * torch.exp(-slack)).clamp(min=1), (value * torch.exp(slack)).clamp(max=n)
    return value, low * (total > 0), high * (total > 0)


def _perplexity(sigma: Tensor) -> Tensor:
    total = sigma.sum(-1, keepdim=True)
    p = sigma / total.masked_fill(total == 0, 1.0)
    return torch.exp(-torch.xlogy(p, p).sum(-1)) * (total[..., 0] > 0)


MEASURES = (effective_rank, stable_rank)
