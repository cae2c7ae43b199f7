"""Maps to states: rebuilt exactly in every form and gauge, orders found, errors known."""

from __future__ import annotations

import pytest
import torch
from systems_with_states import STRUCTURES, of_structure, random, relative, selective, softmax

import dsf
from dsf.errors import DsfMemoryError, DsfShapeError, DsfValueError
from dsf.map_blocks import block_singular_values, minimal_states
from dsf.realisation import realise
from dsf.transitions import Dense

LENGTH = 40
REBUILT = 1e-11
ORTHONORMAL = 1e-12
CONVERTED = 1e-12
KNOWN_ORDER = 1e-12
GAUGE = 1e-9
ERROR = 1e-12
FORMS = ["current", "direct", "predictor"]
GAUGES = ["input-normal", "balanced"]


def as_recurrence(system: object) -> dsf.Recurrence:
    found = system.recurrence() if isinstance(system, dsf.Predictor) else system
    assert isinstance(found, dsf.Recurrence)
    return found


def rank_of(block: torch.Tensor, floor: float) -> int:
    return int((torch.linalg.svdvals(block) > floor).sum()) if block.numel() else 0


MAPS = {
    "random": lambda: random(1, 2, LENGTH, LENGTH).tril(),
    "order 3": lambda: dsf.materialise(selective(LENGTH, 3, head=2)),
}


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MAPS)
def test_maps_are_rebuilt_with_the_fewest_states(name: str, form: str, gauge: str) -> None:
    """Items 1 and 2: map and orders of (3.1), (3.2), (3.3)."""
    T = MAPS[name]()
    system, error = realise(T, tolerance=1e-11, form=form, gauge=gauge)
    r = as_recurrence(system)
    assert relative(dsf.materialise(r), T) <= REBUILT
    assert float(error.max()) <= REBUILT * float(T.norm())
    orders = system.n_state if isinstance(system, dsf.Predictor) else dsf.states_kept(r)
    strict = 1 if form == "predictor" else 0
    floor = 1e-10 * float(torch.linalg.matrix_norm(T, 2).max())
    for h in range(2):
        for t in range(LENGTH):
            block = T[0, h, t + strict :, : t + 1]
            expected = rank_of(block, floor)
            if form == "direct":  # the fewest over all values of the block's corner
                a, b = T[0, h, t:, :t], T[0, h, t + 1 :, : t + 1]
                expected = sum(rank_of(x, floor) for x in (a, b)) - rank_of(
                    T[0, h, t + 1 :, :t], floor)  # fmt: skip
            assert orders[0, h, t] == expected
    if name == "order 3":
        assert int(orders.max()) == 3
    elif form == "predictor":
        t = torch.arange(1, LENGTH + 1)
        assert torch.equal(orders[0, 0], torch.minimum(t, LENGTH - t))
    assert torch.equal(orders, minimal_states(T, form=form))


@pytest.mark.parametrize("length", [1, 2, 17, 128, 512])
@pytest.mark.parametrize("order", [1, 8])
def test_random_maps_of_known_order(order: int, length: int) -> None:
    """The issue's figure: realise, then materialise, 1e-12 relative up to L = 512."""
    T = dsf.materialise(selective(length, order, seed=length))
    system, _ = dsf.realise(T)
    assert system.n_state == min(order, (length + 1) // 2)
    assert relative(dsf.materialise(system), T) <= KNOWN_ORDER


@pytest.mark.parametrize("form", ["current", "predictor"])
def test_states_are_input_normal(form: str) -> None:
    """Item 3: A A^H + B B^H = I on the states in use."""
    system, _ = realise(random(1, 1, LENGTH, LENGTH).tril(), form=form)
    A = system.A.matrix if isinstance(system, dsf.Recurrence) else system.A
    gram = A[0, :, 0] @ A[0, :, 0].mT + system.B[0, :, 0] @ system.B[0, :, 0].mT
    r = as_recurrence(system)
    kept = dsf.states_kept(r)[0, 0] if form == "current" else system.n_state[0, 0]
    for t, n in enumerate(kept.tolist()):
        assert float((gram[t, :n, :n] - torch.eye(n)).abs().max() if n else 0) <= ORTHONORMAL


def test_balanced_states_have_both_gramians_equal_to_the_singular_values() -> None:
    T = dsf.materialise(selective(12, 3))
    r, _ = realise(T, gauge="balanced", tolerance=1e-11)
    reach, see = dsf.gramian(r), dsf.gramian(r, "observability")
    for t, n in enumerate(dsf.states_kept(r)[0, 0].tolist()):
        sigma = torch.diag(torch.linalg.svdvals(T[0, 0, t:, : t + 1])[:n])
        for W in (reach, see):
            assert torch.allclose(W[0, t, 0, :n, :n], sigma, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 4, 8])
