"""Softmax attention against released layers, its definition, and the claims about its order."""

import math

import pytest
import torch
from model_laws import (
    assert_near,
    check_all,
    fresh_input,
    load_golden,
    load_parameters,
    normal,
    shaken,
)

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models.softmax_attention import (
    SoftmaxAttention,
    forgetting_bias,
    softmax_attention_recurrence,
    softmax_log_normaliser,
)
from dsf.rotary import rotary_tables
from dsf.wrappers import core

GOLDEN_ATOL = 1e-9
EXACT = 1e-12


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


# -- released layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [
    "causal", "bidirectional", "window", "sink", "forget", "forget_sink_window",
])  # fmt: skip
def test_golden_variants(variant):
    case = load_golden("fla_softmax_forgetting_sink_attn")
    options = {"causal": variant != "bidirectional"}
    if "window" in variant:
        options["window"] = int(case["opt.window_size"])
    if "sink" in variant:
        options["sink"] = case["in.sink_bias"]
    if "forget" in variant:
        options["bias"] = forgetting_bias(case["in.g"])
    system = softmax_attention_recurrence(case["in.q"], case["in.k"], **options)
    near(dsf.scan(system, case["in.v"]), case[f"out.o_{variant}"], GOLDEN_ATOL)
    near(dsf.materialise(system), case[f"weights_{variant}"], GOLDEN_ATOL)
    top = core(system).C.logits(slice(None), slice(None)).amax(-1).transpose(1, 2)
    top = torch.maximum(top, options["sink"]) if "sink" in options else top
    near(top, case[f"out.max_logits_{variant}"], GOLDEN_ATOL)


@torch.no_grad()
def test_golden_query_key_norm():
    """Qwen3's attention: an RMS norm of each head's query and key before the rotation."""
    case = load_golden("gated_attention_baseline")
    layer = SoftmaxAttention(
        12, int(case["opt.num_heads"]), n_group=int(case["opt.num_kv_heads"]), qk_norm=True,
        head_width=int(case["opt.head_dim"]), rope_base=float(case["opt.rope_theta"]),
        norm_eps=float(case["opt.rms_norm_eps"]), bias=False,
    ).double()  # fmt: skip
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out",
             "q_norm": "query_norm", "k_norm": "key_norm"}  # fmt: skip
    load_parameters(layer, case, **names)
    x = case["in.x"]
    near(layer(x), case["out.y"], GOLDEN_ATOL)
    system, _ = layer.recurrence(x)
    near(dsf.materialise(system), case["weights"], GOLDEN_ATOL)


def test_golden_gpt2():
    case = load_golden("hf_gpt2_attention")
    layer = SoftmaxAttention(12, int(case["opt.num_heads"]), rope_base=None).double()
    weight, bias = case["param.c_attn.weight"].T, case["param.c_attn.bias"]
    parts = zip((layer.query, layer.key, layer.value), weight.split(12), bias.split(12),
                strict=True)  # fmt: skip
    with torch.no_grad():
        for linear, w, b in parts:
            linear.weight.copy_(w)
            linear.bias.copy_(b)
        layer.out.weight.copy_(case["param.c_proj.weight"].T)
        layer.out.bias.copy_(case["param.c_proj.bias"])
        near(layer(case["in.x"]), case["out.y"], GOLDEN_ATOL)
        near(dsf.materialise(layer.recurrence(case["in.x"])[0]), case["weights"], GOLDEN_ATOL)
    check_all(layer, case["in.x"])


def test_golden_llama():
    case = load_golden("hf_llama_attention")
    layer = SoftmaxAttention(
        12, int(case["opt.num_heads"]), n_group=int(case["opt.num_kv_heads"]), bias=False,
        rope_base=float(case["opt.rope_theta"]), head_width=int(case["opt.head_dim"]),
    ).double()  # fmt: skip
    load_parameters(layer, case, q_proj="query", k_proj="key", v_proj="value", o_proj="out")
    with torch.no_grad():
        near(layer(case["in.x"]), case["out.y"], GOLDEN_ATOL)
        near(dsf.materialise(layer.recurrence(case["in.x"])[0]), case["weights"], GOLDEN_ATOL)
    check_all(layer, case["in.x"])


