"""Systems made of systems: each against the same done to the maps."""

from __future__ import annotations

import itertools

import laws
import pytest
import torch
from structures import STRUCTURES, Draw, complex_structure, recurrence, values_for

import dsf
from dsf.errors import DsfShapeError, DsfTypeError
from dsf.transitions import Dense, Diagonal, Shift

names = pytest.mark.parametrize("name", STRUCTURES)
partners = pytest.mark.parametrize("partner", ["scalar", "diagonal_complex", "shift", "dense"])
MAP_RTOL = 1e-12
"""Maps in float64 against products of maps."""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.allclose(a.to(wide), b.to(wide), rtol=MAP_RTOL, atol=MAP_RTOL)


def product(later: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(later.dtype, earlier.dtype)
    return later.to(wide) @ earlier.to(wide)


@names
@partners
@pytest.mark.parametrize("direct", [(True, True), (True, False), (False, True), (False, False)])
def test_a_series_has_the_product_of_the_maps(name, partner, direct):
    one = recurrence(name, 1, length=5, direct=direct[0])
    two = recurrence(partner, 2, length=5, direct=direct[1])
    both = dsf.series(two, one).validate()
    assert both.n_state == 8
    assert same(dsf.materialise(both), product(dsf.materialise(two), dsf.materialise(one)))


@names
@partners
def test_a_series_runs_one_after_the_other_from_both_initial_states(name, partner):
    one = recurrence(name, 3, length=5, initial=3)
    for two in (recurrence(partner, 4, length=5, initial=3), recurrence(partner, 4, length=5)):
        u = values_for(one, 3, channel=3)
        both = dsf.series(two, one)
        assert same(dsf.scan(both, u), dsf.scan(two, dsf.scan(one, u)))


def test_a_series_of_several_inputs_and_outputs():
    one = recurrence("dense", 5, n_input=2, n_output=3)
    two = recurrence("diagonal", 6, n_input=3, n_output=4)
    u = values_for(one, 5)
    assert same(dsf.scan(dsf.series(two, one), u), dsf.scan(two, dsf.scan(one, u)))
    with pytest.raises(DsfShapeError, match="later: expected input=4, got 2"):
        dsf.series(one, two)


@names
@partners
def test_a_parallel_has_the_sum_of_the_maps(name, partner):
    one = recurrence(name, 7, initial=3, direct=False)
    two = recurrence(partner, 8)
    both = dsf.parallel(one, two).validate()
    maps = [dsf.materialise(r) for r in (one, two)]
    assert same(dsf.materialise(both), maps[0] + maps[1])
    u = values_for(one, 7, channel=3)
    assert same(dsf.scan(both, u), dsf.scan(one, u) + dsf.scan(two, u))


def test_decays_in_parallel_stay_diagonal_and_in_logarithms():
    r = recurrence("diagonal", 9, dtype=torch.float32)
    slow = r.replace(A=Diagonal(torch.full((1, 1, 1, 4), -1e-9)))
    for other in ("identity", "scalar_signed", "diagonal_complex"):
        both = dsf.parallel(slow, recurrence(other, 10, dtype=torch.float32))
        assert isinstance(both.A, Diagonal)
        assert bool((both.A.log_decay[..., :4] == torch.tensor(-1e-9)).all())
    with pytest.raises(DsfShapeError, match="b: expected input=1, output=1"):
        dsf.parallel(r, recurrence("diagonal", n_input=2))


def test_time_invariant_systems_stay_time_invariant():
    one = recurrence("diagonal", 11, time_invariant=True)
    two = recurrence("shift", 12, time_invariant=True)
    for both, whole in [(dsf.series(two, one), lambda a, b: b @ a),
                        (dsf.parallel(two, one), lambda a, b: a + b)]:  # fmt: skip
        assert both.length == 1
        maps = [dsf.materialise(r, length=6) for r in (one, two)]
        assert same(dsf.materialise(both, length=6), whole(*maps))


def test_the_weaker_claim_about_a_mode_is_kept():
    exact = recurrence("diagonal")
    along = exact.replace(mode="exact_along_trajectory")
    linear = exact.replace(mode="linearised")
    assert dsf.series(exact, along).mode == "exact_along_trajectory"
    assert dsf.series(along, linear).mode == "linearised"
    assert dsf.parallel(linear, along).mode == "linearised"
    assert dsf.parallel(exact, exact).mode == "exact"


@pytest.mark.parametrize("name", [n for n in STRUCTURES if complex_structure(n)])
def test_real_parts_of_complex_systems(name):
    r = recurrence(name, 13, initial=5).replace(real_output=True)
    u = values_for(r, 13)
    real = dsf.realified(r)
    assert not real.dtype.is_complex
    assert real.n_state == 8
    assert same(dsf.scan(real, u), dsf.scan(r, u))
    assert same(dsf.materialise(real), dsf.materialise(r))
    other = recurrence("scalar", 14)
    for both, expected in [
        (dsf.series(other, r), dsf.scan(other, dsf.scan(r, u))),
        (dsf.series(r, other), dsf.scan(r, dsf.scan(other, u))),
        (dsf.parallel(r, other), dsf.scan(r, u) + dsf.scan(other, u)),
    ]:
        assert not both.dtype.is_complex
        assert same(dsf.scan(both, u), expected)
    with pytest.raises(DsfTypeError, match="both systems complex or both real"):
        dsf.series(r, recurrence(name, 15))


@names
def test_skip_adds_the_input(name):
    for direct in (True, False):
        r = recurrence(name, 16, n_input=2, n_output=2, direct=direct)
        u = values_for(r, 16)
        assert same(dsf.scan(dsf.skip(r, 0.5), u), dsf.scan(r, u) + 0.5 * u)
    with pytest.raises(DsfShapeError, match="as many outputs as inputs"):
        dsf.skip(recurrence(name, n_output=2))


@names
def test_a_change_of_basis_leaves_the_map_alone(name):
    laws.basis_leaves_the_map_alone(recurrence(name, 17))


def test_a_change_of_basis_moves_the_initial_state_and_may_be_one_for_all_steps():
    r = recurrence("diagonal", 18, initial=5)
    u = values_for(r, 18)
    basis = torch.eye(4, dtype=torch.float64) + 0.2 * Draw(19).normal(1, 1, 3, 4, 4)
    assert same(dsf.scan(dsf.change_of_basis(r, basis), u), dsf.scan(r, u))
    per_step = basis + 0.1 * Draw(20).normal(1, 8, 3, 4, 4)
    assert same(dsf.scan(dsf.change_of_basis(r, per_step), u), dsf.scan(r, u))
    permutation = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]][None, None, None]
    assert same(dsf.materialise(dsf.change_of_basis(r, permutation)), dsf.materialise(r))
    with pytest.raises(DsfShapeError, match=r"basis: expected axes \(batch, time=8 or 1"):
        dsf.change_of_basis(r, basis.expand(1, 3, 3, 4, 4))


