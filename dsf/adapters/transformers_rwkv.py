"""transformers: RWKV-4's time mixing, tapped at its linear attention function."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.adapters._contract import Built, Visit, first_tensor
from dsf.adapters._tapped import ScanFunction, transformers_classes
from dsf.errors import DsfUnsupportedError
from dsf.models.rwkv4 import rwkv4_recurrence


class Rwkv(ScanFunction):
    """Every channel a head; weights are taken relative to the largest, as the layer does.

    The layer takes no padding mask: padded tokens are in its state and in the recurrence.
    """

    name = "transformers_rwkv"
    functions = ("rwkv_linear_attention",)
    parameters: ClassVar[dict[str, Any]] = {
        "time_decay": None, "time_first": None, "key": None, "value": None, "state": None,
        "return_state": False,
    }  # fmt: skip
    systems = ("rwkv4",)
    covers = ("transformers: RWKV-4's time mixing",)
    classes = transformers_classes({"rwkv": "RwkvSelfAttention"})

    def build(self, visit: Visit) -> list[Built]:
        """From time_decay, time_first, key and value; values (batch, time, channel, 1)."""
        a = self.arguments(visit)
        if a["state"] is not None:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: state: expected none, got one: RWKV's cache, which the "
                f"layer changes in place. Pass the whole sequence at once."
            )
        layer_dtype = a["value"].dtype
        dtype = torch.promote_types(layer_dtype, torch.float32)
        key, value = a["key"].to(dtype), a["value"].to(dtype)
        recurrence = rwkv4_recurrence(
            key, -a["time_decay"].to(dtype).exp(), a["time_first"].to(dtype), stabilised=True
        )

        def to_tapped(y: Tensor) -> Tensor:
            return y.squeeze(-1).to(layer_dtype)

        return [Built(
            "rwkv4", recurrence, value[..., None],
            self.readout(visit, lambda y, *_: (to_tapped(y), None)), first_tensor(visit.output),
            tapped=first_tensor(visit.taps[0].result), to_tapped=to_tapped,
        )]  # fmt: skip


ADAPTERS = [Rwkv]
