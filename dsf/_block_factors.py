"""A block's projections as arrays, and its feature blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsf._block_residual import beside, matrices
from dsf.derivatives import Derivative
from dsf.errors import DsfUnsupportedError, DsfValueError
from dsf.maps import Rows, materialise, spans
from dsf.memory import require_memory
from dsf.wrappers import core

if TYPE_CHECKING:
    from dsf.blocks import Block

_ADVICE = "Ask for a tile with queries= and keys=, use map or norm(probes=...), or raise the cap."
_ROUNDING = 1e3
"""Units of round-off, times sqrt(features), within which two ways to one product agree."""


# -- what the projections look like in time ------------------------------------------------------


def taps(name: str, into: Derivative) -> int:
    """How many inputs, the token's own included, make one value; none may lie ahead."""
    x, values = into.inputs[0], into.output
    length = x.shape[1]
    most = 1
    for token in {length // 2, 3 * length // 4, length - 1} - {-1}:
        seed = torch.zeros_like(values)
        seed[:, token] = 1 + torch.arange(seed[:, token].numel(), device=x.device).view(
            seed[:, token].shape).sin()  # fmt: skip
        seen = into.transposed(seed)[0].abs().amax((0, 2)).nonzero().flatten()
        if len(seen) and int(seen[-1]) > token:
            raise _not_local(name, "values made of the token and those before it")
        most = max(most, token - int(seen[0]) + 1) if len(seen) else most
    return most


def require_token_by_token(name: str, out_of: Derivative) -> None:
    """Refuse a readout that mixes tokens: the map would not be the scan's alone."""
    seed = torch.zeros_like(out_of.output)
    seed[:, ::2] = 1
    if bool(out_of.transposed(seed)[0][:, 1::2].any()):
        raise _not_local(name, "a readout that works token by token")


def _not_local(name: str, wanted: str) -> DsfUnsupportedError:
    return DsfUnsupportedError(
        f"dsf.trace(...).block: {name}: expected {wanted}, got a layer that mixes tokens "
        f"outside its recurrence. Its map cannot be told from the recurrence's."
    )


# -- maps between directions ---------------------------------------------------------------------


def between(
    block: Block, read: Tensor, write: Tensor, queries: Rows, keys: Rows, cap: int | None
) -> Tensor:
    """o_t . M_tj i_j of every head (batch, head, query, key), for directions of all tokens."""
    rows, cols = _spans(block, queries, keys)
    (out,) = block.out_of.transposed(read)
    written = _written(block, write)
    total = out.new_zeros(out.shape[0], block.n_head, len(rows), len(cols))
    for v, tile in zip(written, _tiles(block, rows, cols, cap), strict=True):
        total += torch.einsum(
            "bthp,bjhp,bhptj->bhtj", out[:, rows.start : rows.stop],
            v[:, cols.start : cols.stop], tile.expand(-1, -1, v.shape[-1], -1, -1),
        )  # fmt: skip
    if block.around is None:
        return total
    return beside(total, (read * block.around.apply(write)).sum(-1), rows, cols)


def require_probes(function: str, probes: int) -> None:
    """Refuse fewer than one random direction."""
    if probes < 1:
        raise DsfValueError(f"{function}: probes: expected at least 1 or None, got {probes}.")


def _written(block: Block, x: Tensor) -> Tensor:
    """(tap, batch, time, head, channel): what x_j, alone, adds to the values at j + tap."""
    n = block.taps
    found = x.new_zeros(n, *block.into.output.shape)
    for start in range(n):
        alone = torch.zeros_like(x)
        alone[:, start::n] = x[:, start::n]
        values = block.into.apply(alone)
        for tap in range(n):
            late = values[:, start + tap :: n]
            found[tap][:, start::n][:, : late.shape[1]] = late
    return found


def _tiles(block: Block, rows: range, cols: range, cap: int | None) -> Iterator[Tensor]:
    """For each tap the inner map (batch, head, channel or 1, query, key) at columns key + tap."""
    length = block.input.shape[1]
    wide = range(cols.start, min(cols.stop + block.taps - 1, length))
    tile = materialise(block.inner, rows, wide, max_memory=cap, length=_free_length(block))
    tile = tile if tile.ndim == 5 else tile[:, :, None]
    tile = tile.expand(block.input.shape[0], block.n_head, -1, -1, -1)
    tile = torch.nn.functional.pad(tile, (0, len(cols) + block.taps - 1 - len(wide)))
    for tap in range(block.taps):
        yield tile[..., tap : tap + len(cols)]


def _free_length(block: Block) -> int | None:
    return block.input.shape[1] if core(block.inner).length == 1 else None


def sketched_norm(
    block: Block, queries: Rows, keys: Rows, heads: bool, probes: int, cap: int | None
) -> Tensor:
    """Root of the mean square of o . M i over random signs: E (o . M i)^2 = ||M||_F^2."""
    require_probes("dsf.Block.norm", probes)
    generator = torch.Generator().manual_seed(0)
    total: Tensor | None = None
    for _ in range(probes):
        o, i = (torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
                for x in (block.output, block.input))  # fmt: skip
        found = between(block, o, i, queries, keys, cap)
        square = (found if heads else found.sum(1)).square() / probes
        total = square if total is None else total + square
    assert total is not None
    return total.sqrt()


# -- exact, with the projections as arrays -------------------------------------------------------


def arrays(block: Block, cap: int | None) -> tuple[Tensor, Tensor]:
    """V (tap, batch, time, head, channel, input), O (batch, time, head, channel, output).

    V is by source token: V[k][:, j] makes values at j + k of x_j. Cost: one row of a projection
    at a time, all tokens together.
    """
    batch, length, head, channel = block.into.output.shape
    n, n_in, n_out = block.taps, block.input.shape[-1], block.output.shape[-1]
    require_memory(
        "dsf.Block", "projections", ("tap", "batch", "time", "head", "channel", "feature"),
        (n, batch, length, head, channel, n_in + n_out), block.input.dtype,
        device=block.input.device, max_memory=cap, advice=_ADVICE,
    )  # fmt: skip
    into = block.input.new_zeros(n, batch, length, head * channel, n_in)
    for start in range(n):

        def values_seeds(which: range, start: int = start) -> Tensor:
            seeds = into.new_zeros(len(which), batch, length, head * channel)
            seeds[range(len(which)), :, start::n, list(which)] = 1
            return seeds.unflatten(-1, (head, channel))

        for which, found in block.into.rows(values_seeds, head * channel):
            for tap in range(n):
                source = slice((start - tap) % n, max(length - tap, 0), n)
                rows = found[:, :, source].permute(1, 2, 0, 3)
                into[tap][:, source, which.start : which.stop] = rows
    out_of = block.output.new_zeros(batch, length, head, channel, n_out)

    def output_seeds(which: range) -> Tensor:
        seeds = out_of.new_zeros(len(which), batch, length, n_out)
        seeds[range(len(which)), :, :, list(which)] = 1
        return seeds

    for which, found in block.out_of.rows(output_seeds, n_out):
        out_of[..., which.start : which.stop] = found.permute(1, 2, 3, 4, 0)
    into = into.unflatten(3, (head, channel))
    _check_arrays(block, into)
    return into, out_of


def _check_arrays(block: Block, into: Tensor) -> None:
    x = block.input
    parts = [torch.einsum("bjhpi,bji->bjhp", v, x) for v in into]
    made = sum(_later(part, tap) for tap, part in enumerate(parts))
    exact = block.into.apply(x)
    unit = torch.finfo(x.dtype).eps * math.sqrt(x.shape[-1]) * _ROUNDING
    if float((made - exact).abs().max()) > unit * float(exact.abs().max()):
        raise _not_local(block.name, f"values made of {block.taps} tokens")


def _later(x: Tensor, tap: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0) * 2 + (tap, 0))[:, : x.shape[1]]


