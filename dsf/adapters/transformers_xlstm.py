"""transformers and xlstm: the mLSTM layer, tapped at the boundary of its backend module."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.adapters._contract import Built, Visit, first_tensor
from dsf.adapters._tapped import Place, TappedLayer, method_of, transformers_classes
from dsf.models.mlstm import mlstm_recurrence

_LETTERS = {"q": "query", "k": "key", "v": "value", "i": "igate", "f": "fgate"}


class Xlstm(TappedLayer):
    """The matrix memory in units of its largest weight; the divisor carries the layer's epsilon.

    The layer takes no padding mask: padded tokens are in its state and in the recurrence.
    """

    name = "transformers_xlstm"
    parameters: ClassVar[dict[str, Any]] = {
        "query": None, "key": None, "value": None, "igate": None, "fgate": None,
        "c_initial": None, "n_initial": None, "m_initial": None,
    }  # fmt: skip
    states = frozenset({"c_initial", "n_initial", "m_initial"})
    systems = ("mlstm",)
    tapped = "the backend's forward"
    decodes = True
    covers = ("transformers: xLSTM's mLSTM layer", "xlstm: mLSTMLayer of xLSTM large")
    classes = transformers_classes({"xlstm": "xLSTMLayer"}) | {
        "xlstm.xlstm_large.model:mLSTMLayer"  # which transformers uses where xlstm is installed
    }

    def places(self, module: nn.Module) -> list[Place]:
        """The backend's forward, which every mode goes through."""
        return [method_of(module.mlstm_backend, "forward")]  # type: ignore[arg-type]

    def named(self, args: tuple, kwargs: dict[str, Any], function: str = "") -> dict[str, Any]:
        """The names that transformers gives the arguments; xlstm's are single letters."""
        given = {_LETTERS.get(name, name): x for name, x in kwargs.items()}
        return super().named(args, given, function)

    def build(self, visit: Visit) -> list[Built]:
        """From q, k, v and the capped gates; values (batch, time, head, channel)."""
        a = self.arguments(visit)
        layer_dtype = a["value"].dtype
        dtype = torch.promote_types(layer_dtype, torch.float32)
        query, key, value, i, f = (
            a[n].transpose(1, 2).to(dtype) for n in ("query", "key", "value", "igate", "fgate")
        )
        # in units of exp(m), as the layer hands them from one part of a long sequence to the next
        state, key_sum, m = (
            None if a[n] is None else a[n].to(dtype)
            for n in ("c_initial", "n_initial", "m_initial")
        )
        recurrence = mlstm_recurrence(
            query, key, i, f, eps=visit.module.mlstm_backend.config.eps, stabilised=True,  # type: ignore[union-attr]
            initial_state=state, initial_key_sum=key_sum,
            initial_maximum=None if m is None else m.reshape(m.shape[:2]),
        )  # fmt: skip

        def to_tapped(y: Tensor) -> Tensor:
            return y.transpose(1, 2).to(layer_dtype)

        return [Built(
            "mlstm", recurrence, value, self.readout(visit, lambda y, *_: (to_tapped(y), None)),
            first_tensor(visit.output), tapped=first_tensor(visit.taps[0].result),
            to_tapped=to_tapped,
        )]  # fmt: skip


ADAPTERS = [Xlstm]
