"""A whole layer as one linear map: against layers written by hand, and against itself."""

from __future__ import annotations

import dataclasses
import functools

import frozen_models
import numpy as np
import pytest
import tiny_models
import torch
from block_laws import REACHED, close, drawn
from torch import Tensor, nn
from torch.func import jvp, vjp

import dsf
from dsf.errors import (
    DsfFidelityError,
    DsfMemoryError,
    DsfShapeError,
    DsfUnsupportedError,
    DsfValueError,
)
from dsf.freezing import Frozen
from dsf.wrappers import core

SINGLE = 1e-5
LENGTH = 9


@functools.cache
def traced(name: str, path: str, padding: str = "none"):
    model = tiny_models.model(name, torch.float64)
    return model, dsf.trace(model, tiny_models.inputs(padding, LENGTH), [path])[path]


@functools.cache
def block(name: str, path: str, padding: str = "none"):
    return traced(name, path, padding)[1].block()


CASES = [
    ("bert", "encoder.layer.1.attention.self", "right"), ("llama", "layers.1.self_attn", "left"),
    ("gpt2", "h.0.attn", "none"), ("mamba", "layers.1.mixer", "left"),
    ("mamba2", "layers.0.mixer", "none"), ("recurrent_gemma", "layers.1.temporal_block", "none"),
    ("lfm3", "layers.0.conv", "none"),
]  # fmt: skip
cases = pytest.mark.parametrize(("name", "path", "padding"), CASES)


# -- against layers written by hand ------------------------------------------------------------

WRITTEN = {
    "llama": lambda model, layer, x: frozen_models.llama_mixer(
        layer, x, model.rotary_emb.inv_freq),
    "mamba": lambda model, layer, x: frozen_models.mamba_mixer(layer, x),
    "mamba2": lambda model, layer, x: frozen_models.mamba2_mixer(layer, x),
    "recurrent_gemma": lambda model, layer, x: frozen_models.rglru_mixer(layer, x),
    "lfm3": lambda model, layer, x: frozen_models.lfm_convolution(
        layer, x, torch.ones(x.shape[:2], dtype=x.dtype)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "path"), [(n, p) for n, p, _ in CASES if n in WRITTEN])
def test_products_are_those_of_the_frozen_layer(name, path):
    model, trace = traced(name, path)
    found = trace.block()

    def frozen(x: Tensor) -> Tensor:
        return WRITTEN[name](model, model.get_submodule(path), x)

    x, z = drawn(found.input.shape, 1), drawn(found.output.shape, 2)
    output, forward = jvp(frozen, (found.input,), (x,))
    assert close(output, found.output)
    assert close(found.apply(x), forward)
    assert close(found.transposed(z), vjp(frozen, found.input)[1](z)[0])
    assert found.error <= REACHED


# -- against itself ----------------------------------------------------------------------------


@cases
def test_every_view_of_a_block_is_the_same_map(name, path, padding):
    found = block(name, path, padding)
    x = drawn(found.input.shape, 1)
    z = found.apply(x)
    by_head = found.apply(x, heads=True)
    assert close(by_head.sum(1), z)
    blocks = found.jacobian()
    assert close(torch.einsum("bhtjoi,bji->bhto", blocks, x), by_head)

    o, i = drawn(found.output.shape, 3), drawn(found.input.shape, 4)
    assert close(found.map(o, i).values, torch.einsum("bhtjoi,bto,bji->bhtj", blocks, o, i))
    assert close(found.map(o[0, 0], i[0, 0]).values,
                 torch.einsum("bhtjoi,o,i->bhtj", blocks, o[0, 0], i[0, 0]))  # fmt: skip
    assert close(found.norm().values, torch.linalg.vector_norm(blocks, dim=(-2, -1)))
    whole = torch.linalg.vector_norm(blocks.sum(1), dim=(-2, -1))
    assert close(found.norm(heads=False).values, whole)
    assert close(found.trace().values, torch.einsum("bhtjoo->bhtj", blocks))


@cases
def test_the_plain_recurrence_of_each_head_is_the_block(name, path, padding):
    found = block(name, path, padding)
    system = found.recurrence()
    dsf.scan(system, torch.zeros(*found.input.shape[:2], found.n_head, found.input.shape[2], 1,
                                 dtype=torch.float64))  # validates  # fmt: skip
    r = core(system)
    assert (r.n_input, r.n_output) == (found.input.shape[2], found.output.shape[2])
    x = drawn(found.input.shape, 1)
    values = x[:, :, None, :, None].expand(-1, -1, found.n_head, -1, -1)
    y = dsf.scan(system, values, "reference")[..., 0].transpose(1, 2)
    assert close(y, found.apply(x, heads=True))
    assert close(dsf.materialise(system), found.jacobian())


