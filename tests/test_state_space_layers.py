"""S4, S5 and LRU: against the released S4 and dense arithmetic in both time domains."""

import pytest
import torch
from golden_vectors import golden
from model_laws import FACES_ATOL, assert_near, check_all, fresh_input, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models._hippo import legs_matrix, legs_pairs, with_conjugates
from dsf.models.lru import Lru, lru_recurrence
from dsf.models.s4 import S4, s4_kernel, s4_recurrence, s4_untruncated_output
from dsf.models.s5 import S5, s5_recurrence
from dsf.transitions import DiagonalLowRank

FLOAT32_GOLDEN = 1e-4
"""The released S4 kernel runs in float32."""
EXACT = 1e-12


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def random_complex(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.complex128, generator=g)


# -- S4 ----------------------------------------------------------------------------------------


def released_system():
    case = golden("s4_dplr")

    def pairs(name):
        return torch.view_as_complex(case[f"param.{name}"].double())

    A = torch.complex(-case["param.A_real"].double().exp(), -case["param.A_imag"].double())
    step = case["param.inv_dt"].double().exp()[:, 0]
    stored = pairs("C")[0]
    system = s4_recurrence(step, A, pairs("P"), pairs("B")[0], stored)
    C = s4_untruncated_output(system, stored, int(case["opt.L"]))
    return s4_recurrence(step, A, pairs("P"), pairs("B")[0], C), case


def test_released_discrete_matrices():
    system, case = released_system()
    assert isinstance(system.A, DiagonalLowRank)
    A, B = system.dense_transition()[0, 0], system.B[0, 0, ..., 0]
    near(A, case["info.dA"].to(A.dtype), FLOAT32_GOLDEN)
    near(B, case["info.dB"].to(B.dtype), FLOAT32_GOLDEN)
    near(system.C[0, 0, :, 0], case["info.dC"][0].to(B.dtype), FLOAT32_GOLDEN)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_released_kernel_and_convolution(backend):
    system, case = released_system()
    length = int(case["opt.L"])
    near(s4_kernel(system, length), case["out.kernel_K"][0].double(), FLOAT32_GOLDEN)
    u = case["in.u"].double().mT[..., None]
    near(dsf.scan(system, u, backend)[..., 0].mT, case["out.conv_K_u"].double(), FLOAT32_GOLDEN)
    M = dsf.materialise(system, length=length, backend=backend)
    near(M[0, :, :, 0], case["out.kernel_K"][0].double(), FLOAT32_GOLDEN)


@pytest.mark.parametrize("rank", [1, 2])
def test_bilinear_low_rank_is_the_dense_inverse(rank):
    """Woodbury against (I - s/2 F)^-1 (I + s/2 F), float64."""
    A = torch.complex(-torch.rand(3, 4).double(), 3 * torch.randn(3, 4).double())
    P, B, C = (
        random_complex(rank, 3, 4),
        random_complex(3, 4, seed=1),
        random_complex(3, 4, seed=2),
    )
    Q = random_complex(rank, 3, 4, seed=3)
    s = torch.tensor([0.1, 0.5, 0.02], dtype=torch.float64)
    for given in (None, Q):
        r = s4_recurrence(s, A, P, B, C, Q=given)
        p, q = with_conjugates(P), with_conjugates(P if given is None else given)
        F = torch.diag_embed(with_conjugates(A)) - torch.einsum("rcn,rcm->cnm", p, q.conj())
        eye = torch.eye(8, dtype=torch.complex128)
        half = 0.5 * s[:, None, None] * F
        near(r.dense_transition()[0, 0], torch.linalg.solve(eye - half, eye + half))
        near(r.B[0, 0], torch.linalg.solve(eye - half, s[:, None, None]
                                           * with_conjugates(B)[..., None]))  # fmt: skip


def test_untruncated_output_inverts_the_release():
    system, _ = released_system()
    C = system.C[0, 0, :, 0]
    A = system.dense_transition()[0, 0]
    stored = C - (torch.linalg.matrix_power(A, 16).mT @ C[..., None])[..., 0]
    near(s4_untruncated_output(system, stored[:, :4], 16), C[:, :4])


def test_legs_diagonalised():
    A, B = legs_matrix(8)
    legs = legs_pairs(8)
    V = torch.cat([legs.basis, legs.basis.conj()], 1)
    p = with_conjugates(legs.low_rank)
    F = torch.diag(with_conjugates(legs.eigenvalues)) - p[:, None] * p.conj()
    near(V @ F @ V.conj().mT, A.to(torch.complex128))
    near(V @ with_conjugates(legs.input), B.to(torch.complex128))
    near(V.conj().mT @ V, torch.eye(8, dtype=torch.complex128))


