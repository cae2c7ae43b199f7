"""Hankel singular values from the coefficients, and how many of them are more than rounding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.gramians import one_minus_products
from dsf.map_blocks import check_cuts
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.shapes import Float, Int
from dsf.state_factors import (
    plain,
    reached_factors,
    require_double,
    require_stable,
    seen_factors,
    stationary_factors,
)
from dsf.transitions import Diagonal, Scalar
from dsf.transitions._base import mm

TRUST = 10.0
"""A value is trusted when it stands so many times above rounding: its first digit is right."""
UNIT = 2.0**-53
"""Unit round-off of float64."""


def hankel_singular_values(
    recurrence: Recurrence,
    cuts: Sequence[int] | None = None,
    *,
    strict: bool = True,
    max_memory: int | None = None,
) -> Float[Tensor, "batch head cut state"]:
    """Singular values of the blocks map[t:, :t] from the coefficients, without any map.

    At cut t the block is O_t L_t up to factors with orthonormal columns, future outputs seen from
    the states times states reached from past inputs, both kept as triangular factors,

        L_t L_t^H = A_t L_{t-1} L_{t-1}^H A_t^H + B_t B_t^H,    sigma = svd(O_t L_t)

    so that Gramians are never squared. `strict=False` takes map[t-1:, :t], what a recurrence with
    D = 0 carries. Returns (batch, head, cut, state) in float64, falling; a complex system with
    `real_output` counts real states (twice as many). How many of them stand above rounding:
    `trusted_states`. Cost: O(length state^3), memory O(cuts state^2). Raises DsfMemoryError when
    the factors would not fit. Source: Dewilde and van der Veen (1998), chapter 3.
    """
    return values_and_noise(recurrence, cuts, strict=strict, max_memory=max_memory)[0]


def trusted_states(
    recurrence: Recurrence,
    cuts: Sequence[int] | None = None,
    *,
    strict: bool = True,
    max_memory: int | None = None,
) -> Int[Tensor, "batch head cut"]:
    """How many Hankel singular values of each cut stand 10 times above their rounding.

    Rounding moves a value by at most about 2 state u ||O_t|| ||L_t|| (Frobenius norms of the
    factors, u = 2^-53), whatever its own size: smaller values are noise. Arguments and cost as
    `hankel_singular_values`.
    """
    sigma, noise = values_and_noise(recurrence, cuts, strict=strict, max_memory=max_memory)
    return count_trusted(sigma, noise)


def count_trusted(sigma: Tensor, noise: Tensor) -> Tensor:
    """The number of values (*, state) above TRUST times the noise (*)."""
    return (sigma > TRUST * noise[..., None]).sum(-1)


def values_and_noise(
    recurrence: Recurrence, cuts: Sequence[int] | None = None, *, strict: bool = True,
    max_memory: int | None = None,
) -> tuple[Float[Tensor, "batch head cut state"], Float[Tensor, "batch head cut"]]:  # fmt: skip
    """`hankel_singular_values`, and by how much rounding may have moved those of each cut."""
    r = plain(recurrence)
    batch, length, head = r.lead_shape()
    chosen = check_cuts("dsf.hankel_singular_values", cuts, length, strict=strict)
    n = r.n_state
    require_memory(
        "dsf.hankel_singular_values", "factors", ("cut", "batch", "head", "state", "state"),
        (len(chosen), batch, head, n, n), r.dtype, device=r.device, max_memory=max_memory,
        advice="Pass fewer cuts=.",
    )  # fmt: skip
    wanted = set(chosen)
    last = max(chosen, default=0)
    reached = {t: f for t, f in enumerate(reached_factors(r, last), 1) if t in wanted}
    found = {}
    backwards = seen_factors(r, length, strict=strict)
    for t, seen in zip(range(length, min(chosen, default=length + 1) - 1, -1), backwards,
                       strict=False):  # fmt: skip
        if t in reached:
            found[t] = _product_values(seen, reached[t])
    if not chosen:
        empty = torch.zeros(batch, head, 0, n, dtype=torch.float64, device=r.device)
        return empty, empty[..., 0]
    values, noises = zip(*(found[t] for t in chosen), strict=True)
    return torch.stack(values, dim=2), torch.stack(noises, dim=2)


def _product_values(seen: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
    norms = torch.linalg.matrix_norm(seen) * torch.linalg.matrix_norm(reached)
    return torch.linalg.svdvals(mm(seen, reached)), 2 * seen.shape[-1] * UNIT * norms


# -- time-invariant systems --------------------------------------------------------------------


def stationary_hankel_values(
    recurrence: Recurrence,
) -> tuple[Float[Tensor, "batch head state"], Int[Tensor, "batch head"]]:
    """Hankel singular values of a stable time-invariant system over all time, and trusted ones.

    sigma = sqrt(eig(W V)), W and V the stationary reachability and observability (own output
    counted) Gramians. Diagonal (or scalar) A with one input and one output: every value to full
    relative accuracy, however small, from W_ij = b_i conj(b_j) / (1 - a_i conj(a_j)). The pivoted
    Cholesky factor of such a matrix is a product of given numbers alone,

        after eliminating k:  W_ij rho_i conj(rho_j),  rho_i = (a_i - a_k) / (1 - a_i conj(a_k))

    and one-sided Jacobi rotations keep its accuracy; equal poles merge. Other systems: triangular
    factors by doubling, values right down to rounding times the product of the factors' norms.

    Returns sigma (batch, head, state), falling, and how many of them are trusted (batch, head).
    With `real_output` conjugate pairs are counted as two states. Raises DsfValueError unless the
    system is time-invariant with spectral radius below 1. Cost O(state^3).
    Source: Demmel (1999) for Cauchy-like matrices; Drmac (1998) for singular values of products.
    """
    require_double("dsf.stationary_hankel_values", recurrence)
    r = recurrence.dense_factors().to(torch.float64)
    if r.length != 1:
        raise DsfValueError(
            f"dsf.stationary_hankel_values: recurrence: expected time of size 1, got "
            f"time={r.length}. Use dsf.hankel.hankel_singular_values."
        )
    if isinstance(r.A, Diagonal | Scalar) and r.n_input == r.n_output == 1:
        require_stable("dsf.stationary_hankel_values", r)
        return _structured(r)
    reached, seen = stationary_factors(plain(r))
    sigma, noise = _product_values(seen, reached)
    return sigma, count_trusted(sigma, noise)


def _structured(r: Recurrence) -> tuple[Tensor, Tensor]:
    batch, _, head = r.lead_shape()
    n = r.n_state
    A = r.A if isinstance(r.A, Diagonal) else r.A.widen()
    assert isinstance(A, Diagonal)
    assert isinstance(r.B, Tensor)
    assert isinstance(r.C, Tensor)
    shape = (batch, head, n)
    log = A.log_decay[:, 0].expand(shape)
    sign = (torch.ones_like(log) if A.sign is None else A.sign[:, 0]).expand(shape)
    phase = (torch.zeros_like(log) if A.phase is None else A.phase[:, 0]).expand(shape)
    b, c = r.B[:, 0, :, :, 0].expand(shape), r.C[:, 0, :, 0].expand(shape)
    if r.real_output and r.dtype.is_complex:  # Re(C h): the pair of h and its conjugate, halved
        log, sign = torch.cat([log, log], -1), torch.cat([sign, sign], -1)
        phase = torch.cat([phase, -phase], -1)
        b, c = torch.cat([b, b.conj()], -1), torch.cat([c, c.conj()], -1) / 2
    gap = one_minus_products(log, phase, sign)
    rho = _differences(log, phase, sign) / gap
    sigma = torch.zeros(log.shape, dtype=torch.float64)
    pieces = [x.cpu().numpy() for x in (gap, rho, b, c)]
    for index in np.ndindex(batch, head):
        g, blaschke, write, read = (x[index] for x in pieces)
        reached = _cauchy_factor(np.outer(write, write.conj()) / g, blaschke)
        seen = _cauchy_factor(np.outer(read.conj(), read) / g.conj(), blaschke.conj())
        values = _jacobi_values(seen.conj().T @ reached)
        sigma[index][: len(values)] = torch.from_numpy(values)
    return sigma.to(r.device), torch.full((batch, head), sigma.shape[-1], dtype=torch.int64)


def _differences(log: Tensor, phase: Tensor, sign: Tensor) -> Tensor:
    """a_i - a_k to full relative accuracy, a = sign exp(log + i phase)."""
    first, second = log[..., :, None], log[..., None, :]
    larger, smaller = torch.maximum(first, second), torch.minimum(first, second)
    step = torch.where(smaller == larger, 0.0, smaller - larger)  # -inf - -inf: two exact zeros
    same = sign[..., :, None] * sign[..., None, :] > 0
    modulus = torch.exp(larger)
    angle = phase[..., :, None] - phase[..., None, :]
    if not bool(phase.any()):
        size = torch.where(same, -torch.expm1(step), 1 + torch.exp(step)) * modulus
        up = torch.where(first >= second, 1.0, -1.0)
        return size * torch.where(same, up * sign[..., :, None], sign[..., :, None])
    # for |a_i| >= |a_k|: a_i - a_k = a_i (1 - m e^(-i x)); else the same with i and k swapped
    turned = torch.where(same, angle, angle + torch.pi)
    turned = torch.where(first >= second, turned, -turned)
    m = torch.exp(step)
    ratio = torch.complex(
        -torch.expm1(step) + 2 * m * torch.sin(turned / 2) ** 2, m * torch.sin(turned)
    )
    leading = torch.where(first >= second, phase[..., :, None], phase[..., None, :])
    factor = torch.where(first >= second, sign[..., :, None], -sign[..., None, :])
    return ratio * torch.polar(modulus, leading) * factor


def _cauchy_factor(W: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """F with W = F F^H, columns falling, by pivoting and multiplications alone."""
    W = W.copy()
    left = np.ones(len(W), dtype=bool)
    columns = []
    for _ in range(len(W)):
        size = np.where(left, np.real(np.diagonal(W)), -1.0)
        k = int(size.argmax())
        if size[k] <= 0:
            break
        columns.append(np.where(left, W[:, k], 0) / np.sqrt(size[k]))
        left[k] = False
        W *= np.outer(rho[:, k], rho[:, k].conj())
    return np.stack(columns, axis=1) if columns else np.zeros((len(W), 0), W.dtype)


def _jacobi_values(P: np.ndarray) -> np.ndarray:
    """Singular values of a graded matrix, falling, by one-sided Jacobi on its R."""
    from scipy.linalg import qr

    if not P.size or not np.abs(P).max():
        return np.zeros(min(P.shape))
    scale = np.abs(P).max()
    upper = np.asarray(qr(P / scale, mode="r", pivoting=True)[0])
    X = upper.conj().T.copy()
    n = X.shape[1]
    players = np.arange(n + n % 2)
    for _ in range(60):
        largest = 0.0
        for _ in range(len(players) - 1):
            half = len(players) // 2
            i, j = players[:half], players[half:][::-1]
            kept = (i < n) & (j < n)
            largest = max(largest, _rotate(X, i[kept], j[kept]))
            players = np.concatenate([players[:1], np.roll(players[1:], 1)])
        if largest <= 4 * n * UNIT:
            break
    return np.sort(np.sqrt((np.abs(X) ** 2).sum(0)))[::-1] * scale


def _rotate(X: np.ndarray, i: np.ndarray, j: np.ndarray) -> float:
    """Make columns i and j orthogonal, pair by pair; the largest cosine there was."""
    x, y = X[:, i], X[:, j]
    a, b = (np.abs(x) ** 2).sum(0), (np.abs(y) ** 2).sum(0)
    g = (x.conj() * y).sum(0)
    size = np.abs(g)
    cosine = np.divide(size, np.sqrt(a) * np.sqrt(b), out=np.zeros_like(a), where=a * b > 0)
    turn = cosine > UNIT
    if not turn.any():
        return 0.0
    x, y, a, b, g, size = x[:, turn], y[:, turn], a[turn], b[turn], g[turn], size[turn]
    zeta = (b - a) / (2 * size)
    t = np.where(zeta < 0, -1.0, 1.0) / (np.abs(zeta) + np.hypot(1, zeta))
    cos = 1 / np.hypot(1, t)
    sin = cos * t
    y = y * (g.conj() / size)
    X[:, i[turn]], X[:, j[turn]] = cos * x - sin * y, sin * x + cos * y
    return float(cosine.max())
