"""Softmax layers of transformers: the attention interface, cross-attention, the others."""

from __future__ import annotations

import types

import attention_models
import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch_layers import spoil_after_the_pass
from transformers import BigBirdConfig, BigBirdModel, LlamaModel

import dsf
from dsf.cross_rows import CrossRows
from dsf.errors import DsfFidelityError, DsfUnsupportedError
from dsf.tracing import LayerTrace, relative_error, trace
from dsf.wrappers import core

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
"""What the adapters reach; the gate itself asks for 1e-5 and 1e-10."""
SINGLE_MAP = 1e-6
WRONG = 1e-3
NO_FLOAT64 = {"xglm"}
"""Whose own mask arithmetic fails in float64."""
NO_SDPA = set(attention_models.OWN) - {"falcon"}
BACKENDS = [
    (name, attention) for name in attention_models.ALL for attention in ("eager", "sdpa")
    if attention == "eager" or name not in NO_SDPA
]  # fmt: skip


def _slow_but(*quick: str) -> list:
    return [pytest.param(*case, marks=[] if case[0] in quick else pytest.mark.slow)
            for case in BACKENDS]  # fmt: skip


@pytest.mark.parametrize("dtype", [
    pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])  # fmt: skip
@pytest.mark.parametrize(("name", "attention"), BACKENDS)
def test_every_layer_is_reproduced_with_and_without_padding(name, attention, dtype):
    if name in NO_FLOAT64 and dtype == torch.float64:
        pytest.skip("the model itself has no float64")
    model = attention_models.model(name, dtype, attention)
    for padding in ("none", "left", "right") if name != "vit" else ("none",):
        found = trace(model, attention_models.inputs(name, padding, dtype))
        assert {layer.system for layer in found.values()} == {"softmax_attention"}
        for layer in found.values():
            assert layer.error <= TOLERANCE[dtype], (layer.name, padding, layer.error)
            assert layer.attrs["scan_error"] <= TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "attention"), _slow_but("t5", "vit", "deberta", "falcon"))
def test_the_traced_pass_is_the_plain_one_and_leaves_nothing_behind(name, attention):
    model = attention_models.model(name, attention=attention)
    inputs = attention_models.inputs(name, "left")
    if name != "vit":
        inputs["use_cache"] = False
    during: list[Tensor] = []
    with torch.no_grad():
        plain = model(**inputs)[0]
    attributes = [sorted(m.__dict__) for m in model.modules()]
    implementations = [m.config._attn_implementation for m in model.modules()
                       if hasattr(m, "config")]  # fmt: skip
    hook = model.register_forward_hook(lambda m, a, out: during.append(out[0]))
    trace(model, inputs)
    hook.remove()
    assert torch.equal(during[0], plain)
    broken = model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace(model, inputs)
    broken.remove()
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert [m.config._attn_implementation for m in model.modules()
            if hasattr(m, "config")] == implementations  # fmt: skip
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], plain)


@pytest.mark.parametrize("name", ["gpt_neox", "roberta", "gemma3", "phi3", "modernbert", "opt"])
def test_flex_attention_is_run_by_eager_arithmetic(name):
    inputs = attention_models.inputs(name, "left")
    eager = trace(attention_models.model(name, attention="eager"), inputs)
    flex = trace(attention_models.model(name, attention="flex_attention"), inputs)
    for layer, expected in zip(flex.values(), eager.values(), strict=True):
        assert torch.equal(layer.output, expected.output)
        assert layer.error == expected.error


@pytest.mark.parametrize("name", ["roberta", "gpt_neox", "opt", "gpt_bigcode", "bloom", "gptj",
                                  "deberta", "mpnet", "megatron_bert"])  # fmt: skip
def test_maps_are_the_ones_that_the_model_returns(name):
    model = attention_models.model(name, attention="eager")
    inputs = attention_models.inputs(name, "right")
    found = trace(model, inputs)
    maps = model(**inputs, output_attentions=True).attentions
    for layer, expected in zip(found.values(), maps, strict=True):
        assert relative_error(dsf.materialise(layer.recurrence), expected) <= SINGLE_MAP


