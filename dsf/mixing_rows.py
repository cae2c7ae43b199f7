"""Output rows taken from an attention map: what every kind of them offers."""

from __future__ import annotations

import abc
from typing import Literal

import torch
from torch import Tensor

from dsf.shapes import Inexact, broadcast_shapes

Part = Literal["causal", "anticausal", "strict", "full"]
"""Which entries of a map: key <= query, key >= query, key > query, or all."""

_BLOCK_ENTRIES = 2**22
"""How many weights are held at once while rows are mixed block by block."""


class MixingRows(abc.ABC):
    """C whose row t is row t of an attention map, computed when asked for, tile by tile.

    With A = I and B = OneHot the system's map is the causal part of these rows. A subclass gives
    `tile`, `shape` and `time_slice`; `n_key` is the number of slots. `causal` promises that row r
    is zero beyond key query_start + r.
    """

    shape: torch.Size
    causal: bool
    query_start: int = 0

    @property
    def n_key(self) -> int:
        """Number of keys, the columns of the map."""
        return self.shape[-1]

    @property
    def ndim(self) -> int:
        """5, as C."""
        return 5

    @abc.abstractmethod
    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """Weights (batch, head, query, key) of some rows and columns, nothing else computed."""

    @abc.abstractmethod
    def time_slice(self, start: int, stop: int) -> MixingRows:
        """The rows of steps start..stop-1."""

    def shape_faults(self) -> list[str]:
        """What does not fit, one sentence each; empty if all is well."""
        return []

    def mix(self, values: Inexact[Tensor, "batch head key channel"]) -> Inexact[
        Tensor, "out_batch out_head query channel"]:  # fmt: skip
        """All rows times `values` (batch, head, key, channel): memory O(block x n_key)."""
        return self.mix_part(values, "full", 0)

    def mix_part(
        self, values: Inexact[Tensor, "batch head key channel"], part: Part, offset: int
    ) -> Inexact[Tensor, "out_batch out_head query channel"]:
        """The rows times `values`, of each row only a part, relative to its own slot offset + row.

        Memory O(block x n_key), by tiles; "full" takes everything.
        """
        length, every = self.shape[1], slice(0, self.n_key)
        block = block_rows(self)
        rows = []
        for start in range(0, length, block):
            stop = min(start + block, length)
            weights = self.tile(slice(start, stop), every)
            if part != "full":
                own = range(offset + start, offset + stop)
                weights = weights.masked_fill(~_part(part, own, self.n_key, weights.device), 0)
            dtype = torch.promote_types(weights.dtype, values.dtype)
            rows.append(weights.to(dtype) @ values.to(dtype))
        if not rows:
            lead = (self.shape[0], self.shape[2])
            lead = broadcast_shapes(values.shape[:2], lead)
            return values.new_zeros(*lead, 0, values.shape[-1])
        return torch.cat(rows, dim=2)


def _part(part: Part, own: range, n_key: int, device: torch.device) -> Tensor:
    row = torch.arange(own.start, own.stop, device=device)[:, None]
    key = torch.arange(n_key, device=device)
    if part == "causal":
        return key <= row
    return key > row if part == "strict" else key >= row


def block_rows(rows: MixingRows) -> int:
    """So many rows of a map that they hold at most _BLOCK_ENTRIES weights, one at least."""
    batch, _, head, _, n_key = rows.shape
    return max(1, _BLOCK_ENTRIES // max(n_key * batch * head, 1))
