"""transformers' recurrent mixers are exact: chunk edges, padding, operators, golden vectors.

Errors with and without padding, and that the traced pass is the plain one bit for bit, are in
test_adapters_transformers.py, which loops over the same tiny models.
"""

from __future__ import annotations

import importlib.util

import pytest
import tiny_models
import torch
import transformers
from golden_vectors import assert_golden, golden
from recurrent_models import KINDS, LAYERS, LEAKING
from torch import nn
from transformers.models.inkling import modeling_inkling
from transformers.models.inkling2 import modeling_inkling2
from transformers.models.minimax import modeling_minimax
from transformers.models.qwen3_next import modeling_qwen3_next

import dsf
from dsf.adapters import adapters
from dsf.decoding import trace_decoding
from dsf.precision import Float64Throughout
from dsf.tracing import from_layer, relative_error, trace

DOUBLE = 1e-13
"""What the adapters reach in float64; the gate itself asks for 1e-10."""
AGREEMENT = 1e-10
"""Of a model's own two ways of computing the same in float64."""
WRONG = 1e-3
XLSTM = importlib.util.find_spec("xlstm") is not None
"""transformers' xLSTM models are then made of that package's layers."""
BETWEEN_PARTS = 5e-3
"""xLSTM's model rounds the state that it hands from part to part to bfloat16."""


def test_every_tiny_model_is_here():
    assert sorted(LAYERS) == sorted(tiny_models.RECURRENT)


# -- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_around_the_edges_of_the_layers_own_chunks(name):
    path, system, chunk = LAYERS[name]
    model = tiny_models.model(name, torch.float64)
    edges = {2, max(chunk - 1, 1), chunk, 2 * chunk + 3} if name in KINDS else set()
    for length in sorted({1, chunk + 1} | edges):
        padding = "left" if length > tiny_models.PADDED else "none"
        layer = trace(model, tiny_models.inputs(padding, length), [path])[path]
        assert layer.system == system
        assert layer.error <= DOUBLE, (length, layer.error)
        assert layer.attrs["scan_error"] <= DOUBLE, (length, layer.attrs["scan_error"])


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in LEAKING])
def test_a_padded_row_is_the_row_alone(name):
    """Left and right: same output and same map on the real tokens, nothing from the padding."""
    path = LAYERS[name][0]
    model = tiny_models.model(name, torch.float64)
    pad = tiny_models.PADDED
    for padding, real in (("left", slice(pad, None)), ("right", slice(None, -pad))):
        inputs = tiny_models.inputs(padding)
        padded = trace(model, inputs, [path])[path]
        alone = trace(model, {"input_ids": inputs["input_ids"][1:, real]}, [path])[path]
        assert relative_error(padded.output[1:, real], alone.output) <= DOUBLE
        whole = dsf.materialise(padded.recurrence, length=tiny_models.LENGTH)
        own = dsf.materialise(alone.recurrence, length=tiny_models.LENGTH - pad)
        assert relative_error(whole[-1:, ..., real, real], own) <= DOUBLE
        y = dsf.scan(padded.recurrence, padded.values)
        nothing = padded.values.clone()
        nothing[1, [t for t in range(tiny_models.LENGTH) if t not in range(*real.indices(13))]] = 0
        silent = dsf.scan(padded.recurrence, nothing)
        assert relative_error(silent[1, real], y[1, real]) <= DOUBLE


@pytest.mark.parametrize("name", ["rwkv", "xlstm"])
def test_layers_without_a_mask_carry_their_padding(name):
    """With left padding the layer's state holds the padding, and so does the recurrence."""
    path = LAYERS[name][0]
    model = tiny_models.model(name, torch.float64)
    inputs = tiny_models.inputs("left")
    padded = trace(model, inputs, [path])[path]
    real = slice(tiny_models.PADDED, None)
    alone = trace(model, {"input_ids": inputs["input_ids"][1:, real]}, [path])[path]
    assert padded.error <= DOUBLE
    assert relative_error(padded.output[1:, real], alone.output) > WRONG


def _run_on_other_values(layer: dsf.LayerTrace, values: torch.Tensor) -> torch.Tensor:
    """The layer's own tapped call again, on other values: what it returns."""
    adapter = next(a for a in adapters() if a.recognises(layer.source.visit.module))
    call = layer.source.visit.taps[0]
    (place, *_) = adapter.places(layer.source.visit.module)
    name = next(n for n in ("v", "value", "hidden_states") if n in call.kwargs)
    names = {"q": "query", "k": "key", "v": "value"} if layer.system.endswith(
        ("delta_net", "delta_attention")) else {}  # fmt: skip
    if XLSTM and layer.system == "mlstm":
        names = {"query": "q", "key": "k", "value": "v", "igate": "i", "fgate": "f"}
    given = {names.get(n, n): v for n, v in {**call.kwargs, name: values}.items()}
    if "z" in given:
        given["z"] = None
    with torch.no_grad(), Float64Throughout():
        result = place.original(**given)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", [n for n in KINDS if n not in ("zamba", "minimax")])
