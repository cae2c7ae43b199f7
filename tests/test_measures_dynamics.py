"""Lyapunov spectra, eigenvalues, products, impulses and stability against closed forms."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
import xarray as xr
from decays import FAMILIES

import dsf
from dsf import measures
from dsf.errors import DsfMemoryError, DsfShapeError, DsfTypeError, DsfValueError
from dsf.transitions import (
    BlockDiagonal,
    Dense,
    Diagonal,
    DiagonalLowRank,
    Householder,
    Identity,
    Scalar,
    Shift,
)

EXACT = 1e-12
GAUGE = 1e-8
"""Spectra of products of matrices with random changes of basis of condition up to about 100."""

OF_STATES = (
    measures.lyapunov_spectrum, measures.stability, measures.state_product_norm,
    measures.transition_eigenvalues, measures.monodromy_eigenvalues,
)  # fmt: skip


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def system(A: dsf.transitions.Transition, length: int | None = None) -> dsf.Recurrence:
    n = A.n_state
    ones = torch.ones(1, length or A.lead_shape()[1], 1, n, 1, dtype=torch.float64)
    return dsf.Recurrence(A, ones, ones.mT, system="test")


def with_decay(decay: torch.Tensor) -> dsf.Recurrence:
    return system(Diagonal.from_decay(decay))


def family(name: str, length: int) -> Diagonal:
    log_decay, sign, phase = FAMILIES[name](torch.Generator().manual_seed(0), (1, length, 2, 3))
    return Diagonal(log_decay, sign, phase)


def exact_exponents(A: torch.Tensor, digits: int) -> list[float]:
    """ln of the singular values of A_L ... A_2 over L - 1, by many digits."""
    with mpmath.workdps(digits):
        P = mpmath.eye(A.shape[-1])
        for M in A[1:]:
            P = mpmath.matrix(M.tolist()) * P
        sigma = mpmath.svd_r(P, compute_uv=False)
        return sorted((float(mpmath.log(s) / (len(A) - 1)) for s in sigma), reverse=True)


# -- Lyapunov ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "n"), [(2, 3), (3, 4), (31, 5), (150, 4)])
def test_exponents_are_those_of_the_product(length: int, n: int) -> None:
    A = random(1, length, 1, n, n) / n**0.5
    found = measures.lyapunov_spectrum(system(Dense(A)))
    expected = exact_exponents(A[0, :, 0], digits=60 + 6 * length)
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-11)
    assert found.attrs["at_rounding"] == 0
    assert found.attrs["change"] < 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_exponents_of_decays_are_sums_of_logs(name: str) -> None:
    r = system(family(name, 40))
    found = measures.lyapunov_spectrum(r).values
    logs = r.A.log_decay.numpy()  # type: ignore[attr-defined]
    expected = -np.sort(-logs[:, 1:].mean(1), axis=-1)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-10)
    if not np.isinf(found).any():
        dense = r.replace(A=Dense(r.A.as_dense()))
        np.testing.assert_allclose(
            measures.lyapunov_spectrum(dense).values, found, rtol=1e-9, atol=1e-12)  # fmt: skip


def test_exact_zeros_are_minus_infinity() -> None:
    a = torch.full((1, 9, 1, 3), 0.5, dtype=torch.float64)
    a[:, 4, :, 1] = 0
    for r in (with_decay(a), system(Dense(torch.diag_embed(a)))):
        found = measures.lyapunov_spectrum(r)[0, 0].values
        np.testing.assert_allclose(found, [math.log(0.5)] * 2 + [-math.inf], atol=EXACT)
    nilpotent = torch.zeros(1, 3, 1, 2, 2, dtype=torch.float64)
    nilpotent[..., 0, 1] = 1
    once = measures.lyapunov_spectrum(system(Dense(nilpotent[:, :2])))
    assert once[0, 0].values.tolist() == [0, -math.inf]
    assert np.isneginf(measures.lyapunov_spectrum(system(Dense(nilpotent)))).all()
    assert np.isneginf(measures.lyapunov_spectrum(system(Shift(4), 9))).all()
    assert (measures.lyapunov_spectrum(system(Identity(4), 9)) == 0).all()


def test_reflections_and_projections() -> None:
    k = torch.nn.functional.normalize(random(1, 60, 1, 4), dim=-1)
    turned = measures.lyapunov_spectrum(system(Householder(2 * torch.ones(1, 60, 1).double(), k)))
    np.testing.assert_allclose(turned, np.zeros((1, 1, 4)), atol=EXACT)
    erased = measures.lyapunov_spectrum(system(Householder(torch.ones(1, 60, 1).double(), k)))
    lost = float(erased[0, 0, -1])
    assert np.isneginf(lost) or (lost < -15 and erased.attrs["at_rounding"] == 1)


def test_exponents_of_a_time_invariant_system_are_its_eigenvalues() -> None:
    T = random(4, 4, seed=1)
    a = torch.tensor([0.9, -0.7, 0.2, 0.05], dtype=torch.float64)
    A = (T * a) @ torch.linalg.inv(T)
    found = measures.lyapunov_spectrum(system(Dense(A[None, None, None]), 7))
    np.testing.assert_allclose(found[0, 0], np.log(a.abs().numpy()), atol=1e-11)


def test_a_bounded_change_of_basis_moves_exponents_by_its_condition_at_most() -> None:
    r = system(Dense(random(1, 400, 1, 3, 3) / 2))
    basis = torch.linalg.qr(random(1, 401, 1, 3, 3, seed=1)).Q * torch.tensor([1.0, 2.0, 5.0])
    before, after = (measures.lyapunov_spectrum(x).values for x in (
        r, dsf.change_of_basis(r, basis.double())))  # fmt: skip
    assert 0 < np.abs(before - after).max() <= 2 * math.log(5) / 399 + EXACT


def test_large_requests_are_refused_before_work() -> None:
    A = Dense(torch.zeros(1, 1, 1, 1, 1).expand(64, 2_000_000, 64, 8, 8))
    r = dsf.Recurrence(A, torch.ones(1, 1, 1, 8, 1), torch.ones(1, 1, 1, 1, 8))
    for measure in (measures.lyapunov_spectrum, measures.state_product_norm,
                    measures.transition_eigenvalues):  # fmt: skip
        with pytest.raises(DsfMemoryError, match="GiB"):
            measure(r)


# -- eigenvalues -------------------------------------------------------------------------------


def test_eigenvalues_of_decays_are_the_decays() -> None:
    a = torch.tensor([0.5, -0.25, 0.0, 1.0], dtype=torch.float64).expand(1, 5, 2, 4)
    found = measures.transition_eigenvalues(with_decay(a))
    assert found.log_modulus.sizes == {"batch": 1, "time": 5, "head": 2, "state": 4}
    np.testing.assert_allclose(
        found.log_modulus[0, 0, 0], [math.log(0.5), math.log(0.25), -math.inf, 0], atol=EXACT
    )
    np.testing.assert_allclose(found.phase[0, 3, 1], [0, math.pi, 0, 0])
    assert found.log_modulus.attrs["gauge"] == "as given"
    assert "time-varying" in found.log_modulus.attrs["invariance"]
    turning = system(Diagonal(torch.zeros(1, 1, 1, 2), phase=torch.tensor([[[[4.0, -1.0]]]])), 6)
    found = measures.transition_eigenvalues(turning)
    np.testing.assert_allclose(found.phase[0, 0, 0], [4 - 2 * math.pi, -1], atol=1e-6)
    assert "time-invariant" in found.phase.attrs["invariance"]


@pytest.mark.parametrize("family", [0, 1])
def test_eigenvalues_of_decays_agree_with_dense_ones(family: int) -> None:
    a = random(1, 6, 2, 3, seed=family)
    numbers = torch.polar(a.abs(), random(1, 6, 2, 3, seed=5)) if family else a
    r = system(Diagonal.from_decay(numbers))
    dense = r.replace(A=Dense(r.A.as_dense()))
    for measure in (measures.transition_eigenvalues, measures.monodromy_eigenvalues):
        values = [
            np.exp(d.log_modulus + 1j * d.phase).values for d in (measure(r), measure(dense))
        ]
        values = [np.sort_complex(v.round(12)) for v in values]
        np.testing.assert_allclose(*values, atol=1e-10)


def test_a_constant_basis_leaves_eigenvalues_alone() -> None:
    r = system(Dense(random(1, 1, 2, 4, 4)), 8)
    moved = measures.eigenvalue_shift(r, random(1, 1, 2, 4, 4, seed=1))
    assert float(moved.transition.max()) < GAUGE
    assert moved.transition.attrs["gauge_dependent"] == 0


def test_a_moving_basis_changes_eigenvalues_of_steps_but_not_of_the_period() -> None:
    r = system(Dense(random(1, 9, 1, 3, 3) / 2))
    basis = random(1, 10, 1, 3, 3, seed=1) + 2 * torch.eye(3).double()
    basis[:, -1] = basis[:, 1]
    changed = dsf.change_of_basis(r, basis)
    np.testing.assert_allclose(dsf.materialise(changed), dsf.materialise(r), atol=GAUGE)
    moved = measures.eigenvalue_shift(r, basis)
    assert float(moved.transition[0, 1:].min()) > 1e-3
    assert moved.transition.attrs["gauge_dependent"] == 1
    assert float(moved.product.max()) < GAUGE
    basis[:, -1] *= 2  # it no longer ends where it began
    assert float(measures.eigenvalue_shift(r, basis).product.max()) > 0.5


def test_decays_moved_into_keys_have_eigenvalue_one() -> None:
    r = with_decay(torch.full((1, 6, 1, 1), 0.5, dtype=torch.float64))
    basis = 2.0 ** torch.arange(7, dtype=torch.float64)[None, :, None, None, None]
    moved = dsf.change_of_basis(r, basis)
    np.testing.assert_allclose(measures.transition_eigenvalues(moved).log_modulus, 0, atol=EXACT)
    np.testing.assert_array_equal(dsf.materialise(moved), dsf.materialise(r))


def test_products_neither_underflow_nor_report_rounding() -> None:
    a = torch.full((1, 801, 1, 2), 1e-3, dtype=torch.float64)
    for r in (with_decay(a), system(Dense(torch.diag_embed(a)))):
        found = measures.monodromy_eigenvalues(r)
        np.testing.assert_allclose(found.log_modulus, 800 * math.log(1e-3), rtol=EXACT)
    wide = system(Dense(random(1, 200, 1, 4, 4)))
    found = measures.monodromy_eigenvalues(wide).log_modulus
    trusted = found.attrs["n_trusted"]
    assert 1 <= trusted < 4
    assert np.isnan(found[0, 0]).sum() == 4 - trusted
    P = np.eye(4)
    for M in wide.dense_transition()[0, 1:, 0].numpy():
        P = M @ P
    largest = math.log(np.abs(np.linalg.eigvals(P)).max())
    assert float(found[0, 0, 0]) == pytest.approx(largest, abs=1e-8)
    gone = system(Dense(torch.zeros(1, 3, 1, 2, 2).double()))
    assert np.isneginf(measures.monodromy_eigenvalues(gone).log_modulus).all()


# -- products, impulses, gradients -------------------------------------------------------------


def test_product_norms_are_those_of_the_windows() -> None:
    A = random(1, 12, 1, 3, 3) / 2
    found = measures.state_product_norm(system(Dense(A)))
    assert found.step.values.tolist() == [1, 2, 4, 8]
    for i, lag in enumerate(found.step.values):
        windows = [torch.linalg.multi_dot([*A[0, t : t + lag, 0].flip(0), torch.eye(3).double()])
                   for t in range(1, 13 - lag)]  # fmt: skip
        logs = torch.log(torch.linalg.matrix_norm(torch.stack(windows), ord=2))
        assert float(found.mean_log[0, 0, i]) == pytest.approx(float(logs.mean()), abs=EXACT)
        assert float(found.largest_log[0, 0, i]) == pytest.approx(float(logs.max()), abs=EXACT)


@pytest.mark.parametrize("name", FAMILIES)
def test_product_norms_from_logs_agree_with_matrices(name: str) -> None:
    r = system(family(name, 33))
    dense = r.replace(A=Dense(r.A.as_dense()))
    for one, two in zip(*(measures.state_product_norm(x).values() for x in (r, dense)),
                        strict=True):  # fmt: skip
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-10)


def test_product_norms_of_short_and_constant_systems() -> None:
    for length in (1, 2, 3):
        r = with_decay(torch.full((1, length, 1, 2), 0.5, dtype=torch.float64))
        found = measures.state_product_norm(r)
        assert found.mean_log[0, 0].values.tolist()[0] == pytest.approx(math.log(0.5))
    constant = system(
        Scalar(torch.full((1, 1, 1), math.log(0.5), dtype=torch.float64), n_state=3), 100
    )
    found = measures.state_product_norm(constant)
    np.testing.assert_allclose(found.largest_log[0, 0], found.step * math.log(0.5), rtol=EXACT)


def test_impulse_responses_are_columns_of_the_map() -> None:
    A, B, C = Diagonal(-random(2, 8, 3, 4).abs()), random(2, 8, 3, 4, 1), random(2, 8, 3, 1, 4)
    r = dsf.Recurrence(A, B, C)
    whole = dsf.materialise(r).numpy()
    for start in (0, 5):
        np.testing.assert_allclose(
            measures.impulse_response(r, start), whole[..., start], atol=EXACT
        )
    unit = torch.zeros(2, 8, 3, 1, dtype=torch.float64)
    unit[:, 2] = 1
    np.testing.assert_allclose(
        measures.impulse_response(r, 2), dsf.scan(r, unit)[..., 0].movedim(1, 2), atol=EXACT
    )
    back = measures.impulse_response(dsf.anticausal(r))
    assert back.attrs["start"] == 7
    decaying = with_decay(torch.full((1, 6, 1, 1), 0.5, dtype=torch.float64))
    np.testing.assert_allclose(
        measures.impulse_response(decaying)[0, 0], 0.5 ** np.arange(6), atol=EXACT
    )
    with pytest.raises(DsfShapeError, match="below 8"):
        measures.impulse_response(r, 8)


def test_gradients_by_distance() -> None:
    A, B, C = Diagonal(-random(1, 9, 2, 3).abs()), random(1, 9, 2, 3, 1), random(1, 9, 2, 1, 3)
    r = dsf.Recurrence(A, B, C)
    whole = dsf.materialise(r)
    lines = [whole.diagonal(-lag, dim1=-2, dim2=-1).abs() for lag in range(9)]
    expected = torch.stack([x.square().mean(-1).sqrt() for x in lines], -1)
    np.testing.assert_allclose(measures.gradient_decay(r), expected, atol=EXACT)
    largest = torch.stack([x.amax(-1) for x in lines], -1)
    np.testing.assert_allclose(measures.gradient_decay(r, "largest", block=4), largest, atol=EXACT)
    u = random(1, 9, 2, 1, seed=3).requires_grad_()
    (gradient,) = torch.autograd.grad(dsf.scan(r, u)[0, 8, 1, 0], u)
    np.testing.assert_allclose(gradient[0, :, 1, 0].abs().flip(0),
                               torch.stack([x[0, 1, -1] for x in lines]), atol=EXACT)  # fmt: skip
    with pytest.raises((DsfValueError, Exception), match="statistic"):
        measures.gradient_decay(r, "median")  # type: ignore[arg-type]


def test_gradient_decay_does_not_depend_on_the_basis() -> None:
    r = system(Dense(random(1, 9, 1, 3, 3) / 2))
    changed = dsf.change_of_basis(r, random(1, 10, 1, 3, 3, seed=1) + 2 * torch.eye(3).double())
    np.testing.assert_allclose(
        measures.gradient_decay(changed), measures.gradient_decay(r), atol=GAUGE
    )
    one, two = (measures.state_product_norm(x).mean_log.values for x in (r, changed))
    assert np.abs(one - two).max() > 0.1


# -- stability ---------------------------------------------------------------------------------


def test_stability_of_known_systems() -> None:
    """2,000 time-invariant systems, dense and diagonal, margins 1e-2 to 1e-14: none wrong."""
    generator = torch.Generator().manual_seed(0)
    wrong = undecided = 0
    exponents = [(-e, s) for e in range(2, 15) for s in (1, -1)]
    batch = 2000 // (2 * len(exponents)) + 1
    for exponent, sign in exponents:
        n = 5
        largest = 1 - sign * 10.0**exponent
        a = torch.rand(batch, n, dtype=torch.float64, generator=generator) * 0.9
        a[:, 0] = largest
        a = a * torch.where(torch.rand(batch, n, generator=generator) < 0.5, -1.0, 1.0)
        T = torch.randn(batch, n, n, dtype=torch.float64, generator=generator)
        M = (T * a[:, None]) @ torch.linalg.inv(T)
        for A in (Dense(M[:, None, None]), Diagonal.from_decay(a[:, None, None])):
            verdict = measures.stability(system(A, 3)).verdict.values
            wrong += int((verdict == -sign).sum())
            undecided += int((verdict == 0).sum())
            if isinstance(A, Diagonal) or exponent >= -6:
                assert (verdict == sign).mean() > 0.97
            if isinstance(A, Diagonal):
                assert (verdict == sign).all()
    assert wrong == 0
    assert undecided > 0


def test_a_kept_state_does_not_die_out() -> None:
    assert (measures.stability(system(Identity(3), 5)).verdict == -1).all()
    mixed = torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert (measures.stability(with_decay(mixed.expand(1, 1, 1, 2))).verdict == -1).all()
    assert (measures.stability(with_decay(mixed.expand(1, 9, 1, 2))).verdict == -1).all()
    assert (measures.stability(system(Shift(3), 5)).verdict == 1).all()


def test_defective_systems_are_not_called_unstable() -> None:
    jordan = 0.5 * torch.eye(4) + torch.diag(torch.ones(3), 1)
    found = measures.stability(system(Dense(jordan.double()[None, None, None]), 4))
    assert found.verdict.item() == 1
    assert found.step_margin.item() < 0
    edge = torch.eye(4) + torch.diag(torch.ones(3), 1)
    found = measures.stability(system(Dense(edge.double()[None, None, None]), 4))
    assert found.verdict.item() < 1


def test_time_varying_verdicts() -> None:
    shrink, grow = 0.5 * torch.eye(2), torch.tensor([[0.0, 2.0], [0.1, 0.0]])
    steps = {
        1: [shrink] * 6, -1: [2 * torch.eye(2)] * 6,
        0: [shrink, grow, shrink, shrink, shrink, shrink],
    }  # fmt: skip
    for verdict, matrices in steps.items():
        A = torch.stack(matrices).double()[None, :, None]
        found = measures.stability(system(Dense(A)))
        assert found.verdict.item() == verdict
        assert "none" in found.verdict.attrs["invariance"]
    a = torch.full((1, 6, 1, 2), 0.5, dtype=torch.float64)
    a[:, 3, :, 0] = 1.5
    found = measures.stability(with_decay(a))
    assert found.verdict.item() == 0
    assert found.step_margin.item() == pytest.approx(-0.5)
    assert found.margin.item() == pytest.approx(1 - (1.5 * 0.5**4) ** 0.2)


def test_time_varying_verdicts_are_undecided_within_rounding() -> None:
    """Steps that turn into each other and back: the product is the identity, up to rounding."""
    Q = torch.linalg.qr(random(4, 4)).Q
    grow = Q @ torch.diag(torch.tensor([1e3, 1.0, 1.0, 1e-3]).double()) @ random(4, 4, seed=1)
    A = torch.stack([Q, grow, torch.linalg.inv(grow)] * 3)[None, :, None]
    found = measures.stability(system(Dense(A)))
    assert found.verdict.item() == 0
    assert found.tolerance.item() > abs(found.margin.item())
    logs = 0.1 * random(1, 50, 1, 1)
    logs[:, -1] -= logs[:, 1:].sum(1)
    assert abs(float(logs[:, 1:].sum())) < 1e-14
    assert measures.stability(system(Diagonal(logs))).verdict.item() == 0


def test_a_margin_near_zero_keeps_its_digits() -> None:
    r = system(Diagonal(torch.full((1, 1, 1, 1), -1e-18).double()), 4)
    found = measures.stability(r)
    assert found.margin.item() == pytest.approx(1e-18)
    assert found.verdict.item() == 1


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("structure", ["dense", "low rank", "blocks", "complex", "strided"])
def test_every_structure_has_an_answer(structure: str, length: int) -> None:
    """And the same one as its dense form."""
    low = random(1, length, 1, 4, 1, seed=2), random(1, length, 1, 4, 1, seed=3)
    A = {
        "dense": Dense(random(1, length, 1, 4, 4)),
        "low rank": DiagonalLowRank(-random(1, length, 1, 4).abs(), left=low[0], right=low[1]),
        "blocks": BlockDiagonal(random(1, length, 1, 2, 2, 2), n_block=2),
        "complex": Dense(torch.complex(random(1, length, 1, 4, 4), random(1, length, 1, 4, 4))),
        "strided": Dense(random(1, 2 * length, 1, 8, 8)[:, ::2, :, ::2, ::2].mT),
    }[structure]
    r = system(A)
    dense = r.replace(A=Dense(A.as_dense().contiguous()))
    for measure in OF_STATES:
        both = [x if isinstance(x, xr.DataArray) else x.to_dataarray()
                for x in (measure(r), measure(dense))]  # fmt: skip
        np.testing.assert_allclose(both[0], both[1], atol=1e-10)
        assert not np.isnan(both[0]).any()


def test_empty_systems_are_refused_by_name() -> None:
    for A in (Diagonal(torch.zeros(1, 0, 1, 3)), Dense(torch.zeros(1, 0, 1, 3, 3))):
        for measure in (*OF_STATES, measures.gradient_decay, measures.impulse_response):
            with pytest.raises(DsfShapeError, match=measure.__name__):
                measure(system(A))


def test_sides_and_bare_maps() -> None:
    slow, fast = (with_decay(torch.full((1, 6, 1, 1), a, dtype=torch.float64)) for a in (0.9, 0.2))
    both = dsf.Bidirectional(slow, dsf.anticausal(fast, strict=True))
    for side, a in (("lower", 0.9), ("upper", 0.2)):
        found = measures.lyapunov_spectrum(both, side=side)
        assert float(found[0, 0, 0]) == pytest.approx(math.log(a))
        assert found.attrs["side"] == side
    for measure in OF_STATES:
        with pytest.raises((DsfTypeError, TypeError)):
            measure(torch.eye(3))
    with pytest.raises(DsfValueError, match=r"dsf\.stability: side"):
        measures.stability(slow, side="upper")
