"""Every structure, and every ordered pair of structures, against dense matrices."""

from __future__ import annotations

import itertools

import laws
import pytest
import torch
from structures import N_STATE, SMOOTH, STRUCTURES, Draw, transition
from torch.utils import _pytree as pytree

import dsf
from dsf.transitions import Dense, Diagonal, DiagonalLowRank, Identity, Scalar, Shift

LEADS = [((2, 7, 3), (2, 7, 3)), ((1, 7, 1), (2, 1, 3)), ((1, 1, 1), (2, 7, 3))]
DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("later", STRUCTURES)
@pytest.mark.parametrize("earlier", STRUCTURES)
def test_every_ordered_pair_multiplies_like_matrices(later, earlier):
    for dtype, (one, two) in itertools.product(DTYPES, LEADS):
        laws.product_is_matrix_product(
            transition(later, 1, one, dtype), transition(earlier, 2, two, dtype)
        )


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_is_a_product_with_the_matrix(name, dtype):
    for lead, state_lead in LEADS:
        laws.apply_is_matrix_product(
            transition(name, 3, lead, dtype), Draw(4, dtype).normal(*state_lead, N_STATE, 5)
        )


@pytest.mark.parametrize("name", STRUCTURES)
def test_widening_keeps_the_matrix(name):
    laws.widening_keeps_the_matrix(transition(name, 5))


@pytest.mark.parametrize("name", STRUCTURES)
def test_steps_slices_and_flips_follow_the_matrix(name):
    A = transition(name, 6)
    whole = A.as_dense()
    if A.tensors():
        assert A.lead_shape() == (2, 7, 3)
        assert torch.equal(A.at(4).as_dense(), whole[:, 4])
        assert torch.equal(A.at(-1).as_dense(), whole[:, -1])
        assert torch.equal(A.time_slice(2, 5).as_dense(), whole[:, 2:5])
        assert torch.equal(A.flip_time().as_dense(), whole.flip(1))
    shared = transition(name, 6, (2, 1, 3))
    for same in (shared.time_slice(3, 9), shared.flip_time()):
        assert torch.equal(same.as_dense(), shared.as_dense())
    assert shared.n_state == N_STATE
    assert shared.is_complex == name.endswith("complex")


@pytest.mark.parametrize("name", STRUCTURES)
def test_pytree_round_trip(name):
    A = transition(name, 7)
    leaves, spec = pytree.tree_flatten(A)
    assert all(isinstance(x, torch.Tensor) for x in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(A)
    assert torch.equal(again.as_dense(), A.as_dense())
    assert pytree.tree_structure(again) == spec


@pytest.mark.parametrize("later", SMOOTH)
def test_products_are_differentiable(later):
    earlier = transition("diagonal_low_rank_complex", 9, (1, 2, 1))
    A = transition(later, 8, (1, 2, 1))
    leaves, spec = pytree.tree_flatten(A)
    if not leaves:
        return
    inputs = [x.clone().requires_grad_() for x in leaves]

    def product(*tensors):
        return pytree.tree_unflatten(list(tensors), spec).after(earlier).as_dense()

    assert torch.autograd.gradcheck(product, inputs)


def test_products_keep_the_cheapest_common_structure():
    def kind(a, b):
        return type(transition(a, 1).after(transition(b, 2))).__name__

    assert kind("identity", "identity") == "Identity"
    assert kind("identity", "scalar") == "Scalar"
    assert kind("scalar", "diagonal") == "Diagonal"
    assert kind("diagonal", "householder") == "DiagonalLowRank"
    assert kind("householder", "householder") == "DiagonalLowRank"
    assert kind("shift", "shift") == "Shift"
    assert kind("block_diagonal", "block_diagonal") == "BlockDiagonal"
    assert kind("shift", "scalar") == "Dense"


def test_structures_without_tensors_take_the_dtype_of_the_other():
    for bare in (Identity(N_STATE), Shift(N_STATE)):
        for name in ("scalar", "diagonal", "dense"):
            A = transition(name, 1, dtype=torch.float32)
            assert bare.after(A).as_dense().dtype == torch.float32
            assert A.after(bare).as_dense().dtype == torch.float32


def test_states_must_agree():
    with pytest.raises(dsf.errors.DsfShapeError, match="expected state=4, got 5"):
        Identity(4).after(Identity(5))


def test_shift_moves_at_most_everything():
    h = torch.arange(3.0)[:, None]
    assert Shift(3, 0).apply(h).flatten().tolist() == [0, 1, 2]
    assert Shift(3, 2).apply(h).flatten().tolist() == [0, 0, 0]
    assert Shift(3, 1).apply(h).flatten().tolist() == [0, 0, 1]
    assert Shift(3, 1).apply_transposed(h).flatten().tolist() == [1, 2, 0]
    assert Shift(3, 7).apply(h).flatten().tolist() == [0, 0, 0]
    assert Shift(3, 7).as_dense().abs().sum() == 0
    assert Shift(3).compose(Shift(3, 2)) == Shift(3, 3)


# -- decays in logarithms ----------------------------------------------------------------------


def test_decays_survive_the_logarithm():
    decay = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -1e-30, 1e-300, 1.5], dtype=torch.float64)
    A = Diagonal.from_decay(decay[None, None, None])
    assert A.log_decay[0, 0, 0, 0] == -torch.inf
    torch.testing.assert_close(A.decay().flatten(), decay, rtol=1e-13, atol=0.0)
    assert Diagonal.from_decay(decay.abs()[None, None, None]).sign is None
    turned = torch.polar(decay.abs(), torch.linspace(-3, 3, 8, dtype=torch.float64))
    A = Diagonal.from_decay(turned[None, None, None])
    torch.testing.assert_close(A.decay().flatten(), turned, rtol=1e-13, atol=0.0)