def test_the_map_is_the_layers_own_operator_on_any_values(name):
    """The function that was tapped, run again on random values with its gates as they were."""
    path, system, _ = LAYERS[name]
    model = tiny_models.model(name, torch.float64)
    layer = trace(model, tiny_models.inputs(length=11), [path])[path]
    u = torch.randn(*layer.values.shape, dtype=torch.float64)
    if name == "lfm2":
        u[:, :, :, 1] = 1.0  # the constant that drives the bias
    u = u.expand(tiny_models.BATCH, *u.shape[1:])
    y = dsf.scan(layer.recurrence, u)
    as_given = {
        "mamba": lambda x: x.squeeze(-1).mT, "rwkv4": lambda x: x.squeeze(-1),
        "rglru": lambda x: x.squeeze(-1), "mlstm": lambda x: x.transpose(1, 2),
        "short_convolution": lambda x: (x[..., 0, 0] if x.ndim == 5 else x[..., 0]).mT,
    }.get(system, lambda x: x)  # fmt: skip
    assert relative_error(as_given(y), _run_on_other_values(layer, as_given(u))) <= DOUBLE


def test_lightning_attention_is_its_quadratic_form():
    """MiniMax has no function to call again: (q k^T) decayed by exp(-slope lag), masked."""
    model = tiny_models.model("minimax", torch.float64)
    layer = trace(model, tiny_models.inputs(length=11))["layers.0.self_attn"]
    mixer, x = layer.source.visit.module, layer.source.visit.kwargs["hidden_states"]
    mixed = nn.functional.silu(mixer.qkv_proj(x)).unflatten(-1, (4, 3, -1))
    lag = torch.arange(11)[:, None] - torch.arange(11)
    decay = torch.exp(-mixer.slope_rate * lag).tril()
    expected = torch.einsum("bihn,bjhn->bhij", mixed[..., 0, :], mixed[..., 1, :]) * decay
    assert relative_error(dsf.materialise(layer.recurrence), expected) <= DOUBLE


@pytest.mark.parametrize("name", [n for n in KINDS if n != "recurrent_gemma"])
def test_sixteen_bit_layers_are_traced_within_their_precision(name):
    model = tiny_models.model(name, torch.bfloat16)
    if name == "xlstm" and XLSTM:
        pytest.skip("xlstm's native kernels do not run in bfloat16 on the CPU")
    # shorter than a chunk: xLSTM's own chunked scan does not run in bfloat16 on the CPU
    layers = trace(model, tiny_models.inputs("right", 7), [LAYERS[name][0]])
    for layer in layers.values():
        assert layer.attrs["precision"] == "bfloat16"
        assert layer.output.dtype == torch.bfloat16


