"""Backwards, both ways, and gated: each against flips, sums and products."""

from __future__ import annotations

import laws
import pytest
import torch
from structures import SMOOTH, STRUCTURES, Draw, recurrence, values_for
from torch.utils import _pytree as pytree

import dsf
from dsf.errors import DsfShapeError
from dsf.transitions import Identity
from dsf.wrappers import core, total_length

names = pytest.mark.parametrize("name", STRUCTURES)
backends = pytest.mark.parametrize("backend", ["auto", "reference"])
RTOL = 1e-12
"""float64 outputs against flips and sums of others."""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.allclose(a.to(wide), b.to(wide), rtol=RTOL, atol=RTOL)


@names
@backends
def test_backwards_is_flip_scan_flip(name, backend):
    r = recurrence(name, 1, n_input=2, n_output=3, initial=5)
    u = values_for(r, 1)
    y, state = dsf.scan(dsf.anticausal(r), u, backend, return_state=True)
    flipped, last = dsf.scan(r.flip_time(), u.flip(1), backend, return_state=True)
    assert torch.equal(y, flipped.flip(1))
    assert torch.equal(state, last)


@names
@backends
def test_strict_leaves_out_the_token_itself(name, backend):
    r = recurrence(name, 2, n_input=2, n_output=3, initial=5)
    u = values_for(r, 2)
    y, state = dsf.scan(dsf.anticausal(r, strict=True), u, backend, return_state=True)
    full, last = dsf.scan(dsf.anticausal(r), u, backend, return_state=True)
    wide = torch.complex128
    own = r.C.to(wide) @ (r.B.to(wide) @ u.to(wide))
    assert same(y, full.to(wide) - own)
    assert same(state, last)


@names
def test_strict_outputs_are_untouched_by_the_token_itself_bit_for_bit(name):
    """Also where the token is 1e30 times the rest: nothing is subtracted."""
    r = recurrence(name, 3, direct=False)
    u = values_for(r, 3)
    loud = u.clone()
    loud[:, :3] *= 1e30
    system = dsf.anticausal(r, strict=True)
    for backend in ("auto", "reference"):
        quiet, found = dsf.scan(system, u, backend), dsf.scan(system, loud, backend)
        assert torch.equal(found[:, 2:], quiet[:, 2:])


@names
def test_maps_of_backward_systems(name):
    r = recurrence(name, 4)
    u = values_for(r, 4)
    for strict in (False, True):
        system = dsf.anticausal(r, strict=strict)
        weights = dsf.materialise(system)
        assert same(laws.apply_map(weights, u), dsf.scan(system, u))
        below = torch.ones(7, 7, dtype=torch.bool).tril(-1)
        assert bool((weights[:, :, below] == 0).all())
        if strict:  # D alone stands on the diagonal
            diagonal = weights.diagonal(dim1=2, dim2=3)
            assert same(diagonal, r.D[:, 0, :, 0].expand_as(diagonal))


@names
@backends
def test_both_ways_is_the_sum(name, backend):
    r, other = recurrence(name, 5, initial=5), recurrence("dense", 6)
    u = values_for(r, 5)
    for strict in (False, True):
        back = dsf.anticausal(other, strict=strict)
        system = dsf.Bidirectional(r, back)
        y, states = dsf.scan(system, u, backend, return_state=True)
        y1, s1 = dsf.scan(r, u, backend, return_state=True)
        y2, s2 = dsf.scan(back, u, backend, return_state=True)
        assert same(y, y1 + y2)
        assert torch.equal(states[0], s1)
        assert torch.equal(states[1], s2)
        assert same(dsf.materialise(system), dsf.materialise(r) + dsf.materialise(back))
        laws.tiles_are_parts_of_the_map(system)


def test_strict_scans_of_short_sequences():
    for length in (0, 1, 2):
        r = recurrence("diagonal", 7, length=length, direct=False)
        u = values_for(r, 7)
        y = dsf.scan(dsf.anticausal(r, strict=True), u)
        assert y.shape == u.shape
        assert torch.equal(y[:, -1:], torch.zeros_like(u[:, -1:]))


@pytest.mark.parametrize("name", SMOOTH)
def test_strict_scans_are_differentiable(name):
    r = recurrence(name, 8, batch=1, length=3, head=1, initial=1)
    leaves, spec = pytree.tree_flatten(dsf.anticausal(r, strict=True))
    u = values_for(r, 8, batch=1, head=1, channel=1)
    inputs = [x.detach().clone().requires_grad_() for x in [*leaves, u]]

    def run(*tensors):
        return dsf.scan(pytree.tree_unflatten(list(tensors[:-1]), spec), tensors[-1])

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_time_invariant_systems_run_backwards_too():
    r = recurrence("diagonal", 9, time_invariant=True)
    u = values_for(r, 9, length=6)
    system = dsf.anticausal(r, strict=True)
    assert same(dsf.scan(system, u, "reference"), dsf.scan(system, u))
    assert same(laws.apply_map(dsf.materialise(system, length=6), u), dsf.scan(system, u))