def test_logarithms_keep_slow_decays_apart_from_one():
    log_decay = torch.full((1, 1, 1), -1e-9, dtype=torch.float32)
    A = Scalar(log_decay, n_state=1)
    power = A
    for _ in range(20):
        power = power.compose(power)  # 2^20 steps
    expected = torch.exp(torch.tensor(-1e-9, dtype=torch.float64) * 2**20)
    assert abs(float(power.decay()) - float(expected)) < 1e-6


def test_gradient_of_a_zero_decay_is_zero_and_finite():
    decay = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    Diagonal.from_decay(decay[None, None, None]).decay().sum().backward()
    assert torch.allclose(decay.grad, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))


def test_decays_can_be_split_under_vmap_and_compile():
    def there_and_back(decay):
        return Diagonal.from_decay(decay).decay()

    decay = Draw(1).decay(5, 2, 3, 4, 2)
    together = torch.func.vmap(there_and_back)(decay)
    torch.testing.assert_close(together, decay, rtol=1e-13, atol=0.0)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(decay[0]), decay[0], rtol=1e-13, atol=0.0)


def test_phases_of_sixteen_bits_are_widened():
    A = Diagonal(torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16),
                 phase=torch.ones(1, 1, 1, 2, dtype=torch.bfloat16))  # fmt: skip
    assert A.decay().dtype == torch.complex64


def test_complex_reflections_widen_to_a_real_logarithm():
    k = Draw(2).complex_normal(1, 2, 1, 3)
    A = dsf.transitions.Householder(Draw(3).uniform(1, 2, 1), k)
    wide = A.widen()
    assert isinstance(wide, DiagonalLowRank)
    assert not wide.log_decay.is_complex()
    assert torch.allclose(wide.as_dense(), A.as_dense())


def test_a_rank_of_zero_is_a_diagonal():
    A = transition("diagonal_signed", 3)
    wide = A.widen()
    assert isinstance(wide, DiagonalLowRank)
    assert wide.left.shape[-1] == 0
    h = Draw(5).normal(2, 7, 3, N_STATE, 2)
    assert torch.equal(wide.apply(h), A.apply(h))


def test_dense_widens_to_itself():
    A = transition("dense", 1)
    assert isinstance(A, Dense)
    assert A.widen() is A