def test_qwen3_next_layers_against_golden():
    case = golden("hf_qwen3next_gated_deltanet")
    config = transformers.Qwen3NextConfig(
        hidden_size=10, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=4,
        linear_value_head_dim=5, rms_norm_eps=1e-6, layer_types=["linear_attention"],
        num_hidden_layers=1,
    )  # fmt: skip
    net = modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0).to(torch.float64)
    net.load_state_dict(case.group("param"))
    layer = from_layer(net, case["in.x"])
    assert_golden(layer.output, case["out.y"])
    assert_golden(dsf.scan(layer.recurrence, layer.values), case["mid.o_core"])
    assert_golden(dsf.materialise(layer.recurrence), case["weights"])

    case = golden("hf_qwen3next_gated_attention")
    config = transformers.Qwen3NextConfig(
        hidden_size=10, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        rms_norm_eps=1e-6, attn_implementation="eager",
    )  # fmt: skip
    attention = modeling_qwen3_next.Qwen3NextAttention(config, 0).to(torch.float64)
    attention.load_state_dict(case.group("param"))
    mask = torch.full((12, 12), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    layer = from_layer(
        attention, case["in.x"], position_embeddings=(case["in.cos"], case["in.sin"]),
        attention_mask=mask,
    )  # fmt: skip
    assert_golden(layer.output, case["out.y"])
    assert_golden(dsf.materialise(layer.recurrence), case["weights"])


# -- several scans, several mixers, several visits ----------------------------------------------


def test_zamba_scans_its_channels_in_parts_that_are_one_system():
    layers = trace(tiny_models.model("zamba"), tiny_models.inputs())
    assert [(n, t.system) for n, t in layers.items()] == [
        ("layers.0.mamba", "mamba"),
        ("layers.1.shared_transf.self_attn", "softmax_attention"),
        ("layers.1.mamba_decoder.mamba", "mamba"),
        ("layers.2.shared_transf.self_attn", "softmax_attention"),
        ("layers.2.mamba_decoder.mamba", "mamba"),
    ]
    layer = layers["layers.0.mamba"]
    assert len(layer.source.visit.taps) == 3
    assert layer.recurrence.n_head == layer.values.shape[2] == 48
    b = layer.recurrence.B[0, 0, ::16, :, 0] / layer.recurrence.B[0, 0, ::16, :1, 0]
    assert not torch.allclose(b[0], b[1])  # each part has a B of its own


def test_falcon_h1_has_two_mixers_in_one_layer():
    layers = trace(tiny_models.model("falcon_h1"), tiny_models.inputs())
    assert {n: t.system for n, t in layers.items() if n.startswith("layers.0.")} == {
        "layers.0.mamba": "mamba2", "layers.0.self_attn": "softmax_attention",
    }  # fmt: skip


def _xlstm_with_a_cache() -> nn.Module:
    """Its cache wants keys whose width is a multiple of 64."""
    torch.manual_seed(0)
    model = transformers.xLSTMModel(transformers.xLSTMConfig(
        vocab_size=tiny_models.VOCABULARY, hidden_size=128, num_hidden_layers=1, num_heads=2,
        chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).to(torch.float64).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("name", ["xlstm", "lfm2", "minimax"])
@pytest.mark.parametrize("n_token", [4, 11])
def test_decoding_with_a_cache_is_the_full_pass(name, n_token):
    """The first call shorter and longer than the short convolution's register."""
    model = _xlstm_with_a_cache() if name == "xlstm" else tiny_models.model(name, torch.float64)
    inputs = {"input_ids": tiny_models.inputs()["input_ids"]}
    path = LAYERS[name][0]
    full = trace(model, inputs, [path])[path]
    cache = modeling_minimax.MiniMaxCache() if name == "minimax" else None
    found = trace_decoding(model, inputs, n_token, [path], cache=cache)
    steps = [step[path] for step in found]
    assert max(step.error for step in steps) <= DOUBLE
    assert relative_error(torch.cat([s.output for s in steps], 1), full.output) <= AGREEMENT
    before = None
    for step in steps:
        r = step.recurrence
        if before is not None and name != "lfm2":  # whose register drops its oldest input
            assert relative_error(r.initial_state, before) <= DOUBLE
        _, before = dsf.scan(r, step.values, return_state=True)


def test_a_long_sequence_that_xlstm_takes_in_parts_is_several_visits():
    """Each part starts from the state that the last one left, in units of its own."""
    model = _xlstm_with_a_cache()
    inputs = tiny_models.inputs(length=13)
    (whole,) = trace(model, inputs).values()
    model.config.max_inference_chunksize = 5
    parts = trace(model, inputs)
    assert list(parts) == [f"blocks.0.mlstm_layer{n}" for n in ("", "#2", "#3")]
    assert all(part.error <= DOUBLE for part in parts.values())
    joined = torch.cat([part.output for part in parts.values()], 1)
    assert relative_error(joined, whole.output) <= BETWEEN_PARTS


def test_inklings_convolutions_inside_attention_belong_to_it_and_can_be_asked_for():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.float64)
    mask[1, :3] = 0
    fixed = [modeling_inkling.InklingShortConvolution(12, 4, 0, 0),
             modeling_inkling2.Inkling2ShortConvolution(12, 4, 0, 0)]  # fmt: skip
    for module in fixed:
        layer = from_layer(module.to(torch.float64), x, conv_mask=mask)
        assert (layer.system, layer.recurrence.structure) == ("short_convolution", "shift")
        assert layer.error <= DOUBLE
    dynamic = modeling_inkling2.Inkling2DynamicShortConvolution(12, 7, 3, 4, 0, 0)
    nn.init.normal_(dynamic.static_weight)
    extra = torch.randn(2, 9, 7, dtype=torch.float64)
    layer = from_layer(dynamic.to(torch.float64), x, extra, conv_mask=mask)
    assert layer.error <= DOUBLE
    assert layer.recurrence.C.shape == (2, 9, 12, 1, 4)

    class Attention(nn.Module):
        """An outer layer of another adapter that calls the same function for its keys."""

        def __init__(self) -> None:
            super().__init__()
            self.k_sconv, self.after = fixed[0], modeling_inkling.InklingShortConvolution(
                12, 4, 0, 1).to(torch.float64)  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(self.k_sconv(x))

    found = trace(Attention(), x, ["k_sconv"])
    assert list(found) == ["k_sconv"]
    assert found["k_sconv"].error <= DOUBLE


@pytest.mark.parametrize("weights", ["single", "fused"])
def test_the_xlstm_package_has_the_same_layer_under_other_names(weights):
    """Where it is installed, transformers' xLSTM models are made of it."""
    layers = pytest.importorskip("xlstm.xlstm_large.model", reason="xlstm is not installed")
    backend = pytest.importorskip("mlstm_kernels.torch.backend_module")
    config = layers.mLSTMLayerConfig(
        embedding_dim=24, num_heads=3, weight_mode=weights,
        mlstm_backend=backend.mLSTMBackendConfig(
            chunkwise_kernel="chunkwise--native_autograd", step_kernel="native",
            sequence_kernel="native_sequence__native", chunk_size=16, mode="inference",
            return_last_states=True, autocast_kernel_dtype="float32",
        ),
    )  # fmt: skip
    layer = layers.mLSTMLayer(config).to(torch.float64)
    for length in (1, 16, 37):
        found = from_layer(layer, torch.randn(2, length, 24, dtype=torch.float64))
        assert found.system == "mlstm"
        assert found.error <= DOUBLE
