"""Gated linear attention, retention, lightning attention, HGRN and HGRN2 against released code."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models.gla import Gla, gla_recurrence
from dsf.models.hgrn import Hgrn, hgrn_recurrence
from dsf.models.hgrn2 import Hgrn2, hgrn2_recurrence
from dsf.models.lightning_attention import (
    LightningAttention,
    lightning_attention_recurrence,
    lightning_log_decays,
)
from dsf.models.retention import Retention, retention_log_decays, retention_recurrence
from dsf.rotary import rotary_tables
from dsf.transitions import Diagonal, Scalar

EXACT = 1e-13


@pytest.mark.parametrize("initial", [False, True])
def test_golden_gla(initial):
    case = golden("fla_gla")
    start = case["in.initial_state"] if initial else None
    r = gla_recurrence(case["in.q"], case["in.k"], case["in.gk"], initial_state=start)
    y, state = dsf.scan(r, case["in.v"], return_state=True)
    end = "_with_initial_state" * initial
    assert_golden(y, case[f"out.o{end}"])
    assert_golden(state, case[f"out.final_state{end}"])
    if not initial:
        assert_golden(dsf.materialise(r), case["weights"])


def test_golden_retention():
    case = golden("fla_retention")
    q, k, v = (case[f"in.{n}"].transpose(1, 2) for n in "qkv")
    r = retention_recurrence(q, k)
    assert_golden(dsf.scan(r, v).transpose(1, 2), case["out.o"])
    assert_golden(dsf.materialise(r), case["weights"])
    assert_golden(retention_log_decays(2).exp(), case["info.decay_per_head"])


def test_golden_lightning():
    case = golden("fla_lightning_attn")
    log_decay = lightning_log_decays(
        2, int(case["opt.layer_idx"]), int(case["opt.num_layers"]), slopes="linear")  # fmt: skip
    assert_golden(log_decay, case["info.log_decay_per_head"])
    q, k, v = (case[f"in.{n}"] for n in "qkv")
    r = lightning_attention_recurrence(q, k, log_decay, scale=q.shape[-1] ** -0.5)
    y, state = dsf.scan(r, v, return_state=True)
    assert_golden(y, case["out.o"])
    assert_golden(state, case["out.final_state"])
    assert_golden(dsf.materialise(r), case["weights"])


@pytest.mark.parametrize("initial", [False, True])
def test_golden_hgrn(initial):
    case = golden("fla_hgrn")
    x, log_decay = case["in.x"], case["in.g"]
    start = case["in.initial_state"] if initial else None
    written = torch.ones_like(log_decay[:1, :1])
    r = hgrn_recurrence(log_decay, write=written, initial_state=start)
    y, state = dsf.scan(r, x[..., None], return_state=True)
    assert_golden(y[..., 0], case["out.o" + "_with_initial_state" * initial])
    if not initial:
        assert_golden(state[..., 0, 0], case["out.final_state"])
        assert_golden(dsf.materialise(r), case["weights_per_channel"])


def test_golden_hgrn2():
    """The core of the released MetaLA layer is the same function: key 1 - alpha, free query."""
    case = golden("metala_layer")
    q, log_decay, v = (case[f"mid.{n}"].transpose(1, 2) for n in ("q", "log_alpha", "v"))
    r = hgrn2_recurrence(q, log_decay)
    y, state = dsf.scan(r, v, return_state=True)
    assert_golden(y.transpose(1, 2), case["mid.o_recurrence"])
    assert_golden(state, case["out.final_state"])
    assert_golden(dsf.materialise(r), case["weights"])


def test_hgrn2_is_gla_with_its_own_key():
    q, log_decay = normal(2, 7, 2, 3), -normal(2, 7, 2, 3, seed=1).exp()
    v, key = normal(2, 7, 2, 4, seed=2), -torch.expm1(log_decay)
    y = dsf.scan(hgrn2_recurrence(q, log_decay), v)
    assert_near("gla", y, dsf.scan(gla_recurrence(q, key, log_decay), v), EXACT)
    one = hgrn_recurrence(log_decay.flatten(2))
    assert_near("write", one.B[..., 0, 0], key.flatten(2), 0.0)


def test_lightning_power_slopes():
    """2^(-8(h+1)/H), as in the original code, nearly flat in the last layer."""
    first, last = (lightning_log_decays(4, i, 3) for i in (0, 2))
    assert_near("first", first, -torch.tensor([0.25, 0.0625, 2**-6, 2**-8]).double(), 1.1e-5)
    assert float(last.abs().max()) < 1e-5
    with pytest.raises(DsfValueError, match=r"slopes: expected one of"):
        lightning_log_decays(4, slopes="none")


def test_retention_rotation_is_relative():
    """scale gamma^(t-j) q_t.R_(j-t) k_j: later positions give the same map."""
    q, k = normal(1, 6, 2, 4), normal(1, 6, 2, 4, seed=1)
    maps = [
        dsf.materialise(retention_recurrence(q, k, rotation=rotary_tables(6, 4, start=start)))
        for start in (0, 17)
    ]
    assert_near("shifted", maps[1], maps[0], EXACT)
    plain = dsf.materialise(retention_recurrence(q, k))
    assert float((maps[0] - plain).abs().max()) > 1e-2


def test_structures_and_errors():
    q = normal(1, 3, 2, 4)
    assert isinstance(gla_recurrence(q, q, -q.exp()).A, Diagonal)
    assert isinstance(retention_recurrence(q, q[:, :, :1]).A, Scalar)
    with pytest.raises(DsfShapeError, match=r"dsf\.gla_recurrence: key"):
        gla_recurrence(q, torch.cat([q, q[:, :, :1]], 2), q)


def test_exact_overwrite_and_lower_bound():
    """log_decay -inf forgets everything; a bound keeps the gate above it."""
    q, v = normal(1, 5, 1, 3), normal(1, 5, 1, 2, seed=1)
    log_decay = torch.full_like(q, -torch.inf)
    weights = dsf.materialise(hgrn2_recurrence(q, log_decay))
    assert not bool(weights.tril(-1).any())
    assert_near("own", dsf.scan(hgrn2_recurrence(q, log_decay, scale=1.0), v),
                q.sum(-1, keepdim=True) * v, EXACT)  # fmt: skip
    layer = shaken(Hgrn(8, lower_bound=0.9))
    with torch.no_grad():
        r, _ = layer.recurrence(fresh_input(8))
    assert float(r.A.log_decay.exp().min()) > 0.9


OPTIONS = {
    "gla_conv": (Gla, {"conv_size": 3, "value_width": 12}),
    "retention_bare": (Retention, {"rope_base": None, "key_width": 4}),
    "lightning_linear": (LightningAttention, {"slopes": "linear", "layer": 1, "n_layer": 3}),
    "hgrn_conv": (Hgrn, {"conv_size": 2, "expand": 2, "lower_bound": 0.5}),
    "hgrn2_bound": (Hgrn2, {"conv_size": 4, "lower_bound": 0.3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    kind, options = OPTIONS[name]
    torch.manual_seed(0)
    sizes = {} if kind is Hgrn else {"n_head": 2}
    check_all(shaken(kind(8, **sizes, **options)), fresh_input(8, length=7))
