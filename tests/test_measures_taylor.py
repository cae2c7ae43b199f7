"""Taylor growth of a softmax head's state: counts, errors on the maps themselves, bounds kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from model_laws import normal

import dsf
from dsf import measures
from dsf.errors import DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.models.softmax_attention import softmax_attention_recurrence
from dsf.models.taylor_attention import taylor_attention_recurrence
from dsf.transitions import Diagonal

NEAR = 1e-12
SLACK = 1e-12
ORDERS = (0, 1, 2, 3, 4, 7)


def vectors(length: int = 23, width: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(2, length, 2, width, seed=seed), normal(2, length, 2, width, seed=seed + 1)


@pytest.mark.parametrize("length", [1, 2, 23])
@pytest.mark.parametrize("centre", [False, True])
def test_row_errors_are_those_of_the_two_maps(centre: bool, length: int) -> None:
    """Against the maps of taylor_attention and softmax_attention, order by order."""
    q, k = vectors(length)
    found = measures.taylor_growth(softmax_attention_recurrence(q, k), ORDERS, centre=centre)
    assert found["order"].values.tolist() == sorted(ORDERS)
    true = dsf.materialise(softmax_attention_recurrence(q, k))
    moved = k - k.mean(1, keepdim=True) if centre else k
    for order in (0, 2, 4):
        rows = dsf.materialise(taylor_attention_recurrence(q, moved, order=order))
        expected = (rows - true).abs().sum(-1).amax(-1)
        got = found["row_error"].sel(order=order)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=NEAR)
        assert bool((found["n_state"].sel(order=order) == math.comb(3 + order, order)).all())


def test_pointwise_errors_by_their_definition() -> None:
    q, k = vectors()
    found = measures.taylor_growth(softmax_attention_recurrence(q, k), ORDERS, centre=False)
    x = torch.einsum("bthf,bshf->bhts", q, k) * 3**-0.5
    seen = torch.ones(23, 23, dtype=torch.bool).tril()
    for order in ORDERS:
        total = sum(x**p / math.factorial(p) for p in range(order + 1))
        error = ((total / torch.exp(x) - 1).abs() * seen).amax((-2, -1))
        np.testing.assert_allclose(found["pointwise_error"].sel(order=order), error, rtol=1e-9)
        bound = torch.exp(-x).clamp(min=1) * x.abs() ** (order + 1) / math.factorial(order + 1)
        bound = (bound * seen).amax((-2, -1))
        np.testing.assert_allclose(found["pointwise_bound"].sel(order=order), bound, rtol=1e-9)


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 3.0])
def test_bounds_hold_and_the_errors_fall_once_the_order_is_above_the_logits(scale: float) -> None:
    q, k = vectors(seed=5)
    rows = dsf.SoftmaxRows(scale * q, k, causal=False)
    found = measures.taylor_growth(rows, range(13))
    assert bool((found.pointwise_error <= found.pointwise_bound + SLACK).all())
    assert bool((found.row_error <= found.row_bound + SLACK).all())
    largest = float(abs(torch.einsum("bthf,bshf->bhts", scale * q, k)).max()) * 3**-0.5
    even = found.sel(order=[p for p in range(0, 13, 2) if p > 2 * largest])
    assert bool((even.row_error.diff("order") < SLACK).all())
    assert np.isfinite(found.row_bound.values).any() == (scale < 3)


def test_windows_masks_and_empty_rows() -> None:
    """Only what a row may see counts; a row without keys has no error."""
    q, k = vectors(12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, :3] = False
    rows = dsf.SoftmaxRows(q, k, key_mask=mask, window=4)
    found = measures.taylor_growth(rows, (1, 2), centre=False)
    x = torch.einsum("bthf,bshf->bhts", q, k) * 3**-0.5
    lag = torch.arange(12)[:, None] - torch.arange(12)
    seen = (lag >= 0) & (lag < 4) & (torch.arange(12) >= 3)
    weights = torch.where(seen, 1 + x + x**2 / 2, 0)
    p = torch.nan_to_num(weights / weights.sum(-1, keepdim=True))
    true = torch.nan_to_num(torch.softmax(x.masked_fill(~seen, -torch.inf), -1))
    expected = (p - true).abs().sum(-1).amax(-1)
    np.testing.assert_allclose(found["row_error"].sel(order=2), expected, rtol=1e-9)
    none = dsf.SoftmaxRows(q, k, key_mask=torch.zeros(2, 12, dtype=torch.bool))
    assert float(measures.taylor_growth(none, (2,)).row_error.max()) == 0


def test_a_common_shift_of_the_keys_is_not_seen() -> None:
    q, k = vectors()
    moved = measures.taylor_growth((q, k + 50.0))
    still = measures.taylor_growth((q, k))
    np.testing.assert_allclose(moved.row_error, still.row_error, rtol=1e-8)
    far = measures.taylor_growth((q, k + 50.0), centre=False)
    even = [2, 4, 6, 8]  # rows of an odd order may have any sign, and any error
    assert bool((far.row_error > still.row_error).sel(order=even).all())


def test_what_it_is_not_for() -> None:
    q, k = vectors(6)
    decay = dsf.Recurrence(
        Diagonal(-q[..., 0, :][:, :, None].abs()), q[..., None], k[..., None, :]
    )
    with pytest.raises(DsfTypeError, match="expected a softmax system"):
        measures.taylor_growth(decay)
    with pytest.raises(DsfUnsupportedError, match="softcap"):
        measures.taylor_growth(dsf.SoftmaxRows(q, k, softcap=2.0))
    for orders in ((), (-1, 2)):
        with pytest.raises(DsfValueError, match="orders: expected whole numbers"):
            measures.taylor_growth((q, k), orders)
