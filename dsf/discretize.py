"""From continuous time to steps: diagonal dh/ds = A h + B u over a step of given size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.shapes import Float, Inexact
from dsf.transitions import Diagonal

_SERIES_RADIUS = 0.5
_SERIES_TERMS = 16  # 0.5^16 / 17! is 4e-20: below the round-off of any type in use


class Discretized(NamedTuple):
    """A_t as a transition, and the factor that turns the continuous B into B_t."""

    transition: Diagonal
    gain: Tensor


def zero_order_hold(
    A: Inexact[Tensor, "#batch #time #head #state"],
    step_size: Float[Tensor, "#batch #time #head #state"],
) -> Discretized:
    """The exact step when the input is constant over it, also where A is 0.

        A_t = exp(s A),    gain = (exp(s A) - 1) / A = s phi_1(s A),   phi_1(0) = 1

    with s the step size (seconds, or any unit of which A is the inverse). A (batch, time, head,
    state), real or complex; step_size with size 1 where it is shared. Value and gradients of
    the gain are exact through A = 0. Cost: elementwise. Source: Gu et al. (2022), S4D, section 3.
    """
    z = A * step_size
    return Discretized(_exponential(z), step_size * exponential_quotient(z))


def exponential_euler(
    A: Inexact[Tensor, "#batch #time #head #state"],
    step_size: Float[Tensor, "#batch #time #head #state"],
) -> Discretized:
    """Exact decay with a first-order input, the rule of S6 and SSD.

        A_t = exp(s A),    gain = s

    Shapes as in `zero_order_hold`. Source: Gu and Dao (2023), section 3.2 and released code.
    """
    return Discretized(_exponential(A * step_size), step_size)


def forward_euler(
    A: Inexact[Tensor, "#batch #time #head #state"],
    step_size: Float[Tensor, "#batch #time #head #state"],
) -> Discretized:
    """The explicit first-order step; unstable where |1 + s A| > 1.

        A_t = 1 + s A,    gain = s

    Shapes as in `zero_order_hold`. 1 + s A = 0 is an exact zero of A_t.
    """
    z = A * step_size
    if z.is_complex():
        log_decay = 0.5 * _log1p(2 * z.real + z.real.square() + z.imag.square())
        return Discretized(Diagonal(log_decay, phase=torch.atan2(z.imag, 1 + z.real)), step_size)
    negative = z.detach() < -1
    log_decay = torch.where(negative, _log1p(-2 - z), _log1p(z))
    return Discretized(Diagonal(log_decay, _sign(negative, z)), step_size)


def bilinear(
    A: Inexact[Tensor, "#batch #time #head #state"],
    step_size: Float[Tensor, "#batch #time #head #state"],
) -> Discretized:
    """The trapezoidal rule (Tustin): a stable A stays stable for every step size.

        A_t = (1 + s A / 2) / (1 - s A / 2),    gain = s / (1 - s A / 2)

    Shapes as in `zero_order_hold`. Source: Gu et al. (2022), S4, equation 3.
    """
    z = A * step_size
    gain = step_size / (1 - z / 2)
    # log of |1 + z/2|^2 / |1 - z/2|^2 without forming 1 + z/2: a slow decay keeps its digits
    real = z.real if z.is_complex() else z
    squared = (1 - z / 2).abs().square()
    log_decay = 0.5 * _log1p(2 * real / squared)
    if z.is_complex():
        phase = torch.angle(1 + z / 2) - torch.angle(1 - z / 2)
        return Discretized(Diagonal(log_decay, phase=phase), gain)
    negative = (z.detach() < -2) | (z.detach() > 2)
    return Discretized(Diagonal(log_decay, _sign(negative, z)), gain)


RULES: dict[str, Callable[[Tensor, Tensor], Discretized]] = {
    "zero_order_hold": zero_order_hold,
    "exponential_euler": exponential_euler,
    "forward_euler": forward_euler,
    "bilinear": bilinear,
}


def discretized(
    A: Inexact[Tensor, "#batch #time #head #state"],
    step_size: Float[Tensor, "#batch #time #head #state"],
    rule: str = "zero_order_hold",
) -> Discretized:
    """Transition and input gain by the named rule of `RULES`; DsfValueError for another name."""
    if rule not in RULES:
        raise DsfValueError(f"dsf.discretize: rule: expected one of {list(RULES)}, got {rule!r}.")
    return RULES[rule](A, step_size)


def exponential_quotient(z: Inexact[Tensor, "*axes"]) -> Inexact[Tensor, "*axes"]:
    """phi_1(z) = (exp(z) - 1) / z, with phi_1(0) = 1 and every derivative exact at 0."""
    small = z.detach().abs() < _SERIES_RADIUS
    near = torch.where(small, z, torch.zeros_like(z))
    series = torch.zeros_like(z)
    for k in reversed(range(_SERIES_TERMS)):
        series = series * near + 1 / math.factorial(k + 1)
    far = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, series, torch.expm1(far) / far)


def _exponential(z: Tensor) -> Diagonal:
    return Diagonal(z.real, phase=z.imag) if z.is_complex() else Diagonal(z)


def _log1p(x: Tensor) -> Tensor:
    """log(1 + x) with -inf at x <= -1 and no gradient there."""
    zero = x.detach() <= -1
    return torch.log1p(torch.where(zero, torch.zeros_like(x), x)).masked_fill(zero, -torch.inf)


def _sign(negative: Tensor, like: Tensor) -> Tensor | None:
    if not bool(negative.any()):
        return None
    return torch.where(negative, -1.0, 1.0).to(like.dtype)
