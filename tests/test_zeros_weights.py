"""What must hold of ZeroS's weights: ranks, reach, bounds, causality; the release's defects."""

import numpy as np
import pytest
import scipy.optimize
import torch
from model_laws import normal
from zeros_cases import LENGTH, WIDTH, far, inputs, radial_by_definition, unit

import dsf
from dsf.models.zeros import zeros_radial_recurrence, zeros_recurrence

EXACT = 1e-14
REALISATIONS = ["raw", "running_max", "normalised"]
SAFE = ["running_max", "normalised"]


def test_off_diagonal_ranks():
    q, k, s, gates, _ = inputs(length=80)

    def order(system):
        m = dsf.materialise(system)[0, 0]
        return max(int(torch.linalg.matrix_rank(m[t:, :t], rtol=1e-10)) for t in range(1, 80))

    assert order(zeros_radial_recurrence(s, *gates)) == 3
    assert order(zeros_recurrence(q, k, s, *gates)) == 3 * WIDTH
    same = (gates[0], gates[0])
    assert order(zeros_radial_recurrence(s, *same)) == 2
    assert order(zeros_recurrence(q, k, s, *same)) == 2 * WIDTH
    m = dsf.materialise(zeros_recurrence(q, k, s, *gates, causal=False))[0, 0]
    assert int(torch.linalg.matrix_rank(m, rtol=1e-10)) <= 3 * WIDTH
    r = dsf.materialise(zeros_radial_recurrence(s, *gates[:2], causal=False))[0, 0]
    assert int(torch.linalg.matrix_rank(r, rtol=1e-10)) == 2


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0, 10.0])
def test_unequal_gates_reach_every_zero_sum_row(size):
    """sigma1 > sigmah: the logits of a given zero-sum row exist; equal gates: w >= -sigma/t."""
    n, (first, higher) = 8, (0.8, 0.3)
    target = size * normal(n, seed=7).numpy()
    target -= target.mean()

    def row(s):
        s = torch.as_tensor(s)[None, :, None]
        gates = (torch.full_like(s, first), torch.full_like(s, higher))
        return dsf.materialise(zeros_radial_recurrence(s, *gates), slice(n - 1, n))[
            0, 0, 0
        ].numpy()

    def slope(s):
        p = np.exp(s - s.max())
        p /= p.sum()
        centred = np.eye(n) - 1 / n
        return higher * (np.diag(p) - np.outer(p, p)) + (first - higher) / n * centred + 1 / n

    start = target * n / (first - higher)
    found = scipy.optimize.root(
        lambda s: row(s) - target + s.mean(), start - start.mean(), jac=slope, tol=1e-14
    )
    assert np.linalg.norm(row(found.x) - target) <= 1e-10 * np.linalg.norm(target)


def test_equal_gates_bound_the_weights_from_below():
    _, _, s, gates, _ = inputs()
    w = dsf.materialise(zeros_radial_recurrence(4 * s, gates[0], gates[0]))
    t = torch.arange(1.0, LENGTH + 1, dtype=torch.float64)
    floor = -(gates[0].transpose(1, 2) / t)[..., None]
    assert bool((w >= floor - 1e-15).all())
    half = w.clamp(max=0).abs().sum(-1)[..., 1:]
    assert far(half, w.abs().sum(-1)[..., 1:] / 2) <= EXACT


