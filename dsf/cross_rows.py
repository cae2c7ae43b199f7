"""Attention between two sequences as one system: the keys' tokens first, then the queries'."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsf.mixing_rows import MixingRows
from dsf.shapes import Inexact
from dsf.transitions._base import register, static


@register
@dataclasses.dataclass(frozen=True)
class CrossRows(MixingRows):
    """Rows of cross-attention on one axis of time: `inner` reads n_token keys, which come first.

    Step t <= n_token writes a token's value and reads nothing: its row is zero. Step n_token + i
    reads row i of `inner`, and what it writes is never read. Keys of `inner` beyond n_token are
    slots that hold a value from the start; they stand behind the slots of all steps. `n_query`
    counts the queries of the whole system and `query_start` the steps before the first row, of
    which there are `n_row`: time slices keep the slots' numbers.
    """

    inner: MixingRows
    n_token: int = static()
    n_query: int = static()
    n_row: int = static()
    query_start: int = static(default=0)

    @classmethod
    def of(cls, inner: MixingRows, n_token: int) -> CrossRows:
        """All steps: those of the keys, then those of the queries of `inner`."""
        n_query = inner.shape[1]
        return cls(inner, n_token, n_query, n_token + n_query)

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Every key that is a token comes before every query."""
        return self.inner.n_key == self.n_token

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, slot)."""
        batch, _, head, _, n_key = self.inner.shape
        return torch.Size((batch, self.n_row, head, 1, n_key + self.n_query))

    @property
    def _empty(self) -> int:
        return self.n_row - self.inner.shape[1]

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """The tile of `inner` among zeros."""
        rows = range(*queries.indices(self.n_row))
        cols = range(*keys.indices(self.n_key))
        read = slice(*(max(r - self._empty, 0) for r in (rows.start, rows.stop)))
        tokens = slice(min(cols.start, self.n_token), min(cols.stop, self.n_token))
        behind = self.n_token + self.n_query
        held = slice(*(self.n_token + max(c - behind, 0) for c in (cols.start, cols.stop)))
        parts = [self.inner.tile(read, tokens), self.inner.tile(read, held)]
        gap = len(cols) - sum(part.shape[-1] for part in parts)
        parts[0] = torch.nn.functional.pad(parts[0], (0, gap))
        found = torch.cat(parts, -1)
        return torch.nn.functional.pad(found, (0, 0, len(rows) - found.shape[-2], 0))

    def time_slice(self, start: int, stop: int) -> CrossRows:
        """The rows of steps start..stop-1 over the same slots."""
        read = [max(step - self._empty, 0) for step in (start, stop)]
        return dataclasses.replace(
            self, inner=self.inner.time_slice(*read), n_row=stop - start,
            query_start=self.query_start + start,
        )  # fmt: skip

    def mix(
        self, values: Inexact[Tensor, "batch head key channel"]
    ) -> Inexact[Tensor, "out_batch out_head query channel"]:
        """The values of the keys through `inner`'s own fast path."""
        behind = self.n_token + self.n_query
        read = torch.cat([values[..., : self.n_token, :], values[..., behind:, :]], -2)
        return torch.nn.functional.pad(self.inner.mix(read), (0, 0, self._empty, 0))

    def shape_faults(self) -> list[str]:
        """Those of `inner`, and the counts of steps."""
        faults = self.inner.shape_faults()
        if not faults and not (self.inner.n_key >= self.n_token and self._empty >= 0):
            faults.append(
                f"C: expected at least n_token={self.n_token} keys and at most {self.n_row} rows "
                f"of inner, got {self.inner.n_key} keys and {self.inner.shape[1]} rows."
            )
        return faults
