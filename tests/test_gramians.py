"""Gramians: by hand, by the recursion, stationary with a checked residual, unstable refused."""

from __future__ import annotations

import pytest
import torch
from systems_with_states import STRUCTURES, of_structure, random, relative, selective, uniform

import dsf
from dsf.errors import DsfMemoryError, DsfValueError
from dsf.gramians import one_minus_products, reachability
from dsf.map_blocks import block_singular_values
from dsf.state_factors import seen_factors
from dsf.transitions import Dense, Diagonal, Identity, Scalar

LENGTH = 20
EXACT = 1e-11
HANKEL = 1e-8
SQUARE = 1e-14
UNIT = 2.0**-53


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gramians_are_sums_of_what_was_written_and_will_be_read(structure: str) -> None:
    r = of_structure(structure, 7)
    plain = dsf.realified(r) if structure == "complex" else r
    A = plain.dense_transition().expand(2, 7, 2, -1, -1)
    B, C = (x.expand(2, 7, 2, -1, -1) for x in plain.dense_input_output())
    reach, see = dsf.gramian(r), dsf.gramian(r, "observability")
    later = dsf.gramian(r, "observability", strict=True)
    for t in range(7):
        W = torch.zeros_like(reach[:, t])
        for j in range(t + 1):
            column = B[:, j]
            for i in range(j + 1, t + 1):
                column = A[:, i] @ column
            W = W + column @ column.mH
        assert relative(reach[:, t], W) <= EXACT
        V = torch.zeros_like(W)
        for i in range(t, 7):
            row = C[:, i]
            for j in range(i, t, -1):
                row = row @ A[:, j]
            V = V + row.mH @ row
        assert relative(see[:, t], V) <= EXACT
        own = C[:, t].mH @ C[:, t]
        assert float((later[:, t] + own - V).abs().max()) <= EXACT * float(V.abs().max())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_hankel_values_are_those_of_the_gramians(structure: str) -> None:
    """Item 9: sqrt(eig(W_t V_t)) = the singular values of map[t:, :t], 1e-8 of the largest.

    A product's eigenvalues are right to rounding of the largest one, so that a value of zero may
    read as the root of that: zeros are compared before the root is taken.
    """
    r = of_structure(structure)
    blocks = block_singular_values(dsf.materialise(r))
    W, V = dsf.gramian(r), dsf.gramian(r, "observability", strict=True)
    for t in range(1, LENGTH):
        squares = torch.linalg.eigvals(W[:, t - 1] @ V[:, t - 1]).real.sort(descending=True).values
        expected = blocks[:, :, t - 1, : squares.shape[-1]]
        top = float(blocks.max())
        assert float((squares - expected**2).abs().max()) <= SQUARE * top**2
        seen = expected > 1e-6 * top
        gap = (squares.clamp(min=0).sqrt() - expected).abs()[seen]
        assert float(gap.max()) <= HANKEL * top


def stable(n: int, radius: float, seed: int = 0, symmetric: bool = False) -> torch.Tensor:
    X = random(1, 1, 1, n, n, seed=seed)
    X = X + X.mT if symmetric else X
    return X * (radius / float(torch.linalg.eigvals(X).abs().max()))


@pytest.mark.parametrize("radius", [0.5, 0.99, 1 - 1e-6, 1 - 1e-10, 1 - 1e-12])
@pytest.mark.parametrize("n", [1, 2, 12, 40, pytest.param(256, marks=pytest.mark.slow)])
def test_stationary_gramians_keep_their_equation(n: int, radius: float) -> None:
    """Residual at most 100 N u (relative to |W| (1 + |A|^2)), and no negative eigenvalue."""
    for seed in range(3):
        equation_is_kept(n, radius, seed)


@pytest.mark.slow
def test_stationary_gramians_of_a_thousand_systems() -> None:
    """Up to 256 states, radii to 1 - 1e-12, symmetric or not."""
    sizes = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)
    radii = (0.3, 0.9, 0.999, 1 - 1e-6, 1 - 1e-9, 1 - 1e-12)
    for seed in range(1000):
        n = 256 if seed % 100 == 99 else sizes[seed % len(sizes)]
        equation_is_kept(n, radii[seed % len(radii)], seed)


def equation_is_kept(n: int, radius: float, seed: int) -> None:
    A = stable(n, radius, seed, symmetric=seed % 3 == 1)
    r = dsf.Recurrence(
        Dense(A), random(1, 1, 1, n, 2, seed=seed + 9), random(1, 1, 1, 1, n, seed=seed + 8)
    )
    for kind in ("reachability", "observability"):
        W = dsf.gramian(r, kind)[0, 0, 0]
        M, x = (A[0, 0, 0], r.B[0, 0, 0]) if kind == "reachability" else (
            A[0, 0, 0].mT, r.C[0, 0, 0].mT)  # fmt: skip
        gap = torch.linalg.matrix_norm(W - M @ W @ M.mT - x @ x.mT)
        size = torch.linalg.matrix_norm(W) * (1 + torch.linalg.matrix_norm(M, 2) ** 2)
        assert float(gap / size) <= 100 * n * UNIT, (n, radius, seed)
        eigenvalues = torch.linalg.eigvalsh(W)
        assert float(eigenvalues[0]) >= -1e-12 * float(eigenvalues[-1]), (n, radius, seed)


