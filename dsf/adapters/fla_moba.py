"""flash-linear-attention: MoBA, softmax over a token's own block and a few blocks it chooses."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.adapters._contract import Visit
from dsf.adapters._fla_ops import Given, maps_by_row
from dsf.adapters.flash_linear_attention import FlashLinearAttention, given_mask
from dsf.factors import ExplicitRows
from dsf.models._cached import cache_recurrence
from dsf.recurrence import Recurrence


def _map(query: Tensor, key: Tensor, size: int, n_chosen: int) -> Tensor:
    """(head, time, time) of one sequence (time, head, width).

    A block is `size` tokens; token t may choose from the blocks that ended at t or before, but
    for the sequence's last, those n_chosen whose mean key has the largest product with q_t.
    """
    length, at = len(query), torch.arange(len(query), device=query.device)
    z = query.shape[-1] ** -0.5 * torch.einsum("thd,shd->hts", query, key)
    seen = at[:, None] >= at
    n_block = (length - 1) // size  # the last one is never chosen
    if n_chosen > 0:
        own = at[:, None] // size == at // size
        seen = (seen & own).expand_as(z)
    if n_chosen > 0 and n_block > 0:
        means = key[: n_block * size].unflatten(0, (n_block, size)).mean(1)
        gate = torch.einsum("thd,nhd->htn", query, means)
        ended = at[:, None] >= size * (torch.arange(n_block, device=at.device) + 1)
        gate = gate.masked_fill(~ended, -math.inf)
        best = gate.topk(min(n_chosen, n_block), -1).indices
        chosen = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, best, True) & ended
        chosen = chosen.repeat_interleave(size, -1)
        seen = seen.clone()
        seen[..., : n_block * size] |= chosen
    return z.masked_fill(~seen, -math.inf).softmax(-1)


class Moba(FlashLinearAttention):
    """The map is kept, as its rows have holes that depend on the queries.

    The op lays rows end to end also without a mask. One block in all (`moba_topk` 1) is, in the
    released op, attention to every token before.
    """

    ops: ClassVar[dict[str, Any]] = {"parallel_moba": None}
    tapped = "the attention function of the layer's file"

    def __init__(self) -> None:
        super().__init__(
            "mixture_of_block_attention", "moba:MoBA", structure="I (one state per token)"
        )

    def prepared(self, visit: Visit, given: Given) -> Given:
        """Rows of equal length, which no mask tells of, as a batch."""
        if given_mask(visit) is not None or visit.kwargs.get("cu_seqlens") is not None:
            return given
        rows = len(given["cu_seqlens"]) - 1
        return {
            **{n: x.unflatten(1, (rows, -1))[0] if n in ("q", "k", "v") else x
               for n, x in given.items()}, "cu_seqlens": None,
        }  # fmt: skip

    def recurrence(self, function: str, given: Given) -> tuple[Recurrence, Tensor]:
        """One map after another, on the layer's own time."""
        query, key = given["q"], given["k"]
        chunk, chosen = given["chunk_size"], given["topk"] - 1
        weights = maps_by_row(
            query, given["kept"], lambda row, real: _map(query[row, real], key[row, real], chunk,
                                                         chosen)
        )  # fmt: skip
        return cache_recurrence(self.system, ExplicitRows(weights)), given["v"]

    def returned(self, function: str, y: Tensor, given: Given) -> Tensor:
        """End to end, where it has not been laid so yet."""
        return y.flatten(0, 1)[None] if given["cu_seqlens"] is None else y


ADAPTERS = [Moba]