def test_a_convolution_is_a_register_of_what_its_head_sees():
    """Mamba's heads are channels: kernel states for the register, N for the scan."""
    found = block("mamba", "layers.1.mixer", "left")
    assert found.taps == 4
    assert core(found.recurrence()).n_state == 4 + 4
    assert block("recurrent_gemma", "layers.1.temporal_block").taps == 4
    assert block("llama", "layers.1.self_attn", "left").taps == 1


@cases
def test_tiles_are_cut_out_of_the_whole(name, path, padding):
    found = block(name, path, padding)
    rows, cols = slice(2, 7), slice(1, LENGTH)
    o, i = drawn(found.output.shape, 3), drawn(found.input.shape, 4)
    for view in (found.norm, found.trace, functools.partial(found.map, o, i)):
        whole, tile = view(), view(queries=rows, keys=cols)
        assert np.allclose(tile.values, whole.values[..., rows, cols], rtol=1e-10, atol=1e-13)
        assert list(tile["query"].values) == [2, 3, 4, 5, 6]
    assert close(found.jacobian(rows, cols), found.jacobian()[:, :, rows, cols])


@cases
def test_offset_is_what_the_map_of_the_input_leaves(name, path, padding):
    found = block(name, path, padding)
    assert close(found.apply(found.input) + found.offset, found.output)
    if name in ("mamba2", "llama"):  # biases only where the configuration has some
        biases = [p for n, p in traced(name, path)[0].get_submodule(path).named_parameters()
                  if n.endswith("bias") and "dt" not in n]  # fmt: skip
        expected = 0 if name == "llama" else 1
        assert (len(biases) > 0) == bool(expected)
        assert (float(found.offset.abs().max()) > REACHED) == bool(expected)


def test_random_probes_estimate_norms_without_bias():
    found = block("llama", "layers.1.self_attn", "none")
    seen = np.tril(np.ones((LENGTH, LENGTH), dtype=bool))
    for heads in (True, False):
        exact = found.norm(heads=heads).values[..., seen] ** 2
        sketched = found.norm(heads=heads, probes=100).values[..., seen] ** 2
        assert abs(float((sketched / exact).mean()) - 1) < 0.15
    assert "3 random probes" in found.norm(probes=3, queries=slice(0, 1)).attrs["reduction"]


def test_every_recurrent_layer_of_transformers_has_a_block():
    for name in ("falcon_mamba", "jamba", "bamba", "falcon_h1", "zamba2", "nemotron_h",
                 "qwen3_next", "kimi_linear", "rwkv", "minimax", "xlstm"):  # fmt: skip
        model = tiny_models.model(name, torch.float64)
        for trace in dsf.trace(model, tiny_models.inputs("left", 5)).values():
            assert trace.block().error <= REACHED, trace.name


def test_torch_attention_and_float32():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True)
    x = torch.randn(2, 5, 12)
    found = dsf.from_layer(layer, x, x, x).block()
    assert found.error <= SINGLE
    offset = found.offset  # biases, and the slot that holds bias_v from the start
    assert float((found.apply(x) + offset - found.output).abs().max()) <= SINGLE
    assert found.norm(heads=False, tokens=list("abcde"))["key_token"].values[4] == "e"


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("name", ["mamba", "llama"])
def test_short_sequences(name, length):
    model = tiny_models.model(name, torch.float64)
    trace = next(iter(dsf.trace(model, tiny_models.inputs(length=length)).values()))
    found = trace.block()
    assert found.taps <= length
    x = drawn(found.input.shape)
    y = torch.einsum("bhtjoi,bji->bto", found.jacobian(), x)
    assert close(y, found.apply(x))
    values = x[:, :, None, :, None].expand(-1, -1, found.n_head, -1, -1)
    assert close(dsf.scan(found.recurrence(), values)[..., 0].sum(2), found.apply(x))


# -- what is refused ---------------------------------------------------------------------------


def test_what_no_freezing_makes_linear_is_refused():
    layer, x = nn.MultiheadAttention(12, 3, batch_first=True), torch.randn(2, 5, 12)
    found = dsf.from_layer(layer, x, x, x)
    warped = dataclasses.replace(
        found, readout=lambda y: found.readout(y).exp2(), output=found.output.exp2())  # fmt: skip
    with pytest.raises(DsfFidelityError, match="nonlinearity that dsf"):
        warped.block()


def test_parts_of_a_module_and_traces_without_a_pass_are_refused():
    lstm = dsf.trace(nn.LSTM(3, 4), torch.randn(5, 1, 3))["l0"]
    with pytest.raises(DsfUnsupportedError, match="module that is one layer"):
        lstm.block()
    _, trace = traced("llama", "layers.1.self_attn")
    with pytest.raises(DsfUnsupportedError, match="trace with its pass"):
        dataclasses.replace(trace, source=None).block()