# -- cuts and joins ----------------------------------------------------------------------------


@names
@pytest.mark.parametrize("cuts", [(3,), (1, 6), (2, 2, 5)])
def test_joined_slices_are_the_whole_and_keep_the_structure(name, cuts):
    r = recurrence(name, 21, initial=5)
    edges = [0, *cuts, 7]
    parts = [dsf.slice_time(r, a, b) for a, b in itertools.pairwise(edges)]
    joined = dsf.concatenate_time(parts).validate()
    assert joined.length == 7
    assert joined.structure == r.structure
    assert torch.equal(dsf.materialise(joined), dsf.materialise(r))


def test_parts_of_other_structures_meet_at_dense():
    parts = [recurrence(n, 22 + i, length=3) for i, n in enumerate(STRUCTURES)]
    joined = dsf.concatenate_time(parts)
    assert isinstance(joined.A, Dense)
    u = values_for(joined, 22)
    state, outputs = None, []
    for i, p in enumerate(parts):
        y, state = dsf.scan(p.replace(initial_state=state), u[:, 3 * i : 3 * i + 3],
                            return_state=True)  # fmt: skip
        outputs.append(y.to(torch.complex128))
    assert same(dsf.scan(joined, u), torch.cat(outputs, 1))


def test_parts_of_one_structure_but_other_sizes_meet_at_dense():
    one = recurrence("shift", 23)
    two = one.replace(A=Shift(4, 2))
    joined = dsf.concatenate_time([one, two])
    assert isinstance(joined.A, Dense)
    assert joined.A.as_dense()[0, 0, 0, 1, 0] == 1
    assert joined.A.as_dense()[0, 7, 0, 2, 0] == 1


def test_signs_and_phases_are_filled_in():
    plain, signed = recurrence("diagonal", 24), recurrence("diagonal_signed", 25)
    turned = recurrence("diagonal_complex", 26)
    joined = dsf.concatenate_time([plain, signed, turned])
    assert isinstance(joined.A, Diagonal)
    expected = torch.cat([x.A.as_dense().to(torch.complex128) for x in (plain, signed, turned)], 1)
    assert same(joined.A.as_dense(), expected)


def test_direct_terms_of_some_parts_only():
    parts = [recurrence("diagonal", 27, direct=False), recurrence("diagonal", 28)]
    joined = dsf.concatenate_time(parts)
    assert torch.equal(joined.D[:, :7], torch.zeros_like(joined.D[:, :7]))
    assert torch.equal(joined.D[:, 7:], parts[1].D.expand(2, 7, 3, 1, 1))


def test_what_cannot_be_cut_or_joined_is_refused():
    r = recurrence("diagonal")
    for start, stop in [(-1, 3), (4, 3), (0, 8)]:
        with pytest.raises(DsfShapeError, match="0 <= start <= stop <= 7"):
            dsf.slice_time(r, start, stop)
    with pytest.raises(DsfShapeError, match="at least one"):
        dsf.concatenate_time([])
    with pytest.raises(DsfShapeError, match=r"expected \(state, input, output, real_output\)"):
        dsf.concatenate_time([r, recurrence("diagonal", n_output=2)])
