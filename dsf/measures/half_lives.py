"""How long does a state remember?"""

from __future__ import annotations

import math

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.map_blocks import Side
from dsf.measures._one_side import decay_logs, one_side, side_attrs
from dsf.transitions import Identity, Shift, Transition
from dsf.wrappers import System

__all__ = ["memory_half_life", "survival_steps"]


def memory_half_life(
    system: System, *, side: Side | None = None, length: int | None = None
) -> xr.DataArray:
    """Steps until half of a state's content is left, at the system's average rate of decay.

        half-life_n = ln 2 / r_n,    r_n = -(1/(L-1)) ln || A_L ... A_2 e_n ||

    For scalar and diagonal transitions r_n is the mean of -log_decay, exact from the logs: a
    constant decay a gives ln(1/2)/ln a. For every other structure the norm of the product on the
    n-th unit vector, renormalised at each step. Infinite where nothing is lost (identity, the
    cache of softmax attention, expansion; attrs count the `expansive` ones). A_1 acts on the
    initial state alone and does not count. Where a product is exactly zero (a reset) the average
    rate says nothing, and the mean of `survival_steps` over the starts that reach half is given.

    The states' coordinates matter: attrs name the gauge; scalar decays can be moved into keys and
    queries, which makes every half-life infinite and leaves the map alone. See
    `effective_horizon` for what does not depend on it.

    Parameters
    ----------
    system: a dsf system. side: "lower" for the causal part, "upper" for the anticausal one; by
    default the only one there is, else lower. length: accepted for time-invariant systems, whose
    half-life does not depend on it.

    Returns (batch, head, state) in steps. Cost: O(length state) from logs, O(length state^3)
    otherwise. Source: MetaLA (Chou et al., 2024), section 3; Sieber et al. (2024), section 4.
    """
    r, used = one_side(system, side, "memory_half_life")
    A = r.A
    if isinstance(A, Identity):
        value = torch.full((1, 1, A.n_state), math.inf, dtype=torch.float64)
        expansive, method = 0, "identity: nothing is forgotten"
    elif isinstance(A, Shift):
        left = torch.arange(A.n_state, 0, -1, dtype=torch.float64)
        value = torch.ceil(left / max(A.amount, 1))[None, None]
        expansive, method = 0, "steps until a value leaves the register"
    else:
        logs = decay_logs(A)
        exact = logs is not None
        rate = -_mean_log(logs) if exact else _rate_by_norms(A, length)
        value = torch.where(rate > 0, math.log(2) / rate, math.inf)
        gone = torch.isinf(rate)
        if bool(gone.any()) and A.lead_shape()[1] > 1:
            value = torch.where(gone, _mean_survival(_survival(A)), value)
        expansive = int((rate < 0).sum())
        method = "mean log decay" if exact else "norms of products on unit vectors"
    lead = r.lead_shape()
    value = value.expand(lead[0], lead[2], -1)
    return to_xarray(
        value, ("batch", "head", "state"), name="memory_half_life",
        attrs={**side_attrs(system, r, used), "units": "step", "method": method,
               "expansive": expansive,
               "long_name": "steps until half of a state's content is left"},
    )  # fmt: skip


def survival_steps(system: System, *, side: Side | None = None) -> xr.DataArray:
    """For each step and state, how many further steps until half of what is there is left.

    The smallest m with || A_{t+m} ... A_{t+1} e_n || <= 1/2, between steps by interpolation of
    the logarithm (so a constant decay a gives ln(1/2)/ln a here too); infinite where that is not
    reached within the sequence. Returns (batch, time, head, state) in steps. Cost: O(length
    state) memory for scalar and diagonal transitions; dense ones O(length^2 state^3) time.
    """
    r, used = one_side(system, side, "survival_steps")
    lead = r.lead_shape()
    if isinstance(r.A, Identity):
        steps = torch.full((1, 1, 1, r.n_state), math.inf, dtype=torch.float64)
    else:
        steps = _survival(r.A)
    return to_xarray(
        steps.expand(*lead, r.n_state), ("batch", "time", "head", "state"), name="survival_steps",
        attrs={**side_attrs(system, r, used), "units": "step",
               "method": "first passage of 1/2, log-interpolated",
               "long_name": "steps until half of a state's content is left"},
    )  # fmt: skip


# -- rates -------------------------------------------------------------------------------------


def _mean_log(logs: Tensor) -> Tensor:
    return logs[:, 1:].mean(1) if logs.shape[1] > 1 else logs[:, 0]


def _rate_by_norms(A: Transition, length: int | None) -> Tensor:
    """-(1/steps) ln ||A_L ... A_2 e_n||, (batch, head, state)."""
    batch, own, head = A.lead_shape()
    steps = range(1, own) if own > 1 else range(max((length or 0) - 1, 256))
    X = _unit_vectors(A, batch, head)
    total = X.new_zeros(batch, head, A.n_state, dtype=torch.float64)
    for t in steps:
        X, log_norm = _move(A.at(t if own > 1 else 0), X)
        total = total + log_norm
    return -total / max(len(steps), 1)


def _unit_vectors(A: Transition, batch: int, head: int) -> Tensor:
    dtype = torch.complex128 if A.is_complex else torch.float64
    device = A.tensors()[0].device if A.tensors() else None
    eye = torch.eye(A.n_state, dtype=dtype, device=device)
    return eye.expand(batch, head, A.n_state, A.n_state)


def _move(A: Transition, X: Tensor) -> tuple[Tensor, Tensor]:
    """A X with unit columns, and the log of the norms they had."""
    X = A.apply(X)
    norm = torch.linalg.vector_norm(X, dim=-2)
    return X / norm.masked_fill(norm == 0, 1.0)[..., None, :], torch.log(norm)


def _survival(A: Transition) -> Tensor:
    """First passage of ||product e_n|| through 1/2 from every step, (batch, time, head, state)."""
    batch, length, head = A.lead_shape()
    out = torch.full((batch, length, head, A.n_state), math.inf, dtype=torch.float64)
    logs = decay_logs(A)
    logs = logs if logs is None else logs.expand(batch, length, head, -1)
    for start in range(length - 1):
        out[:, start] = (
            _passage(logs[:, start + 1 :].movedim(1, 0)) if logs is not None
            else _passage(_product_logs(A, start, length)))  # fmt: skip
    return out


def _product_logs(A: Transition, start: int, length: int) -> Tensor:
    batch, own, head = A.lead_shape()
    X = _unit_vectors(A, batch, head)
    logs = []
    for t in range(start + 1, length):
        X, log_norm = _move(A.at(t if own > 1 else 0), X)
        logs.append(log_norm)
    return torch.stack(logs)


def _passage(increments: Tensor) -> Tensor:
    """When the running sum of (time, ...) first falls to -ln 2, in steps with a fraction."""
    half = -math.log(2)
    total = torch.cumsum(increments, 0)
    hit = total <= half
    first = hit.to(torch.int8).argmax(0, keepdim=True)
    earlier = torch.cat([torch.zeros_like(total[:1]), total[:-1]])
    step, before = increments.gather(0, first)[0], earlier.gather(0, first)[0]
    share = torch.where(torch.isinf(step), 0.0, (half - before) / step)  # a reset takes no time
    return torch.where(hit.any(0), first[0] + share, math.inf)


def _mean_survival(steps: Tensor) -> Tensor:
    reached = torch.isfinite(steps)
    total = steps.masked_fill(~reached, 0.0).sum(1)
    return torch.where(reached.any(1), total / reached.sum(1).clamp(min=1), math.inf)


MEASURES = (memory_half_life, survival_steps)
