"""Does a wider state contain the narrower one? By free coefficients always, in a tied class if."""

from __future__ import annotations

from collections.abc import Callable

import xarray as xr
from torch import Tensor
from torch.nn.functional import pad

from dsf.algebra import parallel
from dsf.axes import to_xarray
from dsf.errors import DsfValueError
from dsf.maps import materialise
from dsf.measures._size_checks import require_copies, require_states
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Identity
from dsf.wrappers import System

__all__ = ["expand_state", "expansion_error"]


def expand_state(recurrence: Recurrence, n_state: int) -> Recurrence:
    """The same map with `n_state` states: the new ones are written and never read.

        A = [[A_t, 0], [0, I]],   B = [B_t; 0],   C = [C_t 0]

    Shows that what N states can do, more can. Raises DsfValueError on fewer states than there are.
    Source: Sieber et al. (2024), Lemma 2, with X = 0 and Y = I so that A stays diagonal.
    """
    require_states("expand_state", recurrence)
    r, more = recurrence, n_state - recurrence.n_state
    if more < 0:
        raise DsfValueError(
            f"dsf.expand_state: n_state: expected {r.n_state} or more, got {n_state}. To reduce a "
            f"system take dsf.reduce."
        )
    if more == 0:
        return r
    B, C = r.dense_input_output()
    spare = Recurrence(Identity(more), B.new_zeros(1, 1, 1, more, r.n_input),
                       C.new_zeros(1, 1, 1, r.n_output, more))  # fmt: skip
    return parallel(r, spare).replace(system=r.system, gauge=r.gauge)


def expansion_error(
    make: Callable[[Tensor, Tensor], System],
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time head state"],
    extra: int = 1,
) -> xr.DataArray:
    """How far the map of a tied class moves when query and key get `extra` coordinates of 0.

        max |M(q + zeros, k + zeros) - M(q, k)| / max |M(q, k)|

    make: the class, its system from query and key. 0 where the lemma holds inside the class
    (identity maps, S6, SSD); not where the feature map of 0 is not 0, as elu + 1, whose extra
    features enter scores and normaliser. Returns (batch, head). Cost and memory O(length^2).
    Source: limits derived from Sieber et al. (2024), Lemma 2.
    """
    require_copies("expansion_error", query, key)
    if extra < 1:
        raise DsfValueError(f"dsf.expansion_error: extra: expected 1 or more, got {extra}.")
    one = materialise(make(query, key))
    other = materialise(make(pad(query, (0, extra)), pad(key, (0, extra))))
    error = (other - one).abs().flatten(2).amax(-1) / one.abs().flatten(2).amax(-1)
    return to_xarray(error, ("batch", "head"), name="expansion_error", attrs={
        "units": "1", "long_name": "change of the map when states are added",
        "method": f"{extra} zero coordinates of query and key"})  # fmt: skip


MEASURES = ()
