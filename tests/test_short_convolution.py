"""The short convolution: against torch's Conv1d, as a recurrence, and token by token."""

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models.short_convolution import ShortConvolution, gated_short_convolution_recurrence
from dsf.short_convolution import (
    short_convolution,
    short_convolution_recurrence,
    short_convolution_step,
    with_constant,
)

EXACT = 1e-13
"""Two orders of summation of a few products, float64, absolute on numbers near 1."""


def example(kernel=4, length=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, dtype=torch.float64, generator=g)  # noqa: E731
    return draw(2, length, 3), draw(3, kernel), draw(3), draw(2, 3, kernel - 1)


@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
def test_equals_conv1d(kernel):
    x, weight, bias, _ = example(kernel)
    conv = torch.nn.Conv1d(3, 3, kernel, groups=3, padding=kernel - 1).double()
    conv.load_state_dict({"weight": weight[:, None], "bias": bias})
    expected = conv(x.mT)[..., : x.shape[1]].mT
    assert torch.allclose(short_convolution(x, weight, bias), expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kernel", [1, 4])
def test_is_a_shift_register(kernel, cached, biased):
    x, weight, bias, cache = example(kernel)
    bias, cache = (bias if biased else None), (cache if cached else None)
    system = short_convolution_recurrence(weight, bias, cache).validate()
    assert system.structure == "shift"
    assert system.n_state == kernel
    values = with_constant(x[..., None]) if biased else x[..., None]
    expected = short_convolution(x, weight, bias, cache)
    assert torch.allclose(dsf.scan(system, values)[..., 0], expected, atol=EXACT, rtol=0)


def test_map_is_the_banded_toeplitz_of_its_taps():
    _, weight, _, _ = example(kernel=3)
    M = dsf.materialise(short_convolution_recurrence(weight), length=6)
    for c in range(3):
        for t in range(6):
            for j in range(6):
                expected = weight[c, 2 - (t - j)] if 0 <= t - j < 3 else torch.tensor(0.0)
                assert float(M[0, c, t, j]) == float(expected)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_steps_give_the_same_bits(length):
    x, weight, bias, cache = example(length=length)
    whole = short_convolution(x, weight, bias, cache)
    outputs = []
    for t in range(length):
        y, cache = short_convolution_step(x[:, t], weight, bias, cache)
        outputs.append(y)
        assert cache.shape == (2, 3, 3)
    assert torch.equal(torch.stack(outputs, 1), whole)


def test_cut_anywhere_with_the_cache_carried_on():
    x, weight, bias, _ = example()
    whole = short_convolution(x, weight, bias)
    cache = torch.cat([torch.zeros(2, 3, 1, dtype=x.dtype), x[:, :2].mT], 2)
    assert torch.equal(short_convolution(x[:, 2:], weight, bias, cache), whole[:, 2:])


def test_empty_input_and_gradients():
    x, weight, bias, cache = example(length=3)
    assert short_convolution(x[:, :0], weight, bias, cache).shape == (2, 0, 3)
    leaves = [t.requires_grad_() for t in (x, weight, bias, cache)]
    assert torch.autograd.gradcheck(short_convolution, leaves)


def test_wrong_sizes_are_named():
    x, weight, bias, cache = example()
    with pytest.raises(DsfShapeError, match="channel is fixed by x"):
        short_convolution(x[..., :2], weight)
    with pytest.raises(DsfShapeError, match="past=3"):
        short_convolution(x, weight, bias, cache[..., :2])
    with pytest.raises(DsfShapeError, match="past=3"):
        short_convolution_recurrence(weight, bias, cache[..., :2])


# -- the layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"kernel": 1}, {"kernel": 4, "bias": True}, {"gated": False},
                {"gated": False, "bias": True, "kernel": 5}],
)  # fmt: skip
def test_layer_options_keep_the_contract(options):
    torch.manual_seed(0)
    check_all(shaken(ShortConvolution(6, **options), 0.3), fresh_input(6))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_the_released_one(bias):
    modeling = pytest.importorskip(
        "transformers.models.lfm2.modeling_lfm2", reason="transformers without LFM2"
    )
    config = modeling.Lfm2Config(
        hidden_size=8, num_hidden_layers=1, layer_types=["conv"], conv_L_cache=3, conv_bias=bias,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=8, vocab_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    released = modeling.Lfm2ShortConv(config, 0).double()
    layer = ShortConvolution(8, bias=bias).double()
    layer.load_state_dict(released.state_dict())
    x = fresh_input(8)
    assert_near("layer", layer(x), released(x), EXACT)


def test_gates_are_in_the_map():
    weight, b, c = normal(3, 4), normal(2, 7, 3, seed=1), normal(2, 7, 3, seed=2)
    r = gated_short_convolution_recurrence(weight, input_gate=b, output_gate=c)
    plain = dsf.materialise(short_convolution_recurrence(weight), length=7)
    expected = c.mT[..., None] * plain * b.mT[:, :, None]
    assert_near("map", dsf.materialise(r), expected, EXACT)
    with pytest.raises(DsfShapeError, match="input_gate: expected axes"):
        gated_short_convolution_recurrence(weight, input_gate=b[..., :2])
    with pytest.raises(DsfValueError, match="kernel: expected at least 1, got 0"):
        ShortConvolution(6, kernel=0)
