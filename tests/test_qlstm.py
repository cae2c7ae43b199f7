"""qLSTM: equations 8, 20 and 23 of Sieber et al. (2024), the bare layer and its block."""

import pytest
import torch
from model_laws import FACES_ATOL, assert_near, check_all, fresh_input, shaken
from torch.nn.functional import gelu

import dsf
from dsf.models.qlstm import Qlstm, qlstm_recurrence

EXACT = 1e-12
"""The framework's form against the elementwise recurrence (specification, section 7)."""
IDENTITY = 1e-14
"""exp(-a softplus(z)) against sigmoid(-z)^a."""
DIFFERENT = 1e-2
"""What the misprinted equation 20b must be off by."""


def naive_bare(layer, x):
    """x_t = f x_{t-1} + i (W_u u_t), y_t = o x_t, one step after another."""
    f, i, o = layer.gates(x).chunk(3, -1)
    a = torch.sigmoid(-f) ** layer.alpha if layer.reversed_sigmoid else torch.sigmoid(f)
    h, out = 0.0, []
    for t in range(x.shape[1]):
        h = a[:, t] * h + torch.sigmoid(i[:, t]) * (layer.input.weight @ x[:, t].mT).mT
        out.append(torch.sigmoid(o[:, t]) * h)
    return torch.stack(out, 1)


@pytest.mark.parametrize("reversed_sigmoid", [False, True])
def test_bare_layer_is_the_elementwise_recurrence(reversed_sigmoid):
    torch.manual_seed(0)
    layer, x = shaken(Qlstm(6, reversed_sigmoid=reversed_sigmoid)), fresh_input(6)
    assert_near("output", layer(x), naive_bare(layer, x), EXACT)


@pytest.mark.parametrize("reversed_sigmoid", [False, True])
def test_block_is_the_released_experiment(reversed_sigmoid):
    """Written out with torch's own convolution."""
    torch.manual_seed(0)
    layer = shaken(Qlstm(4, reversed_sigmoid=reversed_sigmoid, block=True))
    x = fresh_input(4)
    z, k = layer.input(x).chunk(2, -1)
    k = torch.nn.functional.conv1d(k.mT, layer.conv.weight, layer.conv.bias, padding=3, groups=8)
    k = k[..., : x.shape[1]].mT
    f, i, o = layer.gates(k).chunk(3, -1)
    a = torch.sigmoid(-f) ** layer.alpha if reversed_sigmoid else torch.sigmoid(f)
    h, out = 0.0, []
    for t in range(x.shape[1]):
        h = a[:, t] * h + torch.sigmoid(i[:, t]) * k[:, t]
        out.append(gelu(z[:, t]) * torch.sigmoid(o[:, t]) * h)
    assert_near("output", layer(x), layer.output(torch.stack(out, 1)), FACES_ATOL)


def test_map_of_equation_20_with_the_matrix_product_and_not_the_printed_one():
    torch.manual_seed(0)
    layer, x = shaken(Qlstm(4, reversed_sigmoid=False)), fresh_input(4, length=6, batch=1)
    f, i, o = (torch.sigmoid(g[0]) for g in layer.gates(x).chunk(3, -1))
    W = layer.input.weight

    def by_equation(product):
        h, out = torch.zeros(4, dtype=torch.float64), []
        for t in range(6):
            h = torch.diag(f[t]) @ h + product(torch.diag(i[t]), W) @ x[0, t]
            out.append(torch.diag(o[t]) @ h)
        return torch.stack(out)

    assert_near("matrix product", layer(x)[0], by_equation(torch.matmul), EXACT)
    printed = by_equation(torch.mul)
    assert float((layer(x)[0] - printed).detach().abs().max()) > DIFFERENT


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0, 2.7])
def test_reversed_sigmoid_with_exponent(exponent):
    g = torch.Generator().manual_seed(0)
    f, i, o = (4 * torch.randn(2, 5, 3, dtype=torch.float64, generator=g) for _ in range(3))
    system = qlstm_recurrence(f, i, o, reversed_sigmoid=True, exponent=exponent)
    got = system.A.decay()[..., 0]
    assert_near("power", got, torch.sigmoid(-f) ** exponent, IDENTITY)
    softplus = torch.nn.functional.softplus(f, threshold=1e9)
    assert_near("softplus", got, torch.exp(-exponent * softplus), IDENTITY)


def test_saturated_gates_stay_finite_with_gradients():
    f = torch.tensor([[[800.0], [-800.0], [0.0]]], dtype=torch.float64, requires_grad=True)
    system = qlstm_recurrence(f, f, f, reversed_sigmoid=True, exponent=2.0)
    assert system.A.log_decay.flatten().tolist()[0] == -1600.0
    y = dsf.scan(system, torch.ones(1, 3, 1, 1, dtype=torch.float64))
    y.sum().backward()
    assert bool(torch.isfinite(f.grad).all())


def test_initial_state():
    g = torch.Generator().manual_seed(0)
    f, i, o = (torch.randn(2, 8, 3, dtype=torch.float64, generator=g) for _ in range(3))
    u = torch.randn(2, 8, 3, 1, dtype=torch.float64, generator=g)
    y, _ = dsf.scan(qlstm_recurrence(f, i, o), u, return_state=True)
    _, h = dsf.scan(qlstm_recurrence(f[:, :3], i[:, :3], o[:, :3]), u[:, :3], return_state=True)
    rest = qlstm_recurrence(f[:, 3:], i[:, 3:], o[:, 3:], initial_state=h[..., 0, 0])
    assert_near("second part", dsf.scan(rest, u[:, 3:]), y[:, 3:], FACES_ATOL)


@pytest.mark.parametrize(
    "options",
    [
        {"reversed_sigmoid": False},
        {"block": True},
        {"block": True, "reversed_sigmoid": False, "n_hidden": 5, "conv_kernel": 2},
    ],
    ids=str,
)
def test_options_keep_the_contract(options):
    torch.manual_seed(0)
    check_all(shaken(Qlstm(6, **options)), fresh_input(6))


def test_initial_values_are_the_released_ones():
    torch.manual_seed(0)
    layer = Qlstm(64, block=True)
    assert float(layer.alpha.detach()) == 1.0
    for weight, width in (
        (layer.input.weight, 64), (layer.gates.weight, 128), (layer.output.weight, 128),
    ):  # fmt: skip
        assert float(weight.detach().std()) == pytest.approx(width**-0.5, rel=0.05)