def test_several_maps_of_one_layer_are_further_heads():
    model = attention_models.model("diffllama", torch.float64)
    layers = trace(model, tiny_models.inputs("left")).values()
    assert [core(layer.recurrence).n_head for layer in layers] == [8, 8]
    assert model.config.num_attention_heads == 4


def test_a_sink_for_each_query_leaves_rows_below_one():
    make = tiny_models._build(
        "Inkling2TextModel", "Inkling2TextConfig", **tiny_models._DECODER, head_dim=8,
        sliding_window=5, n_routed_experts=2, moe_intermediate_size=16,
        num_experts_per_tok=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = make("eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    found = trace(model, tiny_models.inputs())
    layers = [t for t in found.values() if t.system == "softmax_attention"]
    assert len(layers) == 2
    for layer in layers:
        assert layer.error <= TOLERANCE[torch.float32]
        rows = dsf.materialise(layer.recurrence).sum(-1)
        assert float(rows.max()) < 1
        assert float(rows.std(-1).min()) > 0


# -- two sequences -----------------------------------------------------------------------------


def _cross(name: str, queries: int, attention: str = "eager", padding: str = "left") -> tuple[
        nn.Module, dict, list[LayerTrace]]:  # fmt: skip
    model = attention_models.model(name, torch.float64, attention)
    inputs = attention_models.inputs(name, padding, queries=queries)
    found = trace(model, inputs, precision="native", tolerance=SINGLE_MAP)
    return model, inputs, [t for t in found.values() if "n_key" in t.attrs]


@pytest.mark.parametrize("queries", [1, 9, 13, 17])
@pytest.mark.parametrize("name", attention_models.ENCODER_DECODERS)
def test_the_map_of_cross_attention_is_a_block_of_the_systems(name, queries):
    model, inputs, layers = _cross(name, queries, padding="left" if queries > 4 else "none")
    expected = model(**inputs, output_attentions=True).cross_attentions
    assert len(layers) == len(expected) == 2
    for layer, weights in zip(layers, expected, strict=True):
        n_key = layer.attrs["n_key"]
        assert (n_key, layer.attrs["n_query"]) == (tiny_models.LENGTH, queries)
        assert layer.attrs["time"] == "keys, then queries"
        assert isinstance(layer.recurrence, dsf.Recurrence)
        whole = dsf.materialise(layer.recurrence)
        assert whole.shape[-2:] == (n_key + queries, n_key + queries)
        assert relative_error(whole[..., n_key:, :n_key], weights) <= SINGLE_MAP
        whole[..., n_key:, :n_key] = 0
        assert float(whole.abs().max()) == 0
        assert float(layer.values[:, n_key:].abs().max()) == 0


def test_cross_attention_runs_by_every_backend_step_by_step_and_tile_by_tile():
    _, _, (layer, _) = _cross("bart", 9)
    r, u = layer.recurrence, layer.values
    assert isinstance(r, dsf.Recurrence)
    expected = dsf.scan(r, u, "reference")
    for backend in ("auto", "chunked"):
        assert relative_error(dsf.scan(r, u, backend), expected) <= TOLERANCE[torch.float64]
    state, outputs = None, []
    for t in range(u.shape[1]):
        y, state = dsf.step(r.time_slice(t, t + 1), u[:, t], state)
        outputs.append(y)
    assert relative_error(torch.stack(outputs, 1), expected) <= TOLERANCE[torch.float64]
    whole = dsf.materialise(r)
    for rows, cols in [((0, 5), (0, 22)), ((10, 20), (3, 15)), ((14, 22), (0, 7)),
                       ((5, 5), (0, 4)), ((15, 22), (13, 22)), ((0, 22), (12, 14))]:  # fmt: skip
        tile = dsf.materialise(r, slice(*rows), slice(*cols))
        expected = whole[..., slice(*rows), slice(*cols)]
        assert relative_error(tile, expected) <= TOLERANCE[torch.float64]


def test_cross_rows_say_what_does_not_fit():
    rows = dsf.SoftmaxRows(torch.randn(1, 3, 2, 4), torch.randn(1, 5, 2, 4), causal=False)
    assert CrossRows.of(rows, 5).shape_faults() == []
    assert "at least n_token=6 keys" in CrossRows.of(rows, 6).shape_faults()[0]
    bad = dsf.SoftmaxRows(torch.randn(1, 3, 2, 4), torch.randn(1, 5, 3, 4), causal=False)
    assert "C.key" in CrossRows.of(bad, 5).shape_faults()[0]


def test_gradients_reach_the_keys_of_cross_attention():
    model = attention_models.model("bart", torch.float64, "eager")
    found = trace(model, attention_models.inputs("bart"), gradients=True)
    layer = next(t for t in found.values() if "n_key" in t.attrs)
    projection = model.get_submodule(layer.name).k_proj.weight
    y = dsf.scan(layer.recurrence, layer.values, "chunked")
    (gradient,) = torch.autograd.grad(y.square().sum(), projection)
    assert float(gradient.abs().max()) > 0


# -- refusals ----------------------------------------------------------------------------------


def test_attention_that_nobody_knows_is_refused_with_the_reason():
    config = BigBirdConfig(vocab_size=40, hidden_size=24, num_hidden_layers=1, pad_token_id=0,
                           num_attention_heads=3, intermediate_size=32, sep_token_id=2,
                           attention_type="original_full")  # fmt: skip
    with pytest.raises(DsfUnsupportedError, match=r"BigBirdSelfAttention: no part of it calls.*"
                                                  r"ALL_ATTENTION_FUNCTIONS"):  # fmt: skip
        trace(BigBirdModel(config), tiny_models.inputs())


def test_a_layer_whose_forward_a_kernel_replaced_is_refused():
    model = tiny_models.model("llama")
    assert isinstance(model, LlamaModel)
    layer = model.layers[1].self_attn

    def kernel(self: nn.Module, hidden_states: Tensor, **_) -> tuple[Tensor, None]:
        return hidden_states, None

    layer.forward = types.MethodType(kernel, layer)
    with pytest.raises(DsfUnsupportedError, match=r"layers.1.self_attn: .*kernelize\(\)"):
        trace(model, tiny_models.inputs())


def test_two_products_in_one_layer_are_refused():
    model = attention_models.model("mpnet")
    layer = model.encoder.layer[0].attention.attn
    once = layer.forward
    layer.forward = lambda *a, **k: (once(*a, **k), once(*a, **k))[1]
    with pytest.raises(DsfUnsupportedError, match=r"expected one product of a softmax .*got 2"):
        trace(model, tiny_models.inputs())


@pytest.mark.parametrize(("name", "weight"), [
    ("bart", "decoder.layers.0.encoder_attn.out_proj.weight"),
    ("t5", "decoder.block.0.layer.1.EncDecAttention.o.weight"),
    ("mpt", "blocks.0.attn.out_proj.weight"),
    ("falcon", "h.0.self_attention.dense.weight"),
])  # fmt: skip
def test_a_weight_changed_after_the_pass_fails_the_gate(name, weight):
    model = attention_models.model(name)
    spoil_after_the_pass(model, weight)
    with pytest.raises(DsfFidelityError, match="relative difference of"):
        trace(model, attention_models.inputs(name))


@pytest.mark.parametrize("name", ["bart", "deberta"])
def test_any_changed_value_shows_in_the_readout(name):
    model = attention_models.model(name)
    for layer in trace(model, attention_models.inputs(name)).values():
        y = dsf.scan(layer.recurrence, 0.5 * layer.values)
        assert relative_error(layer.readout(y), layer.output) > WRONG