# -- S5 and LRU --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["zero_order_hold", "bilinear"])
def test_s5_is_the_dense_loop_over_both_members(rule):
    a = torch.complex(-torch.rand(4).double(), 3 * torch.randn(4).double())
    B, C = random_complex(4, 3), random_complex(5, 4, seed=1)
    s = 0.1 + torch.rand(4).double()
    x = fresh_input(3)
    r = s5_recurrence(s, a, B, C, rule=rule)
    twice = [torch.cat([t, t.conj()]) for t in (a, B)]
    both = s5_recurrence(torch.cat([s, s]), twice[0], twice[1], torch.cat([C, C.conj()], 1),
                         rule=rule, conjugate_pairs=False)  # fmt: skip
    z = a * s
    decay = torch.exp(z) if rule == "zero_order_hold" else (1 + z / 2) / (1 - z / 2)
    gain = (decay - 1) / a if rule == "zero_order_hold" else s / (1 - z / 2)
    h, outputs = torch.zeros(2, 4, dtype=torch.complex128), []
    for t in range(x.shape[1]):
        h = decay * h + (gain[:, None] * B @ x[:, t, :, None].to(B.dtype))[..., 0]
        outputs.append(2 * (h @ C.mT).real)
    y = dsf.scan(r, x[:, :, None, :, None])[:, :, 0, :, 0]
    near(y, torch.stack(outputs, 1))
    near(dsf.scan(both, x[:, :, None, :, None])[:, :, 0, :, 0], y)


def test_lru_is_the_elementwise_loop():
    nu, theta, gamma = (torch.randn(4).double() for _ in range(3))
    B, C, D = random_complex(4, 3), random_complex(3, 4, seed=1), torch.randn(3).double()
    x = fresh_input(3)
    r = lru_recurrence(nu, theta, gamma, B, C, D)
    decay = torch.exp(torch.complex(-nu.exp(), theta.exp()))
    h, outputs = torch.zeros(2, 4, dtype=torch.complex128), []
    for t in range(x.shape[1]):
        h = decay * h + gamma.exp() * (B @ x[:, t, :, None].to(B.dtype))[..., 0]
        outputs.append((h @ C.mT).real + D * x[:, t])
    near(dsf.scan(r, x[:, :, None, :, None])[:, :, 0, :, 0], torch.stack(outputs, 1))
    near(dsf.scan(dsf.realified(r), x[:, :, None, :, None])[:, :, 0, :, 0],
         torch.stack(outputs, 1), FACES_ATOL)  # fmt: skip


def test_lru_starts_on_its_ring_with_unit_variance():
    torch.manual_seed(0)
    layer = Lru(4, n_state=512, r_min=0.4, r_max=0.9, max_phase=0.3)
    modulus = torch.exp(-layer.nu_log.exp())
    assert 0.4 <= float(modulus.detach().min()) < 0.45
    assert 0.88 < float(modulus.detach().max()) <= 0.9
    assert float(layer.theta_log.detach().exp().max()) <= 0.3 + 1e-6
    near(layer.gamma_log.exp(), torch.sqrt(1 - modulus**2), 1e-5)
    radii = torch.sort(modulus**2).values  # uniform in the ring's area
    near(radii, torch.linspace(0.16, 0.81, 512), 0.05)


@pytest.mark.parametrize("layer", [
    lambda: S5(8, n_state=16, n_block=2, rule="bilinear", activation="full_glu"),
    lambda: S5(8, n_state=8, activation="gelu"), lambda: Lru(8, n_state=5, r_min=0.9, r_max=0.999),
], ids=["s5_blocks", "s5_gelu", "lru_slow"])  # fmt: skip
def test_contract_with_options(layer):
    torch.manual_seed(0)
    check_all(shaken(layer()), fresh_input(8))


@torch.no_grad()
def test_layer_starts_at_legs():
    """The layer's pairs are the continuous HiPPO-LegS system, to float32: same kernel."""
    torch.manual_seed(0)
    layer = S4(2, n_state=8)
    system = layer.kernel()
    A, B = legs_matrix(8)
    s = layer.kernel.inv_dt.double().exp()[0, 0]
    eye = torch.eye(8, dtype=torch.float64)
    dense, start = torch.linalg.solve(eye - s / 2 * A, torch.cat([eye + s / 2 * A, s * B[:, None]],
                                                                 1)).split([8, 1], 1)  # fmt: skip
    # the pairs' basis: eigenvectors of the normal part, conjugated as the release stores them
    V = legs_pairs(8).basis.conj()
    V = torch.cat([V, V.conj()], 1)
    near(V @ system.dense_transition()[0, 0, 0].to(V.dtype) @ V.conj().mT, dense.to(V.dtype), 1e-5)
    near(V @ system.B[0, 0, 0].to(V.dtype), start.to(V.dtype), 1e-5)


def test_refusals():
    s, A = torch.ones(3), torch.ones(3, 4)
    with pytest.raises(DsfShapeError, match="channel=3"):
        s4_recurrence(s, A, A[None, :, :2], A, A)
    with pytest.raises(DsfValueError, match="even number"):
        S4(8, n_state=7)
    with pytest.raises(DsfValueError, match="activation: expected one of"):
        S5(8, activation="relu")
    with pytest.raises(DsfValueError, match="2 n_block"):
        S5(8, n_state=6, n_block=2)
    v = torch.ones(4)
    with pytest.raises(DsfShapeError, match="state=4"):
        lru_recurrence(v, v, v, torch.ones(3, 2), torch.ones(2, 4))
    with pytest.raises(DsfShapeError, match="state=4"):
        s5_recurrence(v, v, torch.ones(3, 2), torch.ones(2, 4))
    x = fresh_input(8)
    layer = S4.small(8).double()
    r, _ = layer.recurrence(x)
    with pytest.raises(DsfValueError, match="time-invariant"):
        s4_kernel(r.replace(C=r.C.expand(1, 5, 8, 1, 8)), 4)
