"""flash-linear-attention: its layers, tapped at the ops that their own files import."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.adapters._contract import Built, Visit, first_tensor
from dsf.adapters._fla_ops import OPS, Given, gated_delta_product
from dsf.adapters._tapped import Place, ScanFunction, refuse_packed
from dsf.errors import DsfUnsupportedError
from dsf.recurrence import Recurrence

_TIMED = frozenset({
    "q", "k", "v", "g", "gk", "beta", "p", "s", "x", "r", "w", "a", "b", "kk", "g_atk",
    "beta_atk", "g_scalar", "delta", "g_cmp", "g_slc", "g_swa", "chosen",
})  # fmt: skip
"""Arguments with a value a token."""

_LAYERS = {
    "gla": "gla:GatedLinearAttention simple_gla:SimpleGatedLinearAttention "
           "lightnet:LightNetAttention rodimus:RodimusAttention yoco:YOCOGatedRetention",
    "hgrn": "hgrn:HGRNAttention", "hgrn2": "hgrn2:HGRN2Attention",
    "retention": "multiscale_retention:MultiScaleRetention",
    "linear_attention": "linear_attn:LinearAttention", "based": "based:BasedLinearAttention",
    "rebased": "rebased:ReBasedLinearAttention",
    "gated_slot_attention": "gsa:GatedSlotAttention abc:ABCAttention raven:Raven",
    "delta_net": "delta_net:DeltaNet", "gated_delta_net": "gated_deltanet:GatedDeltaNet",
    "comba": "comba:Comba", "kimi_delta_attention": "kda:KimiDeltaAttention",
    "rwkv6": "rwkv6:RWKV6Attention", "rwkv7": "rwkv7:RWKV7Attention",
}  # fmt: skip
"""Files and classes of fla.layers by the system that they are."""


class FlashLinearAttention(ScanFunction):
    """One op of the layer's file holds its recurrence; which one depends on length and mode.

    With a padding mask most layers lay the real tokens of all rows end to end for the op. The
    recurrence is on the layer's own axis of time: padded tokens write nothing and read nothing.
    """

    parameters: ClassVar[dict[str, Any]] = {"q": None, "k": None, "v": None, "scale": None}
    ops: ClassVar[dict[str, Callable[[Given], Recurrence]]] = OPS
    """The recurrence of each op, by its name in the layer's file."""
    tapped = "the op of the layer's file"
    releases = "flash-linear-attention 0.6.0"

    def __init__(self, system: str, layers: str, *, structure: str = "") -> None:
        self.system, self.structure = system, structure  # type: ignore[misc]
        self.systems = () if structure else (system,)  # type: ignore[misc]
        self.name = f"flash_linear_attention.{system}"  # type: ignore[misc]
        names = [layer.partition(":")[2] for layer in layers.split()]
        self.covers = (f"flash-linear-attention: {', '.join(names)}",)  # type: ignore[misc]
        self.classes = frozenset(f"fla.layers.{layer}" for layer in layers.split())  # type: ignore[misc]

    def places(self, module: nn.Module) -> list[Place]:
        """Every op of the layer's file that has a recurrence here."""
        space = self.namespace(module)
        found = [Place(space, name, space[name]) for name in self.ops if callable(space.get(name))]
        if not found:
            raise DsfUnsupportedError(
                f"dsf.trace: {self.name}: expected {space['__name__']} to import an op out of "
                f"{sorted(self.ops)}, got none. Install flash-linear-attention 0.6.0."
            )
        return found

    def prepared(self, visit: Visit, given: Given) -> Given:
        """The op's arguments with one place a token on every axis of time."""
        return given

    def recurrence(self, function: str, given: Given) -> tuple[Recurrence, Tensor]:
        """The op that ran, and its values."""
        return self.ops[function](given), given["x"][..., None] if "x" in given else given["v"]

    def returned(self, function: str, y: Tensor, given: Given) -> Tensor:
        """y in the axes in which the op returns its output."""
        return y.squeeze(-1) if "x" in given else y

    def build(self, visit: Visit) -> list[Built]:
        """From the tensors that enter the op, in float32 at least."""
        call = visit.taps[0]
        a = self.prepared(visit, self.arguments(visit))
        if a.get("initial_state") is not None:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: initial_state: expected none, got one. Pass the whole "
                f"sequence at once."
            )
        kept = kept_tokens(visit, a)
        on_time = {n: laid_out(x, kept if n in _TIMED else None) for n, x in a.items()}
        recurrence, values = self.recurrence(call.function, {**on_time, "kept": kept})
        dtype = first_tensor(call.result).dtype

        def to_tapped(y: Tensor) -> Tensor:
            y = y if kept is None else y[kept][None]
            return self.returned(call.function, y, a).to(dtype)

        def result(y: Tensor, *_: Any) -> Any:
            alone = isinstance(call.result, Tensor)
            return to_tapped(y) if alone else (to_tapped(y), *call.result[1:])

        return [Built(
            self.system, recurrence.replace(system=self.system), values,
            self.readout(visit, result), first_tensor(visit.output),
            tapped=first_tensor(call.result), to_tapped=to_tapped,
        )]  # fmt: skip


