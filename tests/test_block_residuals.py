"""Blocks of layers that add their own input back (ALBERT), and of biased convolutions (LFM2)."""

from __future__ import annotations

import functools

import pytest
import tiny_models
import torch
from block_laws import REACHED, close, drawn
from torch import Tensor, nn
from torch.func import jvp, vjp
from transformers import Lfm2Config, Lfm2Model

import dsf
from dsf.tracing import trace
from dsf.wrappers import core

SINGLE = 1e-5
LENGTH = 9


@functools.cache
def albert(padding: str = "right"):
    model = tiny_models.model("albert", torch.float64)
    found = list(trace(model, tiny_models.inputs(padding, LENGTH)).values())
    return model, found[1], found[1].block()


def _frozen_albert(layer: nn.Module, trace, x: Tensor) -> Tensor:
    """norm([P] (x W_v + b_v) W_o + b_o + x), map P and the norm's scale held, written by hand."""
    head = layer.num_attention_heads
    value = layer.value(x).unflatten(-1, (head, -1)).transpose(1, 2)
    y = (dsf.materialise(trace.recurrence) @ value).transpose(1, 2).flatten(2)
    z = layer.dense(y) + x
    norm = layer.LayerNorm
    centred = z - z.mean(-1, keepdim=True)
    scale = (centred.detach().square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return centred * scale * norm.weight + norm.bias


def test_products_are_those_of_the_frozen_layer():
    model, found, block = albert()
    layer = model.get_submodule(found.attrs["path"])
    frozen = functools.partial(_frozen_albert, layer, found)
    x, z = drawn(block.input.shape, 1), drawn(block.output.shape, 2)
    output, forward = jvp(frozen, (block.input,), (x,))
    assert close(output, block.output)
    assert close(block.apply(x), forward)
    assert close(block.transposed(z), vjp(frozen, block.input)[1](z)[0])
    assert block.error <= REACHED
    assert close(block.apply(block.input) + block.offset, block.output)


def test_the_input_that_is_added_is_one_more_part_in_every_view():
    _, found, block = albert()
    head = block.n_head
    assert head == core(found.recurrence).n_head
    assert block.attrs["residual"].startswith("the last head")
    x = drawn(block.input.shape, 1)
    by_head = block.apply(x, heads=True)
    assert by_head.shape[1] == head + 1
    assert close(by_head.sum(1), block.apply(x))
    blocks = block.jacobian()
    assert close(torch.einsum("bhtjoi,bji->bhto", blocks, x), by_head)
    apart = ~torch.eye(LENGTH, dtype=torch.bool)
    assert not blocks[:, -1, apart].any()  # each token its own
    assert bool(blocks[:, -1].any())
    o, i = drawn(block.output.shape, 3), drawn(block.input.shape, 4)
    assert close(block.map(o, i).values, torch.einsum("bhtjoi,bto,bji->bhtj", blocks, o, i))
    assert close(block.norm().values, torch.linalg.vector_norm(blocks, dim=(-2, -1)))
    whole = torch.linalg.vector_norm(blocks.sum(1), dim=(-2, -1))
    assert close(block.norm(heads=False).values, whole)
    assert close(block.trace().values, torch.einsum("bhtjoo->bhtj", blocks))
    rows, cols = slice(2, 7), slice(4, LENGTH)
    assert close(block.jacobian(rows, cols), blocks[:, :, rows, cols])
    assert close(block.norm(rows, cols, heads=False).values, whole[:, rows, cols])


@pytest.mark.parametrize("padding", ["none", "left"])
def test_the_plain_recurrence_has_a_head_for_it(padding):
    _, _, block = albert(padding)
    system = block.recurrence()
    assert core(system).n_head == block.n_head + 1
    x = drawn(block.input.shape, 1)
    values = x[:, :, None, :, None].expand(-1, -1, block.n_head + 1, -1, -1)
    y = dsf.scan(system, values, "reference")[..., 0].transpose(1, 2)
    assert close(y, block.apply(x, heads=True))
    assert close(dsf.materialise(system), block.jacobian())


def test_random_probes_count_it_too():
    _, _, block = albert("none")
    sketched = block.norm(heads=False, probes=100).values ** 2
    exact = block.norm(heads=False).values ** 2
    assert abs(float((sketched / exact).mean()) - 1) < 0.15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_biased_convolution_is_a_register_and_an_offset(padding, dtype):
    model = tiny_models.model("lfm2", dtype)
    found = trace(model, tiny_models.inputs(padding, LENGTH))["layers.0.conv"]
    assert found.recurrence.n_input == 2
    block = found.block()
    limit = REACHED if dtype == torch.float64 else SINGLE
    assert block.error <= limit
    assert core(block.inner).n_input == 1
    whole = block.apply(block.input) + block.offset
    assert float((whole - block.output).abs().max() / block.output.abs().max()) <= limit
    assert bool(block.offset.any())


def test_its_map_is_that_of_the_same_layer_without_bias():
    model = tiny_models.model("lfm2", torch.float64)
    inputs = tiny_models.inputs(length=LENGTH)
    biased = trace(model, inputs)["layers.0.conv"].block()
    layer = model.get_submodule("layers.0.conv")
    weight, bias = layer.conv.weight[:, 0], layer.conv.bias
    with torch.no_grad():
        gate, out, _ = layer.in_proj(biased.input).chunk(3, -1)
    kernel = weight.shape[1]
    assert bool(bias.any())

    def frozen(given: Tensor) -> Tensor:
        u = layer.in_proj.weight.chunk(3)[2]
        values = gate * (given @ u.T)
        padded = nn.functional.pad(values, (0, 0, kernel - 1, 0))
        y = sum(padded[:, i : i + LENGTH] * weight[:, i] for i in range(kernel))
        return (out * y) @ layer.out_proj.weight.T

    direction = drawn(biased.input.shape, 2)
    assert close(biased.apply(direction), frozen(direction))
    blocks = biased.jacobian()
    assert close(torch.einsum("bhtjoi,bji->bto", blocks, direction), frozen(direction))
    system = biased.recurrence()
    values = direction[:, :, None, :, None].expand(-1, -1, biased.n_head, -1, -1)
    assert close(dsf.scan(system, values)[..., 0].sum(2), frozen(direction))


def test_every_layer_of_the_model_has_a_block():
    settings = Lfm2Config(**tiny_models._DECODER, layer_types=["conv", "full_attention"],
                          conv_bias=True, block_auto_adjust_ff_dim=False)  # fmt: skip
    torch.manual_seed(0)
    model = Lfm2Model(settings).double().eval()
    for found in trace(model, tiny_models.inputs("left")).values():
        assert found.block().error <= REACHED