def test_bounds_of_the_weights():
    """t|w| <= 2S|d| + sigmah (e^2S - 1); sum|w| <= |d| mean|delta| + 2 sigmah (1 - 1/t)."""
    t = torch.arange(1.0, 31, dtype=torch.float64)[None, None, :, None]
    worst = 0.0
    for seed in range(50):
        s, gate = (
            1.5 * normal(4, 30, 1, seed=seed),
            torch.sigmoid(2 * normal(2, 4, 30, 1, seed=seed)),
        )
        w = dsf.materialise(zeros_radial_recurrence(s, *gate))
        d = (gate[0] - gate[1]).abs().transpose(1, 2)[..., None]
        higher = gate[1].transpose(1, 2)[..., None]
        biggest = s.abs().amax((1, 2))[:, None, None, None]
        limit = 2 * biggest * d + higher * ((2 * biggest).exp() - 1)
        assert bool((t * w.abs() <= limit + 1e-12).all())
        unit_gate = torch.ones_like(s)
        delta = dsf.materialise(zeros_radial_recurrence(s, unit_gate, 0 * s)).abs().sum(-1)
        mass = d[..., 0] * delta + 2 * higher[..., 0] * (1 - 1 / t[..., 0])
        assert bool((w.abs().sum(-1) <= mass + 1e-12).all())
        worst = max(worst, float((w.abs().sum(-1) / mass.clamp(min=1e-300))[..., 1:].max()))
    assert worst > 0.3  # the bound is not idle


def test_the_printed_bound_fails():
    s = torch.zeros(1, 100, 1, dtype=torch.float64)
    s[0, 50] = 10.0
    gate = torch.full_like(s, 0.9)
    w = dsf.materialise(zeros_radial_recurrence(s, gate, gate))[0, 0, -1]
    delta = s[0, :, 0] - s.mean()
    printed = torch.maximum(torch.ones_like(delta), torch.maximum(
        delta.abs(), (delta**2 - (delta**2).mean()).abs() / 2))  # fmt: skip
    assert abs(float(100 * w.abs().max()) - 88.7) <= 0.05
    assert abs(float(printed.max()) - 48.5) <= 0.05


@pytest.mark.parametrize("realisation", SAFE)
def test_offsets_and_extremes(realisation):
    q, k, s, gates, v = inputs()

    def run(s):
        return dsf.scan(zeros_recurrence(q, k, s, *gates, realisation=realisation), v)

    for offset in (-1e3, 10.0, 1e3):
        assert far(run(s + offset), run(s)) <= 1e-10
    assert bool(torch.isfinite(run(300 * s)).all())
    assert bool(torch.isfinite(run(300 * s.sort(1, descending=True).values)).all())


def test_raw_form_overflows():
    q, k, s, gates, _ = inputs()
    assert not bool(torch.isfinite(
        zeros_recurrence(q, k, s + 1e3, *gates, realisation="raw").B).all())  # fmt: skip


@pytest.mark.parametrize("realisation", SAFE)
def test_the_future_does_not_leak(realisation):
    """Other logits, keys and values after t, one 40 above the maximum: bit for bit the same."""
    q, k, s, gates, v = inputs(length=40)

    def run(k, s, v):
        return dsf.scan(zeros_recurrence(q, k, s, *gates, realisation=realisation), v)

    before = run(k, s, v)
    for t in (0, 9, 30):
        late = [x.clone() for x in (k, s, v)]
        late[0][:, t + 1 :] = unit(normal(1, 39 - t, 2, WIDTH, seed=20))
        late[1][:, t + 1 :] = float(s.max()) + 40
        late[2][:, t + 1 :] = 9.0
        assert torch.equal(run(*late)[:, : t + 1], before[:, : t + 1])


def test_the_released_shift_leaks():
    """Global maximum and eps: row sums become -sigmah eps/(E + eps), the last logit is seen."""
    _, _, s, gates, _ = inputs(length=20, zero=False)

    def released(s):
        shifted = s - s.amax(1, keepdim=True)
        E = shifted.exp().cumsum(1) + 1e-12
        t = torch.arange(1.0, 21, dtype=torch.float64)[:, None]
        beta = (gates[0] - gates[1]) / t
        gamma = -(beta * shifted.cumsum(1) + gates[1]) / t
        rows = gates[1][:, :, None] / E[:, :, None] * shifted.exp()[:, None]
        rows = rows + beta[:, :, None] * shifted[:, None] + gamma[:, :, None]
        rows = rows * torch.ones(20, 20, dtype=torch.float64).tril()[:, :, None]
        return rows, E - 1e-12

    late = s.clone()
    late[:, -1] = s.max() + 25
    rows, E = released(late)
    assert far(rows.sum(2), -gates[1] * 1e-12 / (E + 1e-12)) <= 1e-13
    moved = (rows - released(s)[0])[:, 9].abs().max()
    assert float(moved) > 1e-4
    ours = [dsf.materialise(zeros_radial_recurrence(x, *gates[:2])) for x in (s, late)]
    assert torch.equal(ours[0][..., :19, :], ours[1][..., :19, :])


