"""Row sums by scans and rows read one by one, against the map; distances, windows, keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from decays import FAMILIES, decay_parts

import dsf
from dsf import measures
from dsf.errors import DsfMemoryError, DsfShapeError, DsfTypeError, DsfValueError
from dsf.measures._maps import open_map
from dsf.measures._row_scans import scanned_sums
from dsf.measures._row_tiles import all_rows, chosen_rows
from dsf.measures._rows import row_sums
from dsf.transitions import Dense, Diagonal, Identity, Scalar

NEAR = 1e-12
TIGHT = 1e-13
LENGTHS = (1, 2, 15, 16, 17, 37)
CHUNK = 16


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def with_decay(A, length: int, states: int, *, D: bool = True, seed: int = 0) -> dsf.Recurrence:
    dtype = torch.complex128 if A.is_complex else torch.float64
    B = random(1, length, 2, states, 1, seed=seed + 1, dtype=dtype)
    C = random(1, length, 2, 1, states, seed=seed + 2, dtype=dtype)
    direct = random(1, length, 2, 1, 1, seed=seed + 3) if D else None
    return dsf.Recurrence(A, B, C, direct, real_output=A.is_complex)


def diagonal(family: str, length: int, states: int) -> dsf.Recurrence:
    log, sign, phase = decay_parts(family, (1, length, 2, states), 3, torch.float64)
    return with_decay(Diagonal(log, sign, phase), length, states)


def agree(found, expected, *, fields: Sequence[str]) -> None:
    """Within round-off of the row's size."""
    size = 1 + expected.absolute
    for name in fields:
        a, b = getattr(found, name), getattr(expected, name)
        scale = size**2 if name == "squares" else size
        scale = scale * expected.count.clamp(min=1) if name == "distance" else scale
        assert a.shape == b.shape, name
        assert float(((a - b).abs() / scale).max()) <= TIGHT, name


LINEAR = ("count", "mean", "squares", "first")
SIGNED = (*LINEAR, "absolute", "negative", "n_negative", "distance")


def by_tiles(system):
    return row_sums(open_map(system), scans=False)


# -- by scans ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_scanned_sums_are_those_of_the_map(family: str, length: int) -> None:
    for states in (1, 3):
        r = diagonal(family, length, states)
        found = scanned_sums(open_map(r), CHUNK)
        assert found is not None
        agree(found, by_tiles(r), fields=LINEAR)


@pytest.mark.parametrize("family", [f for f in FAMILIES if "complex" not in f])
def test_signs_of_one_state_by_scans(family: str) -> None:
    """Sums of |w|, negative sums and counts, distances: |c X| = |c| |X| for one state."""
    for length in LENGTHS:
        r = diagonal(family, length, 1)
        found = scanned_sums(open_map(r), CHUNK, signed=True)
        assert found is not None
        expected = by_tiles(r)
        agree(found, expected, fields=[f for f in SIGNED if f != "n_negative"])
        below = found.n_negative - expected.n_negative
        assert bool((below >= 0).all())  # a map's weights underflow to zero, a count does not
        if family in ("one", "half", "negative", "alternating_sign"):
            assert bool((below == 0).all())


def test_signs_of_coefficients_without_negative_entries_by_scans() -> None:
    length, states = 37, 4
    r = with_decay(Diagonal(-random(1, length, 2, states).abs()), length, states)
    r = r.replace(B=r.B.abs(), C=r.C.abs(), D=r.D.abs())
    found = scanned_sums(open_map(r), CHUNK, signed=True)
    assert found is not None
    agree(found, by_tiles(r), fields=SIGNED)
    assert bool((found.negative == 0).all())
    assert scanned_sums(open_map(r.replace(C=-r.C)), CHUNK, signed=True) is None
    mixed = r.replace(D=-r.D)
    assert scanned_sums(open_map(mixed), CHUNK, signed=True) is None


