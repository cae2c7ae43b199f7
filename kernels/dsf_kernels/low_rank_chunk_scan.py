"""The operator of low_rank_scan by chunks; the equations are in low_rank_chunk_launch.py."""

import torch
from torch import Tensor

from dsf_kernels.launch import on_device, over_groups, start_state
from dsf_kernels.low_rank_chunk_launch import Chunks
from dsf_kernels.operators import operator


def _forward(
    query: Tensor, key: Tensor, value: Tensor, left: Tensor, right: Tensor,
    log_decay: Tensor | None, initial: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, final = fake(query, key, value, left, right, log_decay, initial, scale)
    if value.numel() == 0:
        return out, start_state(value, key.shape[3], initial)
    with on_device(value):
        chunks = Chunks((query, key, value, left, right), log_decay, scale)
        chunks.walk(chunks.value, out=out, initial=initial, final=final)
    return out, final


def fake(query, key, value, left, right, log_decay, initial, scale):
    """Outputs and last state without data."""
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    shape = (value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    return out, value.new_empty(shape, dtype=torch.float32)


def _backward(ctx, grad, grad_final):
    *tensors, log_decay, initial = ctx.saved_tensors
    query, key, value, left, right = tensors
    grad_initial = start_state(value, key.shape[3], grad_final)
    if value.numel() == 0:
        return (*(torch.zeros_like(t) for t in tensors),
                None if log_decay is None else torch.zeros_like(log_decay),
                None if initial is None else grad_initial.to(initial.dtype), None)  # fmt: skip
    grad = torch.zeros_like(value) if grad is None else grad
    d_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    with on_device(value):
        chunks = Chunks(tensors, log_decay, ctx.rest[0])
        start, end = chunks.states(), chunks.states()
        found, felt = chunks.replies(), chunks.replies()
        chunks.walk(chunks.value, initial=initial, saved=start, found=found)
        chunks.walk(grad, reverse=True, out=d_value, initial=grad_final, final=grad_initial,
                    saved=end, found=felt)  # fmt: skip
        *rows, steep = chunks.gradients(grad, (start, end), (found, felt))
    d_query, d_key, d_left, d_right = (
        over_groups(d, t) for d, t in zip(rows, (query, key, left, right), strict=True)
    )
    return (d_query, d_key, d_value, d_left, d_right, None if log_decay is None else steep,
            None if initial is None else grad_initial.to(initial.dtype), None)  # fmt: skip


low_rank_chunk_scan = operator("low_rank_chunk_scan", _forward, fake, _backward)
