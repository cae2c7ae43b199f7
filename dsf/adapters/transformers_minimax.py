"""transformers: MiniMax's lightning attention, from weights, between its input and its norm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.adapters._contract import Built, TappedCall, Visit, first_tensor
from dsf.adapters._session import replaced
from dsf.adapters._tapped import Place, TappedLayer, method_of, transformers_classes
from dsf.errors import DsfUnsupportedError
from dsf.models.lightning_attention import lightning_attention_recurrence
from dsf.precision import casts_neutralised

_ARGUMENTS = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
_TABLES = ("query_decay", "key_decay", "diagonal_decay")


class MiniMax(TappedLayer):
    """A = exp(-slope_h), k_t, q_t; no scale and no divisor. The slopes are the layer's buffer.

    The scan is inline in the layer's forward, so queries, keys and values are computed from the
    weights once more, and the norm that follows the scan is tapped: what enters it is the scan's
    output. The layer keeps tables of exp(-slope n) that were made in float32: a float64 pass with
    casts taken out makes them from the slopes again, since the map of rounded tables is not one
    of any state of this size.
    """

    name = "transformers_minimax"
    parameters: ClassVar[dict[str, Any]] = {"hidden_states": None}
    systems = ("lightning_attention",)
    decodes = True
    tapped = "weights, input and the norm after the scan"
    covers = ("transformers: MiniMax's lightning attention",)
    classes = transformers_classes({"minimax": "MiniMaxLightningAttention"})

    def places(self, module: nn.Module) -> list[Place]:
        """The norm after the scan, of this layer alone."""
        return [method_of(_part(module, "norm"), "forward")]

    @contextlib.contextmanager
    def tap(self, modules: list[nn.Module], record: Callable) -> Iterator[None]:
        """Record the norm's call and the state before it, tables in float64 where all else is."""
        states: dict[int, Tensor | None] = {}

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            cache = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}.get("past_key_values")
            state = None if cache is None else cache.get_linear_cache(module.layer_idx)
            states[id(module)] = None if state is None else state.clone()

        def with_state(layers: list[nn.Module], call: TappedCall) -> None:
            call.kwargs["initial_state"] = states.get(id(layers[0]))
            record(layers, call)

        with contextlib.ExitStack() as stack:
            for module in modules:
                hook = module.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(hook.remove)
                slopes = _part(module, "slope_rate")
                if slopes.dtype == torch.float64 and casts_neutralised():
                    tables = _part(module, "decay_factors")(slopes)
                    for name, table in zip(_TABLES, tables, strict=True):
                        stack.enter_context(replaced(module._buffers, name, table))
            stack.enter_context(super().tap(modules, with_state))
            yield

    def build(self, visit: Visit) -> list[Built]:
        """From the input, its mask and the weights; values (batch, time, head, channel)."""
        layer: Any = visit.module
        given = {**dict(zip(_ARGUMENTS, visit.args, strict=False)), **visit.kwargs}
        x, mask = given["hidden_states"], given.get("attention_mask")
        mixed = layer.act_fn(layer.qkv_proj(x))
        if mask is not None:
            mixed = (mixed * mask[:, :, None]).to(mixed.dtype)
        slopes = _part(layer, "slope_rate").flatten()
        query, key, value = mixed.unflatten(-1, (slopes.numel(), -1)).chunk(3, -1)
        norm, call = _part(layer, "norm").forward, self.arguments(visit)
        start = call.get("initial_state")
        recurrence = lightning_attention_recurrence(
            query, key, -slopes.to(query.dtype),
            initial_state=None if start is None else start.to(query.dtype),
        )  # fmt: skip

        def result(y: Tensor, *_: Any) -> Tensor:
            return norm(y.flatten(-2))

        return [Built(
            "lightning_attention", recurrence, value, self.readout(visit, result),
            first_tensor(visit.output), tapped=call["hidden_states"],
            to_tapped=lambda y: y.flatten(-2),
        )]  # fmt: skip


def _part(module: nn.Module, name: str) -> Any:
    part = getattr(module, name, None)
    if part is None:
        raise DsfUnsupportedError(
            f"dsf.trace: transformers_minimax: expected {type(module).__name__} to have {name!r}, "
            f"got none. Install a transformers release that this adapter knows."
        )
    return part


ADAPTERS = [MiniMax]
