"""Gated attention: released layers, what each gate does to the map, the identity with a sink."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import assert_near, normal

import dsf
from dsf.factors import OneHot, SoftmaxRows
from dsf.feature_maps import Taylor
from dsf.models._gates import split_query_gate
from dsf.models.gated_attention import GatedAttention, channel_heads, gated_attention_recurrence
from dsf.normalisers import kernel_sum, log_and_sign, separable_system
from dsf.transitions import Identity
from dsf.wrappers import core, gated

EXACT = 1e-13
SAME = 1e-14
SLACK = 1e-15


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def qkv(length=20, head=2, width=4, channel=3):
    return (normal(2, length, head, width), normal(2, length, head, width, seed=1),
            normal(2, length, head, channel, seed=2))  # fmt: skip


def weights_of(q, k):
    logits = torch.einsum("bthf,bshf->bhts", q, k) * q.shape[-1] ** -0.5
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    return torch.softmax(logits.masked_fill(~seen, -torch.inf), -1)


def gate(*shape, seed=9):
    return torch.sigmoid(normal(*shape, seed=seed))


# -- released code -----------------------------------------------------------------------------


def released(name, *, qwen3next=False):
    case = golden(name)
    head, group, width = (int(case[f"opt.{n}"]) for n in ("num_heads", "num_kv_heads", "head_dim"))
    weights = case.group("param")
    gated_rows = weights["q_proj.weight"].shape[0] - head * width
    layer = GatedAttention(
        case["in.x"].shape[-1], head, n_group=group, head_width=width,
        position="output" if gated_rows else None,
        granularity="headwise" if gated_rows == head else "elementwise",
        rotary_width=int(case["opt.rotary_dim"]) if qwen3next else None,
    ).double()  # fmt: skip
    groups = head if qwen3next else group
    q, g = split_query_gate(weights["q_proj.weight"], groups, head // groups, width)
    weights = {**weights, "q_proj.weight": q}
    if gated_rows:
        weights["gate_proj.weight"] = g
    if qwen3next:  # stored as offsets from one
        weights |= {f"{n}_norm.weight": 1 + weights[f"{n}_norm.weight"] for n in "qk"}
    layer.load_state_dict(weights)
    prefix = "in" if qwen3next else "mid"
    return layer, case, (case[f"{prefix}.cos"], case[f"{prefix}.sin"])


NAMES = ["gated_attention_baseline", "gated_attention_elementwise", "gated_attention_headwise",
         "hf_qwen3next_gated_attention"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_released_layers(name):
    layer, case, rotation = released(name, qwen3next=name.startswith("hf"))
    x = case["in.x"]
    assert_golden(layer(x, rotation=rotation), case["out.y"])
    system, values = layer.recurrence(x, rotation=rotation)
    for backend in ("auto", "reference"):
        assert_golden(layer.readout(dsf.scan(system, values, backend), x), case["out.y"])
    if "weights_gated" in case:
        assert_golden(layer.scores(x), case["mid.gate_after_sigmoid"])
        assert_golden(dsf.materialise(system), case["weights_gated"])
    layer.position = None
    assert_golden(dsf.materialise(layer.recurrence(x, rotation=rotation)[0]), case["weights"])


# -- what each gate does -----------------------------------------------------------------------


@pytest.mark.parametrize("channel", [1, 3])
def test_output_gate_scales_c(channel):
    q, k, v = qkv()
    g = gate(2, 20, 2, channel)
    system = gated_attention_recurrence(q, k, output_gate=g)
    expected = g * torch.einsum("bhts,bshc->bthc", weights_of(q, k), v)
    near(dsf.scan(system, v), expected)
    near(dsf.scan(system, v, "reference"), expected)
    assert isinstance(core(system).A, Identity)


@pytest.mark.parametrize("channel", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_value_gate_scales_b(channel, causal):
    q, k, v = qkv()
    g = gate(2, 20, 2, channel)
    system = gated_attention_recurrence(q, k, value_gate=g, causal=causal)
    a = weights_of(q, k)
    if not causal:
        a = torch.softmax(torch.einsum("bthf,bshf->bhts", q, k) / 2, -1)
    expected = torch.einsum("bhts,bshc->bthc", a, g * v)
    u = channel_heads(v) if channel > 1 else v
    for backend in ("auto", "chunked", "reference"):
        near(dsf.scan(system, u, backend).reshape_as(v), expected)
    weights = dsf.materialise(system)
    per_channel = a[:, :, None] * g.permute(0, 2, 3, 1)[..., None, :]
    near(weights, per_channel.flatten(1, 2))
    assert float(weights.sum(-1).max()) <= 1 + SLACK
    # the cache realisation written out: B_t = g_t e_t
    r = core(system)
    if causal:
        eye = torch.eye(20, dtype=torch.float64)[None, :, None, :, None]
        dense = dsf.Recurrence(
            Identity(20), g.flatten(2)[..., None, None] * eye,
            r.C.rows.tile(slice(0, 20), slice(0, 20)).transpose(1, 2)[..., None, :],
        )  # fmt: skip
        near(dsf.scan(dense, u).reshape_as(v), expected)
        near(dsf.materialise(r.time_slice(4, 9)), weights[..., 4:9, 4:9])


def test_key_and_query_gates_act_inside_the_softmax():
    q, k, v = qkv()
    g = gate(2, 20, 2, 4)
    for name, expected in [("key", weights_of(q, g * k)), ("query", weights_of(g * q, k))]:
        system = gated_attention_recurrence(q, k, **{f"{name}_gate": g})
        near(dsf.materialise(system), expected)
        near(expected.sum(-1), torch.ones(2, 2, 20, dtype=torch.float64))
        near(dsf.scan(system, v), torch.einsum("bhts,bshc->bthc", expected, v))


def test_gates_in_finite_features():
    """The same slots with order-2 Taylor features: G1 in C, G2 in B, G3 in B and the sum."""
    q, k, v = qkv()
    phi = Taylor(2)
    g = gate(2, 20, 2, 1)

    def system(query, key):
        eta = kernel_sum(phi(query), phi(key))
        return separable_system(phi(query), phi(key), *log_and_sign(eta))

    def dense(query, key):
        w = torch.einsum("bthf,bshf->bhts", phi(query), phi(key)).tril()
        return w / w.sum(-1, keepdim=True)

    mixed = torch.einsum("bhts,bshc->bthc", dense(q, k), v)
    output = gated(g, system(q, k))
    assert isinstance(output, dsf.Recurrence)
    near(dsf.scan(output, v), g * mixed)
    r = system(q, k)
    near(dsf.scan(r.replace(B=g[..., None] * r.B), v),
         torch.einsum("bhts,bshc->bthc", dense(q, k), g * v))  # fmt: skip
    g4 = gate(2, 20, 2, 4)
    for first, second in [(q, g4 * k), (g4 * q, k)]:
        near(dsf.scan(system(first, second), v),
             torch.einsum("bhts,bshc->bthc", dense(first, second), v))  # fmt: skip


def test_sink_is_a_headwise_gate():
    """A sink without value = sigmoid(LSE - s_0) times the output; s_0 = 0 is off by one."""
    q, k, v = qkv()
    for sink in (torch.zeros(2).double(), normal(2, seed=4)):
        rows = SoftmaxRows(q, k, sink=sink)
        with_sink = dsf.Recurrence(Identity(20), OneHot(20, 20), rows)
        plain = SoftmaxRows(q, k)
        every = slice(0, 20)
        lse = torch.logsumexp(plain.logits(every, every), -1).transpose(1, 2)
        g = torch.sigmoid(lse - sink)[..., None]
        near(dsf.scan(gated_attention_recurrence(q, k, output_gate=g), v),
             dsf.scan(with_sink, v), SAME)  # fmt: skip
    e = plain.logits(every, every).exp()
    off = e / (1 + e.sum(-1, keepdim=True))
    near(dsf.materialise(with_sink.replace(C=SoftmaxRows(q, k, sink=torch.zeros(2).double()))),
         off, SAME)  # fmt: skip


def test_constant_one_is_the_ungated_layer():
    q, k, v = qkv()
    plain = gated_attention_recurrence(q, k)
    y = dsf.scan(plain, v)
    one = torch.ones(2, 20, 2, 1, dtype=torch.float64)
    for name in ("output", "value", "key", "query"):
        system = gated_attention_recurrence(q, k, **{f"{name}_gate": one})
        assert torch.equal(dsf.scan(system, v), y)
        assert core(system).A == plain.A
