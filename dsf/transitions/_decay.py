"""Decay numbers: log modulus with an optional sign or phase, shared by scalar and diagonal."""

from __future__ import annotations

import dataclasses
from typing import Self

import torch
from torch import Tensor

from dsf.transitions._base import Transition


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

    def decay(self) -> Tensor:
        """The numbers themselves."""
        modulus = torch.exp(self.log_decay)
        if self.sign is not None:
            modulus = modulus * self.sign
        return modulus if self.phase is None else torch.polar(torch.ones_like(
            self.phase), self.phase) * modulus  # fmt: skip

    def _product(self, earlier: Self) -> dict[str, Tensor | None]:
        return {
            "log_decay": self.log_decay + earlier.log_decay,
            "sign": _join(self.sign, earlier.sign, torch.mul),
            "phase": _join(self.phase, earlier.phase, torch.add),
        }


def _join(a: Tensor | None, b: Tensor | None, op: object) -> Tensor | None:
    if a is None:
        return b
    return a if b is None else op(a, b)  # type: ignore[operator]


def split_decay(decay: Tensor) -> dict[str, Tensor | None]:
    """`log_decay`, `sign`, `phase` of given decay numbers, exact zeros and negatives included.

    The gradient with respect to a decay of exactly zero is taken as zero: its logarithm has none.
    """
    if decay.is_complex():
        modulus = decay.abs()
        return {"log_decay": _safe_log(modulus), "sign": None, "phase": torch.angle(decay)}
    negative = decay.detach() < 0
    sign = torch.where(negative, -1.0, 1.0).to(decay.dtype) if bool(negative.any()) else None
    return {"log_decay": _safe_log(decay.abs()), "sign": sign, "phase": None}


def _safe_log(modulus: Tensor) -> Tensor:
    zero = modulus == 0
    return torch.log(torch.where(zero, 1.0, modulus)).masked_fill(zero, -torch.inf)
