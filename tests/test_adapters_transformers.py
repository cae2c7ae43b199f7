"""transformers layers against their recurrences: errors, masks, and that the gate can fail."""

from __future__ import annotations

import functools

import pytest
import tiny_models
import torch
import transformers
from recurrent_models import KINDS
from torch_layers import spoil_after_the_pass
from transformers.models.mamba import modeling_mamba

import dsf
from dsf.errors import DsfFidelityError
from dsf.tracing import relative_error, trace
from dsf.wrappers import core

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
"""What the adapters reach; the gate itself asks for 1e-5 and 1e-10."""
SINGLE = 1e-5
WRONG = 1e-3

CASES = [
    *[(name, attention) for name in tiny_models.SOFTMAX for attention in ("eager", "sdpa")],
    *[(name, "eager") for name in tiny_models.EAGER_ONLY],
    *[(name, None) for name in tiny_models.RECURRENT],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_every_layer_is_reproduced_with_and_without_padding(name, attention, dtype):
    if name == "gpt_oss" and dtype == torch.float64:
        pytest.skip("its experts have no float64 on the CPU")
    model = tiny_models.model(name, dtype, attention)
    for padding in ("none", "left", "right") if dtype == torch.float64 else ("left",):
        found = trace(model, tiny_models.inputs(padding))
        assert found
        for layer in found.values():
            assert layer.error <= TOLERANCE[dtype], (layer.name, padding, layer.error)
            assert layer.attrs["scan_error"] <= TOLERANCE[dtype]
            y = dsf.scan(layer.recurrence, layer.values)
            assert relative_error(layer.readout(y), layer.output) == layer.error


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_traced_pass_gives_the_output_of_the_plain_one_bit_for_bit(name, attention):
    model = tiny_models.model(name, attention=attention)
    inputs = tiny_models.inputs("left")
    during: list[torch.Tensor] = []
    with torch.no_grad():
        plain = model(**inputs, use_cache=False)[0]
    hook = model.register_forward_hook(lambda m, a, out: during.append(out[0]))
    trace(model, inputs)
    hook.remove()
    assert len(during) == 1
    assert torch.equal(during[0], plain)
    with torch.no_grad():
        assert torch.equal(model(**inputs, use_cache=False)[0], plain)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mistral"])
def test_decoders_are_causal_systems_and_encoders_are_not(name):
    for attention in ("eager", "sdpa"):
        model = tiny_models.model(name, attention=attention)
        for layer in trace(model, tiny_models.inputs("right")).values():
            assert isinstance(layer.recurrence, dsf.Recurrence)
            assert layer.recurrence.C.bias is None  # a pattern, not a stored length x length mask
    model = tiny_models.model("bert")
    layers = trace(model, tiny_models.inputs("right")).values()
    assert all(isinstance(layer.recurrence, dsf.Bidirectional) for layer in layers)


def test_left_padding_keeps_a_decoder_causal_under_sdpa_and_not_under_eager():
    """Eager softmax spreads a row without keys over all of them, the future included."""
    kinds = {
        attention: {type(layer.recurrence) for layer in trace(
            tiny_models.model("llama", attention=attention), tiny_models.inputs("left")).values()}
        for attention in ("sdpa", "eager")
    }  # fmt: skip
    assert kinds == {"sdpa": {dsf.Recurrence}, "eager": {dsf.Bidirectional}}


def test_backends_without_a_tensor_mask_are_run_by_eager_arithmetic():
    inputs = tiny_models.inputs("right")
    eager = trace(tiny_models.model("llama", attention="eager"), inputs)
    flex = trace(tiny_models.model("llama", attention="flex_attention"), inputs)
    for name, layer in flex.items():
        assert torch.equal(layer.output, eager[name].output)
        assert layer.attrs["implementation"] == "eager"


def test_windows_are_read_off_the_mask():
    layers = trace(tiny_models.model("qwen3"), tiny_models.inputs())
    windows = [layer.recurrence.C.window for layer in layers.values()]
    assert windows == [None, 5]


def test_grouped_keys_stay_grouped():
    (layer, _) = trace(tiny_models.model("llama"), tiny_models.inputs()).values()
    assert layer.recurrence.C.query.shape[2] == 4
    assert layer.recurrence.C.key.shape[2] == 2


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "qwen3", "gemma2"])
def test_maps_are_the_ones_eager_attention_returns(name):
    model = tiny_models.model(name, torch.float64, "eager")
    inputs = tiny_models.inputs("right")
    found = trace(model, inputs, precision="native", tolerance=SINGLE)
    maps = model(**inputs, output_attentions=True).attentions
    for layer, expected in zip(found.values(), maps, strict=True):
        assert relative_error(dsf.materialise(layer.recurrence), expected) <= SINGLE


