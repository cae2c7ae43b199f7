"""Which eigenvalues does a transition have, and which of them say anything about the map?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dsf.algebra import change_of_basis
from dsf.axes import to_xarray
from dsf.map_blocks import Side
from dsf.measures._maps import with_length
from dsf.measures._one_side import (
    decay_logs,
    decay_phases,
    dense_step,
    one_side,
    side_attrs,
    wrapped,
)
from dsf.measures._products import eigenvalue_conditions, whole_product
from dsf.measures._size_checks import require_states
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.shapes import Inexact
from dsf.transitions import Transition
from dsf.wrappers import System, total_length

__all__ = ["eigenvalue_shift", "monodromy_eigenvalues", "transition_eigenvalues"]

FIXED = "time-invariant: the same in every constant basis"
MOVING = (
    "time-varying: eigenvalues of A_t change with the basis, T_t A_t T_(t-1)^-1, the map does "
    "not; compare monodromy_eigenvalues or the map"
)
PERIOD = "kept by every change of basis that ends where it began (T_1 = T_L)"
Spectrum = tuple[Tensor, Tensor]
"""log modulus and phase, each (batch, time, head, state)."""


def transition_eigenvalues(
    system: System, *, side: Side | None = None, max_memory: int | None = None
) -> xr.Dataset:
    """The eigenvalues of A_t at every step, as log modulus and phase.

    Of scalar and diagonal transitions they are the decays themselves, exact from the logs, in the
    order of the states; of all others by eigvals, falling by modulus. A time-invariant transition
    has them in common in every constant basis. Of a time-varying one they belong to the state
    coordinates alone: attrs name the `gauge` and `invariance` says so.

    Returns a Dataset (batch, time, head, state), time of size 1 if time-invariant: `log_modulus`
    (1/step, -inf for 0) and `phase` (radian, in (-pi, pi], 0 for 0). Cost: O(length state) from
    logs, else O(length state^3). Raises DsfTypeError on a map, DsfMemoryError. Source: Sieber et
    al. (2024), section 4.
    """
    r, used = one_side(system, side, "transition_eigenvalues")
    batch, _, head = r.lead_shape()
    own = r.A.lead_shape()[1]
    logs = decay_logs(r.A)
    if logs is not None:
        log_modulus, phase = logs, wrapped(decay_phases(r.A))
        phase = phase.masked_fill(torch.isinf(logs.expand_as(phase)), 0.0)
        method, order = "the decays themselves", "of the states"
    else:
        require_memory(
            "dsf.transition_eigenvalues", "eigenvalues", ("batch", "time", "head", "state"),
            (*r.A.lead_shape(), r.n_state), torch.complex128, max_memory=max_memory,
            advice="Measure fewer steps with dsf.slice_time.",
        )  # fmt: skip
        parts = [_polar(torch.linalg.eigvals(dense_step(r.A, t))) for t in range(own)]
        log_modulus, phase = (torch.stack(x, 1) for x in zip(*parts, strict=True))
        method, order = "eigvals in float64", "falling by modulus"
    meta = {**side_attrs(system, r, used), "method": method, "order": order,
            "invariance": FIXED if own == 1 else MOVING}  # fmt: skip
    shape = (batch, own, head, r.n_state)
    return _dataset((log_modulus.expand(shape), phase.expand(shape)),
                    ("batch", "time", "head", "state"), meta, "1/step")  # fmt: skip


def monodromy_eigenvalues(
    system: System, *, side: Side | None = None, length: int | None = None
) -> xr.Dataset:
    """The eigenvalues of the product A_L ... A_2, whatever the states: log modulus and phase.

    The product P becomes T_L P T_1^-1 under a change of basis: its eigenvalues stay when the basis
    ends where it began (every constant one, and every periodic one), which those of single A_t do
    not. Logs of scalar and diagonal transitions add; a time-invariant transition has L - 1 times
    its logs (`length` where the system itself does not fix L); every other product is multiplied
    out, its size kept as a logarithm. There, eigenvalues that are no more than rounding (a bound
    on the product's error times the eigenvalue's condition) are NaN, and attrs `n_trusted` counts
    the others; `lyapunov_spectrum` follows the small ones further. A_1 acts on the initial state
    alone and does not count.

    Returns a Dataset (batch, head, state): `log_modulus` (1), `phase` (radian). attrs: `steps`.
    Cost: O(length state), for products O(length state^3).
    """
    r, used = one_side(system, side, "monodromy_eigenvalues")
    batch, _, head = r.lead_shape()
    total = total_length(with_length(system, length))
    own, logs = r.A.lead_shape()[1], decay_logs(r.A)
    steps = (own if own > 1 else total) - 1
    if logs is not None and own > 1:
        both = logs[:, 1:].sum(1), wrapped(decay_phases(r.A)[:, 1:].sum(1))
        method = "sums of log decays and phases"
    elif own == 1:
        log_modulus, phase = (
            _polar(torch.linalg.eigvals(dense_step(r.A, 0))) if logs is None
            else (logs[:, 0], decay_phases(r.A)[:, 0]))  # fmt: skip
        log_modulus = log_modulus * steps if steps else torch.zeros_like(log_modulus)
        both, method = (log_modulus, wrapped(phase * steps)), "powers of one transition"
    else:
        both, method = _of_product(r.A), "eigvals of the product, rounding left out"
    log_modulus, phase = both
    phase = phase.masked_fill(torch.isinf(log_modulus.expand_as(phase)), 0.0)
    shape = (batch, head, r.n_state)
    log_modulus, phase = log_modulus.expand(shape), phase.expand(shape)
    meta = {**side_attrs(system, r, used), "method": method, "steps": steps, "invariance": PERIOD,
            "n_trusted": int((~log_modulus.isnan()).sum())}  # fmt: skip
    return _dataset((log_modulus, phase), ("batch", "head", "state"), meta, "1")


def eigenvalue_shift(recurrence: Recurrence, basis: Inexact[Tensor, "*shape"]) -> xr.Dataset:
    """How far the eigenvalues of A_t, and those of the product, move under a change of basis.

        shift_t = max_i |lambda_i(A_t) - lambda_i(T_t A_t T_(t-1)^-1)|

    with eigenvalues paired by least squares. basis: T_0..T_L as `dsf.change_of_basis` takes it.
    Returns a Dataset: `transition` (batch, time, head), the shift of each step, and `product`
    (batch, head), that of A_L ... A_2 relative to its largest eigenvalue; attrs `gauge_dependent`
    says whether single steps moved by more than 1e-8. Cost: O(length state^3).
    """
    require_states("eigenvalue_shift", recurrence)
    changed = change_of_basis(recurrence, basis)
    before, after = (transition_eigenvalues(x) for x in (recurrence, changed))
    count = max(before.sizes["time"], after.sizes["time"])
    lines = [np.broadcast_to(_numbers(x), (*_lead(before, after, count), recurrence.n_state))
             for x in (before, after)]  # fmt: skip
    moved = _pairing(*lines)
    product = [monodromy_eigenvalues(x) for x in (recurrence, changed)]
    scale = np.nanmax(product[0].log_modulus.values, -1, keepdims=True)
    scale = np.where(np.isfinite(scale), scale, 0.0)
    of_product = _pairing(*(_numbers(x, scale) for x in product))
    meta = {**before.log_modulus.attrs, "units": "1",
            "method": "largest distance of the pairing of least squares",
            "gauge_dependent": bool((moved > 1e-8).any())}  # fmt: skip
    return xr.Dataset({
        "transition": to_xarray(moved, ("batch", "time", "head"), name="transition", attrs={
            **meta, "long_name": "shift of the eigenvalues of a step"}),
        "product": to_xarray(of_product, ("batch", "head"), name="product", attrs={
            **meta, "invariance": PERIOD, "long_name": "shift of the eigenvalues of the product"}),
    })  # fmt: skip


# -- helpers -----------------------------------------------------------------------------------


def _polar(values: Tensor) -> Spectrum:
    order = values.abs().argsort(dim=-1, descending=True, stable=True)
    values = values.gather(-1, order)
    return torch.log(values.abs()), torch.where(values == 0, 0.0, wrapped(torch.angle(values)))


def _of_product(A: Transition) -> Spectrum:
    """Eigenvalues of P = A_L ... A_2 with its norm taken out; NaN below the rounding."""
    P, log_scale, error = whole_product(A)
    values, vectors = torch.linalg.eig(P)
    alive = torch.isfinite(log_scale)[..., None]
    noise = (values.abs() <= eigenvalue_conditions(vectors) * error[..., None]) & alive
    order = values.abs().argsort(dim=-1, descending=True, stable=True)
    log_modulus = torch.log(values.abs()) + torch.where(alive, log_scale[..., None], 0.0)
    log_modulus = log_modulus.masked_fill(noise, torch.nan)
    phase = wrapped(torch.angle(values)).masked_fill(noise, torch.nan)
    return log_modulus.gather(-1, order), phase.gather(-1, order)


def _numbers(spectrum: xr.Dataset, log_scale: Any = 0.0) -> np.ndarray:
    return np.exp(spectrum.log_modulus.values - log_scale + 1j * spectrum.phase.values)


def _lead(before: xr.Dataset, after: xr.Dataset, count: int) -> tuple[int, int, int]:
    batch, head = (max(before.sizes[d], after.sizes[d]) for d in ("batch", "head"))
    return batch, count, head


def _pairing(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The largest distance within the pairing of least squares of two lists (..., state)."""
    from scipy.optimize import linear_sum_assignment

    one, two = np.broadcast_arrays(one, two)
    found = np.full(one.shape[:-1], np.nan)
    for index in np.ndindex(found.shape):
        distance = np.abs(one[index][:, None] - two[index])
        if np.isfinite(distance).all():
            rows, columns = linear_sum_assignment(distance**2)
            found[index] = distance[rows, columns].max(initial=0.0)
    return found


def _dataset(both: Spectrum, dims: tuple[str, ...], meta: dict, units: str) -> xr.Dataset:
    names = (("log_modulus", units, "log modulus of an eigenvalue"),
             ("phase", "radian", "phase of an eigenvalue"))  # fmt: skip
    return xr.Dataset({
        name: to_xarray(x, dims, name=name, attrs={**meta, "units": unit, "long_name": text})
        for x, (name, unit, text) in zip(both, names, strict=True)
    })  # fmt: skip


MEASURES = (transition_eigenvalues, monodromy_eigenvalues)