def test_an_eigenvalue_beside_minus_one() -> None:
    """Bilinear solvers give an indefinite matrix here without a warning."""
    Q = torch.linalg.qr(random(12, 12))[0]
    a = torch.cat([torch.tensor([-1 + 1e-10], dtype=torch.float64), 1.8 * uniform(11) - 0.9])
    r = dsf.Recurrence(Dense((Q @ torch.diag(a) @ Q.mT)[None, None, None]),
                       random(1, 1, 1, 12, 1), random(1, 1, 1, 1, 12))  # fmt: skip
    W = dsf.gramian(r)[0, 0, 0]
    b = Q.mT @ r.B[0, 0, 0]
    expected = (b @ b.mT) / (1 - a[:, None] * a)
    assert float(torch.linalg.eigvalsh(W)[0]) >= -1e-12 * float(W.diagonal().sum())
    # the digits of 1 - 1e-10 limit what any method may know: 1e-16 / 1e-10
    assert relative(Q.mT @ W @ Q, expected) <= 1e-5


@pytest.mark.parametrize("kind", ["reachability", "observability"])
def test_stationary_gramians_are_the_limit_of_finite_ones(kind: str) -> None:
    complex_b, complex_c = (random(1, 1, 2, 3, 1, seed=s, dtype=torch.complex128) for s in (2, 3))
    b, c = random(1, 1, 2, 3, 1, seed=2), random(1, 1, 2, 3, 1, seed=3)
    signs = torch.tensor([1.0, -1, 1], dtype=torch.float64).expand(1, 1, 2, 3)
    systems = {
        "diagonal": dsf.Recurrence(Diagonal(-uniform(1, 1, 2, 3) - 0.3, signs), b, c.mT),
        "scalar": dsf.Recurrence(Scalar(-uniform(1, 1, 2) - 0.3, n_state=3), b, c.mT),
        "complex": dsf.Recurrence(
            Diagonal(-uniform(1, 1, 2, 3) - 0.3, phase=3 * uniform(1, 1, 2, 3, seed=4)),
            complex_b, complex_c.mT),
        "pairs": dsf.Recurrence(
            Diagonal(-uniform(1, 1, 2, 3) - 0.3, phase=3 * uniform(1, 1, 2, 3, seed=4)),
            complex_b, complex_c.mT, real_output=True),
        "dense": dsf.Recurrence(Dense(stable(3, 0.8).expand(1, 1, 2, 3, 3)), b, c.mT),
    }  # fmt: skip
    for r in systems.values():
        for strict in (False, True):
            far = dsf.gramian(r, kind, horizon=120, strict=strict)
            found = dsf.gramian(r, kind, strict=strict)
            assert found.shape[1] == 1
            assert relative(found[:, 0], far[:, -1 if kind == "reachability" else 0]) <= 1e-12


def test_gaps_to_one_keep_their_digits() -> None:
    log = torch.tensor([-1e-18, -1e-9, -1.0, -torch.inf], dtype=torch.float64)
    zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    gap = one_minus_products(log, zero, one)
    assert float(gap[0, 0]) == pytest.approx(2e-18, rel=1e-12)
    assert float(gap[0, 1]) == pytest.approx(1e-9, rel=1e-8)
    assert float(gap[3, 3]) == 1
    turned = one_minus_products(log, torch.tensor([1e-9, 0, 0, 0]).double(), one)
    assert complex(turned[0, 1]) == pytest.approx(1e-9 - 1e-9j, rel=1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_reachability_gives_the_row_of_the_map(structure: str) -> None:
    r = of_structure(structure)
    weights = dsf.materialise(r)
    for t in (0, 7, LENGTH - 1):
        row = (r.C[:, t] @ reachability(r, t).to(r.C.dtype))[..., 0, :]
        row = row.real if r.real_output else row
        assert float((row - weights[:, :, t, : t + 1]).abs().max()) <= EXACT


def test_factors_stand_for_the_gramians() -> None:
    r = selective(9, 3)
    V = dsf.gramian(r, "observability")
    for t, seen in zip(range(8, -1, -1), seen_factors(r, 9, strict=False), strict=True):
        assert relative(seen.mH @ seen, V[:, t]) <= EXACT


def test_unstable_and_impossible_requests_are_refused() -> None:
    log = torch.full((1, 1, 3, 8), -0.5, dtype=torch.float64)
    log[0, 0, 2, 7] = 3e-4
    r = dsf.Recurrence(Diagonal(log), random(1, 1, 1, 8, 1), random(1, 1, 1, 1, 8))
    with pytest.raises(
        DsfValueError,
        match=r"dsf.gramian: A: expected spectral radius below 1, got 1.0003\d* "
        r"\(head 2, state 7\). Use a finite horizon instead.",
    ):
        dsf.gramian(r)
    assert bool(dsf.gramian(r, horizon=5).isfinite().all())
    for A in (Identity(8), Dense(stable(8, 1.5)), Scalar(torch.zeros(1, 1, 1), n_state=8)):
        for call in (dsf.gramian, dsf.stationary_hankel_values):
            with pytest.raises(DsfValueError, match="expected spectral radius below 1"):
                call(r.replace(A=A))
    with pytest.raises((DsfValueError, TypeError), match=r"kind: expected|Type-check error"):
        dsf.gramian(r, "visibility")  # type: ignore[arg-type]
    with pytest.raises(DsfValueError, match="horizon: expected None for a system of 9 steps"):
        dsf.gramian(selective(9, 2), horizon=4)
    with pytest.raises(DsfMemoryError, match=r"Gramians: \(batch=1, time=9, head=1, state=2"):
        dsf.gramian(selective(9, 2), max_memory=100)