@pytest.mark.parametrize("D", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_scanned_sums_backwards(D: bool, strict: bool) -> None:
    for length in LENGTHS:
        A = Diagonal(-random(1, length, 2, 3).abs())
        system = dsf.anticausal(with_decay(A, length, 3, D=D), strict=strict)
        found = scanned_sums(open_map(system), CHUNK)
        assert found is not None
        agree(found, by_tiles(system), fields=("count", "mean", "squares"))


def test_other_structures_and_what_scans_leave_alone() -> None:
    length = 37
    dense = with_decay(Dense(random(1, length, 2, 3, 3) / 3), length, 3)
    scalar = with_decay(Scalar(-random(1, length, 2).abs(), n_state=3), length, 3)
    for r in (dense, scalar, with_decay(Identity(3), length, 3)):
        found = scanned_sums(open_map(r), CHUNK)
        assert found is not None
        agree(found, by_tiles(r), fields=LINEAR)
    q = random(1, length, 2, 3)
    rows = dsf.SoftmaxRows(q, q)
    softmax = dsf.Recurrence(Identity(length), dsf.OneHot(length, length), rows)
    for system in (
        softmax,
        dsf.materialise(dense),
        dsf.Bidirectional(dense, dsf.anticausal(dense)),
    ):
        assert scanned_sums(open_map(system)) is None
    several = dense.replace(B=random(1, length, 2, 3, 2), D=None)
    assert scanned_sums(open_map(several)) is None
    wide = with_decay(Diagonal(torch.zeros(1, 1, 1, 90, dtype=torch.float64)), 8, 90, D=False)
    assert scanned_sums(open_map(wide)) is None
    assert measures.row_sum(dense).attrs["method"] == "float64 scans, no map"
    assert measures.row_sum(softmax).attrs["method"] == "float64 sums by tiles"


def test_overflowing_gauges_fall_back_to_the_map() -> None:
    """exp(+-400) in keys and queries: the Gram matrix overflows, the weights do not."""
    length = 20
    r = with_decay(Identity(2), length, 2, D=False)
    r = r.replace(B=r.B * math.exp(400), C=r.C * math.exp(-400))
    assert scanned_sums(open_map(r), 8) is None
    plain = with_decay(Identity(2), length, 2, D=False)
    np.testing.assert_allclose(measures.spread(r, block=8), measures.spread(plain), rtol=1e-10)


def test_a_nearly_uniform_row_keeps_its_spread() -> None:
    """Spread 1e-9 of a mean of 1: centred sums keep seven digits, sums of squares none."""
    length = 400
    s = 1e-9 * random(1, length, 1, 1, 1)
    B = torch.cat([torch.ones_like(s), s], 3)
    C = torch.ones(1, length, 1, 1, 2, dtype=torch.float64)
    found = measures.spread(dsf.Recurrence(Identity(2), B, C))[0, 0, -1]
    assert float(found) == pytest.approx(s.std(unbiased=False).item(), rel=1e-7)


# -- some rows alone ---------------------------------------------------------------------------


def systems(length: int) -> dict[str, object]:
    A = Diagonal(-random(1, length, 2, 3).abs())
    r, q = with_decay(A, length, 3), random(1, length, 2, 3)
    pairs = diagonal("complex damped", length, 3) if "complex damped" in FAMILIES else r
    softmax = dsf.Recurrence(Identity(length), dsf.OneHot(length, length), dsf.SoftmaxRows(q, q))
    return {
        "causal": r, "complex": pairs, "backwards": dsf.anticausal(r),
        "strict": dsf.anticausal(r, strict=True),
        "strict without D": dsf.anticausal(r.replace(D=None), strict=True),
        "both ways": dsf.Bidirectional(r, dsf.anticausal(r.replace(D=None), strict=True)),
        "gated": dsf.Gated(r, random(1, length, 2, 4, seed=9)),
        "gated by head": dsf.Gated(r, random(1, length, 1, 1, seed=9)),
        "softmax": softmax, "map": dsf.materialise(r), "array": dsf.attention_map(softmax),
    }  # fmt: skip


@pytest.mark.parametrize("length", [1, 150])
@pytest.mark.parametrize("name", list(systems(2)))
def test_chosen_rows_are_those_of_all(name: str, length: int) -> None:
    system = systems(length)[name]
    at = sorted({0, length // 2, length - 1})
    for measure in (measures.row_sum, measures.spread, measures.entropy, measures.l1_mass,
                    measures.negative_count_share, measures.receptive_field,
                    measures.first_token_share, measures.attention_distance):  # fmt: skip
        some, every = measure(system, queries=at), measure(system)
        assert some["query"].values.tolist() == at
        assert some.attrs["n_query"] == length
        np.testing.assert_allclose(some.values, every.values[..., at], rtol=1e-9, atol=1e-12)
    assert measures.entropy(system, queries=at, block=1).equals(measures.entropy(
        system, queries=at, block=1))  # fmt: skip


def test_a_sample_is_stratified_stated_and_repeatable() -> None:
    r = with_decay(Identity(3), 300, 3)
    found = measures.negative_mass(r, queries=10)
    at = found["query"].values
    assert all(30 * i <= t < 30 * (i + 1) for i, t in enumerate(at))
    assert "10 of 300 rows, one from each equal stretch" in found.attrs["method"]
    assert measures.negative_mass(r, queries=10).identical(found)
    assert all_rows(3).positions == [0, 1, 2]
    full = chosen_rows("f", 7, 7)
    assert full is not None
    assert full.positions == list(range(7))


def test_means_over_rows_and_their_standard_errors() -> None:
    r = with_decay(Identity(3), 400, 3)
    every = measures.query_mean(measures.negative_count_share(r))
    assert np.all(every.standard_error == 0)
    assert every.n.values.tolist() == [[400, 400]]
    whole = measures.negative_count_share(r)
    np.testing.assert_allclose(every["mean"], whole.mean("query"), rtol=NEAR)
    some = measures.negative_count_share(r, queries=80)
    sampled = measures.query_mean(some)
    gap = abs(sampled["mean"] - every["mean"])
    assert bool((gap <= 4 * sampled.standard_error).all())
    assert bool((sampled.standard_error > 0).all())
    s = some.values.std(-1, ddof=1)
    np.testing.assert_allclose(
        sampled.standard_error, np.sqrt((1 - 80 / 400) / 80) * s, rtol=NEAR)  # fmt: skip
    later = measures.query_mean(whole, start=1)
    np.testing.assert_allclose(later["mean"], whole.values[..., 1:].mean(-1), rtol=NEAR)
    assert bool(
        measures.query_mean(measures.row_sum(r, queries=[3])).standard_error.isnull().all()
    )
    with pytest.raises(DsfShapeError, match="expected a dim query"):
        measures.query_mean(measures.effective_rank(r))
    with pytest.raises(DsfValueError, match="expected rows from 400 on"):
        measures.query_mean(whole, start=400)


def test_rows_that_are_not_there_are_refused(unchecked) -> None:
    r = with_decay(Identity(2), 5, 2)
    for bad in (0, 6, [5], [-1], []):
        with pytest.raises(DsfValueError, match=r"dsf\.row_sum: queries: expected"):
            measures.row_sum(r, queries=bad)
    for bad in (True, 2.0):
        with pytest.raises(DsfTypeError, match=r"row_sum: queries: expected a number"):
            measures.row_sum(r, queries=bad)


# -- what rows are asked -----------------------------------------------------------------------


def uniform(length: int) -> dsf.Recurrence:
    q = torch.zeros(1, length, 1, 2, dtype=torch.float64)
    return dsf.Recurrence(Identity(length), dsf.OneHot(length, length), dsf.SoftmaxRows(q, q))


def test_uniform_rows_have_the_distances_of_counting() -> None:
    t = np.arange(1, 25)
    assert np.allclose(measures.attention_distance(uniform(24))[0, 0], (t - 1) / 2, rtol=NEAR)
    field = measures.receptive_field(uniform(24), 0.5)[0, 0]
    assert field.values.tolist() == [math.ceil(n / 2) for n in t]
    assert np.allclose(measures.participation(uniform(24))[0, 0], t, rtol=NEAR)
    assert np.allclose(measures.l1_mass(uniform(24)), 1, rtol=NEAR)


def test_rows_by_hand() -> None:
    w = torch.tensor([[2.0, 0, 0], [3, -1, 0], [-2, 1, -1]], dtype=torch.float64)[None, None]
    assert measures.l1_mass(w)[0, 0].values.tolist() == [2, 4, 4]
    expected = [1, 16 / 10, 16 / 6]
    assert np.allclose(measures.participation(w)[0, 0], expected, rtol=NEAR)
    assert measures.attention_distance(w)[0, 0].values.tolist() == [0, 0.75, 1.25]
    fields = {m: measures.receptive_field(w, m)[0, 0].values.tolist() for m in (0.25, 0.5, 1.0)}
    assert fields == {0.25: [1, 1, 1], 0.5: [1, 2, 2], 1.0: [1, 2, 3]}
    both = torch.tensor([[0.0, 1, 3], [1, 0, 1], [1, 1, 2]], dtype=torch.float64)[None, None]
    assert measures.receptive_field(both, 1.0)[0, 0].values.tolist() == [3, 2, 3]
    assert measures.attention_distance(both)[0, 0].values.tolist() == [7 / 4, 1, 0.75]


def test_fields_of_rows_of_zeros_and_of_one_key() -> None:
    zeros = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    for name in ("participation", "attention_distance", "receptive_field"):
        assert np.isnan(getattr(measures, name)(zeros)).all(), name
    assert np.all(measures.l1_mass(zeros) == 0)
    eye = torch.eye(5, dtype=torch.float64)[None, None]
    assert np.all(measures.participation(eye) == 1)
    assert np.all(measures.receptive_field(eye) == 1)
    assert np.allclose(measures.participation(1e-150 * eye), 1, rtol=NEAR)
    for bad in (0.0, 1.5):
        with pytest.raises(DsfValueError, match=r"mass: expected in \(0, 1\]"):
            measures.receptive_field(eye, bad)


def test_a_window_and_the_horizon_of_one_decay() -> None:
    """Weights a^lag: a window of n keys holds 1 - a^n of a long row."""
    a, length = 0.8, 200
    ones = torch.ones(1, length, 1, 1, 1, dtype=torch.float64)
    log = torch.full((1, length, 1, 1), math.log(a), dtype=torch.float64)
    r = dsf.Recurrence(Diagonal(log), ones, ones)
    expected = math.ceil(math.log(1 - 0.9) / math.log(a))
    assert measures.receptive_field(r, queries=[199]).item() == expected
    assert float(measures.attention_distance(r)[0, 0, -1]) == pytest.approx(a / (1 - a), rel=NEAR)
    assert measures.attention_distance(r).attrs["method"] == "float64 scans, no map"


def test_scans_of_long_rows_need_no_map() -> None:
    """length 20,000, 2 heads: the map would take 6 GB, the sums a few MB."""
    r = with_decay(Identity(2), 20_000, 2, D=False)
    found = measures.spread(r)
    assert found.attrs["method"] == "float64 scans, no map"
    row = measures.spread(r, queries=[19_999])
    np.testing.assert_allclose(found.values[..., -1:], row.values, rtol=1e-11)
    w = (r.C[0, -1, :, 0, None] * r.B[0, :, :, :, 0].transpose(0, 1)).sum(-1)  # (head, key)
    np.testing.assert_allclose(found.values[0, :, -1], w.numpy().std(-1), rtol=1e-11)


def test_broadcast_giants_are_refused() -> None:
    r = dsf.Recurrence(Identity(2), random(1, 8, 1, 2, 1), random(1, 8, 1, 1, 2))
    giant = dataclasses.replace(r, B=r.B.expand(10**9, -1, -1, -1, -1))
    with pytest.raises(DsfMemoryError, match=r"dsf\.measures: one number a row: .*fewer samples"):
        measures.row_sum(giant)
