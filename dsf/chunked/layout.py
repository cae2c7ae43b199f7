"""Time cut into chunks, and non-finite inputs kept from leaking into earlier outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsf.transitions import Transition
from dsf.transitions._base import complex_dtype, is_traced
from dsf.validation import CHECKED

Form = Callable[[Any, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(A, B, C, values, state, chunk) -> (y as `from_chunks` gives it, state), for a length that is a
multiple of chunk. The state comes and goes in twice the precision."""


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """(batch, time, head, ...) -> (batch, head, time/chunk, chunk, ...), a view.

    Heads come before chunks, so that the states of a head's chunks lie side by side: what is
    carried from chunk to chunk is then one product a head, without a copy before or after it.
    Time of size 1 stays one shared chunk: what does not vary is computed once.
    """
    if x.shape[1] == 1:
        return x.transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, chunk, *x.shape[3:])
    return x.unflatten(1, (-1, chunk)).movedim(3, 1)


def from_chunks(y: Tensor, n_output: int) -> Tensor:
    """(batch, head, chunks, chunk * output, channel) -> (batch, chunks, chunk, head, output,
    channel), a view: the pieces are copied into time order once, where they are joined."""
    return y.unflatten(3, (-1, n_output)).movedim(1, 3)


def rows(x: Tensor) -> Tensor:
    """(..., chunk, output, state) -> (..., chunk * output, state)."""
    return x.flatten(-3, -2)


def wide(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which the state is carried from chunk to chunk: twice the precision."""
    if device.type == "mps":  # has no float64
        return dtype
    return torch.complex128 if dtype.is_complex else torch.float64


def pieces(length: int, chunk: int, piece: int, *, halving: bool) -> list[tuple[int, int]]:
    """The time axis as (length, chunk) pairs: long pieces of whole chunks, then what is left.

    `piece` bounds the steps of one pair, so that what a pair works on stays in the cache. With
    `halving` chunks stay powers of two: the rest is split by its binary digits.
    """
    rest, parts = length % chunk, []
    step = max(chunk, piece - piece % chunk)
    for start in range(0, length - rest, step):
        parts.append((min(step, length - rest - start), chunk))
    while rest:
        size = 1 << (rest.bit_length() - 1) if halving else rest
        parts.append((size, size))
        rest -= size
    return parts


def guarded(
    form: Form, parts: Sequence[tuple[int, int]], A: Transition, B: Tensor, C: Tensor,
    values: Tensor, state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`form` over the pieces, with what is not finite at step t kept from the outputs before t.

    A matrix product over a chunk would multiply NaN by the zeros of the mask and spoil earlier
    outputs too. So NaN and infinity are taken out first, and the outputs of their channel (of all
    channels for one in A or B) from t on and the last state are set to NaN. C needs no care: row
    t of it meets row t of the output alone. Finite inputs pass unchanged.
    """
    if not is_traced() and (CHECKED.get() or _all_finite(A, B, values)):
        return _by_pieces(form, parts, A, B, C, values, state)
    bad = ~torch.isfinite(values).all(3) | ~torch.isfinite(B).flatten(3).all(3)[..., None]
    for x in A.tensors():
        fault = _decay_fault(x)
        fault = fault.flatten(3).any(3) if fault.ndim > 3 else fault
        bad = bad | fault[..., None]
    spoiled = bad.cumsum(1) > 0
    clean = A.map_tensors(lambda x: x.masked_fill(_decay_fault(x), 0.0))
    y, last = _by_pieces(form, parts, clean, _finite(B), C, _finite(values), state)
    y = y.masked_fill(spoiled[:, :, :, None, :], torch.nan)
    if values.shape[1]:
        last = last.masked_fill(spoiled[:, -1, :, None, :], torch.nan)
    return y, last


def _by_pieces(
    form: Form, parts: Sequence[tuple[int, int]], A: Transition, B: Tensor, C: Tensor,
    values: Tensor, state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`form` over pieces of the time axis, all in one dtype, the state handed on."""
    dtype = _common_dtype(A, B, C, values, state)
    B, C, values = B.to(dtype), C.to(dtype), values.to(dtype)
    state = state.to(wide(dtype, state.device))
    if not parts:
        return values.new_zeros(*values.shape[:3], C.shape[-2], values.shape[-1]), state.to(dtype)

    def cut(x: Tensor, start: int, stop: int) -> Tensor:
        return x[:, start:stop] if x.shape[1] > 1 else x

    outputs, start = [], 0
    for length, chunk in parts:
        stop = start + length
        y, state = form(
            A.time_slice(start, stop), cut(B, start, stop), cut(C, start, stop),
            values[:, start:stop], state, chunk,
        )  # fmt: skip
        outputs.append(y)
        start = stop
    whole = [y for y in outputs if y.shape[2] == outputs[0].shape[2]]
    main = whole[0] if len(whole) == 1 else torch.cat(whole, 1)
    joined = [y.flatten(1, 2) for y in (main, *outputs[len(whole) :])]
    return (joined[0] if len(joined) == 1 else torch.cat(joined, 1)), state.to(dtype)


def _common_dtype(A: Transition, *tensors: Tensor) -> torch.dtype:
    """The dtype of the computation: float32 at least, complex if anything is."""
    dtype = torch.float32
    for x in (*tensors, *A.tensors()):
        dtype = torch.promote_types(dtype, x.dtype)
    return complex_dtype(dtype) if A.is_complex else dtype


def _all_finite(A: Transition, *tensors: Tensor) -> bool:
    """One pass of sums: NaN and infinity show in them (a sum that overflows only costs time)."""
    with torch.no_grad():
        faulty = [~torch.isfinite(x.sum()) for x in tensors]
        faulty += [_decay_fault(x.sum()) for x in A.tensors()]
        return not bool(torch.stack(faulty).any())


def _decay_fault(x: Tensor) -> Tensor:
    """-inf is a legal logarithm of a decay; NaN and +inf are not."""
    return ~torch.isfinite(x) if x.is_complex() else torch.isnan(x) | (x == torch.inf)


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(~torch.isfinite(x), 0.0)