def test_a_sink_leaves_rows_below_one():
    layers = trace(tiny_models.model("gpt_oss", attention="eager"), tiny_models.inputs())
    for layer in layers.values():
        assert core(layer.recurrence).C.sink is not None
        assert float(dsf.materialise(layer.recurrence).sum(-1).max()) < 1


def test_a_shared_layer_is_numbered_by_visit():
    names = list(trace(tiny_models.model("albert"), tiny_models.inputs()))
    assert len(names) == 2
    assert names[1] == names[0] + "#2"


@pytest.mark.parametrize(("name", "head"), [
    ("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("mamba", "MambaForCausalLM"),
    ("bert", "BertForSequenceClassification"), ("recurrent_gemma", "RecurrentGemmaForCausalLM"),
])  # fmt: skip
def test_models_with_a_head_are_traced_without_their_cache(name, head):
    bare = tiny_models.model(name)
    model = getattr(transformers, head)(bare.config)
    layers = trace(model, tiny_models.inputs("right"))
    assert len(layers) == len(trace(bare, tiny_models.inputs()))
    assert all(path in dict(model.named_modules()) for path in layers)


def test_hybrids_are_named_by_module_path():
    found = trace(tiny_models.model("zamba2"), tiny_models.inputs())
    assert {n: (t.system, t.layer) for n, t in found.items()} == {
        "layers.0.mamba": ("mamba2", 0),
        "layers.1.shared_transformer.self_attn": ("softmax_attention", 1),
        "layers.1.mamba_decoder.mamba": ("mamba2", 1),
    }


# -- the gate can fail -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "weight"), [
    ("gpt2", "h.0.attn.c_proj.weight"),
    ("llama", "layers.0.self_attn.o_proj.weight"),
    ("mamba", "layers.0.mixer.out_proj.weight"),
    ("mamba", "layers.0.mixer.in_proj.weight"),
    ("mamba2", "layers.0.mixer.norm.weight"),
    ("recurrent_gemma", "layers.0.temporal_block.linear_y.weight"),
    ("zamba", "layers.0.mamba.out_proj.weight"),
    ("qwen3_next", "layers.0.linear_attn.norm.weight"),
    ("qwen3_next", "layers.0.linear_attn.in_proj_qkvz.weight"),
    ("kimi_linear", "layers.0.self_attn.g_a_proj.weight"),
    ("rwkv", "blocks.0.attention.receptance.weight"),
    ("minimax", "layers.0.self_attn.output_gate.weight"),
    ("minimax", "layers.0.self_attn.qkv_proj.weight"),
    ("xlstm", "blocks.0.mlstm_layer.ogate_preact.weight"),
    ("lfm2", "layers.0.conv.in_proj.weight"),
])  # fmt: skip
def test_a_weight_changed_after_the_pass_fails_the_gate(name, weight):
    model = tiny_models.model(name)
    spoil_after_the_pass(model, weight)
    with pytest.raises(DsfFidelityError, match=r"relative difference of .*at the scan"):
        trace(model, tiny_models.inputs())


@pytest.mark.parametrize("name", ["llama", *KINDS])
def test_any_changed_coefficient_shows_in_the_readout(name):
    """The readout really runs on the scan's output: halve the values, or B = 0, and it moves."""
    layer = next(iter(trace(tiny_models.model(name), tiny_models.inputs()).values()))
    if name != "minimax":  # whose norm takes the scale out
        y = dsf.scan(layer.recurrence, 0.5 * layer.values)
        assert relative_error(layer.readout(y), layer.output) > WRONG
    if name != "llama":
        forgetful = layer.recurrence.replace(B=0 * layer.recurrence.B)
        assert relative_error(
            layer.readout(dsf.scan(forgetful, layer.values)), layer.output) > WRONG  # fmt: skip


def test_a_gate_that_the_adapter_does_not_know_fails(monkeypatch):
    scan = modeling_mamba.mamba_selective_scan

    @functools.wraps(scan)
    def gated_twice(*args, z, **kwargs):
        return scan(*args, z=z, **kwargs) * torch.sigmoid(z)

    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", gated_twice)
    with pytest.raises(DsfFidelityError, match="expected the recurrence to reproduce"):
        trace(tiny_models.model("mamba"), tiny_models.inputs())