# -- options -----------------------------------------------------------------------------------

OPTIONS = {
    "bidirectional": {"causal": False},
    "window": {"window": 3},
    "bidirectional_window": {"causal": False, "window": 3},
    "groups": {"n_group": 2, "head_width": 4},
    "one_group_window": {"n_group": 1, "window": 4},
    "softcap": {"softcap": 2.0},
    "sink": {"sink": True, "n_group": 2},
    "sink_window": {"sink": True, "window": 4},
    "no_positions": {"rope_base": None},
    "query_key_norm": {"qk_norm": True, "n_group": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    torch.manual_seed(0)
    check_all(shaken(SoftmaxAttention(8, 4, **OPTIONS[name]), size=0.3), fresh_input(8))


def naive(query, key, values, seen, bias=0.0):
    """The definition, row by row and head by head."""
    batch, length, head, width = query.shape
    out = torch.zeros(batch, length, head, values.shape[-1], dtype=query.dtype)
    bias = torch.as_tensor(bias, dtype=query.dtype).expand(batch, head, length, length)
    for b in range(batch):
        for h in range(head):
            g = h // (head // key.shape[2])
            for t in range(length):
                js = [j for j in range(length) if seen[b, t, j]]
                if js:
                    z = query[b, t, h] @ key[b, js, g].T / math.sqrt(width) + bias[b, h, t, js]
                    out[b, t, h] = torch.softmax(z, 0) @ values[b, js, g]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_mask_window_bias_and_groups_are_the_definition(causal, window):
    q, k, v = normal(2, 7, 4, 3), normal(2, 7, 2, 3, seed=1), normal(2, 7, 2, 5, seed=2)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[0, :3] = False  # left padding: the first rows see nothing when causal
    real[1, 5:] = False
    bias = normal(1, 4, 7, 7, seed=3)
    lag = torch.arange(7)[:, None] - torch.arange(7)
    seen = (lag >= 0) if causal else torch.ones_like(lag, dtype=torch.bool)
    seen = seen if window is None else seen & (lag.abs() < window)
    system = softmax_attention_recurrence(
        q, k, causal=causal, window=window, key_mask=real, bias=bias)  # fmt: skip
    expected = naive(q, k, v, seen[None] & real[:, None], bias)
    shared = v.repeat_interleave(2, 2)
    near(dsf.scan(system, shared), expected)
    near(dsf.scan(system, shared, "reference"), expected)
    near(torch.einsum("bhts,bshc->bthc", dsf.materialise(system), shared), expected)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 3}, {"sink": True}])
def test_layer_with_key_mask_and_bias(options):
    torch.manual_seed(0)
    layer = shaken(SoftmaxAttention(8, 4, n_group=2, **options))
    x, real = fresh_input(8, length=7), torch.ones(2, 7, dtype=torch.bool)
    real[0, :2], real[1, 4:] = False, False
    bias = normal(1, 4, 7, 7)
    with torch.no_grad():
        y = layer(x, key_mask=real, bias=bias)
        assert bool(torch.isfinite(y).all())
        system, values = layer.recurrence(x, key_mask=real, bias=bias)
        near(layer.readout(dsf.scan(system, values, "reference"), x), y)
        changed = x.masked_fill(~real[..., None], 7.0)  # what is masked is not read
        near(layer(changed, key_mask=real, bias=bias)[real], y[real])


