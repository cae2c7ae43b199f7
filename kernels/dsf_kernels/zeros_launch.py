"""Launches of `zeros_scan` and its gradients, and the rule of its tiles."""

from typing import NamedTuple

import torch
from torch import Tensor

from dsf_kernels.launch import narrow, on_device, power_of_two
from dsf_kernels.zeros_adjoint import adjoint_kernel
from dsf_kernels.zeros_kernels import WALK_ROWS, factors_kernel, totals_kernel
from dsf_kernels.zeros_segments import carry_kernel
from dsf_kernels.zeros_walk import walk_kernel

MAX_WIDTH = 128
# Tokens of a chunk and of a block of its pairs, channels of a program, warps, pipeline stages:
# widths above 64, up to 64, and exact products.
WIDE = {"CHUNK": 128, "COLUMNS": 64, "SLAB": 64, "num_warps": 8, "STAGES": 2}
NARROW = {"CHUNK": 64, "COLUMNS": 64, "SLAB": 64, "num_warps": 4, "STAGES": 2}
EXACT = {"CHUNK": 16, "COLUMNS": 16, "SLAB": 16, "num_warps": 8, "STAGES": 1}
GATES = 32  # COLUMNS at most of walks that also sum for the gates and logits
BLOCK = 4096  # tokens whose logits are summed at once, at most
FACTORS = 128  # tokens of a program that writes factors, at least a chunk
FEW, PARTS, LEAST = 16, 128, 16  # programs up to which a row is split; into so many; chunks of one


class Sums(NamedTuple):
    """Factors of every chunk (batch, head, chunk, rows, token) and the sums they come from."""

    factors: Tensor
    log_total: Tensor
    mean: Tensor
    totals: Tensor | None


def settings(kind: torch.dtype, n_left: int, n_right: int) -> dict:
    """Tiles and warps: three states of WIDTH x SLAB in registers; exact products take less.

    CHUNK is the same whichever of the widths is on the left.
    """
    exact = kind == torch.float32
    chosen = EXACT if exact else WIDE if max(n_left, n_right) > 64 else NARROW
    slab = min(power_of_two(n_right, 16), chosen["SLAB"])
    return chosen | {"WIDTH": power_of_two(n_left, 16), "SLAB": slab, "EXACT": exact,
                     "SCALED": kind == torch.float16,
                     "PRECISION": "ieee" if exact else "tf32"}  # fmt: skip


def segment_of(n_chunk: int, programs: int) -> int:
    """Chunks of a segment: all, unless the row is long and its heads keep few programs busy.

    For one row, never for the batch, so that a row alone equals the row in a batch.
    """
    if programs > FEW or n_chunk <= 2 * LEAST:
        return n_chunk
    return max(LEAST, -(-n_chunk // PARTS))


def serial(length: int) -> dict:
    """Tokens and warps of the kernels that sum along time in one program a head."""
    block = min(BLOCK, power_of_two(length, 32))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 128))}


