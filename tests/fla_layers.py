"""Run in a process of its own: every fla layer traced, its errors printed as JSON.

On a machine without a GPU the real kernels run in Triton's interpreter, which must be chosen
before Triton is imported, and which has no driver to time configurations with: the first one runs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import json
import os
import sys
import warnings
from typing import Any

DEVICE = sys.argv[1]
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from fla_loops import path  # noqa: E402
from fla_on_cpu import replace_ops  # noqa: E402
from triton.runtime import autotuner  # noqa: E402

import dsf  # noqa: E402
from dsf.tracing import relative_error  # noqa: E402

LENGTHS = (1, 13, 70)
"""One token, fewer than the 64 that choose the fused form, and more."""
ONE_BLOCK = 60
"""PaTH's kernel rounds products of reflections to 16 bit between blocks of 64 tokens."""
PADDED = 4
BEYOND = 130
"""Tokens of two such blocks and a part of a third."""
WITHOUT_MASK = ("MomentumDeltaNet",)
"""Layers that take no padding mask."""

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GatedLinearAttention": ("gla", {"num_heads": 2, "num_kv_heads": 1}),
    "HGRN2Attention": ("hgrn2", {"num_heads": 2, "expand_ratio": 16}),
    "SimpleGatedLinearAttention": ("simple_gla", {"num_heads": 2}),
    "LightNetAttention": ("lightnet", {"num_heads": 2}),
    "MultiScaleRetention": ("multiscale_retention", {"num_heads": 2}),
    "LinearAttention": ("linear_attn", {"num_heads": 2}),
    "LinearAttention normalised": ("linear_attn", {"num_heads": 2, "do_feature_map_norm": True,
                                                   "feature_map": "elu"}),
    "BasedLinearAttention": ("based", {"num_heads": 2, "num_key_value_heads": 2,
                                       "feature_dim": 4, "mode": "parallel"}),
    "ReBasedLinearAttention": ("rebased", {"num_heads": 2, "num_key_value_heads": 2,
                                           "feature_dim": 4, "mode": "parallel"}),
    "HGRNAttention": ("hgrn", {}),
    "GatedSlotAttention": ("gsa", {"num_heads": 2, "num_slots": 8}),
    "DeltaNet": ("delta_net", {"num_heads": 2}),
    "GatedDeltaNet": ("gated_deltanet", {"head_dim": 8, "num_heads": 2, "num_v_heads": 4}),
    "GatedDeltaProduct": ("gated_deltaproduct", {"head_dim": 8, "num_heads": 2}),
    "Comba": ("comba", {"head_dim": 8, "num_heads": 2}),
    "KimiDeltaAttention": ("kda", {"head_dim": 8, "num_heads": 2}),
    "KimiDeltaAttention bounded": ("kda", {"head_dim": 8, "num_heads": 2, "safe_gate": True,
                                           "lower_bound": -5.0}),
    "RWKV6Attention": ("rwkv6", {"num_heads": 2, "layer_idx": 0}),
    "RWKV7Attention": ("rwkv7", {"head_dim": 16, "layer_idx": 0, "num_hidden_layers": 2}),
    "RodimusAttention": ("rodimus", {"expand_ratio": 16}),
    "YOCOGatedRetention": ("yoco", {"num_heads": 2}),
    "ABCAttention": ("abc", {"num_heads": 2, "num_slots": 8}),
    "Raven": ("raven", {"num_heads": 2, "num_kv_heads": 1, "num_slots": 8, "topk": 4}),
    "GatedDeltaNet2": ("gdn2", {"head_dim": 8, "num_heads": 2, "num_v_heads": 4}),
    "MomentumDeltaNet": ("momentum_deltanet", {"head_dim": 8, "num_heads": 2, "num_v_heads": 4}),
    "PrecondGatedDeltaNet": ("precond_gated_deltanet", {"head_dim": 8, "num_heads": 2,
                                                        "num_v_heads": 4}),
    "PrecondKDA": ("precond_kda", {"head_dim": 8, "num_heads": 2}),
    "MesaNet": ("mesa_net", {"head_dim": 8, "num_heads": 2}),
    "MomAttention": ("mom", {"head_dim": 8, "num_heads": 2, "num_memories": 4}),
    "MomAttention shared": ("mom", {"head_dim": 8, "num_heads": 2, "num_memories": 4,
                                    "shared_mem": True}),
    "CyclicFlowAttention": ("cyfa", {"head_dim": 16, "num_heads": 2, "num_slots": 8}),
    "Mamba": ("mamba", {"intermediate_size": 16, "state_size": 8}),
    "Mamba2": ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2,
                          "chunk_size": 16}),
    "Mamba2 plain": ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1,
                                "chunk_size": 16, "rmsnorm": False, "D_has_hdim": True}),
    "Attention": ("attn", {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True}),
    "Attention window": ("attn", {"num_heads": 4, "num_kv_heads": 2, "window_size": 5}),
    "BitAttention": ("bitattn", {"num_heads": 4}),
    "MultiheadLatentAttention": ("mla", {
        "num_heads": 2, "q_lora_rank": 8, "qk_rope_head_dim": 8, "kv_lora_rank": 8,
        "v_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16}),
    "SlidingWindowSharedKeyAttention": ("rodimus", {"num_heads": 4, "window_size": 5}),
    "YOCOCrossAttention": ("yoco", {"num_heads": 2, "window_size": 5}),
    "ForgettingAttention": ("forgetting_attn", {"num_heads": 2, "num_kv_heads": 1}),
    "PaTHAttention": ("path_attn", {"num_heads": 2}),
    "PaTHAttention gated": ("path_attn", {"num_heads": 2, "use_forget_gate": True}),
    "WallAttention": ("wall_attn", {"num_heads": 2, "num_kv_heads": 1, "gate_init_bias": 1.0}),
    "WallAttention gated": ("wall_attn", {"num_heads": 2, "use_scalar_gate": True,
                                          "window_size": 5}),
    "Parallax": ("parallax", {"num_heads": 2, "num_kv_heads": 1, "window_size": 5}),
    "DeltaFormerAttention": ("deltaformer", {"num_heads": 2}),
    "MoBA": ("moba", {"num_heads": 2, "moba_chunk_size": 4, "moba_topk": 3}),
    "NativeSparseAttention": ("nsa", {"num_heads": 16, "num_kv_heads": 1, "head_dim": 16,
                                      "block_size": 16, "block_counts": 2, "window_size": 5}),
    "MoBA whole": ("moba", {"num_heads": 2, "moba_chunk_size": 4, "moba_topk": 1}),
}  # fmt: skip


def first_configuration(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of Autotuner.run."""
    return self.fn.run(*args, **{**kwargs, **self.configs[0].kwargs, "warmup": False})


def recurrent_forms(space: dict[str, Any]) -> None:
    """Put a layer's recurrent op in the place of its chunked one, which no interpreter runs."""
    for name in [n for n in space if n.startswith("chunk_") and callable(space[n])]:
        other = space.get(name.replace("chunk_", "fused_recurrent_"))
        if name == "chunk_rwkv7":
            from fla.ops.rwkv7 import fused_recurrent_rwkv7 as other
        if name == "chunk_gated_delta_product":
            space[name] = functools.partial(product, space["fused_recurrent_gated_delta_rule"])
        elif other is not None and name != "chunk_cyfa":
            space[name] = functools.partial(renamed, other)


def renamed(other: Any, **given: Any) -> Any:
    """The arguments that the recurrent op knows, its decay by its own name."""
    known = inspect.signature(other).parameters
    if "gk" in known and "g" not in known:
        given["gk"] = given.pop("g")
    return other(**{n: x for n, x in given.items() if n in known})


def product(rule: Any, *, q: Any, k: Any, g: Any, num_householder: int, **given: Any) -> Any:
    """Writes one after another, the query at the last of a token and its decay at the first."""
    spread = q.new_zeros(*q.shape[:2], num_householder, *q.shape[2:])
    decays = g.new_zeros(*g.shape[:2], num_householder, g.shape[2])
    spread[:, :, -1], decays[:, :, 0] = q, g
    o, state = rule(q=spread.flatten(1, 2), k=k, g=decays.flatten(1, 2), **given)
    return o[:, num_householder - 1 :: num_householder].contiguous(), state


def additive_gate(x: Any, initial_state: Any = None, cu_seqlens: Any = None) -> Any:
    """LightNet's running softmax in torch: its kernel does not run in the interpreter."""
    ends = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    keys, decays = torch.empty_like(x), torch.empty_like(x)
    for start, stop in itertools.pairwise(ends):
        z = torch.logcumsumexp(x[:, start:stop], 1)
        keys[:, start:stop] = (x[:, start:stop] - z).exp()
        before = torch.cat([z[:, :1], z[:, :-1]], 1)
        decays[:, start:stop] = before - z
    return keys, decays, None


def layer_of(name: str) -> torch.nn.Module:
    """A small layer with weights of seed 0 that are large enough to matter."""
    file, options = LAYERS[name]
    module = importlib.import_module(f"fla.layers.{file}")
    torch.manual_seed(0)
    if DEVICE == "cpu":
        replace_ops(file, module.__dict__)
        recurrent_forms(module.__dict__)
    layer = getattr(module, name.split()[0])(hidden_size=32, **options).to(DEVICE)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return layer.eval()


def traced(name: str, length: int, padding: str) -> dict[str, Any]:
    """What a trace of the layer says of itself, or the error that it raised."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, length, 32, generator=generator).to(DEVICE)
    mask = torch.ones(2, length, dtype=torch.long, device=DEVICE)
    if padding != "none":
        mask[1, slice(PADDED) if padding == "left" else slice(-PADDED, None)] = 0
    arguments: dict[str, Any] = {"attention_mask": None if padding == "none" else mask}
    if name.startswith("PaTH") and padding != "none":
        arguments["past_key_values"] = {}  # beside a mask the layer looks into its cache
    if name == "YOCOCrossAttention":  # its keys and values come from another layer
        arguments |= {n: torch.randn(2, length, 2, 16, generator=generator).to(DEVICE)
                      for n in ("shared_k", "shared_v")}  # fmt: skip
    try:
        found = dsf.from_layer(layer_of(name), x, **arguments)
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    return {"system": found.system, "error": found.error, "scan": found.attrs["scan_error"],
            "shape": list(found.values.shape)}  # fmt: skip


def beyond_a_block(name: str) -> dict[str, float]:
    """How far PaTH's kernel and the recurrence are from a float64 loop on the op's arguments."""
    x = torch.randn(1, BEYOND, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = dsf.from_layer(layer_of(name), x, tolerance=1.0)
    assert found.source is not None
    (call,) = found.source.visit.taps
    given = {n: call.kwargs[n][0].double().cpu() for n in ("q", "k", "v", "w", "beta", "g")
             if call.kwargs.get(n) is not None}  # fmt: skip
    exact, y = path(**given), dsf.scan(found.recurrence, found.values)[0]
    return {"kernel": relative_error(call.result[0][0].cpu(), exact),
            "recurrence": relative_error(y.cpu(), exact)}  # fmt: skip


def zeros_for_padding(name: str) -> dict[str, float]:
    """Of a layer without a mask: zeros before the tokens, against the tokens alone."""
    layer, generator = layer_of(name), torch.Generator().manual_seed(1)
    x = torch.randn(1, 13, 32, generator=generator).to(DEVICE)
    x[:, :PADDED] = 0
    padded, alone = (dsf.from_layer(layer, part) for part in (x, x[:, PADDED:]))
    y, own = (dsf.scan(found.recurrence, found.values) for found in (padded, alone))
    return {"layer": relative_error(padded.output[:, PADDED:], alone.output),
            "recurrence": relative_error(y[:, PADDED:], own)}  # fmt: skip


LIMITS = {"PaTHAttention": beyond_a_block, "PaTHAttention gated": beyond_a_block,
          "MomentumDeltaNet": zeros_for_padding}  # fmt: skip
"""What is said of a layer beside the errors of its traces."""


def main() -> None:
    """One line of JSON: {layer: {"length padding": what `traced` gave}}."""
    warnings.simplefilter("ignore")
    if DEVICE == "cpu":
        autotuner.Autotuner.run = first_configuration
        lightnet = importlib.import_module("fla.ops.lightnet.fused_recurrent")
        lightnet.__dict__["fused_additive_gate"] = additive_gate
    names = sys.argv[2:] or list(LAYERS)
    report: dict[str, dict[str, Any]] = {}
    for name in names:
        layer = name.split()[0]
        masks = ("none",) if layer in WITHOUT_MASK else ("none", "left", "right")
        for length in LENGTHS:
            length = min(length, ONE_BLOCK) if layer == "PaTHAttention" else length
            for padding in masks if length == 13 else ("none",):
                report.setdefault(name, {})[f"{length} {padding}"] = traced(name, length, padding)
        if name in LIMITS:
            report[f"limits of {name}"] = LIMITS[name](name)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
