"""ZeroS's weight diagnostics: signs, bounds, order shares; radial and full, short and long."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_laws import normal
from zeros_cases import inputs, radial_by_definition

import dsf
from dsf import measures
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models.zeros import zeros_radial_recurrence, zeros_recurrence

EXACT = 1e-14
NEAR = 1e-12
SLACK = 1e-12
LENGTHS = (1, 2, 3, 7, 8, 9, 31, 100, 131)
SIGNS = ("negative_mass", "negative_count_share", "l1_mass")


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_signs_are_those_of_the_map(length: int, zero: bool) -> None:
    """Every sum over the interval of negative weights, against the quadratic definition."""
    for scale, offset in ((0.1, 0.0), (1.0, 0.0), (3.0, 30.0), (1.0, -1e3)):
        _, _, s, gates, _ = inputs(length=length, zero=zero, seed=length)
        s = scale * s + offset
        found = measures.zero_sum_signs(s, *gates)
        weights = radial_by_definition(s, gates)
        if not zero:
            weights[:, :, 0] = 0
        # radial_by_definition centres at 1e3 with 1e-13 of noise; the row sizes are about 1
        near = NEAR if abs(offset) < 100 else 1e-10
        for name in SIGNS:
            expected = getattr(measures, name)(weights)
            np.testing.assert_allclose(found[name].values, expected.values, rtol=0, atol=near)
            assert found[name].attrs["part"] == "radial"


def test_signs_with_gates_at_their_ends() -> None:
    """First above, below, equal to higher; either at zero: f is bent, straight, falling."""
    _, _, s, _, _ = inputs(length=40)
    one, none = torch.ones_like(s), torch.zeros_like(s)
    for first, higher in ((one, none), (none, one), (one, one), (none, none), (0.2 * one, one),
                          (one, 0.2 * one)):  # fmt: skip
        for zero in (None, 0.3 * one, -0.3 * one):
            found = measures.zero_sum_signs(s, first, higher, zero)
            weights = radial_by_definition(s, (first, higher, zero))
            if zero is None:
                weights[:, :, 0] = 0
            dead = weights.abs().sum(-1) < EXACT
            for name in SIGNS:
                expected = getattr(measures, name)(weights).values
                a = found[name].values
                kept = ~dead.numpy() if name != "l1_mass" else np.ones_like(dead.numpy())
                np.testing.assert_allclose(a[kept], expected[kept], rtol=0, atol=NEAR)


def test_signs_with_logits_far_apart() -> None:
    """A later logit 800 above the others: no overflow, and earlier rows do not see it."""
    _, _, s, gates, _ = inputs(length=50, zero=False)
    late = s.clone()
    late[:, 30] += 800
    a, b = measures.zero_sum_signs(s, *gates), measures.zero_sum_signs(late, *gates)
    for name in SIGNS:
        np.testing.assert_array_equal(a[name][..., 1:30], b[name][..., 1:30])
        assert bool(np.isfinite(b[name][..., 1:]).all())
    weights = dsf.materialise(zeros_radial_recurrence(late, *gates))
    np.testing.assert_allclose(b.l1_mass, measures.l1_mass(weights), rtol=0, atol=1e-10)


def test_half_of_a_zero_sum_row_is_negative() -> None:
    _, _, s, gates, _ = inputs(length=200, zero=False)
    found = measures.zero_sum_signs(s, *gates)
    assert float(abs(found.negative_mass[..., 1:] - 0.5).max()) <= EXACT
    assert np.isnan(found.negative_mass[..., 0]).all()
    assert float(abs(measures.row_sum(zeros_radial_recurrence(s, *gates))).max()) <= EXACT


def test_row_sums_are_the_zero_gate_and_full_rows_are_not_zero_sum() -> None:
    q, k, s, gates, _ = inputs(length=100)
    sums = measures.row_sum(zeros_radial_recurrence(s, *gates))
    assert float(abs(sums.values - gates[2].transpose(1, 2).numpy()).max()) <= EXACT
    full = measures.row_sum(zeros_recurrence(q, k, s, gates[0], gates[1]))
    assert float(abs(full).max()) > 0.01


def encoder_case(length: int, zero: bool, seed: int = 0):
    """Logits, gates, unit vectors, and the radial and full maps by their definition."""
    q, k, s, gates, _ = inputs(length=length, zero=zero, seed=seed)
    maps = {}
    for causal in (True, False):
        radial = radial_by_definition(s, gates, causal=causal)
        if not zero and (causal or length == 1):
            radial[:, :, 0] = 0
        maps[causal] = radial, radial * torch.einsum("bthd,bjhd->bhtj", q, k)
    return q, k, s, gates, maps


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_signs_of_an_encoder_are_those_of_its_map(length: int, zero: bool) -> None:
    """Every row sees every key: sums over the same interval, all logits in one order."""
    _, _, s, gates, maps = encoder_case(length, zero, seed=length)
    found = measures.zero_sum_signs(s, *gates, causal=False)
    for name in SIGNS:
        expected = getattr(measures, name)(maps[False][0])
        np.testing.assert_allclose(found[name].values, expected.values, rtol=0, atol=NEAR)
        assert found[name].attrs["direction"] == "bidirectional"
    if not zero and length > 1:
        assert float(abs(found.negative_mass - 0.5).max()) <= NEAR


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("length", [*LENGTHS, 300])
def test_signs_of_full_rows_are_those_of_the_map(
    length: int, zero: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 7 rows and 5 keys (whole ones for 300), beside the quadratic definition."""
    if length < 300:
        monkeypatch.setattr("dsf.measures._zero_sum_tiles._ROWS", 7)
        monkeypatch.setattr("dsf.measures._zero_sum_tiles._KEYS", 5)
    q, k, s, gates, maps = encoder_case(length, zero, seed=length)
    found = measures.zero_sum_signs(s, *gates, query=q, key=k, causal=causal)
    for name in SIGNS:
        expected = getattr(measures, name)(maps[causal][1])
        if not causal:  # a map at hand that is causal is read as one: the count is over all keys
            weights = maps[causal][1]
            expected = {"negative_count_share": (weights < 0).double().mean(-1)}.get(
                name, torch.as_tensor(expected.values))  # fmt: skip
            expected = expected.numpy()
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=NEAR)
        assert found[name].attrs["part"] == "full"