def sum_logits(gates, totals: Tensor | None, chosen: dict, rows: int) -> tuple[Sums, Tensor]:
    """What the walks multiply with, and the totals after the last token.

    gates: logit, first, higher, zero; chosen: `settings` of the walks.
    """
    logit, first, higher, zero = gates
    batch, length, head = logit.shape
    log_total, mean = logit.new_empty(2, batch, head, length, dtype=torch.float64)
    final = logit.new_empty(batch, head, 3, dtype=torch.float64)
    known = final if totals is None else totals
    totals_kernel[(batch * head,)](
        logit, known, log_total, mean, final, length, head, *logit.stride(),
        HAS_INITIAL=totals is not None, **serial(length),
    )  # fmt: skip
    chunk = chosen["CHUNK"]
    n_chunk, block = -(-length // chunk), max(FACTORS, chunk)
    factors = logit.new_empty(batch, head, n_chunk, rows, chunk, dtype=torch.float32)
    none = logit if zero is None else zero
    factors_kernel[(batch * head * -(-n_chunk * chunk // block),)](
        logit, first, higher, none, log_total, mean, known, factors, length, n_chunk, head,
        *logit.stride(), *first.stride(), *higher.stride(), *none.stride(),
        HAS_INITIAL=totals is not None, HAS_ZERO=zero is not None, EXACT=chosen["EXACT"],
        ROWS=rows, CHUNK=chunk, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return Sums(factors, log_total, mean, totals), final


def _launch(kernel, x, y, w, sums, moments, out, final, asked, parts, segment):
    """One walk; out or final None: not wanted. moments: (batch, head, [segment,] 3, N, P)."""
    batch, length, head, n_right = w.shape
    n_left, chosen = y.shape[3], settings(w.dtype, y.shape[3], n_right)
    if parts is not None:
        chosen["COLUMNS"] = min(chosen["COLUMNS"], GATES)
    n_chunk, rows = sums.factors.shape[2:4]
    n_slab, n_segment = -(-n_right // chosen["SLAB"]), -(-n_chunk // segment)
    held = (0,) * 6 if moments is None else moments.stride()
    held = (*held[:2], 0, *held[2:]) if len(held) == 5 else held
    x, y, w = (narrow(t, 1) for t in (x, y, w))
    asked = x if asked is None else narrow(asked, 1)
    full = (
        length % chosen["CHUNK"] == 0
        and n_left == chosen["WIDTH"]
        and n_right % chosen["SLAB"] == 0
    )
    dummy = sums.factors
    kernel[(batch * head * n_slab * n_segment,)](
        x, y, w, sums.factors, dummy if moments is None else moments, x if out is None else out,
        dummy if final is None else final, asked, dummy if parts is None else parts,
        length, n_chunk, segment, head, n_left, n_right,
        *x.stride(), *y.stride(), *w.stride(), *held, *asked.stride(),
        HAS_INITIAL=moments is not None, STORE=out is not None, FINAL=final is not None,
        PARTS=parts is not None, FULL=full, ROWS=rows, **chosen,
    )  # fmt: skip


def walk(x, y, w, sums, moments, out, final=None, asked=None, parts=None, *, reverse=False):
    """out and the last states (reverse: gradients of the first), in segments if the row asks.

    x, y (..., left), w (..., right); moments (batch, head, 3, left, right) or None.
    """
    kernel = adjoint_kernel if reverse else walk_kernel
    batch, length, head, n_right = w.shape
    n_left, chosen = y.shape[3], settings(w.dtype, y.shape[3], n_right)
    n_chunk = sums.factors.shape[2]
    segment = segment_of(n_chunk, head * -(-n_right // chosen["SLAB"]))
    if segment < n_chunk:
        n_segment = -(-n_chunk // segment)
        shape = (batch, head, n_segment, 3, n_left, n_right)
        ends, starts = (w.new_empty(shape, dtype=torch.float32) for _ in range(2))
        _launch(kernel, x, y, w, sums, None, None, ends, None, None, segment)
        last = ends.new_empty(batch, head, 3, n_left, n_right) if final is None else final
        given = sums.log_total if sums.totals is None else sums.totals
        size, block = n_left * n_right, 256
        carry_kernel[(batch * head * -(-size // block),)](
            ends, starts, last, last if moments is None else moments, sums.log_total, sums.mean,
            given, length, n_segment, segment * chosen["CHUNK"], head, size, n_right,
            *((0,) * 5 if moments is None else moments.stride()),
            HAS_STATE=moments is not None, HAS_INITIAL=sums.totals is not None, REVERSE=reverse,
            BLOCK=block, num_warps=4,
        )  # fmt: skip
        moments, final = starts, None
    _launch(kernel, x, y, w, sums, moments, out, final, asked, parts, segment)


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
    chosen = settings(value.dtype, key.shape[3], value.shape[3])
    with on_device(value):
        totals = None if totals is None else totals.contiguous()
        sums, last = sum_logits((logit, first, higher, zero), totals, chosen, WALK_ROWS)
        walk(query, key, value, sums, moments, out, final)
    return out, final, last