def test_rotation_argument_and_rows():
    q, k = normal(1, 9, 2, 4), normal(1, 9, 2, 4, seed=1)
    tables = rotary_tables(9, 4)
    weights = dsf.materialise(softmax_attention_recurrence(q, k, rotation=tables))
    plain = dsf.materialise(softmax_attention_recurrence(q, k))
    near(weights.sum(-1), torch.ones(1, 2, 9, dtype=torch.float64))
    assert float((weights - plain).abs().max()) > 1e-2
    # one token everywhere: rotated weights depend on the lag alone
    same = dsf.materialise(softmax_attention_recurrence(
        q[:, :1].expand_as(q), k[:, :1].expand_as(k), rotation=tables))  # fmt: skip
    ratio = same / same.diagonal(dim1=-2, dim2=-1)[..., None]
    near(ratio[..., 1:, 1:].tril(), ratio[..., :-1, :-1].tril())


def test_without_position_the_past_is_a_set():
    """A = I is invariant to permuting tokens j < t; a rotation is not."""
    q, k, v = normal(1, 9, 2, 4), normal(1, 9, 2, 4, seed=1), normal(1, 9, 2, 3, seed=2)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 7, 4, 8])

    def last(k, v, **options):
        return dsf.scan(softmax_attention_recurrence(q, k, **options), v)[:, -1]

    near(last(k[:, order], v[:, order]), last(k, v))
    tables = rotary_tables(9, 4)
    moved = last(k[:, order], v[:, order], rotation=tables) - last(k, v, rotation=tables)
    assert float(moved.abs().max()) > 1e-6


def test_window_cache_stays_small():
    torch.manual_seed(0)
    layer = shaken(SoftmaxAttention(8, 4, window=3))
    state, x = None, fresh_input(8, length=9)
    for t in range(9):
        _, state = layer.step(x[:, t], state)
    assert state.key.shape[1] == 3
    assert state.position == 9


# -- claims ------------------------------------------------------------------------------------


def test_log_normaliser_and_its_ratio():
    """log eta by log-sum-exp; eta_(t-1)/eta_t in logs; masking by a product adds L - t."""
    q, k = normal(1, 12, 2, 4), normal(1, 12, 2, 4, seed=1)
    log_eta = softmax_log_normaliser(q, k, scale=1.0)
    logits = torch.einsum("bthd,bshd->bths", q, k)
    seen = torch.ones(12, 12, dtype=torch.float64).tril()[:, None]
    eta = (logits.exp() * seen).sum(-1)
    near((log_eta[:, :-1] - log_eta[:, 1:]).exp(), eta[:, :-1] / eta[:, 1:])
    wrong = (logits * seen).exp().sum(-1)
    near(wrong - eta, (12 - torch.arange(1.0, 13, dtype=torch.float64))[None, :, None]
         .expand_as(eta))  # fmt: skip
    big = softmax_log_normaliser(50 * q, 50 * k, scale=1.0)
    assert bool(torch.isfinite(big).all())


@pytest.mark.parametrize("length", [8, 16, 32])
def test_half_block_rank_of_softmax_is_full(length):
    """No finite state is enough for all lengths: rank of exp(Q K^T) is L/2, of Q K^T at most 3."""
    q, k = normal(length, 3), normal(length, 3, seed=1)
    half = length // 2

    def rank(similarity):
        values = torch.linalg.svdvals(similarity[half:, :half])
        return int((values > 1e-13 * values[0]).sum())

    system = softmax_attention_recurrence(q[None, :, None], k[None, :, None], scale=1.0)
    assert rank(dsf.materialise(system)[0, 0]) == half  # normalising rows changes no rank
    assert rank(q @ k.T) <= 3
    assert rank((1 + q @ k.T) ** 2) <= 10


def test_refusals():
    q, k = normal(1, 5, 4, 3), normal(1, 5, 3, 3)
    with pytest.raises(DsfShapeError, match="a group count that divides head=4, got 3"):
        softmax_attention_recurrence(q, k)
    with pytest.raises(DsfValueError, match="n_head: expected a divisor of width=10, got 4"):
        SoftmaxAttention(10, 4)
    with pytest.raises(DsfValueError, match="n_group: expected a divisor of n_head=4, got 3"):
        SoftmaxAttention(8, 4, n_group=3)