def test_full_rows_with_logits_far_apart() -> None:
    """A later logit 800 above the others, and an offset of 1e3: no overflow, no early effect."""
    q, k, s, gates, _ = inputs(length=50, zero=False)
    late = s.clone()
    late[:, 30] += 800
    near, far = (measures.zero_sum_signs(x, *gates, query=q, key=k) for x in (s, late))
    moved = measures.zero_sum_signs(s + 1e3, *gates, query=q, key=k)
    weights = dsf.materialise(zeros_recurrence(q, k, late, *gates[:2]))
    for name in SIGNS:
        np.testing.assert_allclose(near[name][..., 1:30], far[name][..., 1:30], rtol=0, atol=NEAR)
        np.testing.assert_allclose(near[name][..., 1:], moved[name][..., 1:], rtol=0, atol=1e-10)
        expected = getattr(measures, name)(weights)
        np.testing.assert_allclose(far[name][..., 1:], expected[..., 1:], rtol=0, atol=1e-10)
    both = measures.zero_sum_signs(late, *gates, query=q, key=k, causal=False)
    assert bool(np.isfinite(both.l1_mass).all())


def test_full_rows_of_equal_directions_are_radial_ones() -> None:
    _, _, s, gates, _ = inputs(length=80, zero=True)
    one = torch.zeros(*s.shape, 3, dtype=s.dtype)
    one[..., 0] = 1
    for causal in (True, False):
        full = measures.zero_sum_signs(s, *gates, query=one, key=one, causal=causal)
        radial = measures.zero_sum_signs(s, *gates, causal=causal)
        for name in SIGNS:
            np.testing.assert_allclose(full[name], radial[name], rtol=0, atol=NEAR)


def test_wrong_vectors_are_refused() -> None:
    q, k, s, gates, _ = inputs(length=9)
    for options in ({"query": q}, {"query": q, "key": k[:, :3]}):
        with pytest.raises((DsfShapeError, TypeError), match=r"key: expected axes|Type-check"):
            measures.zero_sum_signs(s, *gates, **options)
    with pytest.raises(DsfValueError, match="query: expected vectors of length 1"):
        measures.zero_sum_signs(s, *gates, query=2 * q, key=k)


