"""S_t = a_t S_{t-1} + k_t v_t^T, y_t = scale S_t^T q_t: the core of all gated linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from dsf.models._heads import check_query_key, share_groups
from dsf.recurrence import Recurrence
from dsf.transitions import Diagonal, Scalar


def gated_linear_recurrence(
    system: str, query: Tensor, key: Tensor, log_decay: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None,
) -> Recurrence:  # fmt: skip
    """A_t = exp(log_decay_t), B_t = k_t, C_t = scale q_t over values (batch, time, head, channel).

    query (batch, time, head, state), key with as many heads or groups of them; log_decay (batch,
    time, head) is one number a head, (batch, time, head, state) one a state; scale is
    state^(-1/2) if None. Raises DsfShapeError when key does not fit query.
    """
    check_query_key(f"dsf.{system}_recurrence", query, key)
    n_state = query.shape[-1]
    A = Diagonal(log_decay) if log_decay.ndim == 4 else Scalar(log_decay, n_state=n_state)
    read = query * (n_state**-0.5 if scale is None else scale)
    return Recurrence(
        A, share_groups(key, query.shape[2])[..., None], read[..., None, :],
        initial_state=initial_state, system=system,
    )  # fmt: skip


def bounded_log_decay(logit: Tensor, lower_bound: float = 0.0) -> Tensor:
    """log(b + (1 - b) sigmoid(logit)): a forget gate in (b, 1); b = 0 keeps every small decay."""
    if lower_bound == 0:
        return torch.nn.functional.logsigmoid(logit)
    return torch.log(lower_bound + (1 - lower_bound) * torch.sigmoid(logit))
