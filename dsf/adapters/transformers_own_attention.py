"""transformers: softmax layers that compute by themselves, outside the attention interface."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dsf.adapters._calls import reads_another_sequence
from dsf.adapters._contract import Adapter, Built, TappedCall, Visit, first_tensor
from dsf.adapters._session import replaced
from dsf.adapters._softmax import (
    SYSTEM,
    attention_system,
    cross_attrs,
    first_new_slot,
    split_cache,
)
from dsf.adapters._tapped import transformers_classes
from dsf.cross_rows import CrossRows
from dsf.errors import DsfUnsupportedError
from dsf.factors import ExplicitRows, OneHot
from dsf.models._cached import cache_recurrence
from dsf.recurrence import Recurrence
from dsf.transitions import Identity
from dsf.wrappers import Bidirectional, System, core

_SOFTMAX = {torch.softmax, torch.Tensor.softmax, functional.softmax}
_PRODUCT = {torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm,
            torch.Tensor.__matmul__}  # fmt: skip
_FUSED = functional.scaled_dot_product_attention


class OwnAttention(Adapter):
    """The product of a softmax with the values, or the fused call, watched as the layer makes it.

    A map that the layer computes by itself (disentangled, with alibi, local) is kept as it is:
    length x length numbers, which the layer held as well.
    """

    name = "transformers_own_attention"
    systems = ("softmax_attention",)
    tapped = "the product of softmax and values"
    covers = (
        "transformers: attention outside the registry, without a cache: DeBERTa (both), MPNet, "
        "OpenAI GPT, Kosmos-2.5's vision (which names the interface and calls its eager function)",
    )
    classes = transformers_classes({
        "deberta": "DisentangledSelfAttention", "deberta_v2": "DisentangledSelfAttention",
        "kosmos2_5": "Kosmos2_5VisionAttention", "mpnet": "MPNetSelfAttention",
        "openai": "Attention",
    })  # fmt: skip

    @contextlib.contextmanager
    def tap(self, modules: list[nn.Module], record: Callable) -> Iterator[None]:
        """Watch the functions that each layer calls while it runs."""
        with contextlib.ExitStack() as stack:
            for module in modules:

                def found(call: TappedCall, module: nn.Module = module) -> Tensor:
                    record(module, call)
                    return call.result

                stack.enter_context(_watched(module, found))
            yield

    def build(self, visit: Visit) -> list[Built]:
        """From the watched product; the readout runs the layer again with y in its place."""
        if len(visit.taps) != 1:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: expected one product of a softmax with the values, got "
                f"{len(visit.taps)}. Write an adapter for this layer."
            )
        (call,) = visit.taps
        cross = reads_another_sequence(visit)
        system, values = (_fused if call.function == "fused" else _explicit)(call, visit, cross)
        kwargs = visit.kwargs
        if visit.past is not None and not cross:
            kwargs = _with_slots(visit, system)
        n_query = first_tensor(visit.output).shape[1]

        def placed(y: Tensor) -> Tensor:
            return y[:, y.shape[1] - n_query :].transpose(1, 2).reshape(call.result.shape)

        def readout(y: Tensor) -> Tensor:
            with _watched(visit.module, lambda _: placed(y)):
                return first_tensor(visit.module.forward(*visit.args, **kwargs))

        return [Built(
            SYSTEM, system, values, readout, first_tensor(visit.output), tapped=call.result,
            to_tapped=placed,
            attrs=cross_attrs(values.shape[1] - n_query, n_query) if cross else {},
        )]  # fmt: skip


def _explicit(call: TappedCall, visit: Visit, cross: bool) -> tuple[System, Tensor]:
    """The map that the layer made, (batch, head, query, key), and the values."""
    weights, values, shape = *call.args, call.kwargs["shape"]
    if len(shape) == 3:
        batch = first_tensor(visit.output).shape[0]
        shape = (batch, shape[0] // batch, *shape[1:])
    weights, length = weights.reshape(shape), shape[-1]
    if values.ndim == 3:
        values = values.reshape(*shape[:2], length, -1)
    values = values.expand(*shape[:2], -1, -1).transpose(1, 2)  # Falcon shares one head
    n_query = shape[2]
    if cross:
        rows = CrossRows.of(ExplicitRows(weights), length)
        values = functional.pad(values, (0, 0, 0, 0, 0, n_query))
        return cache_recurrence(SYSTEM, rows), values
    offset = first_new_slot(visit.past, n_query, length)
    values, held = split_cache(values, offset, n_query)
    causal = not bool(weights.triu(1 + offset).any())
    r = Recurrence(
        Identity(length), OneHot(n_query, length, offset),
        ExplicitRows(weights, causal=causal, query_start=offset), initial_state=held,
        system=SYSTEM, gauge="one state per token",
    )  # fmt: skip
    return (r if causal else Bidirectional.from_rows(r)), values


def _fused(call: TappedCall, visit: Visit, cross: bool) -> tuple[System, Tensor]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    query, key, value = (given[n].transpose(1, 2) for n in names[:3])
    return attention_system(
        query, key, value, mask=given.get("attn_mask"), scale=given.get("scale"),
        causal=bool(given.get("is_causal", False)), past=visit.past, cross=cross,
    )  # fmt: skip


class _Slots:
    """A cache's part in a run whose product is given: keys and values of its length, no more."""

    def __init__(self, n_key: int) -> None:
        self.n_key = n_key

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Both (batch, head, key, width) with as many slots as the cache has."""
        more = (0, 0, 0, self.n_key - key.shape[2])
        return functional.pad(key, more), functional.pad(value, more)

    def get_seq_length(self, *_: Any) -> int:
        """The number of slots."""
        return self.n_key


def _with_slots(visit: Visit, system: System) -> dict[str, Any]:
    """The layer's keyword arguments with `_Slots` for the cache: masks and biases then fit."""
    names = inspect.signature(type(visit.module).forward).parameters
    name = next(n for n in ("past_key_values", "layer_past") if n in names)
    return {**visit.kwargs, name: _Slots(core(system).n_state)}


