"""Decay numbers: log modulus with an optional sign or phase, shared by scalar and diagonal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dsf.shapes import Float, Inexact
from dsf.transitions._base import Transition, is_traced

Parts = tuple[Tensor, Tensor | None, Tensor | None]
"""log_decay, sign, phase."""


@dataclasses.dataclass(frozen=True)
class Decay(Transition):
    """Numbers a = sign * exp(log_decay + i phase); exact zeros are log_decay = -inf.

    The log modulus keeps 1 - 1e-6 apart from 1 in float32 over a million steps; the sign is exact
    and carries no gradient; a phase (radians) makes the numbers complex.
    """

    log_decay: Tensor
    sign: Tensor | None = None
    phase: Tensor | None = None

    @property
    def is_complex(self) -> bool:
        """Whether a phase is present."""
        return self.phase is not None

    def decay(self) -> Inexact[Tensor, "*shape"]:
        """The numbers themselves, in the shape of `log_decay`."""
        modulus = torch.exp(self.log_decay)
        if self.sign is not None:
            modulus = modulus * self.sign
        if self.phase is None:
            return modulus
        # complex numbers need parts of 32 bits at least
        phase = self.phase.to(torch.promote_types(self.phase.dtype, torch.float32))
        return torch.polar(torch.ones_like(phase), phase) * modulus

    def _product(self, earlier: Decay) -> Parts:
        return (
            self.log_decay + earlier.log_decay,
            _join(self.sign, earlier.sign, torch.mul),
            _join(self.phase, earlier.phase, torch.add),
        )


def _join(a: Tensor | None, b: Tensor | None, op: Callable[..., Tensor]) -> Tensor | None:
    if a is None:
        return b
    return a if b is None else op(a, b)


def split_decay(decay: Inexact[Tensor, "*shape"]) -> Parts:
    """`log_decay`, `sign`, `phase` of given decay numbers, exact zeros and negatives included.

    Without negatives the sign is None (where the numbers cannot be looked at it is always there).
    The gradient with respect to a decay of exactly zero is taken as zero: its logarithm has none.
    """
    if decay.is_complex():
        return _safe_log(decay.abs()), None, torch.angle(decay)
    negative = decay.detach() < 0
    sign = None
    if is_traced() or bool(negative.any()):
        sign = torch.where(negative, -1.0, 1.0).to(decay.dtype)
    return _safe_log(decay.abs()), sign, None


def _safe_log(modulus: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    zero = modulus == 0
    return torch.log(torch.where(zero, 1.0, modulus)).masked_fill(zero, -torch.inf)
