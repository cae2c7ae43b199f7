"""The two ways of `dsf.reduce`: balanced truncation, and one decomposition after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsf.hankel import UNIT
from dsf.recurrence import Recurrence
from dsf.state_factors import at
from dsf.transitions import Dense
from dsf.transitions._base import mm
from dsf.wrappers import Anticausal, Bidirectional


class Kept(NamedTuple):
    """Reduced coefficients (batch, time, head, ...) and sizes (batch, head, time).

    `start` (batch, head, state, channel) and `n_start` (batch, head) where there is an initial
    state, else None.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    n_state: Tensor
    start: Tensor | None
    n_start: Tensor | None

    @property
    def width(self) -> int:
        """States of the largest step, 1 at least."""
        first = 0 if self.n_start is None else int(self.n_start.amax())
        return max(1, first, int(self.n_state.amax()))

    def recurrence(self, r: Recurrence, gauge: str) -> Recurrence:
        """The reduced system, labels and D those of `r`."""
        n = self.width
        start = None if self.start is None else self.start[..., :n, :]
        return Recurrence(
            Dense(self.A[..., :n, :n]), self.B[..., :n, :], self.C[..., :n], r.D, start,
            system=r.system, mode=r.mode, gauge=gauge,
        )  # fmt: skip


def dropped_values(sigma: Tensor, kept: Tensor) -> Tensor:
    """The singular values (*, step, k) that were not kept, zeros in place of the others."""
    index = torch.arange(sigma.shape[-1], device=sigma.device)
    return sigma * (index >= kept[..., None])


def disjoint_halves(system: Bidirectional) -> tuple[Recurrence, Anticausal]:
    """The same map from halves that share no entry: the diagonal is the causal half's alone."""
    causal, later = system.causal, system.anticausal
    r = later.recurrence
    own = r.D
    if not later.strict:
        B, C = r.dense_input_output()
        written = mm(C, B)
        written = written.real if r.real_output and r.dtype.is_complex else written
        own = written if own is None else own + written
    if own is not None:
        causal = causal.replace(D=own if causal.D is None else causal.D + own)
    return causal, Anticausal(r.replace(D=None), strict=True)


def projection(o: Tensor, f: Tensor, most: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T = S^{-1/2} U^H O and its inverse L V S^{-1/2}, cut to `most` states above rounding."""
    U, sigma, Vh = torch.linalg.svd(mm(o, f))
    noise = sigma.shape[-1] * UNIT * torch.linalg.matrix_norm(o) * torch.linalg.matrix_norm(f)
    most = torch.as_tensor(most, device=sigma.device)
    index = torch.arange(sigma.shape[-1], device=sigma.device)
    used = (sigma > noise[..., None]) & (index < most[..., None])
    root = torch.where(used, sigma, 1.0).rsqrt() * used
    T = root[..., :, None] * mm(U.mH, o)
    return T, mm(f, Vh.mH) * root[..., None, :], used.sum(-1)


def balanced_steps(
    r: Recurrence, seen: list[Tensor], reached: list[Tensor], sizes: list[int],
    start: Tensor | None,
) -> Kept:  # fmt: skip
    """Balanced states of every step, cut to its size; O_t and L_t for t = 0..length."""
    down, up, kept = [], [], []
    for o, f, most in zip(seen, reached, [sizes[0], *sizes], strict=True):
        T, back, n = projection(o, f, most)
        down.append(T)
        up.append(back)
        kept.append(n)
    T, before, back = torch.stack(down[1:], 1), torch.stack(up[:-1], 1), torch.stack(up[1:], 1)
    B, C = r.dense_input_output()
    A = mm(mm(T, r.dense_transition()), before)
    first = None if start is None else mm(down[0], start)
    n_start = None if start is None else kept[0]
    return Kept(A, mm(T, B), mm(C, back), torch.stack(kept[1:], -1), first, n_start)


def sequential_steps(
    r: Recurrence, seen: list[Tensor], sizes: list[int], budget: Tensor | None,
    start: Tensor | None,
) -> Kept:  # fmt: skip
    """Input-normal steps; with `budget` as few states as lose no more than that sum of squares."""
    batch, length, head = r.lead_shape()
    n = r.n_state
    lost = torch.zeros(batch, head, dtype=torch.float64, device=r.device)
    R = torch.zeros(batch, head, n, n, dtype=r.dtype, device=r.device)
    first = n_start = None
    if start is not None:
        first, n_start, more = _cut(seen[0], start, sizes[0], budget)
        lost = lost + more
        R = torch.nn.functional.pad(mm(start, first.mH), (0, max(0, n - first.shape[-2])))
        first = torch.nn.functional.pad(first, (0, 0, 0, max(0, n - first.shape[-2])))
    steps, kept = [], []
    for t in range(length):
        written = at(r.B, t).to(r.dtype).expand(batch, head, n, -1)
        carried = torch.cat([r.A.at(t).apply(R).to(r.dtype), written], -1)
        room = None if budget is None else budget - lost
        Z, count, more = _cut(seen[t + 1], carried, sizes[t], room)
        lost = lost + more
        R = mm(carried, Z.mH)
        steps.append((Z[..., :n], Z[..., n:], mm(at(r.C, t), R)))
        kept.append(count)
    A, B, C = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    return Kept(A, B, C, torch.stack(kept, -1), first, n_start)


def _cut(
    seen: Tensor, carried: Tensor, most: int, room: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading right singular vectors of O X that are kept, their number, and what is lost."""
    _, sigma, Zh = torch.linalg.svd(mm(seen, carried), full_matrices=False)
    norms = torch.linalg.matrix_norm(seen) * torch.linalg.matrix_norm(carried)
    noise = seen.shape[-1] * UNIT * norms
    tails = torch.flip(torch.cumsum(torch.flip(sigma**2, (-1,)), -1), (-1,))
    count = (sigma > noise[..., None]).sum(-1).clamp(max=most)
    if room is not None:
        free = room.clamp(min=0) * (1 - 1e-12)
        count = torch.minimum(count, (tails > free[..., None]).sum(-1))
    used = torch.arange(sigma.shape[-1], device=sigma.device) < count[..., None]
    return Zh * used[..., None], count, (sigma**2 * ~used).sum(-1)