class GatedDeltaProduct(FlashLinearAttention):
    """Several writes a token, which stand on the op's axis of time one after another."""

    def __init__(self) -> None:
        super().__init__("gated_delta_product", "gated_deltaproduct:GatedDeltaProduct")

    def prepared(self, visit: Visit, given: Given) -> Given:
        """Writes on an axis of their own; what each token has once, once."""
        n = int(visit.module.num_householder)  # type: ignore[arg-type]
        a = {x: given[x].unflatten(1, (-1, n)) for x in ("k", "v", "beta")}
        if visit.taps[0].function == "fused_recurrent_gated_delta_rule":
            # queries stand at the last write of a token, decays at the first, zeros elsewhere
            a["q"] = given["q"][:, n - 1 :: n]
            a["g"] = None if given["g"] is None else given["g"][:, ::n]
        return {**given, **a}

    def recurrence(self, function: str, given: Given) -> tuple[Recurrence, Tensor]:
        """The product of reflections; values (batch, time, head, write, channel)."""
        return gated_delta_product(given), given["v"].transpose(2, 3)

    def returned(self, function: str, y: Tensor, given: Given) -> Tensor:
        """At the last write of each token where the op's time runs over writes."""
        if function == "chunk_gated_delta_product":
            return y
        out = y.new_zeros(*y.shape[:2], given["v"].shape[2], *y.shape[2:])
        out[:, :, -1] = y
        return out.flatten(1, 2)


def kept_tokens(visit: Visit, given: Given) -> Tensor | None:
    """(batch, time), true at the tokens that the layer gave to the op end to end; None if all."""
    if given.get("cu_seqlens") is None:
        return None
    mask = given_mask(visit)
    if mask is None or visit.kwargs.get("cu_seqlens") is not None:
        refuse_packed(visit, given)
    return mask


def given_mask(visit: Visit) -> Tensor | None:
    """(batch, time), true at real tokens: the padding mask of the layer's own call, or None."""
    call = inspect.signature(visit.module.forward).bind(*visit.args, **visit.kwargs).arguments
    mask = call.get("attention_mask")
    return None if mask is None else mask[:, -call["hidden_states"].shape[1] :].bool()


def laid_out(x: Any, kept: Tensor | None) -> Any:
    """In float32 at least; given end to end (1, token, ...), with zeros for what was left out."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if kept is None:
        return x
    out = x.new_zeros(*kept.shape, *x.shape[2:])
    out[kept] = x[0]
    return out


ADAPTERS = [
    *[functools.partial(FlashLinearAttention, *item) for item in _LAYERS.items()],
    GatedDeltaProduct,
]
