"""How strongly does each balanced state of a time-invariant system tie the future to the past?"""

from __future__ import annotations

import torch
import xarray as xr

from dsf.axes import to_xarray
from dsf.errors import DsfTypeError
from dsf.hankel import stationary_hankel_values
from dsf.maps import system_attrs
from dsf.measures._maps import precision_of
from dsf.recurrence import Recurrence
from dsf.transitions import Diagonal, Scalar

__all__ = ["hankel_values"]


def hankel_values(system: Recurrence) -> xr.Dataset:
    """Hankel singular values of a stable time-invariant recurrence over all time.

    `hankel_singular_values` (batch, head, state), falling, and `n_trusted` (batch, head), how
    many of them are more than rounding; values that are not are NaN. Diagonal systems with one
    input and one output have every value to full relative accuracy. Equations, cost, errors:
    `dsf.hankel.stationary_hankel_values`; of time-varying systems see `cut_singular_values`.
    """
    if not isinstance(system, Recurrence):
        raise DsfTypeError(
            f"dsf.hankel_values: system: expected a dsf system of type Recurrence, got "
            f"{type(system)}."
        )
    sigma, trusted = stationary_hankel_values(system)
    noise = torch.arange(sigma.shape[-1], device=sigma.device) >= trusted[..., None]
    structured = isinstance(system.A, Diagonal | Scalar) and system.n_input * system.n_output == 1
    attrs = {
        **system_attrs(system), "precision": precision_of(system), "units": "1",
        "method": "pivoted Cauchy factors and Jacobi rotations" if structured else
        "triangular factors by doubling",
    }  # fmt: skip
    values = to_xarray(
        sigma.masked_fill(noise, torch.nan), ("batch", "head", "state"),
        name="hankel_singular_values",
        attrs={**attrs, "long_name": "Hankel singular values"},
    )  # fmt: skip
    counts = to_xarray(
        trusted, ("batch", "head"), name="n_trusted",
        attrs={**attrs, "long_name": "Hankel singular values above rounding"},
    )  # fmt: skip
    return xr.Dataset({"hankel_singular_values": values, "n_trusted": counts})


MEASURES = ()
