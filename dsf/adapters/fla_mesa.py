"""flash-linear-attention: MesaNet, whose query is solved for against the keys so far."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dsf.adapters._fla_ops import Given, unit_keys
from dsf.adapters.flash_linear_attention import FlashLinearAttention
from dsf.memory import require_memory
from dsf.models._gated_linear import gated_linear_recurrence
from dsf.recurrence import Recurrence
from dsf.scanning import scan
from dsf.transitions import Scalar

EPS = 1e-5
"""What the released solver adds to the divisors of its step sizes."""


def _mesa(a: Given) -> Recurrence:
    """S_t = e^(g_t) S_(t-1) + beta_t k_t v_t^T,   y_t = S_t^T (K_t + diag(lambda))^(-1) q_t.

    K_t is the same sum over k_t k_t^T. No value enters the solution, so it is the C of an exact
    system. It is as good as the layer's: max_CG_iteration steps of conjugate gradients. Memory
    O(length state^2) while it is made.
    """
    query, key = unit_keys(a)
    n_state = key.shape[-1]
    require_memory(
        "dsf.trace", "sums of k k^T", ("batch", "time", "head", "state", "state"),
        (*key.shape, n_state), key.dtype, device=key.device, advice="Trace a shorter sequence.",
    )  # fmt: skip
    written = a["beta"][..., None] * key
    every = torch.eye(n_state, dtype=key.dtype, device=key.device)
    sums = scan(
        Recurrence(Scalar(a["g"], n_state=n_state), written[..., None], every[None, None, None]),
        key,
    )  # fmt: skip
    solved = conjugate_gradients(sums, a["lamb"], query, int(a.get("max_CG_iteration", 30)))
    return gated_linear_recurrence("mesa_net", solved, written, a["g"], scale=1.0)


def conjugate_gradients(matrix: Tensor, ridge: Tensor, right: Tensor, n_step: int) -> Tensor:
    """n_step steps from zero towards (matrix + diag(ridge)) x = right, as the layer takes them.

    matrix (..., state, state) symmetric, ridge broadcast to (..., state), right (..., state).
    """
    x, residual = torch.zeros_like(right), right
    direction, size = residual, residual.square().sum(-1, keepdim=True)
    for _ in range(n_step):
        image = (matrix @ direction[..., None]).squeeze(-1) + ridge * direction
        step = size / ((direction * image).sum(-1, keepdim=True) + EPS)
        x, residual = x + step * direction, residual - step * image
        before, size = size, residual.square().sum(-1, keepdim=True)
        direction = residual + size / (before + EPS) * direction
    return x


class Mesa(FlashLinearAttention):
    """The op solves and reads in one."""

    ops: ClassVar = {"chunk_mesa_net": _mesa}

    def __init__(self) -> None:
        super().__init__("mesa_net", "mesa_net:MesaNet", structure="αₜ I")


ADAPTERS = [Mesa]
