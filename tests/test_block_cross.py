"""Blocks of attention between two sequences: one axis of time, the other sequence first."""

from __future__ import annotations

import functools

import attention_models
import pytest
import torch
from block_laws import REACHED, close, drawn
from torch import Tensor

import dsf
from dsf.tracing import trace

PATHS = {"bart": "decoder.layers.1.encoder_attn", "t5": "decoder.block.0.layer.1.EncDecAttention"}
KEYS, QUERIES = 13, 6


@functools.cache
def read(name: str, padding: str = "left"):
    model = attention_models.model(name, torch.float64)
    inputs = attention_models.inputs(name, padding, queries=QUERIES)
    found = trace(model, inputs)[PATHS[name]]
    return model.get_submodule(PATHS[name]), found, found.block()


def _written(name: str, layer, found, x: Tensor) -> Tensor:
    """P (x W_v) W_o for the tokens of the other sequence, written by hand."""
    value, out = (layer.v_proj, layer.out_proj) if name == "bart" else (layer.v, layer.o)
    head = dsf.materialise(found.recurrence)[..., KEYS:, :KEYS]
    v = (x @ value.weight.T).unflatten(-1, (head.shape[1], -1)).transpose(1, 2)
    return (head @ v).transpose(1, 2).flatten(2) @ out.weight.T


@pytest.mark.parametrize("name", PATHS)
def test_the_map_goes_from_the_other_sequence_to_the_queries(name):
    layer, found, block = read(name)
    assert (block.attrs["n_key"], block.attrs["n_query"]) == (KEYS, QUERIES)
    assert block.error <= REACHED
    assert block.input.shape[1] == block.output.shape[1] == KEYS + QUERIES
    assert not block.input[:, KEYS:].any()
    assert not block.output[:, :KEYS].any()
    assert close(block.output[:, KEYS:], found.output)
    assert close(block.apply(block.input) + block.offset, block.output)
    x, z = drawn(block.input.shape, 1), drawn(block.output.shape, 2)
    y = block.apply(x)
    assert not y[:, :KEYS].any()
    assert close(y[:, KEYS:], _written(name, layer, found, x[:, :KEYS]))
    back = block.transposed(z)
    assert not back[:, KEYS:].any()
    assert abs(float((back * x).sum() - (y * z).sum())) <= REACHED * float((y * z).abs().sum())


@pytest.mark.parametrize("name", PATHS)
def test_every_view_is_the_same_map(name):
    _, _, block = read(name, "none")
    x = drawn(block.input.shape, 1)
    blocks = block.jacobian()
    assert not blocks[:, :, :KEYS].any()
    assert not blocks[:, :, :, KEYS:].any()
    by_head = torch.einsum("bhtjoi,bji->bhto", blocks, x)
    assert close(block.apply(x, heads=True), by_head)
    assert close(block.norm().values, torch.linalg.vector_norm(blocks, dim=(-2, -1)))
    system = block.recurrence()
    values = x[:, :, None, :, None].expand(-1, -1, block.n_head, -1, -1)
    assert close(dsf.scan(system, values)[..., 0].transpose(1, 2), by_head)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_either_order_of_axes_of_torch_attention(batch_first, cross):
    """Input and output of the block are (batch, time, feature) whatever the layer's are."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    x, q = drawn(torch.Size((2, 5, 12)), 1), drawn(torch.Size((2, 3 if cross else 5, 12)), 2)
    query = q if cross else x
    expected = dsf.from_layer(layer, query, x, x).block()
    other = torch.nn.MultiheadAttention(12, 3, batch_first=batch_first).double()
    other.load_state_dict(layer.state_dict())
    given = [a if batch_first else a.transpose(0, 1) for a in (query, x, x)]
    found = dsf.from_layer(other, *given).block()
    assert found.error <= REACHED
    assert close(found.input, expected.input)
    assert close(found.output, expected.output)
    assert close(found.jacobian(), expected.jacobian())
