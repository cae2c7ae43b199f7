"""MonarchAttention: softmax attention projected onto a product of two block-diagonal matrices.

Two launches a step, without the matrix: the right factor, a program for each block of keys, and
the left factor, a program for each place in a block. Each keeps its tile on the chip and hands on
what the next needs: the mean key under each row of the right factor, its entropy and the mean
value; then the mean query under each column of the left factor. No two programs add to one number.
One step over at most 16 blocks of 16 places is one launch, a program a lane; one step over tiles
too wide for a program walks over them (forward alone).

Backward: the steps again, save the last launch, then two launches a step in reverse order.
"""

import torch
from torch import Tensor

from dsf_kernels.launch import (
    check_kind,
    check_scale,
    check_tensor,
    check_type,
    on_device,
    over_groups,
)
from dsf_kernels.monarch_launch import MAX_TILE, Monarch
from dsf_kernels.operators import operator

NAME = "monarch_attention"
PADDINGS = ("after", "before")


def _run(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, block: int, steps: int,
    before: bool, scale: float,
) -> Tensor:  # fmt: skip
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if out.numel():
        with on_device(value):
            Monarch(query, key, value, mask, block, steps, before, scale).forward(out)
    return out


def _fake(query, key, value, mask, block, steps, before, scale):
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _run_adjoint(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grad: Tensor, block: int,
    steps: int, before: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not value.numel():
        zeros = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
        return zeros[0], zeros[1], zeros[2]
    with on_device(value):
        found = Monarch(query, key, value, mask, block, steps, before, scale).backward(grad)
    return found[0], over_groups(found[1], key), found[2]


def _fake_adjoint(query, key, value, mask, grad, block, steps, before, scale):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))


_adjoint = operator("monarch_attention_adjoint", _run_adjoint, _fake_adjoint)


def _backward(ctx, grad):
    if grad is None:
        return (None,) * 8
    return *_adjoint(*ctx.saved_tensors, grad, *ctx.rest), *(None,) * 5


_forward = operator("monarch_attention", _run, _fake, _backward)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Raise on wrong kinds and shapes."""
    check_kind(NAME, {"query": query, "key": key, "value": value})
    axes = ("batch", "time", "head", "width")
    check_tensor(NAME, "query", query, dict.fromkeys(axes), "every size is fixed here")
    batch, length, head, width = query.shape
    sizes = {"batch": batch, "time": length}
    check_tensor(NAME, "key", key, sizes | {"group": None, "width": width}, "fixed by query")
    check_tensor(NAME, "value", value, sizes | {"head": head, "channel": None}, "fixed by query")
    check_type(NAME, "query", {"query": query, "key": key, "value": value})
    if head and (key.shape[2] == 0 or head % key.shape[2]):
        raise ValueError(
            f"dsf_kernels.{NAME}: key: expected a group count that divides head={head}, got "
            f"{key.shape[2]}."
        )
    if not 1 <= min(width, value.shape[3]) <= max(width, value.shape[3]) <= MAX_TILE:
        raise ValueError(
            f"dsf_kernels.{NAME}: expected width and channel from 1 to {MAX_TILE}, got "
            f"width={width}, channel={value.shape[3]}."
        )
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != (batch, length) or mask.device != query.device:
        raise ValueError(
            f"dsf_kernels.{NAME}: key_mask: expected boolean {(batch, length)} on "
            f"{query.device}, got {mask.dtype} {tuple(mask.shape)} on {mask.device}; a mask per "
            "query does not fit the structure."
        )


def _block(length: int, block: int | None, steps: int, padding: str) -> int:
    """The block size used: that given, cut at the length, or the power of two near its root."""
    if padding not in PADDINGS:
        raise ValueError(
            f"dsf_kernels.{NAME}: padding: expected one of {PADDINGS}, got {padding!r}."
        )
    if steps < 1:
        raise ValueError(f"dsf_kernels.{NAME}: steps: expected at least 1, got {steps}.")
    if block is None:
        block = 1 << (max(length, 1).bit_length() - 1) // 2
    if block < 1:
        raise ValueError(f"dsf_kernels.{NAME}: block: expected at least 1, got {block}.")
    block = min(block, max(length, 1))  # one block: the places beyond the length weigh nothing
    return block


def _check_tile(length: int, block: int, steps: int, gradients: bool) -> None:
    """Raise where a tile must be whole in one program and is too wide."""
    n_block = -(-length // block)
    if max(block, n_block) > MAX_TILE and (steps > 1 or gradients):
        raise NotImplementedError(
            f"dsf_kernels.{NAME}: block: expected at most {MAX_TILE} places in a block and as "
            f"many blocks for more than one step, and for gradients, got {block} and {n_block}. "
            "Use dsf.monarch_attention_recurrence."
        )


def monarch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: int | None = None,
    steps: int = 1,
    key_mask: Tensor | None = None,
    padding: str = "after",
    scale: float | None = None,
) -> Tensor:
    """Outputs M V of softmax attention projected onto Monarch matrices, not causal.

    Tokens are pairs (block, place); M[(l, j), (k, i)] = L_jkl R_kji maximises <M, S> + entropy(M),
    S = scale Q K^T, over one factor after the other, `steps` times from L = identity:

        R_kj. = softmax_i(scale abar_kj.k_ki),   abar_kj = sum_l L_jkl q_lj / sum_l L_jkl
        L_j.l = softmax_k(q_lj.(scale sum_i R_kji k_ki) - sum_i R_kji log R_kji)

    Shapes: query (batch, time, head, width), key (batch, time, group, width) with group dividing
    head, value (batch, time, head, channel); time from 0, any strides; float16, bfloat16 or
    float32, one type. block: places in a block, None for 2^floor(log2(time) / 2). key_mask (batch,
    time), True for real tokens: the others are no keys and are left out of the means of queries;
    a block without any real one takes no mass, a sequence without any gives zeros. padding: where
    the last or first block is filled up, "after" or "before". scale: None for width^-1/2.
    Returns the outputs, like value. Differentiable in query, key, value, once.
    Logits, softmax, sums are float32; products of 16-bit tensors round their operands to 16 bits.
    Raises ValueError (shape, mask, block, steps, padding), TypeError (dtype), NotImplementedError
    (CPU tensor; with more than 128 places in a block, or blocks: several steps, or gradients).
    Cost: time x 2 width ((2 steps + 1) block + 2 steps n_block) operations a head forward; memory
    beside the outputs: twice their size, backward up to (steps + 3) times.
    Source: Yaras et al. (2025), arXiv 2505.18698; gradients derived.
    """
    _check(query, key, value, key_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    check_scale(NAME, scale)
    block = _block(query.shape[1], block, steps, padding)
    wanted = any(t.requires_grad for t in (query, key, value))
    _check_tile(query.shape[1], block, steps, wanted and torch.is_grad_enabled())
    return _forward(query, key, value, key_mask, block, steps, padding == "before", scale)
