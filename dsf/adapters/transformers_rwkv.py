"""transformers: RWKV-4's time mixing, tapped at its linear attention function."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsf.adapters._contract import Built, Visit, first_tensor
from dsf.adapters._tapped import ScanFunction, transformers_classes
from dsf.errors import DsfUnsupportedError
from dsf.models.rwkv4 import rwkv4_recurrence


class Rwkv(ScanFunction):
    """Every channel a head; weights are taken relative to the largest, as the layer does.

    The layer takes no padding mask: padded tokens are in its state and in the recurrence. The
    model's state is changed in place, also by the readout, which gets a copy each time.
    """

    name = "transformers_rwkv"
    functions = ("rwkv_linear_attention",)
    parameters: ClassVar[dict[str, Any]] = {
        "time_decay": None, "time_first": None, "key": None, "value": None, "state": None,
        "return_state": False,
    }  # fmt: skip
    systems = ("rwkv4",)
    decodes = True
    covers = ("transformers: RWKV-4's time mixing",)
    classes = transformers_classes({"rwkv": "RwkvSelfAttention"})

    def build(self, visit: Visit) -> list[Built]:
        """From time_decay, time_first, key and value; values (batch, time, channel, 1)."""
        _require_its_own_rows(visit)
        a = self.arguments(visit)
        if a["state"] is not None and visit.past is None:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: state: expected none, got one: RWKV's cache, which the "
                f"layer changes in place. Pass the whole sequence at once, or trace each call "
                f"with a cache by dsf.trace_decoding."
            )
        layer_dtype = a["value"].dtype
        dtype = torch.promote_types(layer_dtype, torch.float32)
        key, value = a["key"].to(dtype), a["value"].to(dtype)
        start = {}
        if visit.past:  # sums in units of exp(largest); rows are ratios, so keys may be as well
            sums, total, largest = (x.to(dtype) for x in a["state"] or ())
            key = key - largest[:, None]
            start = {"initial_state": sums, "initial_sum": total}
        recurrence = rwkv4_recurrence(
            key, -a["time_decay"].to(dtype).exp(), a["time_first"].to(dtype), stabilised=True,
            **start,
        )  # fmt: skip

        def to_tapped(y: Tensor) -> Tensor:
            return y.squeeze(-1).to(layer_dtype)

        def readout(y: Tensor) -> Tensor:
            own = dataclasses.replace(visit, kwargs=pytree.tree_map(_copied, visit.kwargs))
            return self.readout(own, lambda y, *_: (to_tapped(y), None))(y)

        return [Built(
            "rwkv4", recurrence, value[..., None], readout, first_tensor(visit.output),
            tapped=first_tensor(visit.taps[0].result), to_tapped=to_tapped,
        )]  # fmt: skip


def _require_its_own_rows(visit: Visit) -> None:
    """Refuse what transformers 5.23 makes of one token of several sequences: a row a pair."""
    given, made = (first_tensor(x) for x in ((*visit.args, *visit.kwargs.values()), visit.output))
    if given.shape[:2] != made.shape[:2]:
        raise DsfUnsupportedError(
            f"dsf.trace_decoding: {visit.path}: expected outputs (batch, time) = "
            f"{tuple(given.shape[:2])}, got {tuple(made.shape[:2])}: with a state this release of "
            f"transformers mixes the sequences of a batch where each has one token. Give one "
            f"sequence at a time."
        )


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


ADAPTERS = [Rwkv]
