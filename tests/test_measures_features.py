"""Degrees of freedom, leverage, allocation and feature errors against closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import dsf
from dsf import measures
from dsf.errors import DsfMemoryError, DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.models._random_features import (
    draw_directions,
    expected_kernel_error,
    leverage_scores,
    tilted_directions,
)
from dsf.models.random_feature_attention import random_feature_attention_recurrence
from dsf.transitions import Identity

EXACT = 1e-12
QUADRATURE = 1e-8
PRINTED = 5.1e-4
"""Half a unit of the third decimal, in which the leverage row of the specification is printed."""
SOLVED = 1e-6
"""A ridge system of condition 1e9 by two methods."""
NODES = 80
TABLE_2 = (150, 173.8, 24.5, 39.8, 42.1, 66.6, 107.4, 33, 24.9, 29.9, 43.2, 39.8)
"""Largest degrees of freedom of GPT-2's layers (Nishikawa et al. 2025, table 2)."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gauss_hermite(variance: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of N(0, variance)."""
    x, w = np.polynomial.hermite_e.hermegauss(NODES)
    return torch.from_numpy(x) * variance**0.5, torch.from_numpy(w / w.sum())


def weighted(of_query: float, of_key: float | None = None) -> dsf.SoftmaxRows:
    """Rows whose cross operator is that of exp(x y), x and y Gaussian, by quadrature.

    Two further features carry the weights: logit = x y + (ln J w_x + ln J w_y)/2.
    """
    x, w_x = gauss_hermite(of_query)
    y, w_y = gauss_hermite(of_query if of_key is None else of_key)
    a, b = (torch.log(NODES * w) / 2 for w in (w_x, w_y))
    one = torch.ones(NODES).double()
    q, k = torch.stack([x, a, one], -1), torch.stack([y, one, b], -1)
    return dsf.SoftmaxRows(q[None, :, None], k[None, :, None], scale=1.0)


def gaussian_spectrum(coupling: float, count: int) -> Tensor:
    """mu_k = sqrt(1 + r^2) r^k with r + 1/r = 1/coupling."""
    r = (1 - math.sqrt(1 - 4 * coupling**2)) / (2 * coupling)
    return math.sqrt(1 + r * r) * r ** torch.arange(count, dtype=torch.float64)


