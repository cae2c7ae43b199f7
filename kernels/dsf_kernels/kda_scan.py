"""The delta rule with a decay for each state (KDA), by the scan of diagonal plus rank 1."""

from torch import Tensor

from dsf_kernels.launch import check_tensor
from dsf_kernels.low_rank_scan import low_rank_scan


def kda_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write_strength: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float = 1.0,
    form: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and the last state, of h_t = (I - b k k^T) diag(a) h_{t-1} + b k u, y = scale q h.

    k = `key`, u = `value`, b = `write_strength` (batch, time, head), a = exp(`log_decay`) (batch,
    time, head, state). Shapes, errors, form and cost as `low_rank_scan`, which runs it
    with x = -b k, w = k a, rounded to the type of `value`; key has one group a head.
    Source: Kimi Team 2025 (Kimi Linear, delta rule with a decay a channel).
    """
    sizes = dict(zip(("batch", "time", "head"), value.shape, strict=False))
    check_tensor("kda_scan", "write_strength", write_strength, sizes, "one a token and head")
    check_tensor("kda_scan", "key", key, sizes | {"state": None}, "sizes are fixed by value")
    written = (write_strength[..., None] * key).to(key.dtype)
    right = key if log_decay is None else (key * log_decay.exp()).to(key.dtype)
    return low_rank_scan(
        query, written, value, -written, right, log_decay, initial_state, scale=scale, form=form
    )
