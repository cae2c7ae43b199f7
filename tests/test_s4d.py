"""S4D: kernel, convolution, layer and map against the released code; other rules and edges."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import FACES_ATOL, assert_near, fresh_input, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models.s4d import S4d, s4d_kernel, s4d_recurrence
from dsf.transitions import Diagonal


def released_layer():
    case = golden("s4d")
    layer = S4d(4, n_state=int(case["opt.d_state_N"])).double()
    layer.load_state_dict(case.group("param"))
    return layer, case


def test_layer_matches_the_reference_run():
    layer, case = released_layer()
    x = case["in.u"].mT
    assert_golden(layer(x).mT, case["out.y_layer"])
    assert_golden(layer.convolve(x).mT, case["out.y_layer"])
    state, outputs = None, []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    assert_golden(torch.stack(outputs, -1), case["out.y_layer"])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_kernel_scan_and_map_match_the_reference_run(backend):
    layer, case = released_layer()
    x = case["in.u"].mT
    system, values = layer.recurrence(x)
    assert system.length == 1
    assert_golden(s4d_kernel(system, x.shape[1]), case["out.kernel_K"])
    bare = system.replace(D=None)
    y = dsf.scan(bare, values, backend)
    assert y.dtype == torch.float64
    assert_golden(y[..., 0].mT, case["out.conv_K_u"])
    M = dsf.materialise(bare, length=x.shape[1], backend=backend)
    assert_golden(M[0], case["weights_toeplitz"])
    y = dsf.scan(system, values, backend)
    assert y.dtype == torch.float64
    assert_golden(y[..., 0].mT, case["out.conv_K_u"] + case["param.D"][:, None] * case["in.u"])


@pytest.mark.parametrize("rule", ["zero_order_hold", "bilinear", "forward_euler"])
def test_conjugate_pairs_are_the_real_system_of_twice_the_states(rule):
    """2 Re of half the states = the sum over states and conjugates, by dense arithmetic."""
    g = torch.Generator().manual_seed(0)
    A = torch.complex(-torch.rand(3, 4, generator=g), 3 * torch.randn(3, 4, generator=g))
    A, s = A.to(torch.complex128), torch.tensor([0.1, 0.3, 0.02], dtype=torch.float64)
    C, B = torch.randn(2, 3, 4, dtype=torch.complex128, generator=g)
    system = s4d_recurrence(s, A, C, B=B, rule=rule)
    x = fresh_input(3)
    both = [torch.cat([t, t.conj()], 1) for t in (A, C, B)]
    doubled = s4d_recurrence(s, both[0], both[1] / 2, B=both[2], rule=rule)
    y = dsf.scan(system, x[..., None])
    assert_near("pairs", y, dsf.scan(doubled, x[..., None]), FACES_ATOL)
    assert_near("real form", dsf.scan(dsf.realified(system), x[..., None]), y, FACES_ATOL)


def test_initial_state_and_cut_in_time():
    layer, case = released_layer()
    x = case["in.u"].mT
    system, values = layer.recurrence(x)
    _, middle = dsf.scan(system, values[:, :7], return_state=True)
    rest = dsf.scan(system.replace(initial_state=middle), values[:, 7:])
    assert_near("second part", rest, dsf.scan(system, values)[:, 7:], FACES_ATOL)


@pytest.mark.parametrize("decay", [-0.5, 0.0, 0.9])
def test_kernel_of_real_decays(decay):
    a = torch.tensor([[[[decay]]]], dtype=torch.float64)
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    r = dsf.Recurrence(Diagonal.from_decay(a), one, one)
    assert_near("kernel", s4d_kernel(r, 5)[0], decay ** torch.arange(5.0).double(), 1e-15)


def test_convolution_is_the_forward_pass():
    torch.manual_seed(0)
    layer, x = shaken(S4d.small(6)), fresh_input(6, length=33)
    assert_near("convolution", layer.convolve(x), layer(x), FACES_ATOL)
    assert layer.convolve(x[:, :0]).shape == (2, 0, 6)


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    layer = S4d(16, n_state=8)
    A = -layer.kernel.log_A_real.exp() + 1j * layer.kernel.A_imag
    assert torch.allclose(A, -0.5 + 1j * torch.pi * torch.arange(4.0).expand(16, 4))
    step = layer.kernel.log_dt.exp()
    assert float(step.min()) >= 0.99e-3
    assert float(step.max()) <= 1.01e-1


def test_wrong_systems_are_named():
    s, A = torch.ones(3), torch.ones(3, 4)
    with pytest.raises(DsfShapeError, match="channel=3"):
        s4d_recurrence(s, A, A[:, :2])
    r = s4d_recurrence(s, -A, A)
    with pytest.raises(DsfValueError, match="time-invariant"):
        s4d_kernel(r.replace(C=r.C.expand(1, 5, 3, 1, 4)), 4)