def jacobian(block: Block, queries: Rows, keys: Rows, cap: int | None) -> Tensor:
    """M_tj (batch, head, query, key, output, input) of a tile."""
    rows, cols = _spans(block, queries, keys)
    shape = (block.input.shape[0], block.n_head, len(rows), len(cols),
             block.output.shape[-1], block.input.shape[-1])  # fmt: skip
    require_memory(
        "dsf.Block.jacobian", "feature blocks",
        ("batch", "head", "query", "key", "output", "input"), shape, block.input.dtype,
        device=block.input.device, max_memory=cap, advice=_ADVICE,
    )  # fmt: skip
    into, out_of = arrays(block, cap)
    total = into.new_zeros(shape)
    for v, tile in zip(into, _tiles(block, rows, cols, cap), strict=True):
        total += torch.einsum(
            "bthpo,bhptj,bjhpi->bhtjoi", out_of[:, rows.start : rows.stop],
            tile.expand(-1, -1, out_of.shape[3], -1, -1), v[:, cols.start : cols.stop],
        )  # fmt: skip
    if block.around is None:
        return total
    return beside(total, matrices(block, cap, _ADVICE), rows, cols)


def norm(block: Block, queries: Rows, keys: Rows, heads: bool, cap: int | None) -> Tensor:
    """||M_tj||_F by Gram matrices of the channels (with `heads`), or query by query."""
    rows, cols = _spans(block, queries, keys)
    into, out_of = arrays(block, cap)
    into, out_of = into[:, :, cols.start : cols.stop], out_of[:, rows.start : rows.stop]
    tiles = [t.expand(-1, -1, out_of.shape[3], -1, -1) for t in _tiles(block, rows, cols, cap)]
    R = None if block.around is None else matrices(block, cap, _ADVICE)
    if not heads:
        return _whole_norm(into, out_of, tiles, R, rows, cols)
    gram = torch.einsum("bthpo,bthqo->bthpq", out_of, out_of)
    total = out_of.new_zeros(out_of.shape[0], block.n_head, len(rows), len(cols))
    for v1, tile1 in zip(into, tiles, strict=True):
        for v2, tile2 in zip(into, tiles, strict=True):
            values = torch.einsum("bjhpi,bjhqi->bjhpq", v1, v2)
            if tile1.stride(2) == 0:  # channels share their map
                pairs = torch.einsum("bthpq,bjhpq->bhtj", gram, values)
                total += pairs * tile1[:, :, 0] * tile2[:, :, 0]
            else:
                total += torch.einsum(
                    "bthpq,bjhpq,bhptj,bhqtj->bhtj", gram, values, tile1, tile2)  # fmt: skip
    total = total.clamp_min(0).sqrt()
    if R is None:
        return total
    return beside(total, torch.linalg.vector_norm(R, dim=(-2, -1)), rows, cols)


