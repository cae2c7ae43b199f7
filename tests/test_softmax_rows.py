"""Softmax rows in every form against a plain dense softmax."""

from __future__ import annotations

import laws
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from softmax_cases import CASES, HEAD, LENGTH, dense_softmax, rows_and_map, system_of
from structures import Draw
from torch.utils import _pytree as pytree

import dsf
from dsf import mixing_rows
from dsf.transitions import Identity

RTOL = 1e-12
"""float64 against the dense softmax."""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=RTOL, atol=RTOL)


causality = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


@causality
@pytest.mark.parametrize("case", CASES)
def test_softmax_rows_are_the_dense_softmax(case, causal):
    rows, weights = rows_and_map(case, causal)
    every = slice(0, LENGTH)
    assert rows.shape_faults() == []
    assert same(rows.tile(every, every), weights)
    assert torch.equal(rows.tile(slice(2, 5), slice(1, 8)), rows.tile(every, every)[..., 2:5, 1:8])
    for start, stop in [(0, 3), (4, 9), (8, 9)]:
        part = rows.time_slice(start, stop)
        assert part.shape == (2, stop - start, HEAD, 1, LENGTH)
        assert same(part.tile(slice(0, stop - start), every), weights[:, :, start:stop])


@causality
@pytest.mark.parametrize("case", CASES)
def test_mix_is_the_map_times_the_values(case, causal):
    """Through scaled_dot_product_attention or by tiles."""
    rows, weights = rows_and_map(case, causal)
    values = Draw(2).normal(2, HEAD, LENGTH, 3)
    assert same(rows.mix(values), weights @ values)
    assert same(rows.mix_part(values, "full", 0), weights @ values)
    for part, kept in [("causal", weights.tril()), ("anticausal", weights.triu()),
                       ("strict", weights.triu(1))]:  # fmt: skip
        assert same(rows.mix_part(values, part, 0), kept @ values)
    shared = values[:, :1]
    assert same(rows.mix(shared), weights @ shared)


@causality
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_softmax_systems_scan_to_the_map_times_the_values(case, causal, backend):
    rows, weights = rows_and_map(case, causal)
    system = system_of(rows)
    u = Draw(3).normal(2, LENGTH, HEAD, 3)
    expected = laws.apply_map(weights, u)
    y, _ = dsf.scan(system, u, backend, return_state=True)
    assert same(y, expected)
    assert same(dsf.materialise(system), weights)
    laws.tiles_are_parts_of_the_map(system)
    if causal:
        laws.no_token_sees_the_future(system, u, backend)


@given(
    case=st.sampled_from(CASES), causal=st.booleans(), seed=st.integers(0, 10_000),
    start=st.integers(0, LENGTH), size=st.integers(0, LENGTH),
)  # fmt: skip
def test_rows_sum_to_one_or_to_what_sink_and_masks_leave(case, causal, seed, start, size):
    rows, weights = rows_and_map(case, causal, seed)
    tile = rows.tile(slice(start, min(start + size, LENGTH)), slice(0, LENGTH))
    found, total = tile.sum(-1), weights[:, :, start : start + size].sum(-1)
    assert same(found, total)
    empty = total == 0
    if case not in ("sink", "all"):
        assert bool(((found - 1).abs()[~empty] <= 4 * 2.0**-53 * LENGTH).all())
    assert bool((tile[empty] == 0).all())


def test_row_sums_with_extreme_logits():
    """Scores of +-1e4 neither overflow nor lose the row sum; float32 rows to 4 units."""
    d = Draw(4, torch.float32)
    q, k = 300 * d.normal(1, 16, 1, 4), 300 * d.normal(1, 16, 1, 4)
    tile = dsf.SoftmaxRows(q, k).tile(slice(0, 16), slice(0, 16))
    assert bool(tile.isfinite().all())
    assert float((tile.sum(-1) - 1).abs().max()) <= 4 * 2.0**-24


def test_sixteen_bit_queries_are_scored_in_32_bits():
    d = Draw(5)
    q, k = (d.normal(1, 8, 2, 16).to(torch.bfloat16) for _ in range(2))
    tile = dsf.SoftmaxRows(q, k).tile(slice(0, 8), slice(0, 8))
    assert tile.dtype == torch.float32
    assert torch.allclose(tile.double(), dense_softmax(q.double(), k.double()), atol=1e-6)


def test_blocks_of_rows_are_invisible(monkeypatch):
    rows, weights = rows_and_map("all", False)
    values = Draw(6).normal(2, HEAD, LENGTH, 3)
    monkeypatch.setattr(mixing_rows, "_BLOCK_ENTRIES", 2 * LENGTH * 2 * HEAD)
    assert mixing_rows.block_rows(rows) == 2
    assert same(rows.mix(values), weights @ values)
    assert same(rows.tile(slice(0, LENGTH), slice(0, 2)), weights[..., :2])


# -- cuts in time, steps -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_slices_with_the_cache_handed_over_are_the_whole(case):
    rows, _ = rows_and_map(case, True)
    r = system_of(rows)
    u = Draw(7).normal(2, LENGTH, HEAD, 3)
    for backend in ("auto", "reference"):
        y, state = dsf.scan(r, u, backend, return_state=True)
        head, tail = dsf.slice_time(r, 0, 4), dsf.slice_time(r, 4, LENGTH)
        assert isinstance(tail.C, dsf.SoftmaxRows)
        y1, cache = dsf.scan(head, u[:, :4], backend, return_state=True)
        y2, last = dsf.scan(tail.replace(initial_state=cache), u[:, 4:], backend,
                            return_state=True)  # fmt: skip
        assert same(torch.cat([y1, y2], 1), y)
        assert torch.equal(last, state)
    laws.slices_make_the_whole(r, u, 4)


