"""Convolutions that transformers' layers compute by themselves, and rows over grids of patches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsf
from dsf.errors import DsfShapeError, DsfUnsupportedError
from dsf.grid_rows import GridRows
from dsf.transitions import Identity

EXACT = {torch.float64: 1e-14, torch.float32: 2e-6}
MAP = 1e-13


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def filled(layer: nn.Module, dtype: torch.dtype) -> Any:
    layer = layer.to(dtype).eval()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.4 * drawn(*parameter.shape, seed=i))
    return layer


def vision(kernel: int, merge: int, dtype: torch.dtype = torch.float64) -> Any:
    from transformers.models.lfm3_vl.modeling_lfm3_vl import Lfm3VlVisionShortConv

    config = SimpleNamespace(spatial_merge_size=merge, hidden_size=6, conv_kernel_size=kernel)
    return filled(Lfm3VlVisionShortConv(config, 0), dtype)  # type: ignore[arg-type]


GRIDS = [[2, 4, 6], [1, 2, 2], [1, 6, 4]]
PATCHES = 48 + 4 + 24


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kernel", "merge"), [(3, 2), (5, 2), (1, 1), (3, 1)])
def test_the_vision_convolution_is_its_rows(kernel, merge, dtype):
    layer = vision(kernel, merge, dtype)
    x = drawn(PATCHES, 6, dtype=dtype)
    found = dsf.from_layer(layer, x, GRIDS)
    assert found.error <= EXACT[dtype]
    assert found.system == "short_convolution"
    assert isinstance(found.recurrence, dsf.Bidirectional)
    y = dsf.scan(found.recurrence, found.values)
    naive = dsf.scan(found.recurrence, found.values, "reference")
    assert float((y - naive).abs().max()) <= EXACT[dtype] * max(1, float(y.abs().max()))
    mixed = torch.einsum("bctj,bjcp->btcp", dsf.materialise(found.recurrence), found.values)
    assert float((mixed - y).abs().max()) <= EXACT[dtype] * max(1, float(y.abs().max()))


def test_the_map_of_the_vision_convolution_is_the_jacobian_of_its_inside():
    """Between the gates: patches of another frame, image or beyond the kernel have no part."""
    layer = vision(3, 2)
    weights = dsf.materialise(dsf.from_layer(layer, drawn(PATCHES, 6), GRIDS).recurrence)[0]
    with torch.no_grad():  # gates of one, no projection: what is left is the convolution
        layer.in_proj.weight.zero_()
        layer.in_proj.weight[12:] = torch.eye(6, dtype=torch.float64)
        layer.out_proj.weight.copy_(torch.eye(6))
    layer.in_proj.bias = nn.Parameter(torch.cat([torch.ones(12), torch.zeros(6)]).double())
    jacobian: Any = torch.autograd.functional.jacobian(
        lambda x: layer(x, GRIDS), drawn(PATCHES, 6, seed=1)
    )
    own = torch.einsum("tcjc->ctj", jacobian)
    assert float((weights - own).abs().max()) <= MAP
    assert bool((weights != 0).any())


def test_grid_rows_are_the_same_whole_in_slices_and_in_tiles():
    weight = drawn(3, 3, 3)
    rows = GridRows.of(weight, [(1, 2, 4), (2, 2, 4)], merge=2)
    u, every = drawn(2, 3, 24, 5, seed=1), slice(0, 24)
    whole = rows.tile(every, every)
    assert float((rows.mix(u) - whole @ u).abs().max()) <= MAP
    assert torch.equal(rows.tile(slice(5, 9), slice(2, 20)), whole[..., 5:9, 2:20])
    part = rows.time_slice(4, 11).time_slice(1, 5)
    assert torch.equal(part.tile(slice(0, 4), every), whole[..., 5:9, :])
    assert float((part.mix(u) - whole[..., 5:9, :] @ u).abs().max()) <= MAP
    assert rows.time_slice(3, 3).mix(u).shape == (2, 3, 0, 5)
    frame, row, column = rows.places()
    assert list(zip(frame.tolist(), row.tolist(), column.tolist(), strict=True))[:6] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0, 2), (0, 0, 3)]  # fmt: skip
    empty = GridRows.of(weight, [])
    assert empty.mix(u[:, :, :0]).shape == (2, 3, 0, 5)
    for wrong, message in (
        (GridRows.of(weight[..., :2], rows.grids), "C.weight: expected axes .*kernel odd"),
        (GridRows.of(weight, [(1, 3, 8)], 2), "C.grids: expected rows and columns in blocks of 2"),
    ):
        with pytest.raises(DsfShapeError, match=message):
            dsf.Recurrence(Identity(24), dsf.OneHot(24, 24), wrong).validate()


def test_grid_rows_have_the_gradients_of_their_tiles():
    weight, u = drawn(2, 3, 3).requires_grad_(), drawn(1, 2, 9, 2, seed=1).requires_grad_()
    rows = GridRows.of(weight, [(1, 3, 3)])
    seed = drawn(1, 2, 9, 2, seed=2)
    fast = torch.autograd.grad(rows.mix(u), (weight, u), seed)
    slow = torch.autograd.grad(rows.tile(slice(0, 9), slice(0, 9)) @ u, (weight, u), seed)
    for a, b in zip(fast, slow, strict=True):
        assert float((a - b).abs().max()) <= MAP


def compressed(dtype: torch.dtype, bias: bool, kernels: tuple[int, int] = (2, 3)) -> Any:
    from transformers.models.zaya.modeling_zaya import ZayaCCAProjection

    config = SimpleNamespace(
        hidden_size=10, cca_time0=kernels[0], cca_time1=kernels[1], num_key_value_heads=2,
        num_attention_heads=4, head_dim=6, attention_bias=bias,
    )  # fmt: skip
    return filled(ZayaCCAProjection(config, 0), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("length", "kernels"), [(11, (2, 3)), (1, (2, 2)), (2, (3, 2))])
def test_the_compressed_projection_is_three_registers(length, kernels, bias, dtype):
    layer = compressed(dtype, bias, kernels)
    x, mask = drawn(2, length, 10, dtype=dtype), torch.ones(2, length)
    mask[1, : length // 3] = 0
    for given in ((x, None), (x, None, mask)):
        found = dsf.trace(layer, given)
        assert list(found) == ["query", "key", "value"]
        outputs = dict(zip(found, layer(*given), strict=True))
        for name, trace in found.items():
            assert trace.error <= EXACT[dtype], name
            assert torch.equal(trace.output, outputs[name])
            y = dsf.scan(trace.recurrence, trace.values, "reference")
            error = float((trace.readout(y) - trace.output).abs().max())
            assert error <= EXACT[dtype] * max(1, float(trace.output.abs().max()))


def test_the_compressed_projection_looks_back_by_its_taps_and_refuses_a_cache():
    layer = compressed(torch.float64, True)
    with pytest.raises(DsfUnsupportedError, match="past_key_values: expected no cache"):
        dsf.from_layer(layer, drawn(1, 3, 10), past_key_values=SimpleNamespace())
    weights = dsf.materialise(
        dsf.trace(layer, (drawn(1, 7, 10), None))["query"].recurrence, length=7
    )
    lag = torch.arange(7)[:, None] - torch.arange(7)
    outside = (lag < 0) | (lag > 3)  # two taps behind three
    assert not bool(weights.abs().amax((0, 1, 4, 5))[outside].any())
    assert bool((weights.abs().amax((0, 1, 4, 5))[~outside] > 0).all())