@contextlib.contextmanager
def _watched(module: nn.Module, found: Callable[[TappedCall], Tensor]) -> Iterator[None]:
    """The layer's forward under a watch: `found(call)` gives what the product returns."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Watch(found):
            return original(*args, **kwargs)

    with replaced(module.__dict__, "forward", forward):
        yield


class _Watch(TorchFunctionMode):
    """Follows a softmax through casts, masks, dropout and views to its product with the values."""

    def __init__(self, found: Callable[[TappedCall], Tensor]) -> None:
        super().__init__()
        self.found = found
        self.maps: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        """By the id of a tensor: the tensor (kept, so that its id stays its own), its shape."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is _FUSED:
            return self.found(TappedCall("fused", args, kwargs, result, "sdpa"))
        known = self.maps.get(id(args[0])) if args else None
        if known is not None and func in _PRODUCT:
            call = TappedCall("product", tuple(args[:2]), {"shape": known[1]}, result, "eager")
            return self.found(call)
        if not isinstance(result, Tensor):
            return result
        if func in _SOFTMAX:
            self.maps[id(result)] = result, tuple(result.shape)
        elif known is not None and result.numel() == known[0].numel():
            self.maps[id(result)] = result, known[1]
        return result


class OwnAttentionWithCache(OwnAttention):
    """The same of classes that take a cache."""

    name = "transformers_own_attention_with_cache"
    decodes = True
    covers = (
        "transformers: attention outside the registry: BLOOM, CodeGen, Falcon, GPT-J, GPT-Neo, "
        "MPT, RemBERT, RoFormer, XGLM, Megatron-BERT",
    )
    classes = transformers_classes({
        "bloom": "BloomAttention", "codegen": "CodeGenAttention", "falcon": "FalconAttention",
        "gptj": "GPTJAttention", "gpt_neo": "GPTNeoSelfAttention",
        "megatron_bert": "MegatronBertSelfAttention", "mpt": "MptAttention",
        "rembert": "RemBertSelfAttention", "roformer": "RoFormerSelfAttention",
        "xglm": "XGLMAttention",
    })  # fmt: skip


ADAPTERS = [OwnAttention, OwnAttentionWithCache]
