"""Leading singular values of the blocks of a long map, from scans and adjoint scans alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dsf.errors import DsfUnsupportedError
from dsf.map_blocks import Side
from dsf.memory import require_memory
from dsf.scanning import scan
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core, total_length

_SEED = 0
_PASSES = 3
_TURNS = 3
_HALVINGS = 60
_NEAR = 1e-6  # e and s_1 nearer than this are taken as equal
_BUFFERS = 24  # tensors of the size of a sketch that are alive at once, at most
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
        values, basis, _ = _leading(forward, adjoint, start.to(r.device))
        sigma[:, :, i, :k] = values.cpu()
        if k < min(cut, length - cut):
            left[:, :, i] = _left_out(forward, adjoint, probes.to(r.device), basis).cpu()
    return sigma, left


@dataclasses.dataclass(frozen=True)
class MapSketch:
    """Of a whole n x n map: s (batch, head, size), e and the bound of sigma_1, (batch, head)."""

    sigma: Tensor
    left: Tensor
    top: Tensor
    size: int
    n: int


def sketched_map(function: str, system: System, size: int) -> MapSketch:
    """The leading singular values of the whole map, what is left out, and the largest from above.

        s_k <= sigma_k <= sqrt(s_k^2 + e^2),  sigma_{size+1} <= e,  sigma_1^2 <= x,
        x = lambda_max(T + G / (x - e^2))  if e < s_1

    with T = Q^T W W^T Q, G = R^T R of the residual R = W W^T Q - Q T. In the basis of Q and its
    complement W W^T has the blocks T, R and one of norm at most e^2, so that its largest
    eigenvalue x is one of T + R^T (x - S)^-1 R with S <= e^2. Chance of failure and source as
    `sketched_singular_values`; cost: four scans and three gradients of `size` channels, three and
    two of 12. Memory O(length x size), refused when it would not fit.
    """
    r = core(system)
    batch, _, head = r.lead_shape()
    length = total_length(system)
    size = min(size, length)
    require_memory(
        function, "sketch", ("buffer", "batch", "time", "head", "direction"),
        (_BUFFERS, batch, length, head, max(size, PROBES)), torch.float64, device=r.device,
        advice="Pass a smaller sketch=, or measure fewer heads.",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(batch, length, head, size, generator=generator).to(r.device)
    probes = torch.randn(batch, length, head, PROBES, generator=generator).to(r.device)
    every = slice(0, length)
    forward, adjoint = _block(system, every, every, length)
    sigma, basis, last = _leading(forward, adjoint, start)
    left = torch.zeros_like(sigma[..., 0])
    if size < length:
        left = _left_out(forward, adjoint, probes, basis)
    Q, image, carried = (x.transpose(1, 2).double() for x in (basis, forward(last), last))
    rest = image - Q @ (Q.mT @ image)
    return MapSketch(sigma.cpu(), left.cpu(), _largest(carried.mT @ carried, rest.mT @ rest,
                     left**2).cpu(), size, length)  # fmt: skip


def _largest(T: Tensor, G: Tensor, square: Tensor) -> Tensor:
    """The root of x = lambda_max(T + G/(x - e^2)), or lambda_max(T) + e^2 if e is large; sqrt."""
    first = torch.linalg.eigvalsh(T)[..., -1].clamp(min=0)
    most = first + square
    decided = square < first * (1 - _NEAR)
    low, high = first, most
    for _ in range(_HALVINGS):
        x = (low + high) / 2
        gap = torch.where(decided, x - square, 1.0)
        above = torch.linalg.eigvalsh(T + G / gap[..., None, None])[..., -1] > x
        low, high = torch.where(above, x, low), torch.where(above, high, x)
    return torch.where(decided, high, most).sqrt()


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values of Q^T H, the orthonormal basis Q of what H makes of `start`, and H^T Q."""
    carried = start
    for _ in range(_PASSES):
        basis = _orthonormal(forward(carried))
        carried = adjoint(basis)
        last, carried = carried, _orthonormal(carried)
    return torch.linalg.svdvals(last.transpose(1, 2).double()), basis, last


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
