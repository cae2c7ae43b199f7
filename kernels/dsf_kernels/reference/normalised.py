"""The loop of linear attention with its normaliser."""

import torch

from dsf_kernels.reference.scalar_decay import scalar_decay_scan_reference


def normalised_scan_reference(
    query, key, value, log_decay=None, initial_state=None, initial_key_sum=None, *,
    scale=1.0, eps=0.0,
):  # fmt: skip
    """Outputs of y_t = C_t S_t / (C_t z_t + eps), z_t = a_t z_{t-1} + B_t, in float64.

    S_t is the state of `scalar_decay_scan_reference`, z_t one more of its columns with values 1;
    C_t = scale query. A divisor of exactly 0 counts as 1. initial_key_sum: (batch, head, N).
    Returns outputs (batch, time, head, P), the final state and the final key sum.
    """
    ones = value.new_ones(*value.shape[:3], 1)
    start = None
    if initial_state is not None or initial_key_sum is not None:
        batch, _, head, n_channel = value.shape
        shape = (batch, head, key.shape[3])
        state = value.new_zeros(*shape, n_channel) if initial_state is None else initial_state
        key_sum = value.new_zeros(shape) if initial_key_sum is None else initial_key_sum
        start = torch.cat([state.double(), key_sum.double()[..., None]], -1)
    both, final = scalar_decay_scan_reference(
        query, key, torch.cat([value, ones], -1), log_decay, start, scale=scale
    )
    divisor = both[..., -1:] + eps
    divisor = torch.where(divisor == 0, 1.0, divisor)
    return both[..., :-1] / divisor, final[..., :-1], final[..., -1]


def normalised_scan_bound(
    query, key, value, log_decay=None, initial_state=None, initial_key_sum=None, *,
    scale=1.0, eps=0.0,
):  # fmt: skip
    """The loop on arguments >= 0, the gradient of the divisor with its sign turned round.

    Every term then adds: what rounding grows with. Arguments and results as the loop's.
    """
    numerator, state = scalar_decay_scan_reference(
        query, key, value, log_decay, initial_state, scale=scale
    )
    ones = torch.ones_like(value[..., :1])
    start = None if initial_key_sum is None else initial_key_sum[..., None]
    divisor, key_sum = scalar_decay_scan_reference(query, key, ones, log_decay, start, scale=scale)
    divisor = 2 * divisor.detach() - divisor + eps
    return numerator / divisor, state, key_sum[..., 0]
