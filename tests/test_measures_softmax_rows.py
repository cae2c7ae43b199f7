"""Sums of softmax rows from logits, block by block: every row measure against the whole map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_laws import normal

import dsf
from dsf import measures
from dsf.measures._row_formulas import FORMULAS
from dsf.measures._softmax_sums import softmax_sums
from dsf.transitions import Identity

NEAR = 1e-12
SINGLE = 1e-5


def attention(
    length: int, *, causal: bool = True, scale: float = 1.0, groups: int = 2, dtype=torch.float64,
    **options,
) -> dsf.Recurrence:  # fmt: skip
    q = scale * normal(2, length, 4, 3)
    k = normal(2, length, groups, 3, seed=1)
    rows = dsf.SoftmaxRows(q.to(dtype), k.to(dtype), causal=causal, **options)
    return dsf.Recurrence(Identity(length), dsf.OneHot(length, length), rows, system="softmax")


def system(length: int, *, causal: bool = True, **options):
    r = attention(length, causal=causal, **options)
    return r if causal else dsf.Bidirectional.from_rows(r)


def close(found, weights: torch.Tensor, near: float) -> None:
    """Every variable of `row_statistics` against the same of a map with all its keys."""
    expected = measures.row_statistics(weights)
    for name in FORMULAS:
        np.testing.assert_allclose(
            found[name].values, expected[name].values, rtol=near, atol=near, err_msg=name
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [None, 1, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64])
def test_every_row_measure_is_that_of_the_map(
    length: int, block: int | None, causal: bool
) -> None:
    s = system(length, causal=causal)
    assert softmax_sums(s) is not None
    found = measures.row_statistics(s, block=block)
    if causal or length > 2:
        close(found, dsf.materialise(s), NEAR)
    assert found["entropy"].shape == (2, 4, length)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 30.0, 1e3])
def test_rows_from_uniform_to_saturated(scale: float) -> None:
    """Spreads keep their digits where rows are nearly uniform; nothing overflows."""
    for causal in (True, False):
        s = system(40, causal=causal, scale=scale)
        found = measures.row_statistics(s)
        weights = dsf.materialise(s)
        close(found, weights, 1e-10)
        if scale == 1e-9 and not causal:
            z = torch.einsum("bthd,bjhd->bhtj", s.causal.C.query, s.causal.C.key.repeat_interleave(
                2, 2)) * 3**-0.5  # fmt: skip
            first_order = z.std(-1, unbiased=False)
            np.testing.assert_allclose(found["scaled_spread"], first_order, rtol=1e-6)


def test_single_precision_is_summed_in_double() -> None:
    s = system(30, dtype=torch.float32)
    close(measures.row_statistics(s), dsf.materialise(s), SINGLE)


def test_what_goes_by_tiles_of_the_map_instead() -> None:
    """Windows, biases, sinks, caps, masks, D: the same measures, the other way."""
    bias = normal(1, 1, 12, 12, seed=5)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 3] = False
    for options in ({"window": 4}, {"bias": bias}, {"sink": torch.zeros(4).double()},
                    {"softcap": 2.0}, {"key_mask": mask}):  # fmt: skip
        s = attention(12, **options)
        assert softmax_sums(s) is None
        expected = measures.entropy(dsf.materialise(s))
        np.testing.assert_allclose(measures.entropy(s), expected, rtol=1e-10, atol=NEAR)
    plain = attention(12)
    assert softmax_sums(plain.replace(D=torch.ones(1, 1, 1, 1, 1).double())) is None
    assert softmax_sums(dsf.materialise(plain)) is None
    assert softmax_sums(dsf.anticausal(plain)) is None
    half = attention(12, causal=False)  # its map is the lower half of full rows
    assert softmax_sums(half) is None
    expected = measures.row_sum(dsf.materialise(half))
    np.testing.assert_allclose(measures.row_sum(half), expected, rtol=1e-10)


@pytest.mark.slow
def test_entropies_of_131072_uniform_rows_in_little_memory() -> None:
    """ln t, exactly, from 131,072 rows of equal logits: 8.6e9 pairs of query and key."""
    import resource

    length = 131_072
    q = torch.zeros(1, 1, 1, 1, dtype=torch.float64).expand(1, length, 1, 1)
    rows = dsf.SoftmaxRows(q, q)
    r = dsf.Recurrence(Identity(length), dsf.OneHot(length, length), rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = measures.entropy(r)[0, 0].values
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    np.testing.assert_allclose(found, np.log(np.arange(1, length + 1)), rtol=1e-12, atol=1e-12)
    assert grown < 2**20, "KiB"
