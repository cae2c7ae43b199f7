"""flash-linear-attention: native sparse attention, three gated maps; one chooses its blocks."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.adapters._contract import Built, Visit
from dsf.adapters._fla_ops import Given, maps_by_row
from dsf.adapters._tapped import Place
from dsf.adapters.flash_linear_attention import FlashLinearAttention
from dsf.errors import DsfUnsupportedError
from dsf.factors import ExplicitRows
from dsf.models._cached import cache_recurrence
from dsf.models._heads import share_groups
from dsf.recurrence import Recurrence

_OP = "parallel_nsa"
_CHOOSERS = ("parallel_nsa_topk", "naive_nsa_topk")
"""What chooses, in the file of the op: its answer is recorded, as near ties would be broken by
rounding."""


def _map(a: Given) -> Tensor:
    """(head, time, time) of one sequence: tensors (time, head, ...), groups shared.

        M = g^cmp P^cmp / size + g^slc P^slc + g^swa P^swa      (row t times the gates of token t)

    each P a softmax of scale q_t.k_j: over the mean keys of the blocks of `block_size` tokens that
    ended at t or before (a token has its block's weight, divided by its size), over the tokens up
    to t of the chosen blocks, and over the last `window_size` tokens.
    """
    query, size = a["q"], a["block_size"]
    head, length = query.shape[1], len(query)
    key = share_groups(a["k"][None], head)[0]
    scale = query.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    at = torch.arange(length, device=query.device)
    z = scale * torch.einsum("thd,shd->hts", query, key)
    lag = at[:, None] - at
    block = torch.arange(math.ceil(length / size), device=query.device)

    chosen = (a["chosen"][..., None, :] == block[:, None]).any(-1)  # (time, group, block)
    chosen = share_groups(chosen[None], head)[0].transpose(0, 1)
    chosen = chosen.repeat_interleave(size, -1)[..., :length]
    total = _gate(a["g_slc"]) * _softmax(z, chosen & (lag >= 0))
    if a["g_cmp"] is not None:
        whole = length // size
        means = key[: whole * size].unflatten(0, (whole, size)).mean(1)
        coarse = scale * torch.einsum("thd,nhd->htn", query, means)
        p = _softmax(coarse, size * (block[:whole] + 1) <= at[:, None] + 1) / size
        spread = p.repeat_interleave(size, -1)
        total[..., : whole * size] += _gate(a["g_cmp"]) * spread
    if a["window_size"]:
        total = total + _gate(a["g_swa"]) * _softmax(z, (lag >= 0) & (lag < a["window_size"]))
    return total


def _gate(g: Tensor | None) -> Any:
    return 1.0 if g is None else g.T[..., None]


def _softmax(z: Tensor, seen: Tensor) -> Tensor:
    """Rows without a key are zero."""
    return torch.softmax(z.masked_fill(~seen, -math.inf), -1).masked_fill(~seen, 0.0)


class NativeSparse(FlashLinearAttention):
    """The map is kept, as its rows have holes that depend on the queries."""

    ops: ClassVar[dict[str, Any]] = {_OP: None}
    parameters: ClassVar[dict[str, Any]] = {
        "q": None, "k": None, "v": None, "g_cmp": None, "g_slc": None, "g_swa": None,
        "block_indices": None, "block_counts": 16, "block_size": 64, "window_size": 0,
        "scale": None, "cu_seqlens": None,
    }  # fmt: skip
    tapped = "the attention function of the layer's file, and its choice of blocks"

    def __init__(self) -> None:
        super().__init__(
            "native_sparse_attention", "nsa:NativeSparseAttention",
            structure="I (one state per token)",
        )  # fmt: skip

    def places(self, module: nn.Module) -> list[Place]:
        """The op in the layer's file, and what chooses in the op's own."""
        found = super().places(module)
        op: Any = found[0].original
        while hasattr(op, "inner"):  # a tap around a tap
            op = op.inner
        space = inspect.unwrap(op).__globals__
        return found + [Place(space, n, space[n]) for n in _CHOOSERS if callable(space.get(n))]

    def build(self, visit: Visit) -> list[Built]:
        """From the op's arguments and the blocks that it chose."""
        (op,) = (call for call in visit.taps if call.function == _OP)
        given = op.kwargs.get("block_indices")
        chosen = [call.result for call in visit.taps if call.function in _CHOOSERS] or [given]
        counts = op.kwargs["block_counts"]
        if len(chosen) != 1 or chosen[0] is None or isinstance(counts, Tensor):
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: expected one choice of blocks by {_CHOOSERS[0]}, as "
                f"many for every token, got {len(chosen) if chosen[0] is not None else 'none'}"
                f"{' and a tensor of block_counts' if isinstance(counts, Tensor) else ''}. "
                f"Install flash-linear-attention 0.6.0."
            )
        arguments = {**op.kwargs, "chosen": chosen[0].to(torch.float32)}  # laid out as the rest
        return super().build(
            dataclasses.replace(visit, taps=[dataclasses.replace(op, kwargs=arguments)])
        )

    def recurrence(self, function: str, given: Given) -> tuple[Recurrence, Tensor]:
        """One map after another, on the layer's own time."""

        def own(row: int, real: Tensor) -> Tensor:
            moved = ("q", "k", "g_cmp", "g_slc", "g_swa", "chosen")
            cut = {n: x[row, real] for n, x in given.items() if n in moved and x is not None}
            return _map({**given, **cut})

        weights = maps_by_row(given["q"], given["kept"], own)
        values = share_groups(given["v"], weights.shape[1])
        return cache_recurrence(self.system, ExplicitRows(weights)), values


ADAPTERS = [NativeSparse]
