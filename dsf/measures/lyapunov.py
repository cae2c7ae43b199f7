"""At which rates does a transition forget, direction by direction?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.map_blocks import Side
from dsf.measures._one_side import decay_logs, dense_step, matrix_dtype, one_side, side_attrs
from dsf.memory import require_memory
from dsf.transitions import Transition
from dsf.wrappers import System

__all__ = ["lyapunov_spectrum"]

SWEEPS = 20
"""QR sweeps at most; long products are done after three."""
GAP = 1.0
"""Singular values nearer than this (in nats) after all sweeps are taken apart by an SVD."""
SETTLED = 1e-12
"""Sweeps end when no log singular value moves by more than this times 1 + its size (nats)."""
ROUNDING = 4.0
"""A diagonal of R below so many n u ||A_t|| is what rounding left of a zero."""


def lyapunov_spectrum(system: System, *, side: Side | None = None) -> xr.DataArray:
    """Lyapunov exponents of the transition: the mean log growth of its states, falling.

        lambda_i = 1/(L-1) ln sigma_i(A_L ... A_2),    sigma_i the singular values

    Scalar and diagonal transitions: the mean of their logs, exact. A time-invariant one: the log
    moduli of its eigenvalues, the limit of long products. Every other one by the QR iteration
    along the sequence, A_t Q_(t-1) = Q_t R_t, repeated on R_2^H ... R_L^H until the sums of
    ln |R_t,ii| stand still; groups that are still moving then (equal or nearly equal values) are
    taken apart by an SVD of their own diagonal blocks. The whole product, which would underflow,
    is never formed. -inf for an exact zero: a direction that is wiped out. attrs: `sweeps`,
    `change` (what is left of doubt, relative to 1 + |ln sigma_i|), `at_rounding`, how many finite
    exponents rest on a number that is no more than the rounding of a zero (a write strength of
    exactly 1 in the delta rule can leave those). A_1 acts on the initial state alone and does not
    count.

    Under h'_t = T_t h_t the exponents of a long sequence do not change as long as T_t and its
    inverse stay bounded (by ln cond(T)/(L-1) at most); decays moved into keys and queries are no
    such change of basis.

    Returns (batch, head, state) in 1/step. Cost: O(length state) from logs, else O(sweeps length
    state^3) and memory O(length state^2), refused when it does not fit (DsfMemoryError). Source:
    Benettin et al. (1980); sweeps: product singular values, Oliveira and Stewart (2000).
    """
    r, used = one_side(system, side, "lyapunov_spectrum")
    batch, _, head = r.lead_shape()
    logs = decay_logs(r.A)
    own = r.A.lead_shape()[1]
    extra: dict = {"sweeps": 0, "change": 0.0, "at_rounding": 0}
    if logs is not None:
        steps = logs[:, 1:] if own > 1 else logs
        value = steps.mean(1).sort(-1, descending=True).values
        method = "mean log decay"
    elif own == 1:
        moduli = torch.linalg.eigvals(dense_step(r.A, 0)).abs()
        value = torch.log(moduli).sort(-1, descending=True).values
        method = "log modulus of the eigenvalues, time-invariant"
    else:
        total, extra = _by_sweeps(r.A)
        value, method = total / (own - 1), "QR iteration along the sequence, repeated"
    return to_xarray(
        value.expand(batch, head, -1), ("batch", "head", "state"), name="lyapunov_spectrum",
        attrs={**side_attrs(system, r, used), **extra, "units": "1/step", "method": method,
               "long_name": "Lyapunov exponent",
               "invariance": "kept by changes of basis that stay bounded, as length grows"},
    )  # fmt: skip


def _by_sweeps(A: Transition) -> tuple[Tensor, dict]:
    """ln sigma_i(A_L ... A_2), falling, and how they were had."""
    batch, length, head = A.lead_shape()
    n, dtype = A.n_state, matrix_dtype(A)
    require_memory(
        "dsf.lyapunov_spectrum", "triangular factors",
        ("time", "batch", "head", "state", "state"), (2 * length, batch, head, n, n), dtype,
        advice="Measure fewer steps with dsf.slice_time.",
    )  # fmt: skip
    factors, total, small = _sweep((dense_step(A, t) for t in range(1, length)), batch, head)
    change, sweeps = math.inf, 1
    while sweeps < SWEEPS and (change > SETTLED or sweeps < 3):
        before = total
        factors, total, doubtful = _sweep((R.mH for R in reversed(factors)), batch, head)
        small, sweeps = small | doubtful, sweeps + 1
        # sums of many logs round themselves: relative to their size
        moved = (total - before).abs() / (1 + total.abs())
        change = float(torch.where(total == before, 0.0, moved).max()) if n else 0.0
    if change > SETTLED:
        total, change = _apart(factors, total)
    at_rounding = int((small & torch.isfinite(total)).sum())
    return total.sort(-1, descending=True).values, {
        "sweeps": sweeps, "change": change, "at_rounding": at_rounding}  # fmt: skip


def _sweep(
    matrices: Iterable[Tensor], batch: int, head: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The triangular factors of a product from its first matrix on, sums of ln |R_ii|, doubts."""
    Q = None
    factors = []
    for matrix in matrices:
        M = matrix.expand(batch, head, *matrix.shape[-2:])
        Q, R = torch.linalg.qr(M if Q is None else M @ Q)
        factors.append(R)
    diagonal = torch.stack([R.diagonal(dim1=-2, dim2=-1).abs() for R in factors])
    scale = torch.stack([torch.linalg.matrix_norm(R) for R in factors])[..., None]
    unit = ROUNDING * diagonal.shape[-1] * torch.finfo(diagonal.dtype).eps / 2
    doubtful = ((diagonal <= unit * scale) & (diagonal > 0)).any(0)
    return factors, torch.log(diagonal).sum(0), doubtful


def _apart(factors: list[Tensor], total: Tensor) -> tuple[Tensor, float]:
    """Groups of close values by the SVD of their diagonal blocks' product, and its rounding.

    Diagonal blocks of a product of block triangular matrices are products of diagonal blocks, and
    after all sweeps what couples different groups is below exp(-2 GAP SWEEPS).
    """
    total = total.clone()
    doubt = 0.0
    for b, h in itertools.product(*(range(s) for s in total.shape[:2])):
        line = total[b, h].tolist()
        for start, stop in _groups(line):
            scale, spread = 0.0, 0.0
            P = torch.eye(stop - start, dtype=factors[0].dtype)
            for R in factors:
                P = R[b, h, start:stop, start:stop] @ P
                norm = float(torch.linalg.matrix_norm(P))
                scale, P = scale + math.log(norm), P / norm
                sigma = torch.linalg.svdvals(P)
                spread = max(spread, float(sigma[0] / sigma[-1].clamp(min=1e-300)))
            total[b, h, start:stop] = scale + torch.log(torch.linalg.svdvals(P))
            doubt = max(doubt, (stop - start) * 2.0**-53 * spread)
    return total, doubt


def _groups(line: list[float]) -> list[tuple[int, int]]:
    """Runs of at least two finite neighbours that are nearer than GAP."""
    close = [math.isfinite(a) and math.isfinite(b) and abs(a - b) < GAP
             for a, b in itertools.pairwise(line)]  # fmt: skip
    found, start = [], 0
    for i, near in enumerate([*close, False]):
        if not near:
            if i > start:
                found.append((start, i + 1))
            start = i + 1
    return found


MEASURES = (lyapunov_spectrum,)