def test_the_error_of_a_truncation_is_known_and_bounded(order: int, form: str) -> None:
    """Item 4: the accumulated sum is the error, between (5.2) and (5.1)."""
    T = dsf.materialise(softmax(LENGTH))
    system, error = realise(T, max_state=order, form=form)
    r = as_recurrence(system)
    true = float((dsf.materialise(r) - T).norm())
    assert float(error) == pytest.approx(true, rel=ERROR)
    strict = 0 if form == "current" else 1
    tails = [
        float((torch.linalg.svdvals(T[0, 0, t + strict :, : t + 1])[order:] ** 2).sum())
        for t in range(LENGTH)
    ]
    assert max(tails) * (1 - 1e-12) <= true**2 <= sum(tails) * (1 + 1e-12)


def test_sizes_per_step_and_the_best_error_at_a_single_cut() -> None:
    """Full but at one cut: the error is that of Eckart and Young there."""
    T = dsf.materialise(softmax(LENGTH))
    sizes = [LENGTH] * LENGTH
    sizes[20] = 4
    r, error = realise(T, max_state=sizes)
    best = float((torch.linalg.svdvals(T[0, 0, 20:, :21])[4:] ** 2).sum().sqrt())
    assert float(error) == pytest.approx(best, rel=1e-10)
    assert relative(dsf.materialise(r), T) == pytest.approx(best / float(T.norm()), rel=1e-10)
    assert int(dsf.states_kept(r)[0, 0, 20]) == 4


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("budget", [0.05, 0.5, 2.0])
def test_a_budget_is_kept(budget: float, full: bool) -> None:
    """Item 5."""
    T = random(1, 2, LENGTH, LENGTH)
    T = T if full else T.tril()
    r, error = realise(T, budget=budget)
    true = torch.linalg.matrix_norm(dsf.materialise(r) - T)
    assert torch.allclose(true, error, rtol=1e-8)
    assert float(true.max()) <= budget * (1 + 1e-9)
    assert float(true.min()) > 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_conversions_between_the_forms_keep_the_map(structure: str) -> None:
    """Item 6: current -> predictor, and back by appended outputs or by solving for C."""
    r = of_structure(structure).replace(D=random(1, 1, 2, 1, 1, seed=9))
    T = dsf.materialise(r)
    p = dsf.predictor_form(r)
    n = 6 if structure == "complex" else 3
    assert p.A.shape[-1] == n
    for direct in (False, True):
        back = p.recurrence(direct=direct)
        assert relative(dsf.materialise(back), T) <= CONVERTED
        assert (back.D is None) == (not direct)
        assert back.n_state <= n + 1
    by_hand = torch.stack([_predictor_row(p, t) for t in range(T.shape[-1])], -2)
    assert relative(by_hand, T) <= CONVERTED