def test_steps_fill_the_cache():
    rows, weights = rows_and_map("window", True)
    r = system_of(rows)
    u = Draw(8).normal(2, LENGTH, HEAD, 3)
    laws.steps_are_scan(r, u)
    _, cache = dsf.scan(r, u, return_state=True)
    assert torch.equal(cache, u.transpose(1, 2))
    assert same(dsf.scan(r, u), laws.apply_map(weights, u))


def test_rows_never_read_a_slot_that_is_not_written_yet():
    """Rows that stand ahead of the cache: the fast path gives what the equation gives."""
    d = Draw(9)
    rows = dsf.SoftmaxRows(d.normal(1, 4, 2, 3), d.normal(1, 4, 2, 3), query_start=2)
    r = dsf.Recurrence(Identity(4), dsf.OneHot(4, 4), rows)
    u = d.normal(1, 4, 2, 3)
    assert same(dsf.scan(r, u), dsf.scan(r, u, "reference"))
    laws.no_token_sees_the_future(r, u)
    assert torch.equal(dsf.materialise(r), dsf.materialise(r).tril())


def test_slots_before_the_sequence_hold_the_initial_state():
    """A prefix of three slots that every row sees: values only through the initial state."""
    d = Draw(10)
    rows = dsf.SoftmaxRows(d.normal(1, 5, 2, 3), d.normal(1, 8, 2, 3), query_start=3)
    h0 = torch.cat([d.normal(1, 2, 3, 4), torch.zeros(1, 2, 5, 4, dtype=torch.float64)], 2)
    r = dsf.Recurrence(Identity(8), dsf.OneHot(5, 8, offset=3), rows, initial_state=h0)
    u = d.normal(1, 5, 2, 4)
    y = dsf.scan(r, u)
    weights = rows.tile(slice(0, 5), slice(0, 8))
    every = torch.cat([h0[:, :, :3], u.transpose(1, 2)], 2)
    assert same(y, (weights @ every).transpose(1, 2))
    assert same(y, dsf.scan(r, u, "reference"))
    assert same(dsf.materialise(r), weights[..., 3:])


def test_a_direct_term_beside_softmax_rows():
    rows, weights = rows_and_map("plain", True)
    r = system_of(rows).replace(D=Draw(11).normal(1, 1, HEAD, 1, 1))
    u = Draw(12).normal(2, LENGTH, HEAD, 3)
    assert same(dsf.scan(r, u), laws.apply_map(weights, u) + r.D[..., 0] * u)
    assert same(laws.apply_map(dsf.materialise(r), u), dsf.scan(r, u))
    for strict in (False, True):
        back = dsf.anticausal(r, strict=strict)
        assert same(laws.apply_map(dsf.materialise(back), u), dsf.scan(back, u, "reference"))


# -- transforms --------------------------------------------------------------------------------


@causality
@pytest.mark.parametrize("case", ["plain", "closed_bias", "all"])
def test_softmax_systems_are_differentiable(case, causal):
    rows, _ = rows_and_map(case, causal)
    short = rows.time_slice(0, 3)
    system = dsf.Recurrence(Identity(LENGTH), dsf.OneHot(3, LENGTH), short)
    if not causal:
        system = dsf.Bidirectional.from_rows(system)
    leaves, spec = pytree.tree_flatten(system)
    leaves = [x.clone() for x in leaves]
    u = Draw(13).normal(2, 3, HEAD, 1)
    inputs = [x.requires_grad_() if x.is_floating_point() and bool(x.isfinite().all()) else x
              for x in [*leaves, u]]  # fmt: skip

    def run(backend):
        def scan(*tensors):
            whole = pytree.tree_unflatten(list(tensors[:-1]), spec)
            return dsf.scan(whole, tensors[-1], backend)

        return scan

    assert torch.autograd.gradcheck(run("auto"), inputs, fast_mode=True)
    assert torch.autograd.gradcheck(run("chunked"), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run("chunked"), inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_pytree():
    systems = [system_of(rows_and_map("bias", True, seed)[0]) for seed in (14, 15)]
    u = [Draw(i).normal(2, LENGTH, HEAD, 3) for i in range(2)]
    laws.vmap_is_a_loop(systems, u)
    leaves, spec = pytree.tree_flatten(systems[0])
    assert [x.shape for x in leaves] == [(2, 9, 4, 5), (2, 9, 2, 5), (2, 4, 9, 9)]
    assert torch.equal(dsf.scan(pytree.tree_unflatten(leaves, spec), u[0]),
                       dsf.scan(systems[0], u[0]))  # fmt: skip


@causality
def test_compiles_in_one_graph(causal):
    rows, _ = rows_and_map("bias", causal)
    laws.compiles_in_one_graph(system_of(rows), Draw(16).normal(2, LENGTH, HEAD, 3))


def test_complex_values_and_mixed_precision():
    rows, weights = rows_and_map("plain", True)
    r = system_of(rows)
    u = Draw(17).complex_normal(2, LENGTH, HEAD, 3)
    assert same(dsf.scan(r, u), laws.apply_map(weights, u))
    wide = dsf.scan(r.to(torch.float32), u.real)
    assert wide.dtype == torch.float64
    narrow = weights.clone()
    assert torch.allclose(wide, laws.apply_map(narrow, u.real), rtol=1e-5, atol=1e-5)
