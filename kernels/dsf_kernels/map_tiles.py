"""Attention maps by tiles: any rows and columns of one, written once; and statistics of its rows.

The kernels make the map of no decay, of one decay a head (map_kernels), of one decay a state
(map_diagonal_kernels) and of softmax (map_softmax_kernels); `map_statistics` never stores it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsf_kernels.launch import INTERPRETED, on_device
from dsf_kernels.map_check import check_edges, check_map, check_range
from dsf_kernels.map_launch import (
    NAMES,
    Block,
    DiagonalMap,
    linear_statistics,
    linear_tiles,
    softmax_rows,
    softmax_tiles,
)
from dsf_kernels.operators import operator


def _prepared(query, key, log_decay):
    """Queries, keys and decays of every head, of an even width, as diagonal_decay_scan."""
    heads, n_state = log_decay.shape[2], key.shape[3]
    query, key = (t.repeat_interleave(heads // t.shape[2], 2) for t in (query, key))
    if n_state % 2 and not INTERPRETED:
        query, key, log_decay = (pad(t, (0, 1)) for t in (query, key, log_decay))
    return query, key, log_decay


def _tiles(
    query: Tensor, key: Tensor, log_decay: Tensor | None, bias: Tensor | None, scale: float,
    softmax: bool, causal: bool, n_head: int, block: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = _fake_tiles(query, key, log_decay, bias, scale, softmax, causal, n_head, block, dtype)
    at = Block(*block)
    if out.numel() == 0:
        return out
    if not softmax and at.row_0 + at.n_row <= at.col_0:  # above the diagonal; also no key to read
        return out.zero_()
    if softmax and key.shape[1] == 0:
        return out
    with on_device(query):
        if softmax:
            peak = out.new_empty((2, *out.shape[:3]), dtype=torch.float32)
            none = out.new_empty((0, 0, 0, 0))
            softmax_rows(query, key, bias, peak, peak, peak, none, at, scale, causal, False)
            softmax_tiles(query, key, bias, peak, out, at, scale, causal)
        elif log_decay is not None and log_decay.dim() == 4:
            DiagonalMap(*_prepared(query, key, log_decay), at, scale).tiles(out)
        else:
            linear_tiles(query, key, log_decay, out, at, scale)
    return out


def _fake_tiles(query, key, log_decay, bias, scale, softmax, causal, n_head, block, dtype):
    return query.new_empty((query.shape[0], n_head, block[1], block[3]), dtype=dtype)


def _statistics(
    query: Tensor, key: Tensor, log_decay: Tensor | None, bias: Tensor | None, edges: Tensor,
    scale: float, softmax: bool, causal: bool, n_head: int, row_0: int, n_row: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found, mass = _fake_statistics(query, key, log_decay, bias, edges, scale, softmax, causal,
                                   n_head, row_0, n_row)  # fmt: skip
    if found.numel() == 0 or key.shape[1] == 0:
        return found.zero_(), mass.zero_()
    at = Block(row_0, n_row, 0, row_0 + n_row)
    with on_device(query):
        if softmax:
            softmax_rows(query, key, bias, edges, query, found, mass, at, scale, causal, True)
        elif log_decay is not None and log_decay.dim() == 4:
            chunks = DiagonalMap(*_prepared(query, key, log_decay), at, scale)
            chunks.length = key.shape[1]
            chunks.statistics(edges, found, mass)
        else:
            linear_statistics(query, key, log_decay, edges, found, mass, at, scale)
    return found, mass


def _fake_statistics(query, key, log_decay, bias, edges, scale, softmax, causal, n_head, row_0,
                     n_row):  # fmt: skip
    shape = (query.shape[0], n_head, n_row)
    found = query.new_empty((len(NAMES), *shape), dtype=torch.float64)
    bins = max(0, edges.shape[0] - 1)
    return found, query.new_empty((*shape, bins), dtype=torch.float64)


_run_tiles = operator("map_tiles", _tiles, _fake_tiles)
_run_statistics = operator("map_statistics", _statistics, _fake_statistics)


def _given(query, key, log_decay, bias, softmax):
    """The tensors without their gradients; the bias spread over the whole map."""
    tensors = [t if t is None else t.detach() for t in (query, key, log_decay, bias)]
    if softmax and bias is not None:
        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        tensors[3] = tensors[3].expand(shape)
    return tensors


def map_tiles(
    query: Tensor,
    key: Tensor,
    log_decay: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softmax: bool = False,
    causal: bool = True,
    queries: range | None = None,
    keys: range | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The attention map (batch, head, query, key), or its rows `queries` and columns `keys`.

        W_ij = scale C_i a_i .. a_{j+1} B_j for j <= i, else exactly 0               by default
        W_ij = exp(z_ij) / sum_k exp(z_ik),  z_ij = scale C_i . B_j + bias_ij        softmax

    with C = `query`, B = `key`, a = exp(`log_decay`) (1 when None, -inf resets exactly). Rows of
    softmax run over j <= i when `causal`, else over all keys; one without any key is zero.

    Shapes: query, key (batch, time, group, state), groups dividing the heads; log_decay <= 0
    (batch, time, head), or (batch, time, head, state) for one a state; bias broadcasts to (batch,
    head, query, key) and may be -inf; time from 0, any strides; for softmax one query group a
    head and any number of keys. States 1 to 256. bf16, fp16 or fp32, one type for query and key.
    Positions count from 0; a long map made piece by piece has the same bits as one made at once,
    and `dtype` is the type it is stored in. No gradient: the arguments are detached.
    Products are exact float32 for fp32 and of operands in their own type else; sums, decays and
    exponentials are float32, cumulative decays pairs of them.
    Raises ValueError (shape, device, range), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: rows x columns x 2 N operations (below the diagonal) and one write a head; softmax also
    reads its keys twice. Memory: the result, 2 numbers a token and head; with a decay a state as
    diagonal_decay_scan. Source: Sieber et al. 2024, equation 12.
    """
    n_head = check_map("map_tiles", query, key, log_decay, bias, scale, softmax, causal)
    rows = check_range("map_tiles", "queries", queries, query.shape[1])
    columns = check_range("map_tiles", "keys", keys, key.shape[1])
    block = [rows.start, len(rows), columns.start, len(columns)]
    tensors = _given(query, key, log_decay, bias, softmax)
    return _run_tiles(*tensors, float(scale), softmax, causal, n_head, block, dtype)