def _predictor_row(p: dsf.Predictor, t: int) -> torch.Tensor:
    """C_t A_{t-1} ... A_{j+1} B_j for j < t, then D_t: (2.2) written out."""
    row, entries = p.C[:, t], [p.D[:, t, ..., 0, 0]]
    for j in range(t - 1, -1, -1):
        entries.append((row @ p.B[:, j])[..., 0, 0])
        row = row @ p.A[:, j]
    pad = torch.zeros_like(entries[0])
    return torch.stack(entries[::-1] + [pad] * (p.A.shape[1] - t - 1), -1)


def test_a_change_of_basis_keeps_the_map() -> None:
    """Item 7: random S_t of condition up to 1e3."""
    r = selective(LENGTH, 3)
    U, V = (torch.linalg.qr(random(1, LENGTH + 1, 1, 3, 3, seed=s))[0] for s in (4, 5))
    S = U @ torch.diag(torch.tensor([1000.0, 30, 1], dtype=torch.float64)) @ V
    assert relative(dsf.materialise(dsf.change_of_basis(r, S)), dsf.materialise(r)) <= GAUGE


@pytest.mark.parametrize("form", ["current", "direct"])
@pytest.mark.parametrize("gauge", GAUGES)
def test_both_halves_of_a_full_map(form: str, gauge: str) -> None:
    """Item 8: causal plus anticausal reproduce T u; each half has its own fewest states."""
    T, u = random(1, 2, 12, 12), random(1, 12, 2, 5, seed=1)
    both, error = dsf.realise(T, form=form, gauge=gauge)
    assert isinstance(both, dsf.Bidirectional)
    assert both.anticausal.strict
    expected = torch.einsum("bhqk,bkhc->bqhc", T, u)
    assert relative(dsf.scan(both, u), expected) <= CONVERTED
    assert relative(dsf.materialise(both), T) <= CONVERTED
    assert float(error.max()) <= 1e-12
    upper, error = realise(T.triu())
    assert isinstance(upper, dsf.Anticausal)
    assert relative(dsf.materialise(upper), T.triu()) <= CONVERTED