def heads(
    length: int = 40, width: int = 6, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    q, k = random(1, length, 2, width, seed=seed), random(1, length, 2, width, seed=seed + 1)
    return scale * q, scale * k


def gram(x: Tensor) -> Tensor:
    return torch.exp(x @ x.mT)


# -- 1 to 4: closed forms ----------------------------------------------------------------------


def test_gaussian_spectrum_and_degrees_of_freedom() -> None:
    rows = weighted(0.3)
    found = measures.similarity_spectrum(rows, centre=False)
    np.testing.assert_allclose(
        np.exp(found[0, 0, :10]), gaussian_spectrum(0.3, 10), rtol=0, atol=EXACT)  # fmt: skip
    trace = float(np.exp(found).sum())
    # exp(x^2) grows nearly as fast as its weight falls: the diagonal is summed on a grid instead
    grid = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    density = torch.exp(grid**2 - grid**2 / 0.6) / math.sqrt(2 * math.pi * 0.3)
    diagonal = float(density.sum() * (grid[1] - grid[0]))
    for other in (diagonal, (1 - 0.6) ** -0.5, float(gaussian_spectrum(0.3, 400).sum())):
        assert trace == pytest.approx(other, abs=1e-10)
    freedom = measures.degrees_of_freedom(rows, 0.01, centre=False).absolute
    assert freedom.item() == pytest.approx(4.744490565, abs=QUADRATURE)


def test_leverage_integrates_to_the_degrees_of_freedom() -> None:
    x = 0.4 * random(9)
    z, w = gauss_hermite(1.0)
    for lam in (1e-3, 1e-2, 0.1):
        mean = float(w @ leverage_scores(z[:, None], x[:, None], lam))
        rows = dsf.SoftmaxRows(x[None, :4, None, None], x[None, 4:, None, None], scale=1.0)
        found = measures.degrees_of_freedom(rows, lam, form="pooled", centre=False).absolute
        assert mean == pytest.approx(found.item(), abs=QUADRATURE)


def test_degrees_of_freedom_fall_with_regularisation_within_their_bounds() -> None:
    q, k = heads(length=30, width=2, scale=0.7)
    for form in ("cross", "pooled"):
        last = math.inf
        s = np.exp(measures.similarity_spectrum((q, k), form=form)).values
        for lam in (1e-6, 1e-4, 1e-2, 1.0, 100.0):
            found = measures.degrees_of_freedom((q, k), lam, form=form).absolute.values
            assert (found < last).all()
            assert (found <= s.sum(-1) / lam).all()
            assert (found <= s.shape[-1]).all()
            last = found
    few = (q[:, :, :1], torch.cat([k[:, :5, :1]] * 6, 1))
    assert measures.degrees_of_freedom(few, 1e-9).absolute.item() <= 5 + 1e-6


def test_kernel_error_of_sampling_densities() -> None:
    """M E|K - K^|^2 = int |phi|^4/q dtau - |K|^2: plain, leverage at six lambda, optimal."""
    v = 0.12
    x, w = gauss_hermite(v)
    z = torch.linspace(-14, 14, 4001, dtype=torch.float64)
    tau = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    phi = torch.exp(x[:, None] * z - x[:, None] ** 2 / 2)
    b = v / (1 + 2 * v)
    square = (1 + 2 * v) ** -0.5 * torch.exp(2 * b * z**2)
    inside = z.abs() < 6
    np.testing.assert_allclose((w @ phi**2)[inside], square[inside], rtol=EXACT)
    K_square = (1 - 4 * v**2) ** -0.5

    def error(density: Tensor) -> float:
        q = density / (density @ tau)
        return float((square**2 / q) @ tau) - K_square

    assert error(torch.ones_like(z)) == pytest.approx(0.667004, rel=1e-3)
    assert error(torch.ones_like(z)) == pytest.approx(expected_kernel_error(v, tilted=False))
    assert error(square) == pytest.approx(0.285682, abs=1e-6)
    assert error(square) == pytest.approx(expected_kernel_error(v, tilted=True), rel=1e-9)
    root = w.sqrt()
    S = root[:, None] * torch.exp(x[:, None] * x) * root
    weighted_phi = root[:, None] * phi
    eye = torch.eye(NODES, dtype=torch.float64)
    printed = {1e-3: 1.037, 1e-2: 0.748, 0.1: 0.450, 1.0: 0.298, 10.0: 0.2859, 1e3: 0.28568}
    for lam, expected in printed.items():
        scores = (weighted_phi * torch.linalg.solve(S + lam * eye, weighted_phi)).sum(0)
        assert error(scores) == pytest.approx(expected, abs=PRINTED)


def test_the_optimal_tilt_is_a_wider_gaussian() -> None:
    for v in (0.01, 0.12, 0.3, 0.49):
        z = tilted_directions(50, 2, v, generator=torch.Generator().manual_seed(0))[0]
        plain = draw_directions(50, 2, generator=torch.Generator().manual_seed(0))
        ratio = ((z / plain).square() * (1 - 2 * v) / (1 + 2 * v)).mean()
        assert float(ratio) == pytest.approx(1, abs=1e-14 / (1 - 2 * v))
    assert math.isinf(expected_kernel_error(1 / 6, tilted=False))
    assert math.isfinite(expected_kernel_error(1 / 6 - 1e-9, tilted=False))


# -- 5 to 7: gauges and samples ----------------------------------------------------------------


def test_the_cross_form_does_not_see_the_gauge_and_the_pooled_one_does() -> None:
    q, k = heads()
    mixed = random(6, 6, seed=5)
    U, _, Vh = torch.linalg.svd(mixed)
    for A in (U * torch.logspace(0, 2, 6).double() @ Vh / 10, 2 * torch.eye(6).double()):
        moved = (q @ torch.linalg.inv(A), k @ A.mT)
        for name in ("by_norm", "by_trace", "absolute"):
            one, two = (measures.degrees_of_freedom(x, 2**-4)[name].values for x in (
                (q, k), moved))  # fmt: skip
            np.testing.assert_allclose(one, two, rtol=QUADRATURE)
    q, k = heads(length=200, scale=0.6)
    scaled = (2 * q, k / 2)
    one, two = (measures.degrees_of_freedom(x, 2**-4, form="pooled").absolute.values for x in (
        (q, k), scaled))  # fmt: skip
    assert (np.abs(two / one - 1) > 0.1).all()
    balanced = [measures.degrees_of_freedom(x, 2**-4, form="pooled", gauge="balanced").absolute
                for x in ((q, k), scaled)]  # fmt: skip
    np.testing.assert_allclose(*balanced, rtol=QUADRATURE)
    assert measures.degrees_of_freedom((q, k)).by_norm.attrs["gauge"].startswith("none")


def test_balancing_brings_pooled_near_to_cross() -> None:
    spread = torch.linspace(0.3, 1.5, 6).double()
    q, k = heads(length=300)
    q, k = q * spread * 3, k * spread / 3
    cross = measures.degrees_of_freedom((q, k), 2**-4).by_trace.values
    raw, balanced = (measures.degrees_of_freedom((q, k), 2**-4, form="pooled", gauge=g)
                     .by_trace.values for g in ("as given", "balanced"))  # fmt: skip
    assert (np.abs(balanced - cross) < np.abs(raw - cross)).all()
    rank_deficient = (q[:, :4], k[:, :4])
    with pytest.raises(DsfValueError, match="full rank"):
        measures.degrees_of_freedom(rank_deficient, form="pooled", gauge="balanced")


def test_a_common_shift_of_keys_is_centred_away() -> None:
    q, k = heads()
    shift = random(1, 1, 2, 6, seed=9)
    one, two = (measures.degrees_of_freedom((q, x)).by_norm.values for x in (k, k + shift))
    np.testing.assert_allclose(one, two, rtol=1e-9)
    raw = measures.degrees_of_freedom((q, k + shift), centre=False).by_norm.values
    assert (np.abs(raw / one - 1) > 1e-3).any()


def test_queries_and_keys_couple_by_the_product_of_their_spreads() -> None:
    """x from N(0, 0.9), y from N(0, 0.1): the spectrum of coupling sqrt(0.9 0.1) = 0.3."""
    found = measures.similarity_spectrum(weighted(0.9, 0.1), centre=False)
    np.testing.assert_allclose(
        np.exp(found[0, 0, :10]), gaussian_spectrum(0.3, 10), rtol=0, atol=EXACT)  # fmt: skip


def test_duplicated_data_leave_degrees_of_freedom_alone() -> None:
    q, k = heads(length=25)
    twice = tuple(torch.cat([x, x], 1) for x in (q, k))
    for form in ("cross", "pooled"):
        one, two = (measures.degrees_of_freedom(x, 0.1, form=form) for x in ((q, k), twice))
        for name in one:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-10)
    # the printed estimate takes G for G/J: lambda/J here
    printed = [measures.degrees_of_freedom(x, 0.1 / (2 * x[0].shape[1]), form="pooled").absolute
               for x in ((q, k), twice)]  # fmt: skip
    assert (printed[1].values > printed[0].values + 1e-3).all()


