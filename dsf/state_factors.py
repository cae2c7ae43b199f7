"""The states reached and seen, as triangular factors of the Gramians, which are never formed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dsf.algebra import realified
from dsf.errors import DsfValueError
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.transitions import Diagonal, Identity
from dsf.transitions._decay import Decay


def plain(recurrence: Recurrence) -> Recurrence:
    """Double precision, dense B and C, and no real part to take: what the factors work on."""
    r = recurrence
    require_double("dsf.plain", r)
    paired = r.real_output and r.dtype.is_complex
    return (realified(r) if paired else r.dense_factors()).to(torch.float64)


def require_double(function: str, r: Recurrence) -> None:
    """Raise DsfMemoryError when B and C in double precision would not fit: they may be views."""
    many = sum(x.numel() for x in (r.B, r.C) if isinstance(x, Tensor))
    require_memory(
        function, "B and C", ("number",), (many,), torch.float64, device=r.device,
        advice="Take fewer samples or heads at a time, or stretches made by dsf.slice_time.",
    )  # fmt: skip


def at(x: Tensor | object, t: int) -> Tensor:
    """Step t of a dense coefficient; time of size 1 is shared."""
    assert isinstance(x, Tensor)
    return x[:, t if x.shape[1] > 1 else 0]


def reached_factors(r: Recurrence, length: int, start: Tensor | None = None) -> Iterator[Tensor]:
    """L_t with W_t = L_t L_t^H for t = 1..length, by QR: the Gramian itself is never formed.

    start: L_0, zeros unless given.
    """
    factor = nothing_yet(r) if start is None else start
    for t in range(length):
        moved = r.A.at(t).apply(factor).to(r.dtype).expand(factor.shape)
        written = at(r.B, t).to(r.dtype).expand(*factor.shape[:-1], -1)
        factor = triangle(torch.cat([moved, written], -1).mT, r.n_state).mT
        yield factor


def initial_columns(r: Recurrence) -> tuple[Tensor | None, Tensor]:
    """h_0 as what an input before the first step has written, (batch, head, state, channel).

    And L_0, its triangular factor: zeros where there is no initial state, which is None then.
    """
    if r.initial_state is None:
        return None, nothing_yet(r)
    batch, _, head = r.lead_shape()
    start = r.initial_state.to(r.dtype).expand(batch, head, r.n_state, -1)
    return start, triangle(start.mT, r.n_state).mT


def seen_factors(r: Recurrence, length: int, *, strict: bool) -> Iterator[Tensor]:
    """O_t with V_t = O_t^H O_t for t = length..1, with or without the own output."""
    later = nothing_yet(r)
    for t in range(length - 1, -1, -1):
        own = at(r.C, t).to(r.dtype).expand(*later.shape[:-2], -1, -1)
        both = triangle(torch.cat([own, later], -2), r.n_state)
        yield later if strict else both
        carried = r.A.at(t).apply_transposed(both.mT).mT.to(r.dtype).expand(both.shape)
        later = triangle(carried, r.n_state)


def triangle(x: Tensor, n: int) -> Tensor:
    """The R of a QR of x, with exactly n rows; x^H x is what it stands for."""
    found = torch.linalg.qr(x, mode="r").R
    return torch.nn.functional.pad(found, (0, 0, 0, n - found.shape[-2]))


def stationary_factors(r: Recurrence) -> tuple[Tensor, Tensor]:
    """(L, O) of the fixed points, W = L L^H and V = O^H O with the own output, by doubling.

    L <- triangle of [L, A^(2^k) L],    k = 0, 1, ... until A^(2^k) is nothing
    """
    require_stable("dsf.stationary_hankel_values", r)
    batch, _, head = r.lead_shape()
    n = r.n_state
    power = r.dense_transition()[:, 0].to(r.dtype).expand(batch, head, n, n)
    reached = triangle(at(r.B, 0).to(r.dtype).expand(batch, head, n, -1).mT, n).mT
    seen = triangle(at(r.C, 0).to(r.dtype).expand(batch, head, -1, n), n)
    for _ in range(64):
        reached = triangle(torch.cat([reached, power @ reached], -1).mT, n).mT
        seen = triangle(torch.cat([seen, seen @ power], -2), n)
        power = power @ power
        if float(power.abs().amax() if power.numel() else 0.0) < 2.0**-60:
            break
    return reached, seen


def require_stable(function: str, r: Recurrence) -> None:
    """Raise DsfValueError unless the spectral radius of a time-invariant A is below 1."""
    if isinstance(r.A, Identity):
        modulus = torch.ones(1, 1, r.n_state, dtype=torch.float64)
    elif isinstance(r.A, Decay):
        logs = r.A.log_decay[:, 0]
        logs = logs if isinstance(r.A, Diagonal) else logs[..., None]
        modulus = torch.exp(logs).masked_fill(logs < 0, 0.0)  # 1 - 1e-20 is below 1 as well
    else:
        modulus = torch.linalg.eigvals(r.dense_transition()[:, 0]).abs()
    if not modulus.numel() or float(modulus.amax()) < 1:
        return
    where = np.unravel_index(int(modulus.argmax()), modulus.shape)
    batch, head, state = (int(i) for i in where)
    place = f"head {head}, state {state}" if isinstance(r.A, Identity | Decay) else f"head {head}"
    place = f"batch {batch}, {place}" if modulus.shape[0] > 1 else place
    raise DsfValueError(
        f"{function}: A: expected spectral radius below 1, got {float(modulus.amax()):.10g} "
        f"({place}). Use a finite horizon instead."
    )


def nothing_yet(r: Recurrence) -> Tensor:
    """A Gramian of zeros, (batch, head, state, state)."""
    batch, _, head = r.lead_shape()
    return torch.zeros(batch, head, r.n_state, r.n_state, dtype=r.dtype, device=r.device)
