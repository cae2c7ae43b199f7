"""Leading singular values of the blocks of a long map, from scans and adjoint scans alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dsf.errors import DsfUnsupportedError
from dsf.map_blocks import Side
from dsf.scanning import scan
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core, total_length

_SEED = 0
_PASSES = 3
_TURNS = 3
PROBES, SLACK = 12, 5.0
"""Random vectors that test what a sketch left out, and the factor on the largest of them."""
FAILURE = SLACK**-PROBES
"""Chance that the bound of one block does not hold, 4.1e-9."""


def sketch_gap(system: object) -> str:
    """Why a system cannot be sketched; "" if it can."""
    if not isinstance(system, Anticausal | Bidirectional | Gated) and not hasattr(system, "A"):
        return "expected a dsf system, got a map. Leave sketch= out."
    r = core(system)  # type: ignore[arg-type]
    if isinstance(system, Gated) or r.n_input > 1 or r.n_output > 1:
        return (
            "expected a system with one input, one output and no gate by channel. Measure "
            "system.system, or leave sketch= out."
        )
    if r.dtype.is_complex and not r.real_output:
        return "expected a real map, got a complex one. Use dsf.realified, or leave sketch= out."
    return ""


def sketched_singular_values(
    system: System, cuts: list[int], size: int, side: Side
) -> tuple[Tensor, Tensor]:
    """The `size` largest singular values s of every block, and a bound e on all that is left.

    Randomised range finding with two power iterations: random values before the cut are scanned,
    outputs after it orthonormalised (Q), and carried back by the adjoint scan, which is the scan's
    own gradient since it is linear. The block H has

        s_k <= sigma_k <= sqrt(s_k^2 + e^2)  and  sigma_{size+1} <= e,    e >= ||(I - Q Q^H) H||

    where e^5 = 5 sqrt(2 / pi) times the largest of 12 norms ||R R^T R R^T R w||, R = (I - Q Q^T) H
    and w normal, independent of Q: too small with a chance of 5^-12 = 4.1e-9 a block at most (the
    lemma for the matrix R R^T R R^T R, whose norm is ||R||^5, which takes most of the slack off).
    s (batch, head, cut, size) and e (batch, head, cut) in float64. Memory O(length x size); cost
    per cut: three scans and three gradients of `size` channels, and three and two of 12.
    Source: Halko, Martinsson and Tropp (2011), algorithm 4.4 and lemma 4.1.
    """
    if gap := sketch_gap(system):
        raise DsfUnsupportedError(f"dsf.epsilon_rank: sketch: {gap}")
    r = core(system)
    batch, _, head = r.lead_shape()
    length = total_length(system)
    generator = torch.Generator().manual_seed(_SEED)
    sigma = torch.zeros(batch, head, len(cuts), size, dtype=torch.float64)
    left = torch.zeros(batch, head, len(cuts), dtype=torch.float64)
    for i, cut in enumerate(cuts):
        past, future = slice(0, cut), slice(cut, length)
        if side == "upper":
            past, future = future, past
        k = min(size, cut, length - cut)
        n_past = past.stop - past.start
        start = torch.randn(batch, n_past, head, k, generator=generator)
        probes = torch.randn(batch, n_past, head, PROBES, generator=generator)
        forward, adjoint = _block(system, past, future, length)
        values, basis = _leading(forward, adjoint, start.to(r.device))
        sigma[:, :, i, :k] = values.cpu()
        if k < min(cut, length - cut):
            left[:, :, i] = _left_out(forward, adjoint, probes.to(r.device), basis).cpu()
    return sigma, left


def _block(
    system: System, past: slice, future: slice, length: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The block H: past values -> future outputs, and its transpose."""

    def place(x: Tensor, where: slice) -> Tensor:
        whole = x.new_zeros(x.shape[0], length, *x.shape[2:])
        whole[:, where] = x
        return whole

    def forward(u: Tensor) -> Tensor:
        with torch.no_grad():
            return scan(system, place(u, past), allow_nonfinite=True)[:, future]

    def adjoint(y: Tensor) -> Tensor:
        with torch.enable_grad():
            u = place(y.new_zeros(y.shape[0], past.stop - past.start, *y.shape[2:]), past)
            u.requires_grad_()
            out = scan(system, u, allow_nonfinite=True)
            return torch.autograd.grad(out, u, place(y, future).to(out.dtype))[0][:, past]

    return forward, adjoint


def _leading(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], start: Tensor
) -> tuple[Tensor, Tensor]:
    """Singular values of Q^T H, Q an orthonormal basis of what H (H^T H) makes of `start`."""
    carried = start
    for _ in range(_PASSES):
        basis = _orthonormal(forward(carried))
        carried = adjoint(basis)
        last, carried = carried, _orthonormal(carried)
    return torch.linalg.svdvals(last.transpose(1, 2).double()), basis


def _left_out(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], probes: Tensor,
    basis: Tensor,
) -> Tensor:  # fmt: skip
    """The bound e on ||R||, R = (I - Q Q^T) H, (batch, head)."""
    Q = basis.transpose(1, 2)
    log_norm = torch.zeros(probes.shape[0], probes.shape[2], PROBES, dtype=torch.float64,
                           device=probes.device)  # fmt: skip
    for turn in range(_TURNS):
        y = forward(probes if turn == 0 else adjoint(rest.transpose(1, 2))).transpose(1, 2)
        rest = y - Q @ (Q.mT @ y)
        size = torch.linalg.vector_norm(rest.double(), dim=-2)
        log_norm = log_norm + torch.log(size)
        rest = rest / torch.where(size > 0, size, 1.0).to(rest.dtype)[..., None, :]
    most = log_norm.amax(-1) + math.log(SLACK * math.sqrt(2 / math.pi))
    return torch.exp(most / (2 * _TURNS - 1))


def _orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns along time for every batch and head, (batch, time, head, channel)."""
    return torch.linalg.qr(x.transpose(1, 2)).Q.transpose(1, 2)
