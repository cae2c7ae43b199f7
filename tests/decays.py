"""The 12 adversarial decay families, as logarithm, sign and phase: data for every scan test.

A family is a function of a seeded generator and a shape whose axis 1 is time. Each scan must be
finite and exact on all of them, forwards and backwards, whatever its form.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor | None, Tensor | None]
Family = Callable[[torch.Generator, tuple[int, ...]], Parts]


def _uniform(g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def _constant(value: float) -> Family:
    log = math.log(value) if value else -math.inf
    return lambda g, shape: (torch.full(shape, log, dtype=torch.float64), None, None)


def _zero_or_one(g: torch.Generator, shape: tuple[int, ...]) -> Parts:
    return torch.where(_uniform(g, shape) < 0.5, -math.inf, 0.0), None, None


def _alternating(g: torch.Generator, shape: tuple[int, ...]) -> Parts:
    """1, 1e-20, 1, 1e-20, ... along time."""
    odd = torch.arange(shape[1]).view(1, -1, *(1,) * (len(shape) - 2)) % 2
    return (math.log(1e-20) * odd).expand(shape).to(torch.float64), None, None


def _drops(g: torch.Generator, shape: tuple[int, ...]) -> Parts:
    """Next to 1, and about one step in 30 almost nothing is kept."""
    slow = -0.01 * _uniform(g, shape)
    deep = -5 - 60 * _uniform(g, shape)
    return torch.where(_uniform(g, shape) < 1 / 30, deep, slow), None, None


def _negative(g: torch.Generator, shape: tuple[int, ...]) -> Parts:
    return torch.log(0.2 + 0.8 * _uniform(g, shape)), -torch.ones(shape), None


def _alternating_sign(g: torch.Generator, shape: tuple[int, ...]) -> Parts:
    odd = torch.arange(shape[1]).view(1, -1, *(1,) * (len(shape) - 2)) % 2
    sign = (1.0 - 2.0 * odd).expand(shape)
    return torch.log(0.5 + 0.5 * _uniform(g, shape)), sign, None


def _unit_circle(g: torch.Generator, shape: tuple[int, ...]) -> Parts:
    return torch.zeros(shape, dtype=torch.float64), None, 2 * math.pi * _uniform(g, shape)


def _complex_damped(g: torch.Generator, shape: tuple[int, ...]) -> Parts:
    return -0.3 * _uniform(g, shape), None, 2 * math.pi * _uniform(g, shape) - math.pi


FAMILIES: dict[str, Family] = {
    "one": _constant(1.0),
    "one_minus_1e-6": _constant(1 - 1e-6),
    "half": _constant(0.5),
    "1e-30": _constant(1e-30),
    "zero": _constant(0.0),
    "zero_or_one": _zero_or_one,
    "alternating_1_and_1e-20": _alternating,
    "sudden_drops": _drops,
    "negative": _negative,
    "alternating_sign": _alternating_sign,
    "complex_unit_circle": _unit_circle,
    "complex_damped": _complex_damped,
}
"""Name -> (log_decay, sign or None, phase or None), float64."""


def decay_parts(
    family: str, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64
) -> Parts:
    """log_decay, sign, phase of one family in `dtype`; what is rounded is rounded once, here."""
    parts = FAMILIES[family](torch.Generator().manual_seed(seed), shape)
    log, sign, phase = (None if x is None else x.to(dtype).contiguous() for x in parts)
    assert log is not None
    return log, sign, phase