def test_samples_seeds_masks_and_groups() -> None:
    q, k = heads(length=60)
    few = [measures.degrees_of_freedom((q, k), samples=20, seed=s).by_norm for s in (0, 0, 1)]
    np.testing.assert_array_equal(few[0], few[1])
    assert (few[0].values != few[2].values).all()
    assert few[0].attrs["samples"] == 20
    mask = torch.arange(60)[None] < 45
    masked = measures.degrees_of_freedom(dsf.SoftmaxRows(q, k, key_mask=mask)).by_norm
    np.testing.assert_allclose(masked, measures.degrees_of_freedom((q, k[:, :45])).by_norm)
    shared = measures.degrees_of_freedom((q, k[:, :, :1])).by_norm
    np.testing.assert_allclose(shared, measures.degrees_of_freedom((q, k[:, :, [0, 0]])).by_norm)
    rows = dsf.SoftmaxRows(q, k, sink=torch.zeros(2))
    system = dsf.Recurrence(Identity(60), dsf.OneHot(60, 60), rows, system="softmax")
    found = measures.degrees_of_freedom(system).by_norm
    np.testing.assert_allclose(found, measures.degrees_of_freedom((q, k)).by_norm)
    assert (found.attrs["system"], found.attrs["left_out"]) == ("softmax", "sink")


