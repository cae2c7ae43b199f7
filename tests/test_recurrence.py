"""The noun itself: sizes, copies, slices, pytree, and what `validate` finds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from structures import STRUCTURES, Draw, complex_structure, recurrence, transition, values_for
from torch.utils import _pytree as pytree

import dsf
from dsf.errors import DsfMemoryError, DsfShapeError, DsfTypeError, DsfValueError
from dsf.transitions import BlockDiagonal, Diagonal, DiagonalLowRank, Identity, Scalar, Shift

names = pytest.mark.parametrize("name", STRUCTURES)


def softmax_system(length: int = 6, **options: object) -> dsf.Recurrence:
    d = Draw(3)
    rows = dsf.SoftmaxRows(d.normal(2, length, 4, 5), d.normal(2, length, 2, 5), **options)
    return dsf.Recurrence(Identity(length), dsf.OneHot(length, length), rows, system="softmax")


@names
def test_sizes_are_read_from_the_coefficients(name):
    r = recurrence(name, n_input=2, n_output=5, initial=3)
    assert (r.n_state, r.n_head, r.length, r.n_input, r.n_output) == (4, 3, 7, 2, 5)
    assert r.lead_shape() == (2, 7, 3)
    assert r.structure == r.A.structure
    assert r.dtype == (torch.complex128 if complex_structure(name) else torch.float64)
    assert r.device == torch.device("cpu")
    assert r.validate() is r


def test_it_is_shown_in_one_line_without_numbers():
    assert repr(softmax_system()) == (
        "Recurrence(softmax: A identity, B (1, 6, 1, 6, 1), C (2, 6, 4, 1, 6), exact)"
    )
    r = recurrence("diagonal", n_input=2, n_output=5, initial=3)
    assert repr(r.replace(system="")).startswith(
        "Recurrence(unnamed: A diagonal, B (2, 7, 3, 4, 2)"
    )


@names
def test_pytree_round_trip(name):
    for r in (recurrence(name, initial=2), recurrence(name, direct=False)):
        leaves, spec = pytree.tree_flatten(r)
        assert all(isinstance(x, torch.Tensor) for x in leaves)
        again = pytree.tree_unflatten(leaves, spec)
        assert again.system == name
        assert pytree.tree_structure(again) == spec
        for field in dataclasses.fields(r):
            mine, theirs = getattr(r, field.name), getattr(again, field.name)
            assert mine is theirs or type(mine) is type(theirs)
        u = values_for(r, channel=2)
        assert torch.equal(dsf.scan(again, u), dsf.scan(r, u))


@names
def test_to_changes_precision_and_keeps_the_rest(name):
    r = recurrence(name, initial=2).replace(gauge="x", mode="linearised", real_output=True)
    single = r.to(torch.float32)
    wide = torch.complex64 if complex_structure(name) else torch.float32
    assert single.dtype == wide
    assert (single.system, single.gauge, single.mode) == (name, "x", "linearised")
    assert single.real_output
    assert r.dtype != single.dtype
    back = single.to(torch.float64)
    for a, b in zip(pytree.tree_leaves(r), pytree.tree_leaves(back), strict=True):
        finite = torch.isfinite(a)
        assert torch.allclose(a[finite], b[finite], rtol=1e-6, atol=1e-6)
    assert single.to("cpu").dtype == wide


def test_to_leaves_masks_alone():
    r = softmax_system(key_mask=torch.ones(2, 6, dtype=torch.bool)).to(torch.float32)
    assert r.C.key_mask.dtype == torch.bool
    assert r.C.query.dtype == torch.float32
    assert r.dtype == torch.float32


@names
def test_time_slices_and_flips_follow_the_steps(name):
    r = recurrence(name, initial=2)
    part = r.time_slice(2, 5)
    assert part.length == 3
    assert part.initial_state is None
    assert torch.equal(part.B, r.B[:, 2:5])
    assert torch.equal(part.C, r.C[:, 2:5])
    assert part.D.shape[1] == 1
    assert r.time_slice(0, 3).initial_state is r.initial_state
    assert torch.equal(r.flip_time().B, r.B.flip(1))
    twice = r.flip_time().flip_time()
    for a, b in zip(pytree.tree_leaves(twice), pytree.tree_leaves(r), strict=True):
        assert torch.equal(a, b)
    constant = recurrence(name, time_invariant=True)
    assert constant.length == 1
    assert constant.time_slice(3, 9).length == 1


def test_dense_matrices_take_the_dtype_of_the_system():
    for name in ("identity", "shift"):
        r = recurrence(name, dtype=torch.float32)
        assert r.dense_transition().dtype == torch.float32
        assert r.dense_transition().shape == (1, 1, 1, 4, 4)
    B, C = softmax_system().to(torch.float32).dense_input_output()
    assert B.dtype == C.dtype == torch.float32
    assert C.shape == (2, 6, 4, 1, 6)
    assert torch.equal(B[0, :, 0, :, 0], torch.eye(6))


def test_a_cache_too_long_is_not_made_dense():
    length = 10**6
    q = torch.zeros(1, 1, 1, 1).expand(1, length, 1, 1)
    r = dsf.Recurrence(Identity(length), dsf.OneHot(length, length), dsf.SoftmaxRows(q, q))
    with pytest.raises(DsfMemoryError, match=r"dense C.*3.73e\+03 GiB"):
        r.dense_factors()


# -- what validate finds -----------------------------------------------------------------------

FAULTS = {
    "A is no transition": (dict(A=torch.ones(2)), DsfTypeError, "A: expected a dsf.transitions"),
    "B is a list": (dict(B=[1.0]), DsfTypeError, "B: expected torch.Tensor or dsf.OneHot"),
    "C is None": (dict(C=None), DsfTypeError, "C: expected torch.Tensor or dsf.MixingRows"),
    "D is a number": (dict(D=1.0), DsfTypeError, "D: expected torch.Tensor or None"),
    "integer B": (
        dict(B=torch.ones(2, 7, 3, 4, 1, dtype=torch.int64)),
        DsfTypeError, "B: expected a floating dtype, got torch.int64"),
    "C elsewhere": (
        dict(C=torch.ones(2, 7, 3, 1, 4, device="meta")), DsfShapeError,
        "C: expected on cpu like the first tensor, got meta"),
    "four axes of B": (
        dict(B=torch.ones(2, 7, 3, 4)), DsfShapeError,
        r"B: expected axes \('batch', .*, 'input'\), got shape \(2, 7, 3, 4\)"),
    "states of B": (
        dict(B=torch.ones(2, 7, 3, 8, 1)), DsfShapeError,
        r"B: expected axes \(batch=2, time=7, head=3, state=4, input=1\), got \(2, 7, 3, 8, 1\); "
        "state is fixed by A"),
    "states of C": (
        dict(C=torch.ones(2, 7, 3, 1, 8)), DsfShapeError,
        r"C: expected axes \(batch=2, time=7, head=3, output=1, state=4\)"),
    "outputs of D": (
        dict(D=torch.ones(1, 1, 1, 2, 1)), DsfShapeError, "output is fixed by C, input by B"),
    "time": (
        dict(B=torch.ones(2, 6, 3, 4, 1)), DsfShapeError,
        r"size 1 or equal in all fields, got A.log_decay \(2, 7, 3\), B \(2, 6, 3\)"),
    "batch of the initial state": (
        dict(initial_state=torch.ones(3, 3, 4, 1)), DsfShapeError,
        r"initial_state \(3, 1, 3\)"),
    "states of the initial state": (
        dict(initial_state=torch.ones(2, 3, 5, 1)), DsfShapeError,
        r"initial_state: expected axes \(batch=2, head=3, state=4, channel\)"),
    "axes of the initial state": (
        dict(initial_state=torch.ones(2, 4, 1)), DsfShapeError, "initial_state: expected axes"),
    "axes of A": (
        dict(A=Diagonal(torch.zeros(2, 7, 3))), DsfShapeError,
        r"A.log_decay: expected axes \('batch', 'time', 'head', 'state'\), got shape \(2, 7, 3\)"),
    "NaN in A": (
        dict(A=Diagonal(torch.full((2, 7, 3, 4), torch.nan))), DsfValueError,
        "A.log_decay: expected finite numbers, got 168 NaN or infinite of 168"),
    "growth without bound": (
        dict(A=Diagonal(torch.full((1, 1, 1, 4), torch.inf))), DsfValueError, "A.log_decay"),
    "endless phase": (
        dict(A=Diagonal(torch.zeros(1, 1, 1, 4), phase=torch.full((1, 1, 1, 4), -torch.inf))),
        DsfValueError, "A.phase: expected finite"),
    "infinite B": (
        dict(B=torch.full((1, 1, 1, 4, 1), torch.inf)), DsfValueError,
        "B: expected finite numbers, got 4"),
    "NaN in the initial state": (
        dict(initial_state=torch.full((2, 3, 4, 1), torch.nan)), DsfValueError, "initial_state"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_validate_names_the_fault(fault, unchecked):
    changes, kind, message = FAULTS[fault]
    r = recurrence("diagonal").replace(**changes)
    with pytest.raises(kind, match=message) as caught:
        r.validate()
    assert str(caught.value).startswith("dsf.Recurrence: ")


def test_validate_names_every_fault_at_once():
    r = recurrence("diagonal").replace(
        B=torch.ones(2, 7, 3, 8, 1), C=torch.ones(2, 7, 3, 1, 9), D=torch.ones(1, 1, 1, 5, 5)
    )
    with pytest.raises(DsfShapeError) as caught:
        r.validate()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[-2 if i else 1].strip()[0] for i, line in enumerate(lines)] == [
        "B", "C", "D"]  # fmt: skip


OWN_FAULTS = {
    "sign": (Scalar(torch.zeros(1, 1, 1), sign=torch.ones(1, 1, 1, 2), n_state=4), "A.sign"),
    "ranks": (
        DiagonalLowRank(torch.zeros(1, 1, 1, 4), left=torch.ones(1, 1, 1, 4, 2),
                        right=torch.ones(1, 1, 1, 4, 3)),
        r"A.right: expected axes \(batch, time, head, state=4, rank=2\)"),
    "square": (dsf.transitions.Dense(torch.ones(1, 1, 1, 3, 4)), "A.matrix"),
    "blocks": (BlockDiagonal(torch.ones(1, 1, 1, 3, 2, 2), 2), "expected block=2 or 1"),
    "shift": (Shift(4, -1), "A.amount: expected at least 0, got -1"),
    "directions": (
        dsf.transitions.Householder(torch.ones(2, 7, 3, 1), torch.ones(2, 7, 3, 4)),
        "A.write_strength"),
}  # fmt: skip


@pytest.mark.parametrize("fault", OWN_FAULTS)
def test_validate_looks_into_the_structure(fault):
    A, message = OWN_FAULTS[fault]
    with pytest.raises(DsfShapeError, match=message):
        recurrence("diagonal").replace(A=A).validate()


def test_a_decay_of_zero_is_legal():
    A = Diagonal(torch.full((1, 1, 1, 4), -torch.inf))
    assert recurrence("diagonal").replace(A=A).validate().A is A


def test_nonfinite_numbers_pass_when_asked_for():
    r = recurrence("diagonal").replace(B=torch.full((1, 1, 1, 4, 1), torch.nan))
    assert r.validate(allow_nonfinite=True) is r


def test_finite_numbers_whose_sum_overflows_are_fine():
    r = recurrence("diagonal", dtype=torch.float32)
    assert r.replace(B=torch.full((2, 7, 3, 4, 1), 3e38)).validate()


def test_validate_holds_for_every_structure():
    for name in STRUCTURES:
        for lead in [(2, 7, 3), (1, 1, 1)]:
            assert transition(name, 1, lead).shape_faults() == []
