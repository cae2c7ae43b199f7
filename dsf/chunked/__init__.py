"""Fast paths in plain torch: matrix products over chunks of time, memory O(length).

One form per structure, chosen from shapes alone: the numbers never decide, so the same code runs
under `vmap`, `grad` transforms and `torch.compile`, no later input can change which form an
earlier output took, and there is no span of decays at which anything overflows.

| structure | form | file |
| --- | --- | --- |
| identity, scalar | masked products, decays as exponentials of segment sums | linear, decays |
| diagonal | masked products, decays multiplied in block by block | linear, decays |
| diagonal with one channel | step by step, all chunks side by side | elementwise |
| householder, diagonal_low_rank | one triangular inverse a chunk | low_rank |
| shift | one product per lag | shift |
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsf.chunked.decays import DiagonalDecay, NoDecay, ScalarDecay
from dsf.chunked.elementwise import scan_elementwise
from dsf.chunked.layout import guarded, pieces
from dsf.chunked.linear import scan_linear
from dsf.chunked.low_rank import scan_low_rank
from dsf.shapes import Inexact
from dsf.transitions import Diagonal, DiagonalLowRank, Householder, Identity, Scalar, Transition
from dsf.transitions._base import is_traced

__all__ = ["scan_diagonal", "scan_diagonal_low_rank", "scan_scalar"]

CHUNK = 64
"""Steps of a chunk, by measurement (docs/scan_speed.md)."""
CHUNK_SHORT = 32
"""The same where long chunks cost more: scalar decays, complex ones, delta rules."""
PIECE = 2**18
"""Numbers of one coefficient that are worked on at a time, so that they stay in the cache."""
PIECE_LONG = 2**19
"""The same for diagonal decays, whose many small products cost a call each."""
FULL_STEP = 2**13
"""Numbers in one step of all heads from which the plain loop is as fast as anything."""
FEW_STATES = 16
"""States up to which a scalar decay with one channel is scanned like a diagonal one."""

B_ = Inexact[Tensor, "#batch #time #head state input"]
C_ = Inexact[Tensor, "#batch #time #head output state"]
Values = Inexact[Tensor, "batch time head input channel"]
State = Inexact[Tensor, "batch head state channel"]
Result = tuple[Inexact[Tensor, "batch time head output channel"], State]


def scan_scalar(
    A: Identity | Scalar | None, B: B_, C: C_, values: Values, state: State,
    chunk: int | None = None,
) -> Result:  # fmt: skip
    """Outputs C_t h_t and h_L of an identity (A may be None) or scalar transition.

    Cost per token and head O(chunk (state + channel) + state channel), memory O(length). What is
    NaN or infinite at step t makes the outputs from t on NaN, never an earlier one.
    """
    n_state, n_channel = B.shape[-2], values.shape[-1]
    if isinstance(A, Scalar) and n_channel == 1 and n_state <= FEW_STATES:
        return scan_diagonal(A.widen(), B, C, values, state, chunk)

    def form(A: Any, B: Tensor, C: Tensor, u: Tensor, h: Tensor, size: int) -> Any:
        decays = ScalarDecay(A, size, B.dtype) if isinstance(A, Scalar) else NoDecay()
        return scan_linear(decays, B, C, u, h, size)

    default = CHUNK if A is None or isinstance(A, Identity) else CHUNK_SHORT
    parts = pieces(values.shape[1], chunk or default, _piece(B, values), halving=False)
    return guarded(form, parts, A or Identity(n_state), B, C, values, state)


def scan_diagonal(
    A: Transition, B: B_, C: C_, values: Values, state: State, chunk: int | None = None
) -> Result:
    """Outputs C_t h_t and h_L of a diagonal transition, real or complex.

    `chunk` is rounded down to a power of two. Cost as `scan_scalar`, with O(log chunk) products of
    decays per state and token; with one channel O(state) per token and head.
    """
    single = values.shape[-1] == 1
    step_size = values.shape[0] * values.shape[2] * B.shape[-2]

    def form(A: Any, B: Tensor, C: Tensor, u: Tensor, h: Tensor, size: int) -> Any:
        if not single:
            return scan_linear(DiagonalDecay(A, size, B.dtype), B, C, u, h, size)
        if step_size < FULL_STEP or is_traced():
            return scan_elementwise(A, B, C, u, h, size)
        from dsf.scanning import loop

        y, last = loop(A, B, C, u, h.to(u.dtype))
        return y.unflatten(1, (-1, size)), last

    default = CHUNK_SHORT if A.is_complex else CHUNK
    parts = _halving(chunk or default, B, values, PIECE_LONG)
    return guarded(form, parts, A, B, C, values, state)


def scan_diagonal_low_rank(
    A: Householder | DiagonalLowRank, B: B_, C: C_, values: Values, state: State,
    chunk: int | None = None,
) -> Result:  # fmt: skip
    """Outputs C_t h_t and h_L of a Householder or diagonal-plus-low-rank transition.

    `chunk` is rounded down to a power of two. Cost per token and head O(rank chunk (state +
    channel + rank chunk)), memory O(length).
    """
    rank = A.left.shape[-1] if isinstance(A, DiagonalLowRank) else 1

    def form(A: Any, B: Tensor, C: Tensor, u: Tensor, h: Tensor, size: int) -> Any:
        if isinstance(A, Householder):
            left = (A.write_strength[..., None] * A.direction)[..., None]
            right, decays = A.direction[..., None], NoDecay()
        else:
            left, right, decays = A.left, A.right, DiagonalDecay(A, size, B.dtype)
        return scan_low_rank(decays, left.to(B.dtype), right.to(B.dtype), B, C, u, h, size)

    if rank == 0:
        plain = Diagonal(A.log_decay, A.sign, A.phase)  # type: ignore[union-attr]
        return scan_diagonal(plain, B, C, values, state, chunk)
    parts = _halving(chunk or max(4, CHUNK_SHORT // max(rank, 1)), B, values)
    return guarded(form, parts, A, B, C, values, state)


def _halving(
    chunk: int, B: Tensor, values: Tensor, numbers: int | None = None
) -> list[tuple[int, int]]:
    power = 1 << (chunk.bit_length() - 1)
    return pieces(values.shape[1], power, _piece(B, values, numbers), halving=True)


def _piece(B: Tensor, values: Tensor, numbers: int | None = None) -> int:
    """Steps of all heads that hold PIECE (or `numbers`) numbers; on other devices all of them."""
    if values.device.type != "cpu" or is_traced():
        return max(1, values.shape[1])
    batch, _, head = values.shape[:3]
    return max(1, (numbers or PIECE) // max(1, batch * head * max(B.shape[-2], values.shape[-1])))
