"""How much of its memory does a map put to use at each moment?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import xarray as xr
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.map_blocks import Side
from dsf.measures._cut_values import chosen_cuts, cut_values, joint_axes, ranks_of_cuts
from dsf.measures._maps import MapLike, open_map, with_length

__all__ = ["effective_state_size"]

TOLERANCE = 1e-3


def effective_state_size(
    system: MapLike,
    form: Literal["entropy", "tolerance"] = "entropy",
    tolerance: float = TOLERANCE,
    *,
    cuts: Sequence[int] | None = None,
    side: Side | None = None,
    sketch: int | None = None,
    length: int | None = None,
    max_memory: int | None = None,
) -> xr.DataArray:
    """The effective state-size of map[t:, :t] at every cut t, sigma_k its singular values.

        entropy    exp(-sum_k p_k ln p_k),  p_k = sigma_k / sum_j sigma_j;  0 for a block of zeros
        tolerance  the number of sigma_k > tolerance

    Parameters
    ----------
    system: a dsf system, a map tensor or a DataArray map (square).
    form: "entropy" needs no threshold and is no whole number; "tolerance" is one, with an
        absolute threshold: it depends on the scale of the values, unlike `epsilon_rank`.
    tolerance: the threshold of the second form.
    sketch: for the second form only, as in `epsilon_rank`.
    cuts, side, length, max_memory: as in `epsilon_rank`.

    Returns (batch, head, [channel,] time) with the cuts as `time` coordinate, at most
    min(t, length - t) and the number of states. Cost: as `cut_singular_values`.
    Source: Parnichkun et al. (2025), Quantifying Memory Utilization with Effective State-Size.
    """
    if form not in ("entropy", "tolerance"):
        raise DsfValueError(
            f"dsf.effective_state_size: form: expected entropy or tolerance, got {form!r}."
        )
    if form == "tolerance":
        source, size, meta = ranks_of_cuts(
            "dsf.effective_state_size", system, tolerance, "absolute", cuts, side, length,
            max_memory, sketch,
        )  # fmt: skip
    else:
        if sketch is not None:
            raise DsfValueError(
                "dsf.effective_state_size: sketch: expected form='tolerance', got entropy, which "
                "needs every singular value."
            )
        system = with_length(system, length)
        source = open_map(system, length=length)
        found = cut_values(system, source, chosen_cuts(source, cuts), side, max_memory, None)
        size, meta = _perplexity(found.sigma), found.meta
    return source.result(
        size, ("time",), "effective_state_size", lead=joint_axes(source), units="1",
        coords={"time": ("time", chosen_cuts(source, cuts))}, form=form,
        long_name=f"effective state-size, {form} form", **meta,
    )  # fmt: skip


def _perplexity(sigma: Tensor) -> Tensor:
    total = sigma.sum(-1, keepdim=True)
    p = sigma / torch.where(total > 0, total, 1.0)
    return torch.where(total[..., 0] > 0, torch.exp(torch.special.entr(p).sum(-1)), 0.0)


MEASURES = (effective_state_size,)
