"""transformers: PoolFormer, which mixes patches by their mean over neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsf.adapters._contract import Adapter, Built, Visit, first_tensor
from dsf.adapters._tapped import transformers_classes
from dsf.errors import DsfUnsupportedError
from dsf.factors import OneHot
from dsf.grid_rows import GridRows
from dsf.recurrence import Recurrence
from dsf.transitions import Identity
from dsf.wrappers import Bidirectional

SYSTEM = "pooling"


class Pooling(Adapter):
    """The mean of each patch's neighbourhood, without what lies beyond the border, less the patch.

        y_t = (sum_j M_tj x_j) / n_t - x_t,   M_tj = 1 where j is a neighbour of t, n_t of them

    Patches in reading order; every channel a head with the same map (`dsf.grid_rows`).
    """

    name = "transformers_pooling"
    system = SYSTEM
    structure = "I (one state per patch)"
    covers = ("transformers: the pooling of PoolFormer",)
    classes = transformers_classes({"poolformer": "PoolFormerPooling"})
    needs_tap = False

    def build(self, visit: Visit) -> list[Built]:
        """From the input alone; values (batch, patch, channel, 1)."""
        pool: Any = visit.module.pool
        x: Any = visit.args[0] if visit.args else visit.kwargs["hidden_states"]
        if pool.stride != 1 or pool.kernel_size % 2 == 0 or pool.count_include_pad:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: expected a mean over an odd neighbourhood of every "
                f"patch, got kernel_size={pool.kernel_size}, stride={pool.stride}. Write an "
                f"adapter for this layer."
            )
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        batch, channel, *grid = x.shape
        weight = wide.new_ones(channel, pool.kernel_size, pool.kernel_size)
        rows = GridRows.of(weight, [(1, *grid)])
        n = grid[0] * grid[1]
        r = Recurrence(Identity(n), OneHot(n, n), rows, system=SYSTEM, gauge="one state per patch")
        ones = wide.new_ones(1, n, channel, 1)
        count = rows.mix(ones.transpose(1, 2)).transpose(1, 2)

        def readout(y: Tensor) -> Tensor:
            mean = (y / count)[..., 0].mT.reshape(batch, channel, *grid)
            return mean.to(x.dtype) - x

        return [Built(
            SYSTEM, Bidirectional.from_rows(r), wide.flatten(2).mT[..., None], readout,
            first_tensor(visit.output),
        )]  # fmt: skip


ADAPTERS = [Pooling]
