"""MetaLA's conditions: the paper's table by name, and the constructions behind it."""

from __future__ import annotations

import pytest
import torch

import dsf
from dsf.errors import DsfShapeError, DsfUnsupportedError, DsfValueError
from dsf.measures.linear_conditions import (
    FAMILIES,
    Family,
    conditions,
    dynamic_memory,
    linear_complexity,
    static_approximation,
)
from dsf.models import registered
from dsf.models.gla import gla_recurrence
from dsf.models.softmax_attention import softmax_attention_recurrence

# Chou et al. (2024), Table 2: C0, C1, C2, C3
PRINTED = {
    "retention": (1, -1, -1, -1), "lightning_attention": (1, -1, -1, -1),
    "s4d": (1, -1, -1, -1), "gla": (1, 1, 1, -1), "mamba": (1, 1, 1, -1),
    "linear_attention": (1, -1, 1, -1), "random_feature_attention": (1, -1, 1, -1),
    "rwkv4": (1, -1, -1, -1), "glru": (1, 1, -1, -1), "metala": (1, 1, 1, 1),
    "lru": (1, -1, -1, -1), "s5": (1, -1, -1, -1), "hgrn": (1, 1, -1, -1),
    "rglru": (1, 1, -1, -1),
}  # fmt: skip


def softmax_map(length, seed=0):
    logits = torch.randn(length, length, generator=torch.Generator().manual_seed(seed))
    hidden = torch.ones(length, length).triu(1) > 0
    return torch.softmax(logits.double().masked_fill(hidden, -torch.inf), -1)


def test_the_printed_table():
    found = conditions()
    for name, row in PRINTED.items():
        at = found.sel(system=name)
        assert tuple(int(at[c]) for c in ("C0", "C1", "C2", "C3")) == row, name
    assert list(found.system.values) == list(PRINTED)
    assert set(PRINTED) - {"glru"} <= set(registered())


@pytest.mark.parametrize(
    ("query", "key", "decay"),
    [(True, "one", "fixed"), (True, "one", "none"), (False, "free", "none")],
)
def test_the_printed_groups_without_a_model(query, key, decay):
    """Rows (Q, Lambda) and (Q or K) of the table: linear, and nothing else."""
    found = conditions({"none": Family(query, key, decay)})
    assert [int(found[c][0]) for c in ("C0", "C1", "C2", "C3")] == [1, -1, -1, -1]


def test_linear_complexity_of_real_systems():
    def made(n):
        return [torch.rand(1, n, 1, 3), torch.rand(1, n, 1, 3), -torch.rand(1, n, 1, 3)]

    assert int(linear_complexity(lambda n: gla_recurrence(*made(n)))) == 1
    grows = linear_complexity(lambda n: softmax_attention_recurrence(*made(n)[:2]))
    assert int(grows) == -1
    assert grows.attrs["sizes"] == "[16, 32, 64]"


def test_a_key_of_one_passes_the_printed_test_only():
    """The paper's proof takes k = 1: row 1 is right, the rows beside it get v_new too."""
    found = dynamic_memory(Family(False, "one", "dynamic"))
    assert int(found.dynamic_memory) == 1
    assert float(found.row_error) == 0
    assert float(found.others_error) == pytest.approx(1.0)
    tied = dynamic_memory(FAMILIES["metala"])
    assert float(tied.row_error) == float(tied.others_error) == 0.0


@pytest.mark.parametrize("name", ["metala", "gla", "linear_attention", "retention"])
def test_any_softmax_map(name):
    target = softmax_map(40)
    r, found = static_approximation(FAMILIES[name], target, decay=0.5)
    assert float(found.error) <= 1e-14
    assert float((dsf.materialise(r)[0, 0] - target).abs().max()) <= 1e-14
    assert float(found.largest_query) == 1.0
    assert (float(found.largest_key) > 1e8) == (name == "retention")
    assert float(found.largest_key) == 1.0 or name == "retention"


@pytest.mark.parametrize(("decay", "largest"), [(0.5, 1.126e13), (0.9, 3.493), (0.99, 0.03273)])
def test_a_fixed_decay_needs_keys_without_bound(decay, largest):
    uniform = torch.ones(50, 50, dtype=torch.float64).tril()
    uniform = uniform / uniform.sum(1, keepdim=True)
    r, _ = static_approximation(FAMILIES["retention"], uniform, decay=decay)
    assert float(r.B[0, :, 0, 49].max()) == pytest.approx(largest, rel=1e-3)


def test_messages():
    with pytest.raises(DsfUnsupportedError, match="family: expected a free query"):
        static_approximation(FAMILIES["hgrn"], softmax_map(4))
    with pytest.raises(DsfShapeError, match="weights: expected a square map"):
        static_approximation(FAMILIES["metala"], torch.ones(4, 4))
    with pytest.raises(DsfValueError, match="weights: expected rows that sum to 1"):
        static_approximation(FAMILIES["metala"], torch.eye(4) / 2)
    with pytest.raises(DsfValueError, match="decay: expected decay\\^length"):
        conditions(decay=0.99)
    with pytest.raises(DsfValueError, match="n_state: expected 2 or more, got 1"):
        dynamic_memory(FAMILIES["gla"], n_state=1)
    with pytest.raises(DsfValueError, match="query: expected what"):
        FAMILIES["hgrn"].recurrence(torch.ones(3, 2), query=torch.ones(3, 2))
