"""What the RWKV layers share: token shift and a read before the write."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsf.recurrence import Recurrence
from dsf.transitions import BlockDiagonal


def previous(x: Tensor, fill: float = 0.0) -> Tensor:
    """x one token later along time, `fill` before the first."""
    return torch.cat([torch.full_like(x[:, :1], fill), x[:, :-1]], dim=1)


def read_before_write(
    system: str, query: Tensor, key: Tensor, log_decay: Tensor, own_query: Tensor,
    initial_state: Tensor | None = None,
) -> Recurrence:  # fmt: skip
    """y_t = q_t.S_{t-1} + p_t.k_t v_t^T with S_t = a_t S_{t-1} + k_t v_t^T, a_t = 0 allowed.

        state (S_{t-1}, k_t v_t^T) by channel:  A_t = [[a_{t-1}, 1], [0, 0]],  B_t = [0, k_t]
        C_t = [q_t, p_t]

    Twice the states of S: the row reads what the decay a_t is about to take away, so S_t alone
    holds it only divided by a_t. query q, own_query p, key, log_decay (batch, time, head, state)
    or with size 1s; the final S is a_L times the first part plus the second. initial_state
    (batch, head, state, channel) is S_0.
    """
    decay = log_decay.exp()
    if decay.shape[1] > 1:
        decay = previous(decay)  # before the first token S is in the second part
    one, zero = torch.ones_like(decay), torch.zeros_like(decay)
    blocks = torch.stack([torch.stack([decay, one], -1), torch.stack([zero, zero], -1)], -2)
    B = torch.stack([torch.zeros_like(key), key], dim=-1).flatten(-2)
    C = torch.stack(torch.broadcast_tensors(query, own_query), dim=-1).flatten(-2)
    if initial_state is not None:
        parts = [torch.zeros_like(initial_state), initial_state]
        initial_state = torch.stack(parts, dim=-2).flatten(-3, -2)
    return Recurrence(
        BlockDiagonal(blocks, decay.shape[-1]), B[..., None], C[..., None, :],
        initial_state=initial_state, system=system, gauge="state before the write, and the write",
    )  # fmt: skip


class TokenShift(nn.Module):
    """n inputs x_t + mu_i (x_{t-1} - x_t), mu_i a number a channel."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.rand(n, width))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, time, width) -> n of them."""
        change = previous(x) - x
        return tuple(x + change * mu for mu in self.mu)
