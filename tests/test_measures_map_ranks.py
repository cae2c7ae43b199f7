"""Stable and effective rank without the map: bounds that hold, closed forms at 131,072 steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from model_laws import normal

import dsf
from dsf import measures
from dsf.errors import DsfMemoryError, DsfUnsupportedError, DsfValueError
from dsf.measures._sketch import FAILURE
from dsf.transitions import Diagonal, Identity

LENGTH = 60
SLACK = 1e-9
"""Rounding of the sketch, relative."""
RANKS = (measures.stable_rank, measures.effective_rank)


def ones(length: int, head: int = 1) -> dsf.Recurrence:
    """The map of running sums."""
    x = torch.ones(1, length, head, 1, 1, dtype=torch.float64)
    return dsf.Recurrence(Identity(1), x, x)


def linear(length: int = LENGTH, width: int = 4, seed: int = 0) -> dsf.Recurrence:
    B, C = normal(1, length, 2, width, 1, seed=seed), normal(1, length, 2, 1, width, seed=seed + 1)
    return dsf.Recurrence(Identity(width), B, C)


def full(r: dsf.Recurrence) -> dsf.Bidirectional:
    """Linear attention that sees every key: a map of rank `width`."""
    return dsf.Bidirectional(r, dsf.anticausal(r, strict=True))


def fading(seed: int = 0) -> dsf.Recurrence:
    A = Diagonal(-0.3 * normal(1, LENGTH, 2, 4, seed=seed + 7).abs())
    return linear(seed=seed).replace(A=A)


def softmax(length: int = LENGTH, *, causal: bool = True) -> dsf.Recurrence:
    q, k = normal(1, length, 2, 4), normal(1, length, 2, 4, seed=1)
    rows = dsf.SoftmaxRows(q, k, causal=causal)
    return dsf.Recurrence(Identity(length), dsf.OneHot(length, length), rows)


def shift(length: int = LENGTH) -> dsf.Recurrence:
    """The identity map: every singular value is 1."""
    none = torch.zeros(1, length, 1, 1, 1, dtype=torch.float64)
    return dsf.Recurrence(Identity(1), none, none, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64))


def single() -> dsf.Recurrence:
    r = full(linear())
    return dsf.Bidirectional(
        r.causal.to(torch.float32), dsf.anticausal(r.causal.to(torch.float32), strict=True)
    )


SYSTEMS = {
    "sums": ones(LENGTH), "linear": linear(), "full": full(linear()), "fading": fading(),
    "softmax": softmax(), "encoder": dsf.Bidirectional.from_rows(softmax(causal=False)),
    "identity": shift(), "backwards": dsf.anticausal(fading()), "sum of both":
    dsf.Bidirectional(fading(), dsf.anticausal(fading(3))), "float32": single(),
}  # fmt: skip


@pytest.mark.parametrize("size", [6, LENGTH, 2 * LENGTH])
@pytest.mark.parametrize("system", SYSTEMS)
def test_bounds_hold_and_decided_values_are_right(system: str, size: int) -> None:
    slack = 1e-4 if system == "float32" else SLACK
    for measure in RANKS:
        true = measure(dsf.materialise(SYSTEMS[system]))
        found = measure(SYSTEMS[system], sketch=size)
        assert bool((found.lower_bound <= true * (1 + slack)).all())
        assert bool((found.upper_bound >= true * (1 - slack)).all())
        decided = ~found.isnull()
        assert int((~decided).sum()) == found.attrs["n_undecided"]
        np.testing.assert_allclose(
            found.values[decided], true.values[decided], rtol=1.001 * found.attrs["tolerance"]
        )
        assert 0 < found.attrs["failure_probability"] <= 2 * FAILURE
        assert "no map" in found.attrs["method"]


def test_what_is_decided_and_what_is_said_to_be_open() -> None:
    """Stable ranks but that of the identity; effective ranks of low rank; in words elsewhere."""
    for name in ("sums", "full", "softmax"):
        assert measures.stable_rank(SYSTEMS[name], sketch=16).attrs["undecided"] == "none"
    for name in ("full", "float32"):
        found = measures.effective_rank(SYSTEMS[name], sketch=16)
        assert found.attrs["undecided"] == "none"
    for measure in RANKS:
        found = measure(shift(300), sketch=64)
        assert found.isnull().all()
        words = found.attrs["undecided"]
        assert words.startswith("1 of 1 heads: bounds wider than 0.001 after 128 directions")
        assert "dsf.materialise(system)" in words
        assert found.lower_bound.item() < 300 <= found.upper_bound.item() * (1 + SLACK)


def test_bounds_hold_for_many_systems() -> None:
    """Spectra from flat to steep, sketches far too small: 40 heads, none outside its bounds."""
    for seed in range(20):
        steep = 10.0 ** -(0.4 * seed * torch.linspace(0, 1, 6, dtype=torch.float64))
        r = full(linear(40, 6, seed))
        r = full(r.causal.replace(B=r.causal.B * steep[:, None]))
        for measure in RANKS:
            true, found = measure(dsf.materialise(r)), measure(r, sketch=1 + seed % 4)
            assert bool((found.lower_bound <= true * (1 + SLACK)).all())
            assert bool((found.upper_bound >= true * (1 - SLACK)).all())


def sums_stable_rank(n: int) -> float:
    """n (n + 1)/2 over sigma_1^2 = 1/(4 sin^2(pi/(4 n + 2))), in closed form."""
    return n * (n + 1) / 2 * 4 * math.sin(math.pi / (4 * n + 2)) ** 2


def low_rank_truth(r: dsf.Recurrence) -> tuple[np.ndarray, np.ndarray]:
    """(stable, effective) of Q K^T from the small factors of Q and K."""
    sigma = []
    for head in range(2):
        first = torch.linalg.qr(r.C[0, :, head, 0]).R
        second = torch.linalg.qr(r.B[0, :, head, :, 0]).R
        sigma.append(torch.linalg.svdvals(first @ second.mT))
    s = torch.stack(sigma)
    p = s / s.sum(-1, keepdim=True)
    perplexity = torch.exp(torch.special.entr(p).sum(-1))
    return ((s / s[:, :1]) ** 2).sum(-1).numpy(), perplexity.numpy()


@pytest.mark.parametrize("length", [1, 2, 3, 9001, pytest.param(131_072, marks=pytest.mark.slow)])
def test_long_maps_with_known_ranks(length: int) -> None:
    """By default above 8192 steps; below, the whole map gives the same."""
    found = measures.stable_rank(ones(length))
    assert found.item() == pytest.approx(sums_stable_rank(length), rel=1e-9)
    r = linear(length, 3)
    stable, effective = low_rank_truth(r)
    for measure, expected in zip(RANKS, (stable, effective), strict=True):
        found = measure(full(r))
        assert ("no map" in found.attrs["method"]) == (length > 9000)
        np.testing.assert_allclose(found.values[0], expected, rtol=1e-5)


def test_maps_of_zeros_and_no_steps() -> None:
    none = linear().replace(B=torch.zeros(1, LENGTH, 2, 4, 1, dtype=torch.float64))
    for measure in RANKS:
        found = measure(none, sketch=4)
        assert found.values.tolist() == [[0.0, 0.0]]
        assert found.upper_bound.values.tolist() == [[0.0, 0.0]]


def test_options_and_refusals() -> None:
    for measure in RANKS:
        with pytest.raises(DsfValueError, match="sketch: expected at least 1, got 0"):
            measure(linear(), sketch=0)
        with pytest.raises(DsfValueError, match=r"tolerance: expected in \(0, 1\)"):
            measure(linear(), tolerance=0.0)
        with pytest.raises(DsfUnsupportedError, match="sketch: expected a dsf system, got a map"):
            measure(torch.eye(3, dtype=torch.float64), sketch=2)
        wide = linear().replace(B=normal(1, LENGTH, 2, 4, 2), C=normal(1, LENGTH, 2, 2, 4))
        with pytest.raises(DsfUnsupportedError, match="one input, one output"):
            measure(wide, sketch=2)
        step = torch.ones(1, 1, 1, 1, 1).expand(10**5, 4096, 1, 1, 1)
        with pytest.raises(DsfMemoryError, match=r"sketch: \(buffer=24, batch=100000,"):
            measure(dsf.Recurrence(Identity(1), step, step), sketch=2)
