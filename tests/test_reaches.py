"""What one head can reach: hulls and spans against constructions and closed forms."""

from __future__ import annotations

import pytest
import torch

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.measures.reaches import SETS, distance_to_hull, reach


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(values, target):
    found = reach(values[None, :, None], target[None, None])
    return {name: float(found.sel(system=name).squeeze()) for name in SETS}


def test_targets_made_of_each_kind_of_weights_are_reached():
    v = normal(6, 12)
    alpha, free = torch.softmax(normal(6, seed=1), 0), normal(6, seed=2)
    zero_sum = free - free.mean()
    made = {
        "convex": alpha, "centred": alpha - 1 / 6, "zero_sum": zero_sum, "span": free,
        "affine": zero_sum + 1 / 6,
    }  # fmt: skip
    inside = {
        "convex": {"convex", "affine", "span"}, "centred": {"centred", "zero_sum", "span"},
        "zero_sum": {"zero_sum", "span"}, "affine": {"affine", "span"}, "span": {"span"},
    }  # fmt: skip
    for kind, weights in made.items():
        for name, distance in at(v, weights @ v).items():
            assert (distance < 1e-13) == (name in inside[kind]), (kind, name, distance)


def test_centred_softmax_is_bounded_and_the_span_is_not():
    """Proposition 3.1: lambda (v_1 - v_2) leaves the convex set for large lambda."""
    v = normal(5, 7)
    found = [at(v, size * (v[0] - v[1])) for size in (0.1, 1.0, 3.0, 10.0)]
    outside = [x["centred"] for x in found]
    assert outside[0] < 1e-13 < outside[1] < outside[2] < outside[3]
    assert max(x["zero_sum"] for x in found) < 1e-12


def test_a_head_reaches_its_own_output():
    """InLine rows sum to 1 and are signed: in the affine hull, outside the convex one."""
    from dsf.models.inline_attention import inline_attention_recurrence

    q, k = (3 * normal(1, 9, 1, 4, seed=s) for s in (3, 4))
    wide = normal(1, 9, 1, 20, seed=6)
    y = dsf.scan(inline_attention_recurrence(q, k), wide)[0, -1, 0]
    found = at(wide[0, :, 0], y)
    assert found["affine"] < 1e-11 * float(y.norm())
    assert found["convex"] > 0.1


def test_distance_to_a_triangle():
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    for target, expected in [([0.2, 0.2, 0.0], 0.0), ([0.2, 0.2, 3.0], 3.0), ([2.0, 0, 0], 1.0),
                             ([1.0, 1.0, 0.0], 0.5**0.5)]:  # fmt: skip
        found = float(distance_to_hull(corners, torch.tensor(target, dtype=torch.float64)))
        assert abs(found - expected) < 1e-14


def test_equal_values_reach_one_point():
    v = normal(1, 5).expand(4, 5)
    found = at(v, torch.zeros(5, dtype=torch.float64))
    assert found["convex"] == pytest.approx(float(v[0].norm()), rel=1e-12)
    assert found["zero_sum"] == found["centred"] == 0.0


def test_messages():
    with pytest.raises(DsfShapeError, match="target: expected"):
        reach(normal(1, 3, 2, 4), normal(1, 1, 4))
    with pytest.raises(DsfValueError, match="values: expected at least one value"):
        reach(normal(1, 0, 1, 4), normal(1, 1, 4))
