"""Maps to states: rebuilt exactly, orders found, errors known, from blocks and from states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dsf
from dsf.errors import DsfMemoryError, DsfShapeError, DsfValueError
from dsf.realisation import (
    block_singular_values,
    epsilon_ranks,
    hankel_singular_values,
    reachability,
    realise,
)
from dsf.transitions import Dense, Diagonal, Householder, Identity, Shift

LENGTH = 20
EXACT = 1e-11
ORTHONORMAL = 1e-12


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def recurrence(structure: str, n: int = 3) -> dsf.Recurrence:
    lead = (2, LENGTH, 2)
    k = torch.nn.functional.normalize(random(*lead, n, seed=5), dim=-1)
    A = {
        "diagonal": Diagonal(-random(*lead, n).abs()),
        "resets": Diagonal.from_decay((random(*lead, n) > -1).double()),
        "complex": Diagonal(-random(*lead, n).abs(), phase=random(*lead, n, seed=1)),
        "householder": Householder(torch.sigmoid(random(*lead)), k),
        "dense": Dense(random(*lead, n, n) / 2),
        "shift": Shift(n),
        "identity": Identity(n),
    }[structure]
    dtype = torch.complex128 if structure == "complex" else torch.float64
    B = random(*lead, n, 1, seed=2, dtype=dtype)
    C = random(*lead, 1, n, seed=3, dtype=dtype)
    return dsf.Recurrence(A, B, C, real_output=structure == "complex")


STRUCTURES = ["diagonal", "resets", "complex", "householder", "dense", "shift", "identity"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_hankel_values_from_states_are_those_of_the_blocks(structure: str) -> None:
    r = recurrence(structure)
    fast, slow = hankel_singular_values(r), block_singular_values(dsf.materialise(r))
    n = fast.shape[-1]
    assert float((fast - slow[..., :n]).abs().max()) <= EXACT * float(slow.max())
    assert float(slow[..., n:].abs().max()) <= EXACT * float(slow.max())


def test_chosen_cuts_are_a_selection() -> None:
    r = recurrence("diagonal")
    every, some = hankel_singular_values(r), hankel_singular_values(r, [15, 2, 7])
    assert torch.allclose(some, every[:, :, [14, 1, 6]], rtol=1e-12)
    assert hankel_singular_values(r, []).shape == (2, 2, 0, 3)


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DsfMemoryError, match=r"factors: \(cut=19, batch=2, head=2, state=3"):
        hankel_singular_values(recurrence("dense"), max_memory=100)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_reachability_gives_the_row_of_the_map(structure: str) -> None:
    r = recurrence(structure)
    weights = dsf.materialise(r)
    for t in (0, 7, LENGTH - 1):
        row = (r.C[:, t] @ reachability(r, t).to(r.C.dtype))[..., 0, :]
        row = row.real if r.real_output else row
        assert float((row - weights[:, :, t, : t + 1]).abs().max()) <= EXACT


def test_a_random_triangle_is_rebuilt_with_full_order() -> None:
    T = random(1, 2, LENGTH, LENGTH)
    r, error = realise(T)
    assert float((dsf.materialise(r) - T.tril()).norm() / T.norm()) <= EXACT
    assert float(error.max()) <= EXACT
    assert r.n_state == (LENGTH + 1) // 2
    upper_only = T.tril() + 7 * T.triu(1)
    masked, _ = realise(upper_only)
    assert torch.equal(masked.A.matrix, r.A.matrix), "entries above the diagonal must not matter"


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_recurrence_is_found_again_from_its_map(structure: str) -> None:
    weights = dsf.materialise(recurrence(structure))
    r, _ = realise(weights, tolerance=1e-11)
    assert float((dsf.materialise(r) - weights).norm() / weights.norm()) <= EXACT
    assert r.n_state <= (6 if structure == "complex" else 3)


def test_zero_and_diagonal_maps() -> None:
    zero, _ = realise(torch.zeros(1, 1, 5, 5, dtype=torch.float64))
    assert float(dsf.materialise(zero).abs().max()) == 0
    eye = torch.eye(5, dtype=torch.float64)[None, None]
    r, _ = realise(eye)
    assert r.n_state == 1
    assert torch.allclose(dsf.materialise(r), eye)
    assert float(block_singular_values(eye).max()) == 0


def test_states_are_input_normal() -> None:
    r, _ = realise(random(1, 1, LENGTH, LENGTH))
    A, B = r.A.matrix[0, :, 0], r.B[0, :, 0]
    gram = A @ A.mT + B @ B.mT
    for t in range(LENGTH):
        n = int(gram[t].diagonal().sum().round())
        assert float((gram[t, :n, :n] - torch.eye(n)).abs().max()) <= ORTHONORMAL


@pytest.mark.parametrize("order", [1, 4, 8])
def test_the_error_of_a_truncation_is_known_and_bounded(order: int) -> None:
    q = random(1, LENGTH, 1, 4)
    rows = dsf.SoftmaxRows(q, random(1, LENGTH, 1, 4, seed=1))
    T = dsf.materialise(dsf.Recurrence(Identity(LENGTH), dsf.OneHot(LENGTH, LENGTH), rows))
    r, error = realise(T, max_state=order)
    assert r.n_state == order
    true = float((dsf.materialise(r) - T).norm())
    assert float(error) == pytest.approx(true, rel=1e-10)
    tails = [
        float((torch.linalg.svdvals(T[0, 0, t:, : t + 1])[order:] ** 2).sum())
        for t in range(LENGTH)
    ]
    assert max(tails) * (1 - 1e-9) <= true**2 <= sum(tails) * (1 + 1e-9)


@pytest.mark.parametrize("budget", [0.05, 0.5, 2.0])
def test_a_budget_is_kept(budget: float) -> None:
    T = random(1, 2, LENGTH, LENGTH)
    r, error = realise(T, budget=budget)
    true = torch.linalg.matrix_norm(dsf.materialise(r) - T.tril())
    assert torch.allclose(true, error, rtol=1e-8)
    assert float(true.max()) <= budget * (1 + 1e-9)
    assert float(true.max()) > 0


def test_several_channels_and_streaming() -> None:
    T, u = random(1, 1, LENGTH, LENGTH), random(1, LENGTH, 1, 5, seed=1)
    r, _ = realise(T)
    expected = (T[0, 0].tril() @ u[0, :, 0])[None, :, None]
    assert torch.allclose(dsf.scan(r, u), expected, atol=1e-12)
    state, outputs = None, []
    for t in range(LENGTH):
        y, state = dsf.step(r.time_slice(t, t + 1), u[:, t], state)
        outputs.append(y)
    assert torch.allclose(torch.stack(outputs, 1).flatten(), expected.flatten(), atol=1e-12)


def test_epsilon_ranks_of_given_values() -> None:
    sigma = torch.tensor([[[10.0, 1, 0.05], [5, 0, 0]]], dtype=torch.float64)
    assert epsilon_ranks(sigma, 0.01).tolist() == [[2, 1]]
    assert epsilon_ranks(sigma, 0.001).tolist() == [[3, 1]]
    assert epsilon_ranks(sigma, 0.2, criterion="frobenius").tolist() == [[1, 1]]
    assert epsilon_ranks(torch.zeros(1, 2, 3), 0.01, criterion="frobenius").tolist() == [[0, 0]]
    noise = 1e-15 * torch.ones(1, 1, 50, dtype=torch.float64)
    both = torch.cat([torch.cat([torch.ones(1, 1, 1).double(), noise[..., 1:]], -1), noise], 1)
    assert epsilon_ranks(both, 1e-12).tolist() == [[1, 0]], "noise of a weak block must not count"


def test_maps_that_are_not_square_are_refused() -> None:
    with pytest.raises(DsfShapeError, match=r"got \(query=3, key=4\)"):
        realise(random(1, 1, 3, 4))
    with pytest.raises(DsfShapeError, match="as many queries as keys"):
        block_singular_values(random(3, 4))
    with pytest.raises(DsfValueError, match=r"tolerance: expected in \[0, 1\)"):
        realise(random(1, 1, 3, 3), tolerance=2.0)


def test_values_are_ordered_and_padded() -> None:
    sigma = block_singular_values(random(LENGTH, LENGTH))
    assert sigma.shape == (LENGTH - 1, LENGTH // 2)
    assert bool((sigma.diff(dim=-1) <= 0).all())
    counts = (sigma > 1e-12).sum(-1).numpy()
    assert np.array_equal(counts, np.minimum(np.arange(1, LENGTH), LENGTH - np.arange(1, LENGTH)))