def _whole_norm(
    into: Tensor, out_of: Tensor, tiles: list[Tensor], R: Tensor | None, rows: range, cols: range
) -> Tensor:
    """Of the sum over heads and of what is added, one query at a time."""
    found = out_of.new_zeros(out_of.shape[0], out_of.shape[1], into.shape[2])
    for t in range(found.shape[1]):
        parts = [
            torch.einsum("bhpo,bhpj,bjhpi->bjoi", out_of[:, t], tile[..., t, :], v)
            for v, tile in zip(into, tiles, strict=True)
        ]
        whole = torch.stack(parts).sum(0)
        if R is not None and rows[t] in cols:
            whole[:, cols.index(rows[t])] += R[:, rows[t]]
        found[:, t] = torch.linalg.vector_norm(whole, dim=(-2, -1))
    return found


def trace(block: Block, queries: Rows, keys: Rows, cap: int | None) -> Tensor:
    """Sum over features of (M_tj)_ii for every head."""
    rows, cols = _spans(block, queries, keys)
    into, out_of = arrays(block, cap)
    total = into.new_zeros(into.shape[1], block.n_head, len(rows), len(cols))
    for v, tile in zip(into, _tiles(block, rows, cols, cap), strict=True):
        read, write = out_of[:, rows.start : rows.stop], v[:, cols.start : cols.stop]
        own = torch.einsum("bthpi,bjhpi->bhptj", read, write)
        total += (own * tile).sum(2)
    if block.around is None:
        return total
    R = matrices(block, cap, _ADVICE)
    return beside(total, R.diagonal(dim1=-2, dim2=-1).sum(-1), rows, cols)


def _spans(block: Block, queries: Rows, keys: Rows) -> tuple[range, range]:
    return spans("dsf.Block", queries, keys, block.input.shape[1])
