"""Mamba-1: the core against four reference runs, the layer against two, its block as a system."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import FACES_ATOL, assert_near, check_all, fresh_input, shaken
from torch.nn.functional import silu, softplus

import dsf
from dsf.errors import DsfShapeError, DsfTypeError
from dsf.models.mamba import Mamba, mamba_recurrence

CORES = [
    "mamba1_real_constant_BC", "mamba1_real_variable_BC", "mamba1_real_grouped_BC",
    "mamba1_complex_variable_BC",
]  # fmt: skip


def in_time_order(x, A):
    """B or C of the reference layouts as (batch, time, [group,] state) or (channel, state)."""
    if x.ndim == 2:
        return x
    if A.is_complex():  # real and imaginary parts alternate along time
        x = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return x.movedim(-1, 1)


def core_of(case, D=None, plain=False):
    A = case["in.A"]
    delta = case["info.delta_plain"] if plain else case["in.delta"]
    return mamba_recurrence(
        delta.mT, A, in_time_order(case["in.B"], A), in_time_order(case["in.C"], A), D,
        step_bias=None if plain else case["in.delta_bias"], softplus=not plain,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", CORES)
def test_core_matches_the_reference_run(name, backend):
    case = golden(name)
    values = case["in.u"].mT[..., None]
    y, state = dsf.scan(core_of(case), values, backend, return_state=True)
    assert_golden(y[..., 0].mT, case["out.y_no_D_no_z"])
    assert_golden(state[..., 0], case["out.last_state"])
    y = dsf.scan(core_of(case, case["in.D"]), values, backend)[..., 0].mT
    assert_golden(y, case["out.y_with_D"])
    assert_golden(y * silu(case["in.z"]), case["out.y_with_D_and_gate"])
    y = dsf.scan(core_of(case, case["in.D"], plain=True), values, backend)[..., 0].mT
    assert_golden(y, case["out.y_plain_delta_no_softplus_no_bias_with_D"])


@pytest.mark.parametrize("name", CORES)
def test_core_map_matches_the_reference_weights(name):
    case = golden(name)
    assert_golden(dsf.materialise(core_of(case)), case["weights_per_channel"])


@pytest.mark.parametrize("name", CORES)
def test_core_carries_a_state_over_a_cut(name):
    case = golden(name)
    system, values = core_of(case, case["in.D"]), case["in.u"].mT[..., None]
    y, _ = dsf.scan(system, values, return_state=True)
    _, middle = dsf.scan(system.time_slice(0, 6), values[:, :6], return_state=True)
    rest = mamba_recurrence(
        case["in.delta"].mT[:, 6:], case["in.A"],
        *[x if x.ndim == 2 else x[:, 6:] for x in (in_time_order(case["in.B"], case["in.A"]),
                                                   in_time_order(case["in.C"], case["in.A"]))],
        case["in.D"], step_bias=case["in.delta_bias"], softplus=True,
        initial_state=middle[..., 0],
    )  # fmt: skip
    assert_near("second part", dsf.scan(rest, values[:, 6:]), y[:, 6:], FACES_ATOL)


def inner_block():
    case = golden("mamba1_inner_block")
    p = case.group("param")
    inner, width = p["A"].shape[0], p["out_proj_weight"].shape[0]
    rank = p["delta_proj_weight"].shape[1]
    layer = Mamba(width, expand=1, n_state=p["A"].shape[1], dt_rank=rank).double()
    layer.inner = inner
    layer.A_log = torch.nn.Parameter((-p["A"]).log())
    layer.D = torch.nn.Parameter(p["D"])
    layer.conv1d.weight = torch.nn.Parameter(p["conv1d_weight"])
    layer.conv1d.bias = torch.nn.Parameter(p["conv1d_bias"])
    layer.x_proj.weight = torch.nn.Parameter(p["x_proj_weight"])
    layer.dt_proj.weight = torch.nn.Parameter(p["delta_proj_weight"])
    layer.dt_proj.bias = torch.nn.Parameter(p["delta_bias"])
    layer.out_proj.weight = torch.nn.Parameter(p["out_proj_weight"])
    layer.out_proj.bias = torch.nn.Parameter(p["out_proj_bias"])
    # the case starts after in_proj: an identity projection makes xz the layer's own input
    layer.in_proj.weight = torch.nn.Parameter(torch.eye(2 * inner, dtype=torch.float64))
    return layer, case["in.xz"].mT, case["out.y"]


def released_layer():
    case = golden("hf_mamba_mixer")
    layer = Mamba(6, n_state=4, dt_rank=2).double()
    layer.load_state_dict(case.group("param"))
    return layer, case["in.x"], case["out.y"]


@pytest.mark.parametrize("build", [inner_block, released_layer])
def test_layer_matches_the_reference_run(build):
    layer, x, expected = build()
    assert_golden(layer(x), expected)
    state, outputs = None, []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    assert_golden(torch.stack(outputs, 1), expected)


def test_released_layer_intermediate_tensors_and_map():
    case = golden("hf_mamba_mixer")
    layer, x, _ = released_layer()
    system, values = layer.recurrence(x)
    assert_golden(values[..., 0].mT, case["mid.scan_input_after_conv"])
    delta = softplus(case["mid.dt_before_bias_softplus"].mT + case["param.dt_proj.bias"])
    log_decay = -delta[..., None] * case["param.A_log"].exp()
    assert_golden(system.A.log_decay, log_decay)
    assert_golden(dsf.materialise(system.replace(D=None)), case["weights_per_channel"])


@torch.no_grad()
@pytest.mark.parametrize("conv_bias", [False, True])
def test_whole_block_is_one_system_along_its_trajectory(conv_bias):
    torch.manual_seed(0)
    layer = shaken(Mamba(4, n_state=3, conv_bias=conv_bias))
    x = fresh_input(4)
    system, values = layer.block_recurrence(x)
    system.validate()
    assert system.mode == "exact_along_trajectory"
    assert system.n_state == 4 + 3
    y = dsf.scan(system, values)[..., 0]
    assert_near("block", layer.out_proj(y), layer(x), FACES_ATOL)
    M = dsf.materialise(system)
    if conv_bias:  # the second input is the constant that carries the bias
        y = torch.einsum("bctji,bjci->btc", M[..., 0, :], values[..., 0])
    else:
        y = torch.einsum("bctj,bjc->btc", M, values[..., 0])
    assert_near("block by its map", layer.out_proj(y), layer(x), FACES_ATOL)


def test_complex_block_is_one_system():
    from dsf.models.mamba import mamba_block_recurrence
    from dsf.short_convolution import short_convolution, with_constant

    case = golden("mamba1_complex_variable_BC")
    g = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(s, dtype=torch.float64, generator=g) for s in ((3, 4), (3,)))
    x = case["in.u"].mT
    k = short_convolution(x, weight, bias)
    core = core_of(case, case["in.D"])
    system = mamba_block_recurrence(core, k, weight, bias, case["in.z"].mT)
    expected = dsf.scan(core, silu(k)[..., None]) * silu(case["in.z"]).mT[..., None]
    assert_near("block", dsf.scan(system, with_constant(x[..., None])), expected, FACES_ATOL)


def test_options_keep_the_contract():
    torch.manual_seed(0)
    layer = Mamba(6, expand=1.5, n_state=3, conv_kernel=2, dt_rank=3, conv_bias=False, bias=True)
    check_all(shaken(layer), fresh_input(6))


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    layer = Mamba(32, n_state=5)
    steps = softplus(layer.dt_proj.bias)
    assert float(steps.min()) >= 0.99e-3
    assert float(steps.max()) <= 1.01e-1
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 6.0).expand(64, 5))
    assert layer.rank == 2
    assert bool((layer.D == 1).all())
    assert float(layer.dt_proj.weight.abs().max()) <= 2**-0.5


def test_reversed_sigmoid_identity():
    """Sieber et al. (2024), equation 23: A = exp(-a softplus(z)) = sigmoid(-z)^a."""
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(1, 7, 2, dtype=torch.float64, generator=g)
    ones = torch.ones(1, 7, 1, dtype=torch.float64)
    for a in (0.3, 1.0, 4.5):
        A = torch.full((2, 1), -a, dtype=torch.float64)
        decay = mamba_recurrence(z, A, ones, ones, softplus=True).A.decay()[..., 0]
        assert_near("identity", decay, torch.sigmoid(-z) ** a, 1e-14)


def test_wrong_tensors_are_named():
    case = golden("mamba1_real_grouped_BC")
    delta, A = case["in.delta"].mT, case["in.A"]
    B, C = (in_time_order(case[f"in.{n}"], A) for n in "BC")
    with pytest.raises(DsfShapeError, match="A: expected"):
        mamba_recurrence(delta, A[:4], B, C)
    with pytest.raises(DsfShapeError, match="B: expected"):
        mamba_recurrence(delta, A, B[:, :, :, :3], C)
    with pytest.raises(DsfShapeError, match="C: expected"):
        mamba_recurrence(delta, A, B, torch.cat([C, C], 2))
    with pytest.raises(DsfTypeError, match="complex A"):
        mamba_recurrence(delta, A, B + 0j, C)
