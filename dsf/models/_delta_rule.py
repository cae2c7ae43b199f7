"""Delta rules: what a key reads out of the state is taken away before its value is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsf.models._heads import check_query_key, share_groups
from dsf.models._projections import HeadedMixer, unit
from dsf.models._step_size import initial_step_bias, step_sizes
from dsf.recurrence import Recurrence
from dsf.transitions import DiagonalLowRank, Householder, Transition


def delta_rule_recurrence(
    system: str, query: Tensor, key: Tensor, write_strength: Tensor, *,
    erase: Tensor | None = None, log_decay: Tensor | None = None, decay_first: bool = True,
    scale: float | None = None, initial_state: Tensor | None = None,
) -> Recurrence:  # fmt: skip
    """S_t = D_t S_{t-1} + beta_t k_t (v_t - R_t^T p_t)^T, R_t the state after or before the decay.

        A_t = D_t - beta_t k_t (D_t p_t)^T  (or p_t^T),   B_t = beta_t k_t,   C_t = scale q_t

    query (batch, time, head, state), key and erase p (the key unless given) with as many heads or
    groups of them; R_t = D_t S_{t-1} if decay_first, else S_{t-1}. write_strength beta (batch,
    time, head); log_decay (batch, time, head[, state]), D_t = 1 if None, and then A is a
    Householder matrix unless p is given. scale is state^(-1/2) if None. Raises DsfShapeError when
    key does not fit query.
    """
    check_query_key(f"dsf.{system}_recurrence", query, key)
    n_state, n_head = query.shape[-1], query.shape[2]
    key = share_groups(key, n_head)
    written = write_strength[..., None] * key
    A: Transition
    if log_decay is None and erase is None:
        A = Householder(write_strength, key)
    else:
        log_decay = torch.zeros_like(key) if log_decay is None else log_decay
        if log_decay.ndim == 3:
            log_decay = log_decay[..., None].expand(*log_decay.shape, n_state)
        read = key if erase is None else share_groups(erase, n_head)
        read = log_decay.exp() * read if decay_first else read
        A = DiagonalLowRank(log_decay, left=written[..., None], right=read[..., None])
    query = query * (n_state**-0.5 if scale is None else scale)
    return Recurrence(
        A, written[..., None], query[..., None, :], initial_state=initial_state, system=system
    )


class SoftplusDecay(nn.Module):
    """log decay = -exp(A_log) softplus(x + dt_bias), A_log a number a head; Mamba-2's form.

    n_state None gives (batch, time, head), a number (batch, time, head, n_state) with its own
    bias a state. Decay rates start uniform in 1..16, step sizes log-uniform in 0.001..0.1.
    """

    def __init__(self, n_head: int, n_state: int | None = None) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(n_head).uniform_(1, 16).log())
        bias = initial_step_bias(n_head * (n_state or 1), 1e-3, 0.1)
        self.dt_bias = nn.Parameter(bias if n_state is None else bias.unflatten(0, (n_head, -1)))

    def forward(self, x: Tensor) -> Tensor:
        """x of the shape of the result."""
        rate = self.A_log.exp()
        rate = rate if self.dt_bias.ndim == 1 else rate[:, None]
        return -rate * step_sizes(x, self.dt_bias, softplus=True)


class DeltaMixer(HeadedMixer):
    """Short convolutions and SiLU on q, k, v, unit q and k, write strength sigmoid(W_b x).

    negative_eigenvalues doubles the write strength, so that A can reflect. `options` are those of
    `HeadedMixer`.
    """

    def __init__(
        self, width: int, n_head: int, *, conv_size: int = 4, n_write: int = 1,
        negative_eigenvalues: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, conv_size=conv_size, activation="silu", n_write=n_write, **options
        )
        self.n_write = n_write
        self.strength = nn.Linear(width, n_head * n_write, bias=False)
        self.most = 2.0 if negative_eigenvalues else 1.0

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by head, query and key of length one; n_write > 1: axis 3."""
        q, k, v = super().project(x)
        if self.n_write > 1:
            k, v = (part.unflatten(-1, (self.n_write, -1)) for part in (k, v))
        return unit(q), unit(k), v

    def write_strength(self, x: Tensor) -> Tensor:
        """beta (batch, time, head x n_write), in (0, 1) or (0, 2)."""
        return self.most * torch.sigmoid(self.strength(x))
