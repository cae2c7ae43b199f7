"""Mixers of transformers that are the same for every input: FNet's transform, mean of patches."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from transformers.models.poolformer.modeling_poolformer import PoolFormerPooling

import dsf
from dsf.errors import DsfUnsupportedError
from dsf.tracing import from_layer, relative_error, trace
from dsf.wrappers import core

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
FNET = tiny_models._build(
    "FNetModel", "FNetConfig", vocab_size=tiny_models.VOCABULARY, hidden_size=24,
    num_hidden_layers=2, intermediate_size=32, **tiny_models._IDS,
)  # fmt: skip


def _traced(dtype: torch.dtype, length: int):
    model = tiny_models.made(FNET, dtype, None)
    ids = tiny_models.inputs(length=length)["input_ids"]
    return list(trace(model, {"input_ids": ids}).values())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 2, 13, 64])
def test_the_transform_is_two_heads_of_constant_rows(dtype, length):
    found = _traced(dtype, length)
    assert [layer.system for layer in found] == ["fourier_mixing"] * 2
    for layer in found:
        assert layer.error <= TOLERANCE[dtype]
        assert core(layer.recurrence).n_head == 2
    first, second = (dsf.materialise(layer.recurrence) for layer in found)
    assert torch.equal(first, second)  # whatever the input


def test_rows_are_those_of_the_transform_of_unit_tokens():
    (layer, _) = _traced(torch.float64, 13)
    weights = dsf.materialise(layer.recurrence)[0]
    exact = torch.fft.fft(torch.eye(13, dtype=torch.float64), dim=0)
    assert relative_error(weights[0], exact.real) <= 1e-13
    assert relative_error(weights[1], exact.imag) <= 1e-13


def test_its_block_is_the_layer():
    (layer, _) = _traced(torch.float64, 7)
    block = layer.block()
    assert relative_error(block.apply(block.input), block.output) <= 1e-13
    assert float(block.offset.abs().max()) <= 1e-12 * float(block.output.abs().max())


# -- the mean over neighbours --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("grid", [(5, 4), (1, 3), (1, 1)])
@pytest.mark.parametrize("size", [3, 5])
def test_pooling_is_a_constant_map_over_the_grid(dtype, grid, size):
    torch.manual_seed(0)
    layer, x = PoolFormerPooling(size), torch.randn(2, 3, *grid).to(dtype)
    found = from_layer(layer, x)
    assert found.system == "pooling"
    assert found.error <= TOLERANCE[dtype]
    weights = dsf.materialise(found.recurrence)
    assert weights.shape[-2:] == (grid[0] * grid[1],) * 2
    at = torch.cartesian_prod(*map(torch.arange, grid))
    near = ((at[:, None] - at).abs() <= size // 2).all(-1)
    assert torch.equal(weights != 0, near.expand_as(weights))


def test_pooling_with_steps_is_refused():
    pool = torch.nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
    with pytest.raises(DsfUnsupportedError, match="stride=2"):
        from_layer(_Shrinking(pool), torch.randn(1, 2, 4, 4))


class _Shrinking(PoolFormerPooling):
    """Without the difference from its input, whose size it changes."""

    def __init__(self, pool: torch.nn.Module) -> None:
        super().__init__(3)
        self.pool = pool

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.pool(hidden_states)
