"""Hankel singular values: blocks of the map, 30 decades against mpmath, noise told from values."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from systems_with_states import STRUCTURES, of_structure, random, selective, uniform

import dsf
from dsf.errors import DsfMemoryError, DsfValueError
from dsf.hankel import stationary_hankel_values, trusted_states, values_and_noise
from dsf.map_blocks import block_singular_values
from dsf.transitions import Dense, Diagonal, Scalar

EXACT = 1e-11
RELATIVE = 1e-12
DIGITS = 200


@pytest.mark.parametrize("structure", STRUCTURES)
def test_values_from_states_are_those_of_the_blocks(structure: str) -> None:
    r = of_structure(structure)
    fast, slow = dsf.hankel_singular_values(r), block_singular_values(dsf.materialise(r))
    n = fast.shape[-1]
    assert float((fast - slow[..., :n]).abs().max()) <= EXACT * float(slow.max())
    assert float(slow[..., n:].abs().max()) <= EXACT * float(slow.max())
    weights = dsf.materialise(r)
    own = dsf.hankel_singular_values(r, strict=False)
    for t in range(20):
        sigma = torch.linalg.svdvals(weights[..., t:, : t + 1])[..., :n]
        gap = own[:, :, t, : sigma.shape[-1]] - sigma
        assert float(gap.abs().max()) <= EXACT * float(slow.max())


def test_chosen_cuts_are_a_selection() -> None:
    r = of_structure("diagonal")
    every, some = dsf.hankel_singular_values(r), dsf.hankel_singular_values(r, [15, 2, 7])
    assert torch.allclose(some, every[:, :, [14, 1, 6]], rtol=1e-12)
    assert dsf.hankel_singular_values(r, []).shape == (2, 2, 0, 3)
    with pytest.raises(DsfValueError, match=r"cuts: expected within 1\.\.19"):
        dsf.hankel_singular_values(r, [20])


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DsfMemoryError, match=r"factors: \(cut=19, batch=2, head=2, state=3"):
        dsf.hankel_singular_values(of_structure("dense"), max_memory=100)


# -- full relative accuracy --------------------------------------------------------------------


def exact_values(a: list, b: list, c: list) -> list:
    """sqrt(eig(W V)) in 200 digits."""
    n = len(a)
    W, V = mpmath.matrix(n, n), mpmath.matrix(n, n)
    for i in range(n):
        for j in range(n):
            W[i, j] = b[i] * mpmath.conj(b[j]) / (1 - a[i] * mpmath.conj(a[j]))
            V[i, j] = mpmath.conj(c[i]) * c[j] / (1 - mpmath.conj(a[i]) * a[j])
    L = mpmath.cholesky(W)
    M = L.H * V * L
    real = not any(isinstance(x, mpmath.mpc) for x in a)
    values = (mpmath.eigsy if real else mpmath.eighe)((M + M.H) / 2, eigvals_only=True)
    return sorted((mpmath.sqrt(x) for x in values), reverse=True)


def worst(found: torch.Tensor, a: list, b: list, c: list) -> float:
    exact = exact_values(a, b, c)
    return float(max(abs(mpmath.mpf(float(x)) / y - 1)
                     for x, y in zip(found, exact, strict=True)))  # fmt: skip


DECAYS: dict[str, Callable[[int], torch.Tensor]] = {
    "evenly spaced": lambda n: -torch.linspace(0.01, 2, n, dtype=torch.float64),
    "uniform": lambda n: torch.log(uniform(n)),
    "time scales 1 to 1e6": lambda n: -torch.logspace(-6, 1, n, dtype=torch.float64),
    "clustered": lambda n: -0.1 - 1e-7 * uniform(n),
}


@pytest.mark.parametrize("n", [2, 9, 24])
@pytest.mark.parametrize("name", DECAYS)
def test_diagonal_systems_have_full_relative_accuracy(name: str, n: int) -> None:
    """The issue's figure: 1e-12 relative against mpmath, over 30 decades for N <= 24."""
    log, b, c = DECAYS[name](n), random(n), random(n, seed=1)
    if name == "clustered":
        log, b, c = log[:6], b[:6], c[:6]  # 72 decades already
    r = dsf.Recurrence(Diagonal(log[None, None, None]), b[None, None, None, :, None],
                       c[None, None, None, None])  # fmt: skip
    sigma, trusted = dsf.stationary_hankel_values(r)
    with mpmath.workdps(DIGITS):
        a = [mpmath.exp(mpmath.mpf(float(x))) for x in log]
        write, read = ([mpmath.mpf(float(x)) for x in v] for v in (b, c))
        assert worst(sigma[0, 0], a, write, read) <= RELATIVE
    assert int(trusted) == len(log)
    if n == 24 and name in ("evenly spaced", "uniform"):
        assert float(sigma[0, 0, 0] / sigma[0, 0, -1]) >= 1e30