def test_arrays_that_would_not_fit_are_refused_with_their_size():
    found = block("mamba", "layers.1.mixer", "left")
    for view in (found.jacobian, found.norm, found.trace, found.recurrence):
        with pytest.raises(DsfMemoryError, match=r"needs .* the cap is"):
            view(max_memory=1000)
    o, i = drawn((16,)), drawn((16,), 1)
    assert found.map(o, i).sizes["head"] == 32  # no such array


def test_axes_that_do_not_fit_are_refused():
    found = block("llama", "layers.1.self_attn", "none")
    with pytest.raises(DsfShapeError, match=r"Block.apply: x: expected axes"):
        found.apply(drawn((1, LENGTH, 24)))
    with pytest.raises(DsfShapeError, match=r"Block.map: output: expected axes \(features=24"):
        found.map(drawn((3,)), drawn((24,)))
    with pytest.raises(DsfShapeError, match="expected 9 texts"):
        found.norm(tokens=["a"])
    with pytest.raises(DsfValueError, match=r"Block: keys: expected a contiguous range within"):
        found.trace(keys=range(5, 20))
    with pytest.raises(DsfValueError, match=r"Block.norm: probes: expected at least 1 or None"):
        found.norm(probes=0)


# -- freezing ----------------------------------------------------------------------------------


def test_what_is_not_finite_is_refused():
    found = block("lfm3", "layers.0.conv")
    for function, like in (("apply", found.input), ("transposed", found.output)):
        x = torch.zeros_like(like)
        x[0, -1, 0] = float("nan")
        with pytest.raises(DsfValueError, match=rf"Block.{function}: .: .*got 1 NaN or infinite"):
            getattr(found, function)(x)


def test_followed_values_are_multiplied_by_constants_and_added_to_what_is_not():
    """The derivative of a gated sum: no gate, but the residual; not so outside `follow`."""
    y, x = drawn((3, 4), 1).requires_grad_(), drawn((3, 4), 2).requires_grad_()

    def readout(y: Tensor, x: Tensor) -> Tensor:
        h = y * x + x  # a gate on the left and on the right, a ratio, a residual
        h = x * h / (1 + x.square())
        return torch.nn.functional.layer_norm(h + x, (4,))

    seed = drawn((3, 4), 3)
    frozen = Frozen(gates=True)
    with frozen, frozen.follow(y):
        got = torch.autograd.grad(readout(y, x), (y, x), seed)
    with frozen:
        outside = torch.autograd.grad(readout(y, x), (y, x), seed)
    held = x.detach()
    with Frozen(gates=True):
        h = held * (y * held + x) / (1 + held.square())
        exact = torch.autograd.grad(
            torch.nn.functional.layer_norm(h + x, (4,)), (y, x), seed)  # fmt: skip
    for a, b in zip(got, exact, strict=True):
        assert close(a, b)
    assert not close(outside[1], exact[1])


def test_the_left_of_two_factors_is_a_gate_where_a_layer_says_so():
    x = drawn((3,), 1).requires_grad_()
    with Frozen(gates=True, left_gates=True):
        (got,) = torch.autograd.grad((2 * x * (3 * x)).sum(), x)
    assert close(got, 6 * x.detach())
    with Frozen(gates=True):
        (got,) = torch.autograd.grad((2 * x * (3 * x)).sum(), x)
    assert close(got, 12 * x.detach())


@pytest.mark.parametrize(("function", "gates"), [
    (lambda x: nn.functional.layer_norm(x, (6,), torch.arange(6.0).double()), False),
    (lambda x: nn.functional.rms_norm(x, (6,), torch.arange(6.0).double()), False),
    (lambda x: nn.functional.normalize(x, dim=-1), False),
    (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), False),
    (lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5, False),
    (nn.functional.silu, True),
    (nn.functional.gelu, True),
    (torch.tanh, True),
    (torch.relu, True),
    (lambda x: x * torch.sigmoid(3 * x), True),
])  # fmt: skip
def test_frozen_functions_keep_their_values_and_are_their_own_derivative(function, gates):
    x = drawn((4, 6)).requires_grad_()
    with Frozen(gates=gates):
        y = function(x)
    x = x.detach()
    assert close(y.detach(), function(x))
    _, forward = jvp(lambda v: _under(function, gates, v), (x,), (x,))
    assert close(forward, y.detach())


def _under(function, gates: bool, x: Tensor) -> Tensor:
    with Frozen(gates=gates):
        return function(x)


def test_activations_at_zero_have_a_finite_gate():
    x = torch.tensor([0.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with Frozen(gates=True):
        y = nn.functional.silu(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert close(slope, torch.sigmoid(x.detach()))
