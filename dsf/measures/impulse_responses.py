"""What does one token's value leave in every output?"""

from __future__ import annotations

import xarray as xr

from dsf.errors import DsfShapeError
from dsf.measures._maps import MapLike, open_map, widened

__all__ = ["impulse_response"]


def impulse_response(
    system: MapLike, start: int | None = None, *, length: int | None = None
) -> xr.DataArray:
    """The outputs when one token alone carries the value 1: a column of the map.

        g_t = w_(t, start) = C_t A_t ... A_(start+1) B_start  (+ D at t = start)

    with the coefficients as they are: what the input itself does to A, B and C is not followed.
    `start` is the token's index, 0-based; by default the first one, the last one of an anticausal
    system. The columns of a time-invariant system differ only by a delay.

    Returns (batch, head, [channel, output, input,] query), attrs `start`. Cost: one scan, memory
    O(length); softmax rows by blocks, O(length^2) time. Raises DsfShapeError for an index outside.
    """
    source = open_map(system, length=length)
    last = source.attrs["direction"] == "anticausal"
    chosen = (source.n_key - 1 if last else 0) if start is None else start
    if not 0 <= chosen < source.n_key:
        raise DsfShapeError(
            f"dsf.impulse_response: start: expected an index below {source.n_key}, got {chosen}; "
            f"the length of the system fixes it."
        )
    column = widened(source.read(range(source.n_query), range(chosen, chosen + 1)))[..., 0]
    return source.result(
        column, ("query",), "impulse_response", units="1", start=chosen,
        long_name="output after a value of 1 at one token", method="one column of the map",
    )  # fmt: skip


MEASURES = (impulse_response,)