def test_the_released_fallback_is_another_function():
    """(p - 1/t)(sigma1/t + sigmah (1 - 1/t)): zero-sum, equal only for equal gates."""
    _, _, s, gates, _ = inputs(length=50, zero=False)
    t = torch.arange(1.0, 51, dtype=torch.float64)[:, None]
    first, higher = (g.transpose(1, 2)[..., None] for g in gates[:2])
    seen = torch.ones(50, 50, dtype=torch.float64).tril()
    p = torch.softmax(s.transpose(1, 2)[..., None, :].masked_fill(seen == 0, -torch.inf), -1)
    from_p = first * (p / t - 1 / t**2) + higher * (p - 1 / t - (p / t - 1 / t**2))
    fallback = (p - 1 / t) * (first / t + higher * (1 - 1 / t))
    assert far(from_p * seen, fallback * seen) <= 1e-15
    ours = dsf.materialise(zeros_radial_recurrence(s, *gates[:2]))
    assert float((fallback * seen - ours).norm() / ours.norm()) > 0.1


def test_order_of_the_past_and_constant_values():
    _, _, s, gates, _ = inputs(length=12, zero=False)
    order = torch.tensor([4, 0, 7, 2, 10, 1, 3, 9, 5, 8, 6])
    s2 = torch.cat([s[:, order], s[:, 11:]], 1)
    row = dsf.materialise(zeros_radial_recurrence(s, *gates[:2]))[..., 11, :11]
    row2 = dsf.materialise(zeros_radial_recurrence(s2, *gates[:2]))[..., 11, :11]
    assert far(row2, row[..., order]) <= EXACT
    constant = normal(1, 1, 2, 3).expand(1, 12, 2, 3)
    assert float(dsf.scan(zeros_radial_recurrence(s, *gates[:2]), constant).abs().max()) <= EXACT


@pytest.mark.parametrize(("offset", "limit"), [(0, 1e-7), (10, 5e-7), (100, 5e-6), (1000, 5e-5)])
def test_float32_at_an_offset(offset, limit):
    """The normalised form in float32 against float64 on the same (rounded) logits."""
    q, k, s, gates, v = (x.float() if torch.is_tensor(x) else tuple(g.float() for g in x)
                         for x in inputs())  # fmt: skip
    s = s + offset
    low = dsf.scan(zeros_recurrence(q, k, s, *gates), v)
    assert low.dtype == torch.float32
    wide = [x.double() for x in (q, k, s, *gates)]
    assert far(low.double(), dsf.scan(zeros_recurrence(*wide), v.double())) <= limit


def test_gradients_do_not_need_the_gauge():
    """Anchor and maximum carry no gradient: the map has the definition's gradient all the same."""
    _, _, s, gates, _ = inputs(length=9)
    weight = normal(1, 2, 9, 9, seed=30)
    s.requires_grad_()
    expected = torch.autograd.grad((weight * radial_by_definition(s, gates)).sum(), s)[0]
    for realisation in REALISATIONS:
        for causal in (True, False):
            system = zeros_radial_recurrence(s, *gates, realisation=realisation, causal=causal)
            got = torch.autograd.grad((weight * dsf.materialise(system)).sum(), s)[0]
            if causal:
                assert far(got, expected) <= 1e-13
            else:
                full = (weight * radial_by_definition(s, gates, False)).sum()
                assert far(got, torch.autograd.grad(full, s)[0]) <= 1e-13
