"""Leading singular values of the blocks of a long map, from scans and adjoint scans alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsf.errors import DsfUnsupportedError
from dsf.realisation import Side
from dsf.scanning import scan
from dsf.wrappers import Gated, System, core, total_length

_SEED = 0
_PASSES = 3


def sketched_singular_values(system: System, cuts: list[int], size: int, side: Side) -> Tensor:
    """The `size` largest singular values of every block, (batch, head, cut, size) in float64.

    Randomised range finding (Halko, Martinsson and Tropp, 2011) with two power iterations: random
    values before the cut are scanned, outputs after it orthonormalised, and carried back by the
    adjoint scan, which is the scan's own gradient since it is linear. Never above the true
    values; the leading ones are right to a few digits. Memory O(length x size); cost per cut:
    three scans and three gradients of `size` channels.
    """
    r = core(system)
    if isinstance(system, Gated) or r.n_input > 1 or r.n_output > 1:
        raise DsfUnsupportedError(
            "dsf.epsilon_rank: sketch: expected a system with one input, one output and no gate "
            "by channel. Measure system.system, or leave sketch= out."
        )
    if r.dtype.is_complex and not r.real_output:
        raise DsfUnsupportedError(
            "dsf.epsilon_rank: sketch: expected a real map, got a complex one. Use dsf.realified, "
            "or leave sketch= out."
        )
    batch, _, head = r.lead_shape()
    length = total_length(system)
    generator = torch.Generator().manual_seed(_SEED)
    out = torch.zeros(batch, head, len(cuts), size, dtype=torch.float64)
    for i, cut in enumerate(cuts):
        past, future = slice(0, cut), slice(cut, length)
        if side == "upper":
            past, future = future, past
        k = min(size, cut, length - cut)
        start = torch.randn(batch, past.stop - past.start, head, k, generator=generator)
        sigma = _leading(*_block(system, past, future, length), start.to(r.device))
        out[:, :, i, :k] = sigma.cpu()
    return out


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
) -> Tensor:
    """Singular values of Q^T H with Q an orthonormal basis of what H (H^T H) makes of `start`."""
    carried = start
    for _ in range(_PASSES):
        basis = _orthonormal(forward(carried))
        carried = adjoint(basis)
        last, carried = carried, _orthonormal(carried)
    return torch.linalg.svdvals(last.transpose(1, 2).double())


def _orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns along time for every batch and head, (batch, time, head, channel)."""
    return torch.linalg.qr(x.transpose(1, 2)).Q.transpose(1, 2)