def test_wrong_gates_are_refused() -> None:
    _, _, s, gates, _ = inputs(length=9)
    with pytest.raises((DsfShapeError, TypeError)):
        measures.zero_sum_signs(s, gates[0][:, :3], gates[1])
    with pytest.raises(DsfValueError, match="first_gate: expected gates of at least 0"):
        measures.zero_sum_signs(s, -gates[0], gates[1])
    with pytest.raises(DsfValueError, match="logits: expected finite"):
        measures.zero_sum_bounds(s / 0, gates[0], gates[1])


# -- bounds (zeros.md, section 10 and what must hold, 12) ---------------------------------------


def test_bounds_hold_in_every_random_case_and_the_second_is_tight() -> None:
    tightest = 0.0
    for seed in range(12):
        q, k, _, _, _ = inputs(length=30, seed=seed)
        s = (0.3 + seed % 4) * normal(1, 30, 2, seed=seed + 100)
        gate = torch.sigmoid(2 * normal(2, 1, 30, 2, seed=seed + 200))
        if seed % 2:
            gate[1] = gate[0]  # equal gates: where the bound of the mass is reached
        bound = measures.zero_sum_bounds(s, *gate)
        for system in (zeros_radial_recurrence(s, *gate), zeros_recurrence(q, k, s, *gate)):
            largest = dsf.materialise(system).abs().amax(-1).numpy()
            assert bool((largest <= bound.weight_bound.values + SLACK).all())
            mass = measures.l1_mass(system)
            assert bool((mass <= bound.mass_bound + SLACK).all())
            ratio = mass[..., 1:] / bound.mass_bound[..., 1:]
            tightest = max(tightest, float(ratio.max()))
    assert tightest > 0.9


def test_the_bounds_by_their_definition() -> None:
    _, _, s, gates, _ = inputs(length=60, zero=False)
    bound = measures.zero_sum_bounds(s + 30, *gates[:2])
    for t in (1, 2, 17, 60):
        seen = s[0, :t].numpy()
        first, higher = (g[0, t - 1].numpy() for g in gates[:2])
        span = seen.max(0) - seen.min(0)
        weight = (span * abs(first - higher) + higher * np.expm1(span)) / t
        mean = abs(seen - seen.mean(0)).mean(0)
        mass = abs(first - higher) * mean + 2 * higher * (1 - 1 / t)
        np.testing.assert_allclose(bound.weight_bound[0, :, t - 1], weight, rtol=NEAR, atol=EXACT)
        np.testing.assert_allclose(bound.mass_bound[0, :, t - 1], mass, rtol=NEAR, atol=EXACT)


def test_the_counter_example_exceeds_the_printed_bound_and_not_ours() -> None:
    s = torch.zeros(1, 100, 1, dtype=torch.float64)
    s[0, 50] = 10.0
    gate = torch.full_like(s, 0.9)
    largest = 100 * dsf.materialise(zeros_radial_recurrence(s, gate, gate))[0, 0, -1].abs().max()
    delta = s[0, :, 0] - s.mean()
    printed = max(1.0, float(delta.abs().max()), float((delta**2 - (delta**2).mean()).max() / 2))
    assert float(largest) == pytest.approx(88.7, abs=0.05)
    assert printed == pytest.approx(48.5, abs=0.05)
    assert float(largest) <= 100 * float(measures.zero_sum_bounds(s, gate, gate).weight_bound[
        0, 0, -1])  # fmt: skip


# -- orders ------------------------------------------------------------------------------------


def order_parts(q, k, s, gates, *, full: bool, realisation: str = "normalised"):
    none = torch.zeros_like(s)
    each = {"first": (gates[0], none, none), "higher": (none, gates[1], none),
            "zero": (none, none, gates[2])}  # fmt: skip
    if full:
        return {n: zeros_recurrence(q, k, s, *g, realisation=realisation) for n, g in each.items()}
    return {n: zeros_radial_recurrence(s, *g, realisation=realisation) for n, g in each.items()}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("realisation", ["normalised", "running_max", "raw"])
