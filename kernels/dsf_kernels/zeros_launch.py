"""Launches of `zeros_scan` and its gradients, and the rule of its tiles."""

import torch
from torch import Tensor

from dsf_kernels.launch import narrow, on_device, power_of_two
from dsf_kernels.zeros_kernels import totals_kernel
from dsf_kernels.zeros_walk import walk_kernel

MAX_WIDTH = 128
CHUNK = 64
SLAB = 32
STAGES = 2
BLOCK = 1024  # tokens whose logits are summed at once


def settings(kind: torch.dtype, n_left: int, n_right: int) -> dict:
    """Tiles and warps: three states of WIDTH x SLAB in registers; exact products take less."""
    exact = kind == torch.float32
    chunk, slab = min(16 if exact else 64, CHUNK), min(16 if exact else 32, SLAB)
    width = power_of_two(n_left, 16)
    return {"CHUNK": chunk, "WIDTH": width, "SLAB": min(power_of_two(n_right, 16), slab),
            "PRECISION": "ieee" if exact else "tf32",
            "num_warps": 8 if width > 32 else 4, "num_stages": 1 if exact else STAGES}  # fmt: skip


def sum_logits(logit: Tensor, totals: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """log sum of exponentials and mean of the logits so far (batch, head, time); the last."""
    batch, length, head = logit.shape
    log_total, mean = logit.new_empty(2, batch, head, length, dtype=torch.float64)
    final = logit.new_empty(batch, head, 3, dtype=torch.float64)
    totals_kernel[(batch * head,)](
        logit, final if totals is None else totals.contiguous(), log_total, mean, final, length,
        head, *logit.stride(), HAS_INITIAL=totals is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return log_total, mean, final


def walk(query, left, right, gates, sums, moments, totals, out, final, asked=None, parts=None):
    """`walk_kernel`; gates: logit, first, higher, zero; moments (..., state, channel) or None."""
    batch, length, head, n_right = right.shape
    logit, first, higher, zero = gates
    query, left, right = (narrow(t, 1) for t in (query, left, right))
    asked = query if asked is None else narrow(asked, 1)
    n_left, chosen = left.shape[3], settings(right.dtype, left.shape[3], n_right)
    n_slab = -(-n_right // chosen["SLAB"])
    held = (0,) * 5 if moments is None else moments.stride()
    walk_kernel[(batch * head * n_slab,)](
        query, left, right, logit, first, higher, logit if zero is None else zero, *sums,
        out if moments is None else moments, sums[0] if totals is None else totals.contiguous(),
        out, out if final is None else final, asked, out if parts is None else parts,
        length, head, n_left, n_right, n_slab,
        *query.stride(), *left.stride(), *right.stride(), *logit.stride(), *first.stride(),
        *higher.stride(), *(logit if zero is None else zero).stride(), *held, *asked.stride(),
        HAS_INITIAL=moments is not None, HAS_ZERO=zero is not None, PARTS=parts is not None,
        **chosen,
    )  # fmt: skip


def fake(query, key, value, logit, first, higher, zero, moments, totals):
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    shape = (value.shape[0], value.shape[2], 3)
    return (out, value.new_empty(*shape, key.shape[3], value.shape[3], dtype=torch.float32),
            value.new_empty(shape, dtype=torch.float64))  # fmt: skip


def forward(
    query: Tensor, key: Tensor, value: Tensor, logit: Tensor, first: Tensor, higher: Tensor,
    zero: Tensor | None, moments: Tensor | None, totals: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, final, last = fake(query, key, value, logit, first, higher, zero, moments, totals)
    if value.numel() == 0:
        if moments is None or totals is None:
            return out, final.zero_(), last.copy_(last.new_tensor([-torch.inf, 0.0, 0.0]))
        return out, final.copy_(moments), last.copy_(totals)
    with on_device(value):
        log_total, mean, last = sum_logits(logit, totals)
        gates = logit, first, higher, zero
        walk(query, key, value, gates, (log_total, mean), moments, totals, out, final)
    return out, final, last
