"""flash-linear-attention: MoM, gated delta rules of which a router lets each token write some."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsf.adapters._contract import Built, TappedCall, Visit, first_tensor
from dsf.adapters._delta_rule import unit
from dsf.adapters._session import replaced
from dsf.adapters._tapped import Place, TappedLayer, method_of, refuse_packed
from dsf.adapters.flash_linear_attention import kept_tokens, laid_out
from dsf.errors import DsfUnsupportedError
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.transitions import DiagonalLowRank

_OPS = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
_NAMES = {
    "transform": "x routing_mask num_memories selected_memories attention_mask",
    "reconstruct": "transformed_x indices sorted_indices batch_size seq_len topk routing_weights",
    **dict.fromkeys(_OPS, "q k v g beta"), "forward": "x g",
}  # fmt: skip


class _Writes(NamedTuple):
    """One op's tokens: where each belongs, (token,) each, and with which weight it is read."""

    row: Tensor
    token: Tensor
    memory: Tensor
    slot: Tensor
    weight: Tensor
    given: dict[str, Any]


class MixtureOfMemories(TappedLayer):
    """One state of all memories side by side; a token's chosen ones, its `topk`, are its inputs.

        A_t = diag over chosen m of alpha_tm (I - beta_tm k_tm k_tm^T), the identity on the others
        B_t = beta_tm k_tm in column m,   C_t = w_tm q_tm^T / sqrt(state),   w the router's weights

    The layer sorts tokens by memory for one call of its op; where they stood is read from that
    sort. A shared memory is one more, which every token writes and reads with weight one.
    """

    name = "flash_linear_attention.mom"
    system: ClassVar[str] = "mixture_of_memories"
    structure = "αₜₘ(I − βₜₘkₜₘkₜₘᵀ) for chosen m, I for others"
    tapped = "sorting, op and merging of the layer's file, and its norm"
    covers = ("flash-linear-attention: MomAttention",)
    classes = frozenset({"fla.layers.mom:MomAttention"})
    releases = "flash-linear-attention 0.6.0"

    def named(self, args: tuple, kwargs: dict[str, Any], function: str = "") -> dict[str, Any]:
        """Arguments by name, each function with its own order."""
        return {**dict(zip(_NAMES[function].split(), args, strict=False)), **kwargs}

    def places(self, module: nn.Module) -> list[Place]:
        """The functions of the file, and the norm of this layer, which the mixture enters."""
        space = sys.modules["fla.layers.mom"].__dict__
        found = [Place(space, n, space[n]) for n in ("transform", "reconstruct", *_OPS)]
        return [*found, method_of(module.o_norm, "forward")]  # type: ignore[arg-type]

    def build(self, visit: Visit) -> list[Built]:
        """Values (batch, time, head, chosen memory, channel)."""
        layer: Any = visit.module
        refuse_packed(visit, visit.kwargs)
        taps: dict[str, list[TappedCall]] = {"op": []}
        for call in visit.taps:
            taps.setdefault("op" if call.function in _OPS else call.function, []).append(call)
        mixed = taps["forward"][0].kwargs["x"]
        writes = [_chosen(visit, layer, taps)]
        if layer.shared_mem:
            writes.append(_shared(visit, layer, taps["op"][1].kwargs, mixed))
        recurrence, values = _system(writes, mixed, layer.num_memories, layer.topk)
        norm = layer.o_norm

        def readout(y: Tensor) -> Tensor:
            original = norm.forward

            def given(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                return original(y.to(x.dtype), *args, **kwargs)

            with replaced(norm.__dict__, "forward", given):
                return first_tensor(layer.forward(*visit.args, **visit.kwargs))

        return [Built(
            self.system, recurrence, values, readout, first_tensor(visit.output), tapped=mixed,
            to_tapped=lambda y: y,
        )]  # fmt: skip


def _chosen(visit: Visit, layer: Any, taps: dict[str, list[TappedCall]]) -> _Writes:
    """Where the tokens of the first op stood before they were sorted by (memory, row)."""
    _, cut, order, longest, _, real = taps["transform"][0].result
    weights = taps["reconstruct"][0].kwargs["routing_weights"]
    length = weights.shape[1]
    flat = order[cut].view(-1, layer.num_memories, longest).transpose(0, 1)[real]
    memory = real.nonzero()[:, 0]
    row, place = flat // (length * layer.topk), flat % (length * layer.topk)
    token, slot = place // layer.topk, place % layer.topk
    rank = (memory * len(weights) + row) * length + token
    if not bool((rank.diff() > 0).all()):
        raise DsfUnsupportedError(
            f"dsf.trace: {visit.path or 'MomAttention'}: expected the tokens of each memory in "
            f"their order, got another: the layer sorts them by argsort without stable=True, "
            f"which shuffles more than 16 on a CPU, so that its output is not causal. Run it on a "
            f"GPU, or with a stable argsort."
        )
    return _Writes(row, token, memory, slot, weights[row, token, slot], taps["op"][0].kwargs)


def _shared(visit: Visit, layer: Any, given: dict[str, Any], mixed: Tensor) -> _Writes:
    """Every real token, in order."""
    kept = kept_tokens(visit, given)
    real = torch.ones_like(mixed[..., 0, 0], dtype=torch.bool) if kept is None else kept
    row, token = real.nonzero().unbind(1)
    every = torch.ones_like(row)
    return _Writes(
        row, token, layer.num_memories * every, layer.topk * every, every.to(mixed.dtype),
        {n: x.flatten(0, 1)[None] for n, x in given.items() if n in ("q", "k", "v", "g", "beta")},
    )  # fmt: skip


def _system(
    writes: list[_Writes], mixed: Tensor, n_memory: int, n_slot: int
) -> tuple[Recurrence, Tensor]:
    """States (memory, state), inputs (slot,): those of a shared memory last."""
    n_memory, n_slot = n_memory + len(writes) - 1, n_slot + len(writes) - 1
    n_state = writes[0].given["k"].shape[-1]
    lead = mixed.shape[:3]
    like = laid_out(mixed, None)
    require_memory(
        "dsf.trace", "A and B", ("factor", "batch", "time", "head", "memory", "state", "slot"),
        (3, *lead, n_memory, n_state, n_slot), like.dtype, device=like.device,
        advice="Trace a shorter sequence.",
    )  # fmt: skip
    log_decay = like.new_zeros(*lead, n_memory, n_state)
    read = torch.zeros_like(log_decay)
    written, erased = (like.new_zeros(*lead, n_memory, n_state, n_slot) for _ in range(2))
    values = like.new_zeros(*lead, n_slot, mixed.shape[-1])
    for w in writes:
        q, k, v, g, beta = (laid_out(w.given[n], None)[0] for n in ("q", "k", "v", "g", "beta"))
        q, k, g = unit(q), unit(k), g[..., None]
        at, slot = (w.row, w.token, slice(None), w.memory), (slice(None), w.slot)
        log_decay[at] = g.expand_as(k)
        read[at] = w.weight[:, None, None].to(q.dtype) * q * n_state**-0.5
        written[(*at, *slot)] = beta[..., None] * k
        erased[(*at, *slot)] = g.exp() * k
        values[w.row, w.token, :, w.slot] = v
    A = DiagonalLowRank(
        log_decay.flatten(3), left=written.flatten(3, 4), right=erased.flatten(3, 4)
    )
    return Recurrence(
        A, A.left, read.flatten(3)[..., None, :], system=MixtureOfMemories.system,
        gauge="memories side by side",
    ), values  # fmt: skip


ADAPTERS = [MixtureOfMemories]