def map_statistics(
    query: Tensor,
    key: Tensor,
    log_decay: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softmax: bool = False,
    causal: bool = True,
    queries: range | None = None,
    edges: Sequence[int] | Tensor | None = None,
) -> dict[str, Tensor]:
    """Statistics of the rows of the map of `map_tiles`, without the map: {name: (batch, head,
    query)}.

    Of row i, over all keys: sum and squares of W_ij; negative = sum_j max(-W_ij, 0); absolute =
    sum_j |W_ij|; log_moment = sum_j |W_ij| ln |W_ij|; entropy = ln absolute - log_moment /
    absolute in nats (NaN for a row of zeros); maximum. With `edges` e_0 < .. < e_m (at most 64
    bins) lag_mass (batch, head, query, bin): the |W_ij| at lags e_b <= i - j < e_{b+1}. All
    float32.

    Arguments, types and errors as `map_tiles`; `edges` on the host is copied to the GPU, an int32
    tensor there is not. One pass over the keys of each row, in a fixed order, without atomics;
    tiles are summed in float32 and added in float64. No gradient: the arguments are detached.
    Cost: as the map, without its write; O(time) memory.
    """
    n_head = check_map("map_statistics", query, key, log_decay, bias, scale, softmax, causal)
    rows = check_range("map_statistics", "queries", queries, query.shape[1])
    bounds = check_edges("map_statistics", edges, query)
    tensors = _given(query, key, log_decay, bias, softmax)
    found, mass = _run_statistics(
        *tensors, bounds, float(scale), softmax, causal, n_head, rows.start, len(rows)
    )
    named = dict(zip(NAMES, found.unbind(), strict=True))
    named["log_moment"] = named["log_moment"] * 0.6931471805599453
    total = named["absolute"].masked_fill(named["absolute"] == 0, torch.nan)
    named["entropy"] = (total.log() - named["log_moment"] / total).clamp(min=0)
    if edges is not None:
        named["lag_mass"] = mass
    return {name: value.float() for name, value in named.items()}
