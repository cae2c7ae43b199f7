"""Fewer states: errors known and certified, bounds kept, the best possible at one cut."""

from __future__ import annotations

import pytest
import torch
from systems_with_states import STRUCTURES, of_structure, random, relative, selective, softmax

import dsf
from dsf.errors import DsfMemoryError, DsfTypeError, DsfValueError
from dsf.map_distances import map_distance, map_norm
from dsf.transitions import Dense, Diagonal, Identity, Scalar

SAME = 1e-11
ERROR = 1e-9
METHODS = ["balanced", "sequential"]


def norms(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_is_lost_where_nothing_is_cut(structure: str, method: str) -> None:
    r = of_structure(structure).replace(D=random(1, 1, 2, 1, 1, seed=9))
    T = dsf.materialise(r)
    small, found = dsf.reduce(r, 6, method=method)
    assert relative(dsf.materialise(small), T) <= SAME
    assert float(found.error.max()) <= SAME * float(found.norm.max())
    assert torch.allclose(found.norm, norms(T), rtol=1e-12)
    assert torch.equal(found.n_state, dsf.states_kept(small))
    assert small.gauge == ("balanced" if method == "balanced" else "input-normal")


@pytest.mark.parametrize("with_d", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("states", [1, 3, 5])
def test_errors_are_exact_and_between_their_bounds(states: int, method: str, with_d: bool) -> None:
    r = selective(50, 6, batch=2, head=2)
    r = r.replace(D=random(1, 1, 2, 1, 1, seed=9)) if with_d else r
    small, found = dsf.reduce(r, states, method=method)
    E = dsf.materialise(small) - dsf.materialise(r)
    assert small.n_state == states
    assert torch.allclose(found.error, norms(E), rtol=ERROR)
    assert bool((found.error >= found.lower_bound * (1 - 1e-12)).all())
    if method == "sequential":
        assert bool((found.error <= found.upper_bound * (1 + 1e-12)).all())


@pytest.mark.parametrize("length", [40, 64, pytest.param(128, marks=pytest.mark.slow)])
def test_balanced_truncation_of_softmax_keeps_its_spectral_bound(length: int) -> None:
    """Item 10: ||E||_2 <= 2 sum_{k>n} sup_t sigma_k, the systems of the specification."""
    system = softmax(length, 16)
    T = dsf.materialise(system)
    for states in (8, 24) if length == 64 else (4, 8, 16, 32):
        small, found = dsf.reduce(system, states)
        E = dsf.materialise(small) - T
        assert small.n_state == min(states, length // 2)
        assert bool((torch.linalg.matrix_norm(E, 2) <= found.spectral_bound + 1e-12).all())
        assert torch.allclose(found.error, norms(E), rtol=ERROR, atol=1e-12)
        sigma = dsf.hankel_singular_values(system, strict=False)
        by_hand = 2 * sigma[..., states:].amax(2).sum(-1)
        assert torch.allclose(found.spectral_bound, by_hand, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_cut_is_approximated_as_well_as_can_be(method: str) -> None:
    """A_t = I: reducing where keys end and queries begin attains Eckart and Young's error."""
    keys, queries, d = 60, 50, 24
    length = keys + queries
    B, C = random(1, length, 1, d, 1), random(1, length, 1, 1, d, seed=1)
    B[:, keys:] = 0
    C[:, :keys] = 0
    r = dsf.Recurrence(Identity(d), B, C)
    sizes = [d] * length
    sizes[keys] = 6
    small, found = dsf.reduce(r, sizes, method=method)
    K = C[0, keys:, 0, 0] @ B[0, :keys, 0, :, 0].T
    best = float(torch.linalg.svdvals(K)[6:].square().sum().sqrt())
    assert float(found.error) == pytest.approx(best, rel=1e-10)
    assert float(found.lower_bound) == pytest.approx(best, rel=1e-10)
    E = dsf.materialise(small) - dsf.materialise(r)
    assert float(E.norm()) == pytest.approx(best, rel=1e-10)
    assert int(found.n_state[0, 0, keys]) == 6


def test_any_selective_system_at_any_cut() -> None:
    r = selective(30, 5)
    T = dsf.materialise(r)
    for t in (4, 11, 25):
        sizes = [5] * 30
        sizes[t] = 2
        _, found = dsf.reduce(r, sizes)
        best = torch.linalg.svdvals(T[0, 0, t:, : t + 1])[2:].square().sum().sqrt()
        assert float(found.error) == pytest.approx(float(best), rel=1e-10)


@pytest.mark.parametrize("tol", [0.5, 0.1, 1e-3, 1e-8])
def test_a_tolerance_is_kept_and_certified(tol: float) -> None:
    """Item 5: ||E||_F <= tol ||map||_F, and no fewer states would have done at every step."""
    r = selective(60, 8, head=2)
    r = r.replace(B=r.B * 10.0 ** -torch.arange(0, 8, dtype=torch.float64)[:, None])
    T = dsf.materialise(r)
    small, found = dsf.reduce(r, tol=tol)
    E = norms(dsf.materialise(small) - T)
    assert bool((tol * norms(T) * (1 + 1e-9) >= E).all())
    assert torch.allclose(found.error, E, rtol=1e-5)
    assert bool((E > 0).all())
    assert found.method == "sequential"
    assert small.n_state < 8


def test_a_reduction_gives_what_realising_the_map_gives() -> None:
    """The same sequence of decompositions, from states and from the map."""
    r = softmax(24)
    T = dsf.materialise(r)
    small, found = dsf.reduce(r, 5, method="sequential")
    realised, error = dsf.realise(T, max_state=5)
    assert torch.allclose(found.error, error, rtol=ERROR)
    assert relative(dsf.materialise(small), dsf.materialise(realised)) <= 1e-9


@pytest.mark.parametrize("structure", STRUCTURES)
def test_balanced_coordinates(structure: str) -> None:
    """Both Gramians of every step are diag(sigma_t); the map stays."""
    r = of_structure(structure, 12)
    b = dsf.balance(r)
    assert b.gauge == "balanced"
    assert relative(dsf.materialise(b), dsf.materialise(r)) <= SAME
    sigma = dsf.hankel_singular_values(r, strict=False)
    kept = dsf.states_kept(b)
    for W in (dsf.gramian(b), dsf.gramian(b, "observability")):
        for t in range(12):
            for h in range(2):
                n = int(kept[0, h, t])
                expected = torch.diag(sigma[0, h, t, :n])
                gap = (W[0, t, h, :n, :n] - expected).abs().max()
                assert float(gap) <= 1e-10 * float(sigma.max())


def time_invariant(n: int = 6, radius: float = 0.9) -> dsf.Recurrence:
    Q = torch.linalg.qr(random(n, n))[0]
    A = Q @ torch.diag(torch.linspace(-radius, radius, n, dtype=torch.float64)) @ Q.T
    return dsf.Recurrence(Dense(A[None, None, None]), random(1, 1, 1, n, 1, seed=1),
                          random(1, 1, 1, 1, n, seed=2))  # fmt: skip


def spread(r: dsf.Recurrence, length: int) -> torch.Tensor:
    return dsf.materialise(r.replace(B=r.B.expand(-1, length, -1, -1, -1)))


@pytest.mark.parametrize("states", [0, 1, 3, 6])
def test_time_invariant_systems(states: int) -> None:
    """Balanced over all time: impulse response's error measured, spectral norm within 2 sum."""
    r, length = time_invariant(), 300
    small, found = dsf.reduce(r, states)
    E = spread(small, length) - spread(r, length)
    assert float(found.error) == pytest.approx(float(E[0, 0, :, 0].norm()), rel=1e-9, abs=1e-13)
    assert float(torch.linalg.matrix_norm(E, 2)) <= float(found.spectral_bound) + 1e-12
    sigma, _ = dsf.stationary_hankel_values(r)
    tail = 2 * float(sigma[0, 0, states:].sum())
    assert float(found.spectral_bound) == pytest.approx(tail, rel=1e-9, abs=1e-12)
    whole = dsf.balance(r)
    for kind in ("reachability", "observability"):
        W = dsf.gramian(whole, kind)[0, 0, 0]
        assert float((W - torch.diag(sigma[0, 0])).abs().max()) <= 1e-11 * float(sigma.max())


def test_a_tolerance_for_a_time_invariant_system() -> None:
    r = time_invariant()
    small, found = dsf.reduce(r, tol=0.05)
    assert 0 < small.n_state < 6
    assert float(found.error) <= 0.05 * float(found.norm)
    _, more = dsf.reduce(r, small.n_state - 1)
    assert float(more.error) > 0.05 * float(found.norm)


def test_distances_between_maps() -> None:
    a, b = selective(25, 3), selective(25, 4, seed=3)
    gap = norms(dsf.materialise(a) - dsf.materialise(b))
    assert torch.allclose(map_distance(a, b), gap, rtol=1e-12)
    near = a.replace(B=a.B * (1 + 1e-12))
    assert float(map_distance(a, near)) == pytest.approx(1e-12 * float(norms(dsf.materialise(a))),
                                                         rel=1e-2)  # fmt: skip
    assert float(map_distance(a, a)) <= 1e-14 * float(norms(dsf.materialise(a)))


def test_edges_and_refusals() -> None:
    unreached = selective(9, 3).replace(B=torch.zeros(1, 9, 1, 3, 1, dtype=torch.float64))
    for options in ({"states": 2}, {"tol": 0.1}):
        small, found = dsf.reduce(unreached, **options)
        assert float(dsf.materialise(small).abs().max()) == 0
        assert int(found.n_state.max()) == 0
        assert float(found.error) == 0
    two = selective(2, 3)
    assert relative(dsf.materialise(dsf.balance(two)), dsf.materialise(two)) <= SAME
    several = dsf.Recurrence(Diagonal(-random(1, 9, 1, 4).abs()), random(1, 9, 1, 4, 2),
                             random(1, 9, 1, 3, 4, seed=1))  # fmt: skip
    small, found = dsf.reduce(several, 2)
    E = dsf.materialise(small) - dsf.materialise(several)
    assert float(found.error) == pytest.approx(float(E.norm()), rel=1e-10)
    r = selective(9, 3)
    for options, message in (
        ({}, "states, tol: expected one of the two, got states=None, tol=None"),
        ({"states": 2, "tol": 0.1}, "expected one of the two"),
        ({"tol": 1.5}, r"tol: expected in \[0, 1\)"),
        ({"tol": 0.1, "method": "balanced"}, "method: expected 'balanced' for a time-invariant"),
        ({"states": [1, 2]}, "states: expected one number or 9 of them"),
    ):
        with pytest.raises(DsfValueError, match=message):
            dsf.reduce(r, **options)
    gated = dsf.Gated(r, torch.ones(1, 9, 1, 2, dtype=torch.float64))
    with pytest.raises((DsfTypeError, TypeError), match=r"expected a Recurrence|Type-check error"):
        dsf.reduce(gated, 2)
    with pytest.raises(DsfMemoryError, match=r"factors: \(part=3, batch=1, time=9"):
        dsf.reduce(r, 2, max_memory=100)
    with pytest.raises(DsfValueError, match="expected spectral radius below 1"):
        dsf.reduce(time_invariant(radius=1.1), 2)
    scalar = dsf.Recurrence(Scalar(-torch.ones(1, 1, 1).double(), n_state=3),
                            random(1, 1, 1, 3, 1), random(1, 1, 1, 1, 3))  # fmt: skip
    assert dsf.balance(scalar).n_state == 1


# -- both directions ---------------------------------------------------------------------------


def later(r: dsf.Recurrence, *, strict: bool) -> dsf.Anticausal:
    return dsf.anticausal(r, strict=strict)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("states", [1, 3, 6])
def test_both_directions_are_reduced(states: int, strict: bool, method: str) -> None:
    """Errors exact and within their bounds, with and without shared diagonals and D."""
    D = random(1, 1, 2, 1, 1, seed=9)
    causal = selective(30, 6, batch=2, head=2)
    back = selective(30, 5, batch=2, head=2, seed=4).replace(D=D)
    system = dsf.Bidirectional(causal, later(back, strict=strict))
    T = dsf.materialise(system)
    small, found = dsf.reduce(system, states, method=method)
    assert isinstance(small, dsf.Bidirectional)
    assert small.causal.n_state == states
    assert small.anticausal.recurrence.n_state == min(states, 5)
    E = norms(dsf.materialise(small) - T)
    assert torch.allclose(found.error, E, rtol=ERROR, atol=SAME * float(norms(T).max()))
    assert torch.allclose(found.norm, norms(T), rtol=1e-12)
    assert bool((found.error >= found.lower_bound * (1 - 1e-12) - 1e-13).all())
    assert bool((0.01 * found.norm < E).all()) == (states < 5)
    if method == "sequential":
        slack = SAME * float(norms(T).max())
        assert bool((found.error <= found.upper_bound * (1 + 1e-12) + slack).all())
    kept = dsf.states_kept(small.causal) + dsf.states_kept(small.anticausal.recurrence.flip_time()
                                                           ).flip(-1)  # fmt: skip
    assert torch.equal(found.n_state, kept)


@pytest.mark.parametrize("strict", [False, True])
def test_one_direction_backwards(strict: bool) -> None:
    """Its own order of time: sizes are given and told in natural order."""
    r = selective(20, 5)
    system = later(r, strict=strict)
    sizes = [5] * 20
    sizes[4] = 2
    small, found = dsf.reduce(system, sizes)
    assert isinstance(small, dsf.Anticausal)
    assert small.strict is strict
    assert int(found.n_state[0, 0, 4]) == 2
    T, E = dsf.materialise(system), dsf.materialise(small) - dsf.materialise(system)
    assert float(found.error) == pytest.approx(float(E.norm()), rel=ERROR)
    block = T[0, 0, : 4 + (not strict), 4 + strict :]
    best = float(torch.linalg.svdvals(block)[2:].square().sum().sqrt())
    assert float(found.lower_bound) >= best * (1 - 1e-10) * (not strict)
    assert float(E.norm()) >= float(found.lower_bound) * (1 - 1e-12)
    assert float(E.norm()) > 0
    if not strict:
        assert float(E.norm()) == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize("tol", [0.3, 1e-3])
def test_a_tolerance_is_kept_over_both_directions(tol: float) -> None:
    steep = 10.0 ** -torch.arange(0, 8, dtype=torch.float64)[:, None]
    causal, back = (selective(40, 8, head=2, seed=s) for s in (0, 5))
    causal, back = causal.replace(B=causal.B * steep), back.replace(B=1e4 * back.B * steep)
    system = dsf.Bidirectional(causal, later(back, strict=True))
    small, found = dsf.reduce(system, tol=tol)
    T = dsf.materialise(system)
    E = norms(dsf.materialise(small) - T)
    assert bool((tol * norms(T) * (1 + 1e-9) >= E).all())
    assert torch.allclose(found.error, E, rtol=1e-5)
    assert small.causal.n_state < small.anticausal.recurrence.n_state < 8


def test_an_encoder_is_reduced() -> None:
    """Softmax that sees every key, both halves from one set of rows."""
    rows = dsf.SoftmaxRows(random(1, 14, 2, 3), random(1, 14, 2, 3, seed=1), causal=False)
    r = dsf.Recurrence(Identity(14), dsf.OneHot(14, 14), rows)
    system = dsf.Bidirectional.from_rows(r)
    T = dsf.materialise(system)
    small, found = dsf.reduce(system, 14)
    assert relative(dsf.materialise(small), T) <= SAME
    small, found = dsf.reduce(system, 3)
    assert torch.allclose(found.error, norms(dsf.materialise(small) - T), rtol=ERROR)
    both = dsf.Bidirectional(time_invariant(), later(time_invariant(4), strict=True))
    whole, found = dsf.reduce(both, 6)
    assert float(found.error) <= 1e-10 * float(found.norm)
    far = spread(both.causal, 9) + spread(both.anticausal.recurrence, 9).mT
    far = far - torch.diag_embed(spread(both.anticausal.recurrence, 9).diagonal(dim1=-2, dim2=-1))
    long = dsf.Bidirectional(
        whole.causal.replace(B=whole.causal.B.expand(-1, 9, -1, -1, -1)), whole.anticausal
    )
    assert relative(dsf.materialise(long), far) <= 1e-9


# -- initial states ----------------------------------------------------------------------------


def with_start(r: dsf.Recurrence, channels: int = 3) -> dsf.Recurrence:
    batch, _, head = r.lead_shape()
    return r.replace(initial_state=random(batch, head, r.n_state, channels, seed=17))


def extended(r: dsf.Recurrence) -> torch.Tensor:
    """[M_0 | M]: the response to each channel of the initial state beside the map."""
    batch, length, head = r.lead_shape()
    channels = r.initial_state.shape[-1]
    silent = torch.zeros(batch, length, head, channels, dtype=torch.float64)
    M_0 = dsf.scan(r, silent, "reference").transpose(1, 2)
    return torch.cat([M_0, dsf.materialise(r.replace(initial_state=None))], -1)


@pytest.mark.parametrize("with_d", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("states", [1, 3, 5, 6])
def test_an_initial_state_is_one_more_input(states: int, method: str, with_d: bool) -> None:
    r = with_start(selective(30, 6, batch=2, head=2))
    r = r.replace(D=random(1, 1, 2, 1, 1, seed=9)) if with_d else r
    T = extended(r)
    small, found = dsf.reduce(r, states, method=method)
    assert small.initial_state.shape == (2, 2, states, 3)
    E = norms(extended(small) - T)
    slack = SAME * float(norms(T).max())
    assert torch.allclose(found.norm, norms(T), rtol=1e-12)
    assert torch.allclose(found.error, E, rtol=ERROR, atol=slack)
    assert bool((found.error + slack >= found.lower_bound).all())
    if method == "sequential":
        assert bool((found.error <= found.upper_bound * (1 + 1e-12) + slack).all())
    if states == 6:
        u = random(2, 30, 2, 3, seed=21)
        assert relative(dsf.scan(small, u), dsf.scan(r, u)) <= SAME


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_initial_states_of_every_structure(structure: str, method: str) -> None:
    r = of_structure(structure)
    start = random(1, 2, r.n_state, 9, seed=3, dtype=r.dtype)
    r = r.replace(initial_state=start)
    small, found = dsf.reduce(r, 20, method=method)
    assert relative(extended(small), extended(r)) <= SAME
    assert float(found.error.max()) <= SAME * float(found.norm.max())


def test_a_tolerance_counts_the_initial_state() -> None:
    r = selective(40, 8, head=2)
    steep = 10.0 ** -torch.arange(0, 8, dtype=torch.float64)[:, None]
    r = with_start(r.replace(B=r.B * steep))
    for tol in (0.2, 1e-4):
        small, found = dsf.reduce(r, tol=tol)
        E = norms(extended(small) - extended(r))
        assert bool((tol * norms(extended(r)) * (1 + 1e-9) >= E).all())
        assert torch.allclose(found.error, E, rtol=1e-5)
        without, _ = dsf.reduce(r.replace(initial_state=None), tol=tol)
        assert small.n_state >= without.n_state


@pytest.mark.parametrize("states", [0, 2, 6])
def test_time_invariant_systems_that_start_somewhere(states: int) -> None:
    r, length = with_start(time_invariant()), 300
    small, found = dsf.reduce(r, states)
    long = [x.replace(B=x.B.expand(-1, length, -1, -1, -1)) for x in (r, small)]
    one, two = (extended(x)[0, 0] for x in long)
    impulse = torch.cat([one[:, :4] - two[:, :4]], -1)  # M_0 and the first column of M
    assert float(found.error) == pytest.approx(float(impulse.norm()), rel=1e-9, abs=1e-12)
    start = torch.cat([one[:, :4]], -1)
    assert float(found.norm) == pytest.approx(float(start.norm()), rel=1e-12)


def test_norms_without_the_diagonal_and_distances_with_initial_states() -> None:
    r = with_start(selective(12, 3).replace(D=random(1, 1, 1, 1, 1, seed=9)))
    other = with_start(selective(12, 4, seed=5))
    assert torch.allclose(map_norm(r), norms(extended(r)), rtol=1e-12)
    gap = norms(extended(r) - extended(other))
    assert torch.allclose(map_distance(r, other), gap, rtol=1e-12)
    bare = r.replace(initial_state=None)
    strictly = norms(dsf.materialise(bare).tril(-1))
    assert torch.allclose(map_norm(bare, strict=True), strictly, rtol=1e-12)
