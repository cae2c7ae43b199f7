"""How a system becomes coefficient dynamics: finite states as they are, caches by their rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from dsf.coefficients import CoefficientDynamics
from dsf.errors import DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.factors import SoftmaxRows
from dsf.recurrence import Recurrence
from dsf.rotary import rotate
from dsf.shapes import Float
from dsf.transitions import BlockDiagonal, Identity
from dsf.wrappers import is_cache

TURN_ATOL = 1e-5
"""How far cos^2 + sin^2 of rotary tables may be from 1, their float32 rounding."""


def coefficient_dynamics(
    system: Recurrence,
    *,
    injection: Float[Tensor, "#batch #time #head"] | None = None,
    normaliser: Float[Tensor, "#batch #time #head"] | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    pairing: str = "half",
    length: int | None = None,
) -> CoefficientDynamics:
    """The coefficient dynamics (A_t, b_j, phi, eta) of a causal system; `weights` is its map.

    A recurrence with a finite state has phi the identity and A_t its own; it holds b_j k_j and
    q_t / eta_t as one, so b = eta = 1 unless `injection` and `normaliser` (batch, time, head) say
    what to take out of B and C. A cache read by softmax, forgetting, PaTH or sigmoid rows has phi
    = exp or sigmoid, A = I or what its rows hold, and finite n. rotation (cos, sin), the rotary
    tables (time, rotated) that query and key of softmax rows are turned by, with their pairing:
    then A_t is the rotation and q, k are those before it. length is that of a time-invariant
    system. An initial state has no part in it.

    Raises DsfTypeError on what is no causal recurrence, DsfUnsupportedError where the form does
    not cover the system (several inputs or outputs, a window, a mask, a bias, rows made another
    way), DsfValueError on tables that do not rotate and on an injection of zero. Cost: none;
    `weights` is O(length^2 state). Source: Sieber et al. (2025), arXiv 2510.09389.
    """
    name = "dsf.coefficient_dynamics"
    if not isinstance(system, Recurrence):
        raise DsfTypeError(
            f"{name}: system: expected a causal dsf.Recurrence, got {type(system)}."
        )
    system.validate(function=name)
    if not is_cache(system):
        if rotation is not None:
            raise DsfUnsupportedError(f"{name}: rotation: expected None but for softmax rows.")
        return _linear(system, injection, normaliser, length)
    if injection is not None or normaliser is not None:
        raise DsfUnsupportedError(
            f"{name}: injection, normaliser: expected None for a cache, whose rows fix both."
        )
    if system.B.offset or system.D is not None:  # type: ignore[union-attr]
        raise DsfUnsupportedError(f"{name}: system: expected a cache from its first slot, no D.")
    form = cache_form(system.C)
    if rotation is not None:
        form = _unrotated(form, rotation, pairing)
    return dataclasses.replace(form, system=system.system)


@functools.singledispatch
def cache_form(rows: Any) -> CoefficientDynamics:
    """The form of one kind of map rows; another file registers its own with `cache_form.register`.

    Raises DsfUnsupportedError for rows that nobody registered.
    """
    raise DsfUnsupportedError(
        f"dsf.coefficient_dynamics: system: rows of type {type(rows).__name__} are not of the "
        f"form phi(q_t.x_t) / eta_t, or nobody said how."
    )


@cache_form.register
def softmax_form(rows: SoftmaxRows) -> CoefficientDynamics:
    """A = I, b = scale, phi = exp, eta its sum (and the sink). Raises DsfUnsupportedError."""
    refuse_beyond_scores(rows)
    return CoefficientDynamics(
        Identity(rows.query.shape[-1]), scales(rows), shared_keys(rows), rows.query,
        sink=rows.sink, readout="exp", sums_to_one=True, softcap=rows.softcap,
    )  # fmt: skip


def scales(rows: SoftmaxRows) -> Tensor:
    """b_j of softmax rows, (1, 1, 1, 1)."""
    return rows.query.new_full((1, 1, 1, 1), rows.logit_scale)


def shared_keys(rows: SoftmaxRows) -> Tensor:
    """Keys with one copy a query head."""
    return rows.key.repeat_interleave(rows.query.shape[2] // rows.key.shape[2], 2)


def refuse_beyond_scores(rows: SoftmaxRows, *, bias: bool = False) -> None:
    """Raise DsfUnsupportedError where rows have more than scores, soft cap, sink (and bias)."""
    found = [
        name
        for name in ("window", "key_mask", "bias")
        if getattr(rows, name) is not None and not (bias and name == "bias")
    ]
    if found or not rows.causal or rows.query_start or rows.query.shape[1] != rows.key.shape[1]:
        raise DsfUnsupportedError(
            f"dsf.coefficient_dynamics: system: expected causal rows over all past keys, got "
            f"causal={rows.causal}, {', '.join(found) or 'no window, mask or bias'}, "
            f"{rows.query.shape[1]} queries from {rows.query_start} on {rows.key.shape[1]} keys."
        )


def _linear(
    r: Recurrence, injection: Tensor | None, normaliser: Tensor | None, length: int | None
) -> CoefficientDynamics:
    if r.n_input > 1 or r.n_output > 1:
        raise DsfUnsupportedError(
            f"dsf.coefficient_dynamics: system: expected one input and one output, got "
            f"{r.n_input} and {r.n_output}."
        )
    if injection is not None and not bool((injection != 0).all()):
        raise DsfValueError(
            "dsf.coefficient_dynamics: injection: expected no zeros (it is taken out of B), got "
            f"{int((injection == 0).sum())}."
        )
    B, C = r.dense_input_output()
    total = r.length if r.length != 1 or length is None else length
    key = B[..., 0].expand(-1, total, -1, -1)
    query = C[..., 0, :].expand(-1, total, -1, -1)
    b = (key.real.new_ones(1, 1, 1) if injection is None else injection)[..., None]
    return CoefficientDynamics(
        r.A, b, key / b, query if normaliser is None else query * normaliser[..., None],
        normaliser, skip=None if r.D is None else r.D[..., 0, 0], real_output=r.real_output,
        system=r.system,
    )  # fmt: skip


def _unrotated(
    form: CoefficientDynamics, rotation: tuple[Tensor, Tensor], pairing: str
) -> CoefficientDynamics:
    """Softmax of turned queries and keys as A_t = R_(t-1) R_t^T on those before the turn."""
    cos, sin = (x.to(form.query.dtype) for x in rotation)
    width, rotated = form.query.shape[-1], cos.shape[-1]
    if not isinstance(form.A, Identity) or cos.ndim != 2 or (width - rotated) % 2:
        raise DsfUnsupportedError(
            f"dsf.coefficient_dynamics: rotation: expected tables (time, rotated) for softmax "
            f"rows, with an even rest of width={width}, got {tuple(cos.shape)}."
        )
    query, key = (rotate(x, cos, -sin, pairing) for x in (form.query, form.key))
    order = torch.arange(rotated, device=cos.device)
    if pairing == "half":
        order = order.unflatten(0, (2, -1)).mT.flatten()
    c, s = (x[:, order].unflatten(-1, (-1, 2)) for x in (cos, sin))
    for off in (c * c + s * s - 1, c[..., 0] - c[..., 1], s[..., 0] - s[..., 1]):
        if off.numel() and float(off.abs().max()) > TURN_ATOL:
            raise DsfValueError(
                "dsf.coefficient_dynamics: rotation: expected tables that rotate pairs, got "
                f"{float(off.abs().max()):.1e} off. The released ZeroS tables do not rotate."
            )
    c, s = c[..., 0], s[..., 0]
    before = (torch.arange(len(c), device=c.device) - 1).clamp(min=0)
    now, turn = c * c[before] + s * s[before], s * c[before] - c * s[before]
    blocks = torch.stack([now, turn, -turn, now], -1).unflatten(-1, (2, 2))
    rest = torch.eye(2, dtype=c.dtype, device=c.device).expand(
        len(c), (width - rotated) // 2, 2, 2
    )
    every = torch.cat([order, torch.arange(rotated, width, device=cos.device)])
    return dataclasses.replace(
        form, A=BlockDiagonal(torch.cat([blocks, rest], 1)[None, :, None], width // 2),
        query=query[..., every], key=key[..., every],
    )  # fmt: skip