# -- gates -------------------------------------------------------------------------------------


def test_a_gate_shared_by_channels_goes_into_the_output_matrices():
    r = recurrence("diagonal", 10)
    gate = Draw(11).uniform(2, 7, 3, 1)
    system = dsf.gated(gate, r)
    assert isinstance(system, dsf.Recurrence)
    assert same(dsf.scan(system, values_for(r)), gate * dsf.scan(r, values_for(r)))


def test_other_gates_keep_their_wrapper_and_multiply():
    r = recurrence("diagonal", 12)
    one, two = Draw(13).uniform(2, 7, 3, 5), Draw(14).uniform(1, 1, 1, 5)
    system = dsf.gated(two, dsf.gated(one, r))
    assert isinstance(system, dsf.Gated)
    assert system.system is r
    u = values_for(r)
    assert same(dsf.scan(system, u), two * one * dsf.scan(r, u))
    back = dsf.gated(one, dsf.anticausal(r))
    assert same(dsf.scan(back, u), one * dsf.scan(dsf.anticausal(r), u))


def test_gated_systems_step():
    r = recurrence("diagonal", 15)
    gate = Draw(16).uniform(2, 7, 3, 5)
    u = values_for(r)
    state, outputs = None, []
    for t in range(7):
        now = dsf.Gated(r.time_slice(t, t + 1), gate[:, t : t + 1])
        y, state = dsf.step(now, u[:, t], state)
        outputs.append(y)
    assert same(torch.stack(outputs, 1), dsf.scan(dsf.Gated(r, gate), u))


def test_gates_that_do_not_fit_are_refused():
    r = recurrence("diagonal")
    with pytest.raises(DsfShapeError, match=r"gate: expected axes \(batch, time, head, channel\)"):
        dsf.gated(torch.ones(2, 7), r)
    for shape in [(2, 6, 3, 5), (2, 7, 3, 4), (3, 7, 3, 5)]:
        with pytest.raises(DsfShapeError, match=r"gate: expected axes \(batch=2, time=7, head=3"):
            dsf.scan(dsf.Gated(r, torch.ones(shape)), values_for(r))


# -- sizes, pytrees ----------------------------------------------------------------------------


def test_core_and_length_look_through_the_wrappers():
    r = recurrence("diagonal", 17)
    constant = recurrence("diagonal", 17, time_invariant=True)
    back = dsf.anticausal(constant)
    both = dsf.Bidirectional(constant, dsf.anticausal(r))
    gated = dsf.Gated(both, torch.ones(1, 7, 1, 2))
    assert core(gated) is constant
    assert core(back) is constant
    assert [total_length(s) for s in (r, constant, back, both, gated)] == [7, 1, 1, 7, 7]
    assert total_length(constant, values_for(constant, length=9)) == 9
    with pytest.raises(DsfShapeError, match="one length in all parts"):
        total_length(dsf.Gated(r, torch.ones(1, 5, 1, 1)))


def test_wrappers_are_pytrees():
    r = recurrence("diagonal", 18)
    both = dsf.Bidirectional(r, dsf.anticausal(recurrence("dense", 19), strict=True))
    system = dsf.Gated(both, Draw(20).uniform(2, 7, 3, 5))
    u = values_for(r)
    leaves, spec = pytree.tree_flatten(system)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.system.anticausal.strict
    assert torch.equal(dsf.scan(again, u), dsf.scan(system, u))
    stacked = pytree.tree_map(lambda x: torch.stack([x, 2 * x.clamp(max=0)]), system)
    together = torch.func.vmap(dsf.scan)(stacked, torch.stack([u, u]))
    assert same(together[0], dsf.scan(system, u))


@pytest.mark.parametrize("initial", [False, True])
def test_both_halves_of_one_map_count_everything_once(initial):
    d = Draw(21)
    rows = dsf.ExplicitRows(d.normal(2, 3, 7, 7), causal=False)
    h0 = d.normal(2, 3, 7, 5) if initial else None
    r = dsf.Recurrence(Identity(7), dsf.OneHot(7, 7), rows, D=d.normal(1, 1, 3, 1, 1),
                       initial_state=h0)  # fmt: skip
    system = dsf.Bidirectional.from_rows(r)
    assert system.is_one_map
    u = d.normal(2, 7, 3, 5)
    expected = torch.einsum("bhtj,bjhp->bthp", rows.weights, u) + r.D[..., 0] * u
    if h0 is not None:
        expected = expected + torch.einsum("bhtj,bhjp->bthp", rows.weights, h0)
    for backend in ("auto", "chunked", "reference"):
        assert same(dsf.scan(system, u, backend), expected)
    eye = torch.eye(7, dtype=torch.float64)
    assert same(dsf.materialise(system), rows.weights + r.D[0, 0, :, :, 0, None] * eye)
    again = pytree.tree_map(lambda x: x.clone(), system)  # the sharing is lost, the sum is not
    assert same(dsf.scan(again, u), expected)
