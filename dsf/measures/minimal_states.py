"""What is the smallest recurrence that makes this map exactly?"""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.hankel import TRUST, values_and_noise
from dsf.map_blocks import Form, Side, minimal_states
from dsf.measures._cut_values import few_states, unfold
from dsf.measures._maps import MapLike, MapSource, open_map, whole_map, with_length
from dsf.wrappers import Anticausal, Bidirectional, Gated, core

__all__ = ["minimal_state"]


def minimal_state(
    system: MapLike,
    form: Form = "current",
    tolerance: float | None = None,
    *,
    side: Side | None = None,
    length: int | None = None,
    max_memory: int | None = None,
) -> xr.DataArray:
    """The fewest states after each step of any recurrence that makes exactly this map.

        predictor  rank M[t+1:, :t]      y_t = C_t h_{t-1} + D_t u_t
        current    rank M[t:, :t]        y_t = C_t h_t
        direct     the fewest over all diagonals of M    y_t = C_t h_t + D_t u_t

    for t = 1..length, ends included. What `dsf.realise` attains in the same form.

    Parameters
    ----------
    system: a dsf system, a map tensor or a DataArray map (square), one input and one output.
    form: see above.
    tolerance: singular values above it times the largest count; by default 1e-12, or what
        rounding in the map's own precision makes of zero if that is more.
    side: "lower", or "upper" for the anticausal half, counted from the last step back; by default
        the only one there is, lower for a bidirectional map, whose diagonal is the lower half's.

    Returns (batch, head, [channel,] time), whole numbers. Cost O(length state^3) from the states
    ("current" without D, "predictor") where they are fewer than half the steps; else one SVD of
    a map's block a step, refused when the map does not fit. Source: realisation theory; Dewilde
    and van der Veen (1998), chapter 3.
    """
    if form not in ("current", "direct", "predictor"):
        raise DsfValueError(
            f"dsf.minimal_state: form: expected current, direct or predictor, got {form!r}."
        )
    system = with_length(system, length)
    source = open_map(system, length=length)
    if "output" in source.lead_axes or source.n_query != source.n_key:
        raise DsfValueError(
            "dsf.minimal_state: system: expected a square map of one input and one output, got "
            f"{source.lead_axes} of {source.n_query} x {source.n_key}. See dsf.measures.cut_rank."
        )
    used: Side = side or ("upper" if source.attrs.get("direction") == "anticausal" else "lower")
    precision = getattr(torch, source.attrs["precision"])
    if tolerance is None:
        tolerance = max(1e-12, TRUST * source.n_query * torch.finfo(precision).eps)
    found = _from_states(system, source, form, used, tolerance, max_memory)
    method = "triangular factors of the states, no map"
    if found is None:
        method = "ranks of map blocks"
        M = whole_map(source, max_memory, "Measure fewer heads or a shorter input.")
        if used == "upper":
            alone = source.attrs.get("direction") == "anticausal"
            M = M.triu(0 if alone else 1).flip(-1, -2)
        found = minimal_states(M, tolerance, form=form)
    found = found.flip(-1) if used == "upper" else found
    return source.result(
        found.to(torch.float64), ("time",), "minimal_state", units="1", method=method, form=form,
        side=used, tolerance=tolerance, long_name="states of the smallest recurrence",
    )  # fmt: skip


def _from_states(
    system: MapLike, source: MapSource, form: Form, side: Side, tolerance: float,
    max_memory: int | None,
) -> Tensor | None:  # fmt: skip
    """The ranks from the coefficients, where these say them; None elsewhere."""
    r = few_states(system, source, side)
    inner = system.system if isinstance(system, Gated) else system
    half = inner.anticausal if isinstance(inner, Bidirectional) and side == "upper" else inner
    strict = isinstance(half, Anticausal) and half.strict
    if r is None or form == "direct" or isinstance(half, Tensor | xr.DataArray):
        return None
    if form == "current" and (strict or core(half).D is not None):  # more than C_t h_t is read
        return None
    sigma, _ = values_and_noise(r, strict=form == "predictor", max_memory=max_memory)
    sigma = unfold(system, sigma)
    if form == "predictor":  # nothing is carried past the last step
        sigma = torch.cat([sigma, torch.zeros_like(sigma[..., :1, :])], -2)
    return (sigma > tolerance * sigma.amax((-2, -1), keepdim=True)).sum(-1)


MEASURES = (minimal_state,)