def test_huge_logits_do_not_overflow() -> None:
    q, k = heads(scale=60.0)
    found = measures.degrees_of_freedom((q, k))
    assert np.isfinite(found.by_norm).all()
    assert (found.by_norm < 2).all()
    assert np.isnan(found.absolute).all()  # lambda is far below the rounding of the largest value
    assert (found.top_share > 0.9).all()
    assert np.isfinite(measures.similarity_spectrum((q, k))[..., 0]).all()


def test_truncation_at_a_fixed_cut_is_eckart_young() -> None:
    """A = I, B = phi(k), C = phi(q): states kept lose exactly the smaller singular values."""
    n, width = 12, 2
    phi = dsf.feature_maps.Taylor(3)
    k, q = phi(0.7 * random(n, width)), phi(0.7 * random(n, width, seed=1))
    zero = torch.zeros_like(k)
    B, C = torch.cat([k, zero])[None, :, None, :, None], torch.cat([zero, q])[None, :, None, None]
    r = dsf.Recurrence(Identity(k.shape[1]), B, C)
    block = q @ k.mT
    s = torch.linalg.svdvals(block)
    sizes = [k.shape[1]] * (2 * n)
    for kept in (1, 3, 5):
        sizes[n - 1] = kept
        small, _ = dsf.reduce(r, sizes)
        lost = dsf.materialise(small)[0, 0, n:, :n] - block
        best = float(s[kept:].square().sum().sqrt())
        assert float(torch.linalg.matrix_norm(lost)) == pytest.approx(best, rel=1e-10)
    cut = dsf.hankel.hankel_singular_values(r, [n])[0, 0, 0]
    np.testing.assert_allclose(cut[: len(s)], s[: len(cut)], atol=EXACT)


# -- leverage and allocation -------------------------------------------------------------------


@pytest.mark.parametrize("relative_to", ["norm", "trace", "absolute"])
def test_leverage_scores_add_up(relative_to: str) -> None:
    q, k = heads(length=30)
    name = {"norm": "by_norm", "trace": "by_trace"}.get(relative_to, "absolute")
    cross = measures.token_leverage((q, k), 0.02, relative_to=relative_to)
    total = measures.degrees_of_freedom((q, k), 0.02)[name]
    np.testing.assert_allclose(cross.of_query.sum("query"), total, rtol=1e-10)
    np.testing.assert_allclose(cross.of_key.sum("key"), total, rtol=1e-10)
    pooled = measures.token_leverage((q, k), 0.02, relative_to=relative_to, form="pooled")
    total = measures.degrees_of_freedom((q, k), 0.02, form="pooled")[name]
    np.testing.assert_allclose(
        pooled.of_query.sum("query") + pooled.of_key.sum("key"), total, rtol=1e-10
    )
    for scores in (cross.of_query, cross.of_key, pooled.of_query):
        assert float(scores.min()) > 0
        assert float(scores.max()) < 1


def test_pooled_leverage_is_the_ridge_diagonal_and_odd_tokens_stand_out() -> None:
    q, k = heads(length=20, width=3)
    k[0, 7] *= 2.5
    found = measures.token_leverage((q, k), 0.05, relative_to="absolute", form="pooled")
    x = torch.cat([q[0, :, 0], k[0, :, 0] - k[0, :, 0].mean(0)]) * 3**-0.25
    G = gram(x) / 40
    ridge = torch.linalg.solve(G + 0.05 * torch.eye(40).double(), G).diagonal()
    both = np.concatenate([found.of_query[0, 0], found.of_key[0, 0]])
    np.testing.assert_allclose(both, ridge, rtol=SOLVED)
    cross = measures.token_leverage((q, k), 0.05)
    assert (cross.of_key.argmax("key") == 7).all()
    mask = (torch.arange(20) != 3)[None]
    masked = measures.token_leverage(dsf.SoftmaxRows(q, k, key_mask=mask)).of_key
    assert np.isnan(masked[..., 3]).all()
    assert np.isfinite(masked[..., 4:]).all()


