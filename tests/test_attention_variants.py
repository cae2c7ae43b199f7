"""Forgetting, sigmoid and sliding window attention against released code and each other."""

import math

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models.forgetting_attention import ForgettingAttention, forgetting_attention_recurrence
from dsf.models.sigmoid_attention import SigmoidAttention, sigmoid_attention_recurrence
from dsf.models.sliding_window_attention import (
    SlidingWindowAttention,
    sliding_window_attention_recurrence,
)
from dsf.models.softmax_attention import softmax_attention_recurrence

EXACT = 1e-13


def released():
    case = golden("fla_softmax_forgetting_sink_attn")
    q, k, v, g = (case[f"in.{n}"] for n in ("q", "k", "v", "g"))
    return case, q, k, v, g, int(case["opt.window_size"])


@pytest.mark.parametrize("name", ["forget", "forget_sink_window", "forget_window"])
def test_golden_forgetting_attention(name):
    case, q, k, v, g, window = released()
    options = {"sink": case["in.sink_bias"] if "sink" in name else None,
               "window": window if "window" in name else None}  # fmt: skip
    systems = [forgetting_attention_recurrence(q, k, g, **options)]
    if options["window"]:
        systems.append(
            sliding_window_attention_recurrence(q, k, window, log_decay=g, sink=options["sink"])
        )
    for r in systems:
        for backend in ("reference", "auto"):
            assert_golden(dsf.scan(r, v, backend), case[f"out.o_{name}"])
        if f"weights_{name}" in case:
            assert_golden(dsf.materialise(r), case[f"weights_{name}"])


def test_golden_sliding_window_attention():
    case, q, k, v, _, window = released()
    r = sliding_window_attention_recurrence(q, k, window)
    for backend in ("reference", "auto"):
        assert_golden(dsf.scan(r, v, backend), case["out.o_window"])
    assert_golden(dsf.materialise(r), case["weights_window"])


def test_the_register_holds_the_last_values():
    q, v = normal(1, 7, 2, 4), normal(1, 7, 2, 3, seed=1)
    r = sliding_window_attention_recurrence(q, q[:, :, :1], 3)
    assert r.n_state == 3
    y, state = dsf.scan(r, v, return_state=True)
    assert_near("register", state, v[:, [6, 5, 4]].transpose(1, 2), 0.0)
    wide = sliding_window_attention_recurrence(q, q[:, :, :1], 20)
    assert_near("wide", dsf.scan(wide, v),
                dsf.scan(softmax_attention_recurrence(q, q[:, :, :1]), v), EXACT)  # fmt: skip
    narrow = softmax_attention_recurrence(q, q[:, :, :1], window=3)
    assert_near("cache", y, dsf.scan(narrow, v), EXACT)
    with pytest.raises(DsfValueError, match=r"window: expected at least 1, got 0"):
        sliding_window_attention_recurrence(q, q, 0)


def test_forget_gates_of_zero_hide_what_is_before():
    """log f = -inf at t = 3: later rows see tokens from 3 on, as if the text began there."""
    q, k, v = (normal(1, 6, 2, 4, seed=i) for i in range(3))
    g = -normal(1, 6, 2, seed=3).exp()
    g[:, 3] = -torch.inf
    r = forgetting_attention_recurrence(q, k, g)
    weights = dsf.materialise(r)
    assert not bool(weights[..., 3:, :3].any())
    assert bool(torch.isfinite(weights).all())
    late = forgetting_attention_recurrence(q[:, 3:], k[:, 3:], g[:, 3:])
    assert_near("late", dsf.scan(r, v)[:, 3:], dsf.scan(late, v[:, 3:]), EXACT)


def test_long_forgetting_in_float32_keeps_its_digits():
    """Far from the start sums of log f are large; their differences stay good in float32."""
    length = 4096
    g = -4 * torch.sigmoid(normal(1, length, 1))
    q, k = normal(1, length, 1, 4, seed=1), normal(1, length, 1, 4, seed=2)
    exact = forgetting_attention_recurrence(q, k, g)
    short = forgetting_attention_recurrence(q.float(), k.float(), g.float())
    tail = (slice(length - 8, length), slice(length - 8, length))
    assert_near("tail", short.C.tile(*tail).double(), exact.C.tile(*tail), 1e-5)


def test_forgetting_shapes_are_checked():
    q, g = normal(1, 4, 2, 3), -normal(1, 4, 2).exp()
    good = forgetting_attention_recurrence(q, q, g)
    assert good.C.shape_faults() == []
    bad = good.replace(C=type(good.C)(good.C.scores, g[:, :2]))
    with pytest.raises(DsfShapeError, match=r"C\.log_decay: expected axes \(batch=1, key=4"):
        bad.validate()


@pytest.mark.parametrize("causal", [True, False])
def test_sigmoid_attention_is_its_definition(causal):
    q, k, v = normal(2, 6, 4, 3), normal(2, 6, 2, 3, seed=1), normal(2, 6, 4, 5, seed=2)
    system = sigmoid_attention_recurrence(q, k, causal=causal)
    z = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2)) / math.sqrt(3)
    weights = torch.sigmoid(z - math.log(6))
    weights = weights.tril() if causal else weights
    assert_near("map", dsf.materialise(system), weights, EXACT)
    for backend in ("reference", "auto"):
        y = dsf.scan(system, v, backend)
        assert_near("y", y, torch.einsum("bhts,bshp->bthp", weights, v), EXACT)


def test_sigmoid_masks_are_exact_zeros_and_flat_rows_sum_to_one():
    q = torch.zeros(1, 8, 1, 2).double()
    mask = torch.tensor([[True] * 6 + [False] * 2])
    weights = dsf.materialise(sigmoid_attention_recurrence(q, q, key_mask=mask, window=3))
    assert not bool(weights[..., 6:].any())
    assert not bool(weights.tril(-3).any())
    flat = dsf.materialise(sigmoid_attention_recurrence(q, q, causal=False)).sum(-1)
    assert_near("sum", flat, torch.full_like(flat, 8 / 9), EXACT)
    bias = normal(1, 1, 8, 8)
    with_bias = dsf.materialise(sigmoid_attention_recurrence(q, q, bias=bias, offset=0.5))
    assert_near("bias", with_bias, torch.sigmoid(bias + 0.5).tril(), EXACT)


OPTIONS = {
    "forgetting": (ForgettingAttention, {"n_group": 1, "bias": True}),
    "sigmoid": (SigmoidAttention, {"n_group": 1, "context": 4}),
    "window": (SlidingWindowAttention, {"n_group": 1, "window": 1, "rope_base": None}),
    "window_rope": (SlidingWindowAttention, {"window": 3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    kind, options = OPTIONS[name]
    torch.manual_seed(0)
    check_all(shaken(kind(8, 2, **options)), fresh_input(8, length=7))
