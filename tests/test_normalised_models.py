"""Based, ReBased, mLSTM, sLSTM, minGRU, gated slot attention: released code, loops, hard gates."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import (
    assert_near,
    check_all,
    check_linearisation,
    fresh_input,
    normal,
    shaken,
    stepped,
)

import dsf
from dsf.models.based import Based, based_recurrence
from dsf.models.gated_slot_attention import (
    GatedSlotAttention,
    bounded_memory_log_decay,
    gated_slot_attention_recurrence,
    slot_memory,
)
from dsf.models.min_gru import MinGru, min_gru_recurrence, positive
from dsf.models.mlstm import Mlstm, mlstm_recurrence
from dsf.models.rebased import Rebased, rebased_recurrence, squared_features
from dsf.models.rwkv4 import rwkv4_recurrence
from dsf.models.slstm import Slstm, slstm_gates, slstm_recurrence

EXACT = 1e-12


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("name", "make"), [("fla_based_taylor", based_recurrence), ("fla_rebased", rebased_recurrence)]
)
def test_golden_kernel_features(name, make, normalise):
    case = golden(name)
    q, k, v = (case[f"in.{n}"].transpose(1, 2) for n in "qkv")
    r = make(q, k, scale=float(case["opt.scale"]), eps=float(case["opt.eps"]), normalise=normalise)
    end = "" if normalise else "_no_norm"
    for backend in ("reference", "auto"):
        assert_golden(dsf.scan(r, v, backend).transpose(1, 2), case[f"out.o{end}"])
    if f"weights{end}" in case:  # ReBased has no undivided map on file
        assert_golden(dsf.materialise(r), case[f"weights{end}"])


@pytest.mark.parametrize("initial", [False, True])
def test_golden_gated_slot_attention(initial):
    case = golden("fla_gsa")
    q, k, v, s, g = (case[f"in.{n}"] for n in ("q", "k", "v", "s", "g"))
    keys = case["in.initial_hk"].mT if initial else None
    values = case["in.initial_hv"] if initial else None
    r = gated_slot_attention_recurrence(
        q, k, g, write=s, initial_key_state=keys, initial_state=values)  # fmt: skip
    y, state = dsf.scan(r, v, return_state=True)
    end = "_with_initial_state" * initial
    assert_golden(y, case[f"out.o{end}"])
    assert_golden(state, case[f"out.final_hv{end}"])
    if not initial:
        assert_golden(dsf.materialise(r), case["weights"])
        _, held = dsf.scan(slot_memory(g), k, return_state=True)
        assert_golden(held.mT, case["out.final_hk"])


def test_golden_bounded_memory():
    """ABC attention is gated slot attention with the decays of a running mean."""
    case = golden("fla_abc")
    q, k, v, s = (case[f"in.{n}"].transpose(1, 2) for n in ("q", "k", "v", "s"))
    g = bounded_memory_log_decay(s)
    r = gated_slot_attention_recurrence(q, k, g)
    y, state = dsf.scan(r, v, return_state=True)
    assert_golden(y.transpose(1, 2), case["out.o"])
    assert_golden(dsf.materialise(r), case["weights"])
    assert_golden(state, case["out.final_hv"])
    _, held = dsf.scan(slot_memory(g), k, return_state=True)
    assert_golden(held.mT, case["out.final_hk"])


def test_slots_are_shared_by_groups_of_heads():
    q, k, v = normal(1, 5, 4, 3), normal(1, 5, 2, 3, seed=1), normal(1, 5, 2, 2, seed=2)
    g = -normal(1, 5, 2, 6, seed=3).exp()
    spread = [x.repeat_interleave(2, dim=2) for x in (k, g, v)]
    grouped = dsf.scan(gated_slot_attention_recurrence(q, k, g), spread[2])
    full = dsf.scan(gated_slot_attention_recurrence(q, spread[0], spread[1]), spread[2])
    assert_near("groups", grouped, full, 0.0)


def test_squared_features():
    q, k = normal(3, 5), normal(3, 5, seed=1)
    phi_q, phi_k = squared_features(q), squared_features(k)
    assert phi_q.shape == (3, 15)
    assert_near("(q.k)^2", (phi_q * phi_k).sum(-1), (q * k).sum(-1) ** 2, EXACT)


# -- mLSTM --------------------------------------------------------------------------------------


def gates(length=12, size=1.0):
    q, k, v = (normal(2, length, 2, 4, seed=i) for i in range(3))
    i, f = (size * normal(2, length, 2, seed=i) for i in (3, 4))
    return q, k, v, i, f


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("stabilised", [False, True])
def test_mlstm_against_the_released_loop(stabilised, eps):
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if not hasattr(modeling, "mlstm_recurrent_sequence_native"):
        pytest.skip("the xlstm package hides the native functions")
    q, k, v, i, f = gates(size=3.0)
    by_head = [x.transpose(1, 2) for x in (q, k, v, i, f)]
    expected = modeling.mlstm_recurrent_sequence_native(
        *by_head, eps=eps, dtype_state=torch.float64)  # fmt: skip
    expected = expected[0] if isinstance(expected, tuple) else expected
    r = mlstm_recurrence(q, k, i, f, eps=eps, stabilised=stabilised)
    assert_near("released", dsf.scan(r, v).transpose(1, 2), expected, EXACT)


def test_mlstm_gauges_are_one_map_and_the_stabilised_one_takes_any_gate():
    q, k, v, i, f = gates()
    plain, safe = (mlstm_recurrence(q, k, i, f, stabilised=s) for s in (False, True))
    assert_near("map", dsf.materialise(safe), dsf.materialise(plain), EXACT)
    huge = i + 2000.0
    y = dsf.scan(mlstm_recurrence(q, k, huge, f, stabilised=True), v)
    # a gate this large outweighs the bound of one: another shift of all gates changes nothing
    again = dsf.scan(mlstm_recurrence(q, k, huge + 500.0, f, stabilised=True), v)
    assert bool(torch.isfinite(y).all())
    assert_near("shift", again, y, 1e-9)


@torch.no_grad()
def test_mlstm_layer_against_transformers():
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if not hasattr(modeling, "mlstm_recurrent_sequence_native"):
        pytest.skip("the xlstm package hides the native layer")
    config = transformers.xLSTMConfig(
        hidden_size=8, num_heads=2, qk_dim_factor=0.5, v_dim_factor=1.0, eps=0.0,
        chunkwise_kernel="chunkwise--native_autograd", mode="inference",
        norm_reduction_force_float32=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = shaken(modeling.xLSTMLayer(config))
    for p in theirs.parameters():
        p.uniform_(-1, 1)
    names = {
        "query.linear": "q", "key.linear": "k", "value.linear": "v", "input_gate": "igate_preact",
        "forget_gate": "fgate_preact", "output.gate": "ogate_preact", "output.out": "out_proj",
        "output.norm.norm": "multihead_norm",
    }  # fmt: skip
    ours = shaken(Mlstm(8, 2, norm_eps=config.norm_eps))
    ours.output.norm.norm.bias.zero_()
    given = theirs.state_dict()
    found = {f"{a}.{end}": given[f"{b}.{end}"] for a, b in names.items()
             for end in ("weight", "bias") if f"{b}.{end}" in given}  # fmt: skip
    missing, unexpected = ours.load_state_dict(found, strict=False)
    assert (missing, unexpected) == (["output.norm.norm.bias"], [])
    x = fresh_input(8, length=9)
    y, _ = theirs(x)
    # their stabilised divisor carries 1e-6 or float32 casts whatever the configuration says
    assert_near("layer", ours(x), y, 1e-4)


def test_rwkv4_stabilised():
    """The same map, and finite for keys whose exponential is not."""
    k, v = normal(2, 8, 3), normal(2, 8, 3, 1, seed=1)
    w, u = -normal(3, seed=2).exp(), normal(3, seed=3)
    plain, safe = (rwkv4_recurrence(k, w, u, stabilised=s) for s in (False, True))
    assert_near("map", dsf.materialise(safe), dsf.materialise(plain), EXACT)
    for shift in (1500.0, -1500.0):
        y = dsf.scan(rwkv4_recurrence(k + shift, w, u, stabilised=True), v)
        assert_near("shift", y, dsf.scan(plain, v), 1e-9)
    start = {"initial_state": normal(2, 3, seed=4), "initial_sum": normal(2, 3, seed=5).exp()}
    both = [dsf.scan(rwkv4_recurrence(k, w, u, stabilised=s, **start), v) for s in (False, True)]
    assert_near("start", both[1], both[0], EXACT)


# -- sLSTM ---------------------------------------------------------------------------------------


def test_golden_slstm():
    case = golden("slstm")
    weight, bias = case["param.R_head_in_gate_out"], case["param.b"]
    projected = (case["in.Wx"] + bias).unflatten(-1, (4, -1))
    g, state = slstm_gates(projected, weight)
    assert_golden(g.hidden, case["out.y"])
    for part, expected in zip(state, case["out.states_y_c_n_m"], strict=True):
        assert_golden(part, expected[-1])
    r = slstm_recurrence(g.input_gate, g.forget_gate, g.output_gate)
    assert r.mode == "exact_along_trajectory"
    for backend in ("reference", "auto"):
        y = dsf.scan(r, g.candidate[..., None], backend)
        assert_golden(y[..., 0], case["out.y"])
    sums = dsf.materialise(r).sum(-1).squeeze(2).transpose(1, 2)
    assert_near("row sums", sums, torch.sigmoid(g.output_gate), EXACT)
    half, middle = slstm_gates(projected[:, :6], weight)
    rest, _ = slstm_gates(projected[:, 6:], weight, middle)
    assert_golden(torch.cat([half.hidden, rest.hidden], 1), case["out.y"])


def test_slstm_linearisation_is_the_jacobian():
    torch.manual_seed(0)
    layer = shaken(Slstm(4, 2))
    x = fresh_input(4, length=5, batch=1)
    check_linearisation(layer, x, 1e-11, lambda x: layer.gates(x)[0].hidden)


# -- minGRU --------------------------------------------------------------------------------------


@torch.no_grad()
def test_min_gru_is_the_gru_step_by_step():
    layer = shaken(MinGru(6, log_space=True), size=1.0)
    x = fresh_input(6)
    h, expected = torch.zeros(2, 6).double(), []
    for t in range(x.shape[1]):
        z = torch.sigmoid(layer.gate(x[:, t]))
        h = (1 - z) * h + z * positive(layer.candidate(x[:, t]))
        expected.append(h)
    assert_near("loop", layer(x), torch.stack(expected, 1), EXACT)
    assert_near("steps", stepped(layer, x), torch.stack(expected, 1), EXACT)


def test_min_gru_rows_sum_to_one_minus_what_is_left_of_the_start():
    logit = normal(1, 7, 3)
    start = normal(1, 3, seed=1)
    left = torch.cumprod(torch.sigmoid(-logit), dim=1)
    sums = dsf.materialise(min_gru_recurrence(logit)).sum(-1)
    assert_near("row sums", sums.squeeze(2).transpose(1, 2), 1 - left, EXACT)
    y = dsf.scan(min_gru_recurrence(logit, initial_state=start), torch.zeros(1, 7, 3, 1).double())
    assert_near("start", y[..., 0], left * start[:, None], EXACT)


OPTIONS = {
    "based": (Based, {"n_head": 2, "feature_width": 3}),
    "rebased": (Rebased, {"n_head": 2, "feature_width": 4, "shared": False}),
    "mlstm": (Mlstm, {"n_head": 2, "gate_cap": 5.0}),
    "slstm": (Slstm, {"n_head": 2}),
    "min_gru": (MinGru, {"n_hidden": 5, "log_space": False}),
    "gsa": (GatedSlotAttention, {"n_head": 2, "n_slot": 3, "conv_size": 3, "temperature": 1.0}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    kind, options = OPTIONS[name]
    torch.manual_seed(0)
    check_all(shaken(kind(8, **options)), fresh_input(8, length=7))