def test_allocation_of_the_published_table() -> None:
    maxima = torch.tensor(TABLE_2)
    found = measures.feature_allocation(maxima, 64)
    assert found.values.tolist() == [149, 172, 24, 39, 42, 66, 106, 33, 25, 30, 43, 39]
    assert found.attrs["exact_mean"] == pytest.approx(64, abs=EXACT)
    assert found.values.sum() == 768
    clipped = measures.feature_allocation(maxima, 64, cap=64)
    assert clipped.values.tolist() == [64, 64, 24, 39, 42, 64, 64, 33, 25, 30, 43, 39]


@pytest.mark.parametrize("seed", range(20))
def test_allocations_keep_their_budget(seed: int) -> None:
    N = random(13, 4, seed=seed).abs() + 0.01
    for per_head, budget in itertools.product((False, True), (1, 7.5, 64)):
        plain, kept = (measures.feature_allocation(N, budget, per_head=per_head, keep_budget=b)
                       for b in (False, True))  # fmt: skip
        assert plain.attrs["exact_mean"] == pytest.approx(budget, rel=EXACT)
        assert kept.values.sum() == round(budget * kept.size)
        used = N.numpy() if per_head else N.amax(1).numpy()
        exact = budget * used / used.mean()
        np.testing.assert_array_equal(plain.values, np.rint(exact))
        assert np.abs(kept.values - exact).max() < 1
        assert plain.dims == (("layer", "head") if per_head else ("layer",))


def test_allocations_from_measured_heads() -> None:
    layers = [measures.degrees_of_freedom(heads(scale=s)).by_norm[0] for s in (0.3, 0.6, 1.0)]
    found = measures.feature_allocation(xr.concat(layers, "layer"), 32, keep_budget=True)
    assert found.sum() == 96
    assert (np.diff(found.values) > 0).all()


# -- errors and their bounds -------------------------------------------------------------------


def test_error_bounds_hold() -> None:
    """(i') and (ii') in 60 random discrete runs, alpha from 0 to 1/2."""
    ratios = []
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        n, m = 12 + seed % 9, (5, 40, 400)[seed % 3]
        x = 0.8 * torch.randn(n, 2, dtype=torch.float64, generator=g)
        p = torch.rand(n, dtype=torch.float64, generator=g) + 0.1
        z = torch.randn(m, 2, dtype=torch.float64, generator=g)
        phi = torch.exp(x @ z.mT - x.square().sum(-1, keepdim=True) / 2) / m**0.5
        found = measures.feature_error(
            gram(x), phi @ phi.mT, 10.0 ** -(seed % 4), probability=p / p.sum(),
            value=torch.randn(n, dtype=torch.float64, generator=g), smoothness=(seed % 6) / 10,
            n_feature=m,
        )  # fmt: skip
        ratios.append([found.kernel_error.item() / found.kernel_bound.item(),
                       found.value_error.item() / found.value_bound.item()])  # fmt: skip
        assert found.kernel_error.item() >= found.best_possible.item() * (1 - 1e-9)
    largest = np.array(ratios).max(0)
    assert (largest <= 1).all()
    assert (largest > 1e-3).all()


def test_no_error_where_the_kernel_is_the_similarity() -> None:
    x = 0.5 * random(3, 2, 15, 2)
    K = gram(x)
    same = measures.feature_error(K, K, 0.01, value=random(3, 2, 15))
    for name in ("operator_error", "kernel_error", "value_error"):
        assert float(np.abs(same[name]).max()) <= EXACT
    assert same.kernel_error.dims == ("batch", "head")
    rows = measures.feature_row_error(K, K)
    assert float(rows.row_error.max()) <= EXACT
    np.testing.assert_allclose(rows.cross_entropy, rows.entropy, atol=EXACT)
    p = K / K.sum(-1, keepdim=True)
    np.testing.assert_allclose(rows.entropy, -(p * p.log()).sum(-1), atol=EXACT)
    for seed in range(5):
        other = measures.feature_row_error(K, K * torch.exp(0.1 * random(3, 2, 15, 15, seed=seed)))
        assert (other.cross_entropy > other.entropy).all()


def test_best_possible_is_reached_by_the_leading_eigenvectors() -> None:
    K = gram(0.6 * random(20, 2))
    mu, U = torch.linalg.eigh(K)
    for m in (1, 4, 9):
        kept = (U[:, -m:] * mu[-m:]) @ U[:, -m:].mT
        found = measures.feature_error(K, kept, 0.01, n_feature=m)
        assert found.kernel_error.item() == pytest.approx(found.best_possible.item(), rel=1e-9)