@pytest.mark.parametrize("systems", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_diagonal_systems_against_mpmath(systems: int) -> None:
    """1 to 24 states, four families of decays, signs in every other: 1e-12 for each value."""
    families = list(DECAYS.values())
    decades = 0.0
    for seed in range(systems):
        n = 1 + (7 * seed) % 24
        log = families[seed % 4](n) if seed % 4 != 1 else torch.log(uniform(n, seed=seed))
        log = log[:6] if seed % 4 == 3 else log  # clustered: 72 decades already
        n = len(log)
        sign = torch.ones(n, dtype=torch.float64)
        if seed % 8 > 3:
            sign = torch.where(uniform(n, seed=seed + 5) > 0.5, 1.0, -1.0).double()
        b, c = random(n, seed=seed + 1), random(n, seed=seed + 2)
        A = Diagonal(log[None, None, None], sign[None, None, None])
        r = dsf.Recurrence(A, b[None, None, None, :, None], c[None, None, None, None])
        sigma, trusted = dsf.stationary_hankel_values(r)
        with mpmath.workdps(DIGITS):
            a = [int(s) * mpmath.exp(mpmath.mpf(float(x))) for s, x in zip(sign, log, strict=True)]
            write, read = ([mpmath.mpf(float(x)) for x in v] for v in (b, c))
            error = worst(sigma[0, 0], a, write, read)
        assert error <= RELATIVE, (seed, n, error)
        assert int(trusted) == n
        decades = max(decades, float(torch.log10(sigma[0, 0, 0] / sigma[0, 0, -1])))
    assert decades >= 30


@pytest.mark.parametrize("real_output", [False, True])
def test_complex_and_negative_decays_too(real_output: bool) -> None:
    n = 10
    log, phase = torch.log(uniform(n)), 3 * uniform(n, seed=1)
    sign = torch.where(uniform(n, seed=2) > 0.5, 1.0, -1.0).double()
    b, c = (random(n, seed=s, dtype=torch.complex128) for s in (3, 4))
    A = Diagonal(*(x[None, None, None] for x in (log, sign, phase)))
    r = dsf.Recurrence(A, b[None, None, None, :, None], c[None, None, None, None],
                       real_output=real_output)  # fmt: skip
    sigma, _ = stationary_hankel_values(r)
    with mpmath.workdps(DIGITS):
        a = [int(s) * mpmath.exp(mpmath.mpc(float(x), float(p)))
             for s, x, p in zip(sign, log, phase, strict=True)]  # fmt: skip
        write, read = ([mpmath.mpc(complex(x)) for x in v] for v in (b, c))
        if real_output:  # y = Re(C h) is the pair of conjugate systems, halved
            a = a + [mpmath.conj(x) for x in a]
            write = write + [mpmath.conj(x) for x in write]
            read = [x / 2 for x in read]
            read = read + [mpmath.conj(x) for x in read]
        assert worst(sigma[0, 0], a, write, read) <= RELATIVE


def test_equal_poles_merge_and_zeros_are_values() -> None:
    """Two equal decays are one state; a = 0 is a state that lasts one step."""
    log = torch.tensor([-0.5, -0.5, -1.0, -torch.inf, -torch.inf], dtype=torch.float64)
    b, c = random(5), random(5, seed=1)
    r = dsf.Recurrence(Diagonal(log[None, None, None]), b[None, None, None, :, None],
                       c[None, None, None, None])  # fmt: skip
    sigma, _ = stationary_hankel_values(r)
    assert sigma[0, 0, 3:].tolist() == [0, 0]
    length = 120
    far = r.replace(B=r.B.expand(-1, length, -1, -1, -1))
    expected = dsf.hankel_singular_values(far, [length // 2], strict=False)[0, 0, 0]
    assert float((sigma[0, 0] - expected).abs().max()) <= 1e-12 * float(expected[0])


def test_dense_scalar_and_several_inputs() -> None:
    """Doubling: the values of a long finite horizon; scalars are one state."""
    n, length = 4, 400
    decay = 0.9 * uniform(1, 1, 2, n)
    Q = torch.linalg.qr(random(n, n))[0]
    b, c = random(1, 1, 2, n, 2), random(1, 1, 2, 3, n, seed=1)
    dense = dsf.Recurrence(Dense(Q @ torch.diag_embed(decay) @ Q.mT), Q @ b, c @ Q.mT)
    several = dsf.Recurrence(Diagonal(decay.log()), b, c)
    for r in (dense, several):
        sigma, trusted = stationary_hankel_values(r)
        far = r.replace(B=r.B.expand(-1, length, -1, -1, -1))
        expected = dsf.hankel_singular_values(far, [length // 2], strict=False)[:, :, 0]
        assert float((sigma - expected).abs().max()) <= 1e-12 * float(expected.max())
        assert trusted.tolist() == [[n, n]]
    r = dsf.Recurrence(Scalar(-uniform(1, 1, 1), n_state=3), random(1, 1, 1, 3, 1),
                       random(1, 1, 1, 1, 3))  # fmt: skip
    sigma, _ = stationary_hankel_values(r)
    gain = float((r.C @ r.B).abs()) / (1 - float(torch.exp(2 * r.A.log_decay)))
    assert float(sigma[0, 0, 0]) == pytest.approx(gain, rel=1e-13)
    assert float(sigma[0, 0, 1:].max()) <= 1e-15
    with pytest.raises(DsfValueError, match="recurrence: expected time of size 1, got time=9"):
        stationary_hankel_values(selective(9, 2))


# -- what is noise -----------------------------------------------------------------------------


@pytest.mark.parametrize("systems", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_trusted_values_are_right_and_the_others_are_small(systems: int) -> None:
    """Systems with known values from 1 to 1e-30, hidden by a random change of basis."""
    count = 0
    for seed in range(systems):
        n = 4 + seed % 14
        log = torch.log(uniform(n, seed=seed))
        b, c = random(n, seed=seed + 1), random(n, seed=seed + 2)
        diagonal = dsf.Recurrence(Diagonal(log[None, None, None]), b[None, None, None, :, None],
                                  c[None, None, None, None])  # fmt: skip
        exact, _ = stationary_hankel_values(diagonal)
        Q = torch.linalg.qr(random(n, n, seed=seed + 3))[0]
        hidden = diagonal.replace(A=Dense((Q * log.exp()) @ Q.mT[None, None, None]),
                                  B=Q @ diagonal.B, C=diagonal.C @ Q.mT)  # fmt: skip
        sigma, trusted = stationary_hankel_values(hidden)
        k = int(trusted)
        gap = (sigma / exact - 1).abs()[0, 0, :k]
        assert float(gap.max()) <= 0.2
        assert k == n or float(exact[0, 0, k]) <= 1e-11 * float(exact[0, 0, 0])
        count += n - k
    assert count > 40, "the test must meet noise"


def test_trusted_states_of_time_varying_systems() -> None:
    """Two of four states are never written, one is written with weight 1e-30."""
    r = selective(30, 4)
    B = r.B * torch.tensor([1, 1e-30, 0, 0], dtype=torch.float64)[:, None]
    r = r.replace(B=B)
    assert trusted_states(r).amax().item() == 1
    sigma, noise = values_and_noise(r)
    block = block_singular_values(dsf.materialise(r))[..., :4]
    assert bool(((sigma - block).abs() <= noise[..., None]).all())