def test_order_shares_are_those_of_the_definition(full: bool, realisation: str) -> None:
    q, k, s, gates, _ = inputs(length=70)
    parts = order_parts(q, k, s, gates, full=full, realisation=realisation)
    found = measures.order_shares(parts)
    assert "no map" in found["share"].attrs["method"]
    cos = torch.einsum("bthd,bjhd->bhtj", q, k) if full else 1.0
    n = torch.arange(1.0, 71, dtype=torch.float64)[:, None]
    seen = torch.ones(70, 70, dtype=torch.float64).tril()
    z = s.transpose(1, 2)[..., None, :].expand(1, 2, 70, 70)
    delta = (z - (z * seen).sum(-1, keepdim=True) / n) * seen
    p = torch.softmax(z.masked_fill(seen == 0, -torch.inf), -1)
    first, higher, zero = (g.transpose(1, 2)[..., None] for g in gates)
    w = {"first": first * delta / n * cos, "higher": higher * (p - 1 / n - delta / n) * seen * cos,
         "zero": zero * seen / n * cos}  # fmt: skip
    total = (sum(w.values()) ** 2).sum(-1)
    for a, name in enumerate(w):
        expected = (w[name] ** 2).sum(-1) / total
        got = found["share"].sel(order=name).values
        np.testing.assert_allclose(got[..., 1:], expected[..., 1:], rtol=1e-9, atol=NEAR)
        for other in list(w)[a + 1 :]:
            expected = 2 * (w[name] * w[other]).sum(-1) / total
            got = found["cross"].sel(pair=f"{name}.{other}").values
            np.testing.assert_allclose(got[..., 1:], expected[..., 1:], rtol=1e-9, atol=NEAR)
            if not full and other == "zero":  # 1/t is orthogonal to what sums to zero
                assert float(abs(expected[..., 1:]).max()) <= 1e-10
    whole = found["share"].sum("order") + found["cross_term"]
    assert float(abs(whole - 1).max()) <= NEAR


def test_order_shares_row_by_row_and_of_maps() -> None:
    q, k, s, gates, _ = inputs(length=150)
    for full in (False, True):
        parts = order_parts(q, k, s, gates, full=full)
        every = measures.order_shares(parts)
        some = measures.order_shares(parts, queries=[3, 140])
        maps = measures.order_shares({n: dsf.materialise(p) for n, p in parts.items()})
        for name in ("share", "cross", "cross_term"):
            near = {"rtol": 1e-9, "atol": 1e-10}
            rows = every[name].sel(query=[3, 140])
            np.testing.assert_allclose(some[name], rows, **near)
            np.testing.assert_allclose(maps[name][:, :, 1:], every[name][:, :, 1:], **near)
        assert some["share"]["query"].values.tolist() == [3, 140]
    alone = measures.order_shares({"all": dsf.materialise(zeros_recurrence(q, k, s, *gates))})
    assert np.allclose(alone["share"], 1, rtol=NEAR)
    assert alone["cross"].shape[-1] == 0


def test_parts_of_other_shapes_are_refused() -> None:
    _, _, s, gates, _ = inputs(length=9)
    r = zeros_radial_recurrence(s, *gates)
    with pytest.raises(DsfShapeError, match="expected one shape"):
        measures.order_shares({"a": r, "b": torch.zeros(3, 3)})
    with pytest.raises(DsfValueError, match="expected at least one"):
        measures.order_shares({})


# -- long rows ---------------------------------------------------------------------------------


def test_first_order_rows_have_the_spread_of_the_logits_at_any_length() -> None:
    """t x spread = g1 std(s_1..s_t), by scans, for the radial rows of length 5,000."""
    _, _, s, gates, _ = inputs(length=5000)
    none = torch.zeros_like(s)
    r = zeros_radial_recurrence(s, gates[0], none)
    found = measures.scaled_spread(r)
    assert found.attrs["method"] == "float64 scans, no map"
    for t in (100, 4999):
        expected = gates[0][0, t] * s[0, : t + 1].std(0, unbiased=False)
        np.testing.assert_allclose(found[0, :, t], expected, rtol=1e-10)


def test_radial_and_full_rows_by_every_measure() -> None:
    """The same measures on both parts, and scans against the map for the three realisations."""
    q, k, s, gates, _ = inputs(length=150, zero=False)
    for name in ("row_sum", "spread"):
        for full in (False, True):
            for realisation in ("normalised", "running_max", "raw"):
                system = (
                    zeros_recurrence(q, k, s, *gates, realisation=realisation) if full
                    else zeros_radial_recurrence(s, *gates, realisation=realisation)
                )  # fmt: skip
                measure = getattr(measures, name)
                found = measure(system)
                assert found.attrs["method"] == "float64 scans, no map"
                expected = measure(dsf.materialise(system))
                assert float(abs(found.values - expected.values).max()) <= 1e-13