@pytest.mark.parametrize("eps", [0.01, 0.3, 0.9])
def test_pointwise_error_bounds_rows(eps: float) -> None:
    K = torch.exp(random(50, 20))
    sign = torch.where(random(50, 20, seed=2) > 0, 1.0, -1.0).double()
    found = measures.feature_row_error(K, K * (1 + eps * sign))
    assert (found.row_error <= found.row_bound).all()
    np.testing.assert_allclose(found.pointwise, eps, rtol=1e-9)
    np.testing.assert_allclose(found.row_bound, 2 * eps / (1 - eps), rtol=1e-9)
    assert np.isinf(measures.feature_row_error(K, 2.5 * K).row_bound).all()
    with pytest.raises(DsfValueError, match="approximation 0"):
        measures.feature_row_error(torch.eye(3), torch.ones(3, 3))


def test_the_printed_sample_size_fails_and_the_corrected_one_holds() -> None:
    """Ten points, K the identity on them, uniform directions: D = 10 counts/M - 1."""
    points, t, delta, trials = 10, 0.1, 0.1, 2000
    corrected = measures.features_for_accuracy(points, t, delta)
    assert abs(corrected - 44267) <= 1
    printed = math.ceil(corrected * t)
    assert abs(printed - 4427) <= 1
    rng = np.random.default_rng(0)
    failed = {}
    for count in (printed, corrected):
        counts = rng.multinomial(count, [1 / points] * points, size=trials)
        failed[count] = (np.abs(points * counts / count - 1).max(1) > t).mean()
    assert failed[printed] > 0.1
    assert failed[corrected] < 0.01
    counts = torch.from_numpy(rng.multinomial(500, [1 / points] * points)).double()
    found = measures.feature_error(
        torch.eye(points).double(), torch.diag(points * counts / 500), 1e-9)  # fmt: skip
    assert found.operator_error.item() == pytest.approx(
        float((points * counts / 500 - 1).abs().max()), rel=1e-6
    )


def test_feature_attention_is_kernel_attention_exactly() -> None:
    q, k = heads(length=11, width=3)
    w = draw_directions(7, 3, n_head=2, generator=torch.Generator().manual_seed(0))
    system = random_feature_attention_recurrence(q, k, w)
    x, y = (3**-0.25 * z for z in (q, k))
    phi = [torch.exp(torch.einsum("bthd,hmd->bhtm", z, w)
                     - z.square().sum(-1).movedim(2, 1)[..., None] / 2) / 7**0.5
           for z in (x, y)]  # fmt: skip
    K = (phi[0] @ phi[1].mT).tril()
    expected = K / K.sum(-1, keepdim=True)
    assert float((dsf.materialise(system) - expected).abs().max()) <= EXACT
    rows = measures.feature_row_error(torch.exp(torch.einsum("bthd,bshd->bhts", x, y)).tril(), K)
    assert (rows.row_error[..., 0] <= EXACT).all()
    assert (rows.row_error[..., 1:] > 0).all()


# -- refusals ----------------------------------------------------------------------------------


def test_refusals() -> None:
    q, k = heads(length=5)
    ones = torch.ones(1, 5, 1, 2, 1, dtype=torch.float64)
    with pytest.raises(DsfTypeError, match="softmax system"):
        measures.degrees_of_freedom(dsf.Recurrence(Identity(2), ones, ones.mT))
    with pytest.raises(DsfUnsupportedError, match="softcap"):
        measures.degrees_of_freedom(dsf.SoftmaxRows(q, k, softcap=5.0))
    with pytest.raises(DsfValueError, match="regularisation"):
        measures.degrees_of_freedom((q, k), 0.0)
    with pytest.raises(DsfValueError, match="accuracy"):
        measures.features_for_accuracy(math.inf, 0.1, 0.1)
    with pytest.raises(DsfValueError, match="freedom"):
        measures.feature_allocation(torch.tensor([1.0, -1.0]), 8)
    with pytest.raises(DsfValueError, match="budget"):
        measures.feature_allocation(torch.zeros(3), 8)
    long = torch.zeros(1, 1, 1, 1).expand(1, 2_000_000, 1, 1)
    with pytest.raises(DsfMemoryError, match="GiB"):
        measures.token_leverage((long, long))