def test_low_orders_of_both_halves_are_found_and_truncated() -> None:
    both = dsf.Bidirectional(selective(30, 2), dsf.anticausal(selective(30, 3, seed=7),
                                                              strict=True))  # fmt: skip
    T = dsf.materialise(both)
    found, _ = realise(T, form="direct", tolerance=1e-11)
    assert (found.causal.n_state, found.anticausal.recurrence.n_state) == (2, 3)
    assert relative(dsf.materialise(found), T) <= CONVERTED
    less, error = realise(T, max_state=1)
    assert float(error) == pytest.approx(float((dsf.materialise(less) - T).norm()), rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_masking_zero_and_diagonal_maps(form: str) -> None:
    """Item 12: T and tril(T) agree; zero and diagonal maps have order 0 in predictor form."""
    T = random(1, 1, 9, 9)
    one, two = (realise(x, form=form, side="lower")[0] for x in (T, T.tril()))
    assert torch.equal(as_recurrence(one).A.matrix, as_recurrence(two).A.matrix)
    eye = torch.eye(5, dtype=torch.float64)[None, None]
    for M, order in ((0 * eye, 0), (eye, 1 if form == "current" else 0)):
        system, error = realise(M, form=form)
        kept = system.n_state if isinstance(system, dsf.Predictor) else (
            dsf.states_kept(as_recurrence(system)))  # fmt: skip
        # direct: D holds the diagonal
        assert int(kept.max()) == order
        assert torch.equal(dsf.materialise(as_recurrence(system)), M)
        assert float(error) == 0
    assert float(block_singular_values(eye).max()) == 0


@pytest.mark.parametrize("form", FORMS)
def test_several_channels_and_streaming(form: str) -> None:
    """Items 13 and 14: T V for P_v channels, state (n_t, P_v), and the same step by step."""
    T, u = random(1, 1, LENGTH, LENGTH).tril(), random(1, LENGTH, 1, 5, seed=1)
    r = as_recurrence(realise(T, form=form)[0])
    expected = (T[0, 0] @ u[0, :, 0])[None, :, None]
    assert relative(dsf.scan(r, u), expected) <= CONVERTED
    state, outputs = None, []
    for t in range(LENGTH):
        y, state = dsf.step(r.time_slice(t, t + 1), u[:, t], state)
        assert state.shape == (1, 1, r.n_state, 5)
        outputs.append(y)
    assert relative(torch.stack(outputs, 1), expected) <= CONVERTED


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_recurrence_is_found_again_from_its_map(structure: str) -> None:
    weights = dsf.materialise(of_structure(structure))
    r, _ = realise(weights, tolerance=1e-11)
    assert relative(dsf.materialise(r), weights) <= REBUILT
    assert r.n_state <= (6 if structure == "complex" else 3)


def test_complex_strided_and_empty_maps() -> None:
    T = random(1, 2, 9, 9, dtype=torch.complex128).tril()
    assert relative(dsf.materialise(realise(T)[0]), T) <= REBUILT
    wide = random(1, 2, 18, 9)
    strided = wide[:, :, ::2].mT.tril()
    assert relative(dsf.materialise(realise(strided)[0]), strided) <= REBUILT
    for form in FORMS:
        r, error = realise(torch.zeros(1, 2, 0, 0, dtype=torch.float64), form=form)
        assert float(error.sum()) == 0
        assert as_recurrence(r).A.matrix.shape[1] == 0


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(DsfShapeError, match=r"got \(query=3, key=4\)"):
        realise(random(1, 1, 3, 4))
    T = random(1, 1, 3, 3)
    for options, message in (
        ({"tolerance": 2.0}, r"tolerance: expected in \[0, 1\)"),
        ({"form": "predictor"}, "form: expected current or direct for a map with entries above"),
        ({"budget": 1.0, "gauge": "balanced"}, "budget: expected at least 0 and gauge="),
        ({"max_state": [1, 2]}, "max_state: expected one number of states or 3 of them"),
    ):
        with pytest.raises(DsfValueError, match=message):
            realise(T, **options)
    r = of_structure("dense").replace(initial_state=torch.ones(1, 1, 3, 1, dtype=torch.float64))
    with pytest.raises(DsfValueError, match="initial_state: expected None"):
        dsf.predictor_form(r)
    two = dsf.Predictor(
        *(torch.ones(1, 4, 1, *s).double() for s in ((2, 2), (2, 1), (2, 2), (2, 1)))
    )
    with pytest.raises(DsfValueError, match="expected output=1, got 2"):
        two.recurrence()


def test_transitions_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    T = random(1, 1, 40, 40).tril()
    monkeypatch.setattr("dsf.memory.available_bytes", lambda device: 100_000)
    with pytest.raises(DsfMemoryError, match=r"transitions: \(batch=1, time=40, head=1, state=20"):
        realise(T)
    assert realise(T, max_state=2)[0].n_state == 2


def test_an_appended_output_is_only_where_it_is_needed() -> None:
    """A reset forgets the state that the same output still reads: one state more, once."""
    r = selective(9, 2)
    decay = r.A.decay().clone()
    decay[:, 4] = 0
    A = torch.diag_embed(decay)
    p = dsf.predictor_form(r.replace(A=Dense(A)))
    p = dsf.Predictor(p.A, p.B, torch.where(torch.arange(9)[:, None, None, None] == 4,
                                            random(1, 1, 1, 1, 2), p.C), p.D)  # fmt: skip
    back = p.recurrence()
    T = torch.stack([_predictor_row(p, t) for t in range(9)], -2)
    assert relative(dsf.materialise(back), T) <= CONVERTED
    assert back.n_state == 3
    assert dsf.states_kept(back)[0, 0].tolist() == [2, 2, 2, 2, 3, 2, 2, 2, 2]
