"""Linear attention against released code, the direct masked sum, and the framework's claims."""

from itertools import pairwise

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, load_golden, normal, shaken

import dsf
from dsf.errors import DsfValueError
from dsf.feature_maps import elu_plus_one, feature_map, n_taylor_features, taylor_error_bound
from dsf.models.linear_attention import LinearAttention, linear_attention_recurrence
from dsf.models.softmax_attention import softmax_attention_recurrence
from dsf.transitions import BlockDiagonal, Dense, Scalar

GOLDEN_ATOL = 1e-9
EXACT = 1e-12
MAPS = ["identity", "elu_plus_one", "relu", "exp", "taylor", "taylor_4"]


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def qkv(length=9, head=2, width=3, channel=4):
    return (normal(2, length, head, width), normal(2, length, head, width, seed=1),
            normal(2, length, head, channel, seed=2))  # fmt: skip


def direct(q, k, v, phi, *, normalise, causal):
    """sum_j phi(q_t).phi(k_j) v_j / sum_j phi(q_t).phi(k_j), and the weights."""
    weights = torch.einsum("bthf,bshf->bhts", phi(q), phi(k))
    weights = weights.tril() if causal else weights
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhts,bshc->bthc", weights, v), weights


# -- released code -----------------------------------------------------------------------------


@pytest.mark.parametrize("gauge", ["identity", "dsf"])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_golden_fla(gauge, initial, normalise):
    case = load_golden("fla_linear_attn")
    options = {"feature_map": "identity", "scale": float(case["opt.scale"]), "gauge": gauge}
    if initial:
        options["initial_state"] = case["in.initial_state"]
        if normalise:
            options["initial_key_sum"] = case["in.initial_z"][:, 0]
    if normalise:
        options["eps"] = float(case["opt.norm_eps"])
    r = linear_attention_recurrence(case["in.q"], case["in.k"], normalise=normalise, **options)
    y, state = dsf.scan(r, case["in.v"], return_state=True)
    name = "out.o" + "_normalized" * normalise + "_with_initial_state" * initial
    near(y, case[name], GOLDEN_ATOL)
    if not initial:
        weights = case["weights_normalized" if normalise else "weights"]
        near(dsf.materialise(r), weights, GOLDEN_ATOL)
    if not normalise:
        final = "out.final_state" + "_with_initial_state" * initial
        near(state, case[final], GOLDEN_ATOL)
    elif gauge == "identity":
        if not initial:
            near(state, case["out.final_kv_normalized"], GOLDEN_ATOL)
        start = case["in.initial_z"][:, 0, :, :, None] if initial else None
        ones = torch.ones_like(case["in.v"][..., :1])
        _, z = dsf.scan(r.replace(initial_state=start), ones, return_state=True)
        final = case["out.final_z_normalized" + "_with_initial_state" * initial]
        near(z[..., 0], final[:, 0], GOLDEN_ATOL)


@pytest.mark.parametrize("normalise", [False, True])
def test_golden_based(normalise):
    case = load_golden("fla_based_taylor")
    q, k, v = (case[f"in.{n}"].transpose(1, 2) for n in "qkv")
    r = linear_attention_recurrence(
        q, k, feature_map="taylor", scale=float(case["opt.scale"]), normalise=normalise,
        eps=float(case["opt.eps"]) if normalise else 0.0,
    )  # fmt: skip
    end = "" if normalise else "_no_norm"
    near(dsf.scan(r, v).transpose(1, 2), case[f"out.o{end}"], GOLDEN_ATOL)
    near(dsf.materialise(r), case[f"weights{end}"], GOLDEN_ATOL)


# -- the definition ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gauge", ["identity", "dsf"])
def test_is_the_direct_sum(name, causal, gauge):
    q, k, v = qkv()
    for normalise in (False, True):
        system = linear_attention_recurrence(
            q, k, feature_map=name, normalise=normalise, causal=causal, gauge=gauge)  # fmt: skip
        y, weights = direct(q, k, v, feature_map(name), normalise=normalise, causal=causal)
        if name == "relu":  # a row without any similarity is zero, not 0/0
            y, weights = y.nan_to_num(), weights.nan_to_num()
        # signed features: eta comes near zero, and round-off is relative to the terms of its sum
        loose = 1e3 * EXACT if name == "identity" and normalise else EXACT
        near(dsf.scan(system, v), y, loose)
        near(dsf.scan(system, v, "reference"), y, loose)
        near(dsf.materialise(system), weights, loose)
        positive = normalise and name not in ("identity", "relu")
        if positive:
            near(dsf.materialise(system).sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))


def test_the_printed_normaliser_is_wrong():
    """Erratum 1: eta_(t-1) in B_t, as the main text prints it, is another function."""
    q, k, v = qkv()
    r = linear_attention_recurrence(q, k, gauge="dsf")
    y, _ = direct(q, k, v, elu_plus_one, normalise=True, causal=True)
    ratio = r.A.decay()[..., None, None]  # eta_(t-1)/eta_t
    printed = r.replace(B=r.B / ratio)
    assert float((dsf.scan(printed, v) - y).abs().max()) > 1e-2
    near(dsf.scan(r, v), y)


def test_grouped_keys():
    q, k, v = normal(2, 6, 4, 3), normal(2, 6, 2, 3, seed=1), normal(2, 6, 4, 5, seed=2)
    shared = k.repeat_interleave(2, 2)
    near(dsf.scan(linear_attention_recurrence(q, k), v),
         dsf.scan(linear_attention_recurrence(q, shared), v))  # fmt: skip


def test_rows_without_similarity_are_zero_and_differentiable():
    q, k, v = qkv()
    k = k.clone()
    k[:, :4] = -k[:, :4].abs()  # relu features vanish: the first rows see nothing
    k.requires_grad_()
    for gauge in ("identity", "dsf"):
        y = dsf.scan(linear_attention_recurrence(q, k, feature_map="relu", gauge=gauge), v)
        assert not bool(y[:, :4].any())
        (slope,) = torch.autograd.grad(y.square().sum(), k)
        assert bool(torch.isfinite(slope).all())


OPTIONS = {
    "bidirectional": {"causal": False},
    "bidirectional_dsf": {"causal": False, "gauge": "dsf"},
    "dsf_gauge": {"gauge": "dsf"},
    "no_normaliser": {"normalise": False},
    "identity": {"feature_map": "identity", "normalise": False},
    "taylor": {"feature_map": "taylor_2", "scale": 0.7, "eps": 1e-6},
    "exp": {"feature_map": "exp"},
    "groups": {"n_group": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    torch.manual_seed(0)
    check_all(shaken(LinearAttention(8, 4, **OPTIONS[name])), fresh_input(8))


# -- claims ------------------------------------------------------------------------------------


def test_telescoping_and_the_state():
    """A_t ... A_(j+1) B_j = psi(k_j)/eta_t: the normaliser never accumulates."""
    q, k, v = qkv()
    r = linear_attention_recurrence(q, k, gauge="dsf")
    features, eta = elu_plus_one(k), (elu_plus_one(q) * elu_plus_one(k).cumsum(1)).sum(-1)
    decay = r.A.decay()
    for t in range(9):
        for j in range(t + 1):
            product = decay[:, j + 1 : t + 1].prod(1)
            near(product[..., None] * r.B[:, j, :, :, 0], features[:, j] / eta[:, t, :, None])
    _, state = dsf.scan(r, v, return_state=True)
    near(state, torch.einsum("bthf,bthc->bhfc", features, v) / eta[:, -1, :, None, None])


def test_gauge_changes_the_transition_and_nothing_else():
    q, k, _ = qkv()
    plain = linear_attention_recurrence(q, k)
    scaled = linear_attention_recurrence(q, k, gauge="dsf")
    near(dsf.materialise(plain), dsf.materialise(scaled))
    eta = (elu_plus_one(q) * elu_plus_one(k).cumsum(1)).sum(-1)
    ratio = eta[:, :-1] / eta[:, 1:]
    near(scaled.A.decay()[:, 1:], ratio)
    assert float((scaled.A.decay() - 1).abs().max()) > 1e-2
    # T_t = eta_t I undoes it: A = I to round-off
    back = eta[:, 1:] * scaled.A.decay()[:, 1:] / eta[:, :-1]
    near(back, torch.ones_like(back), 1e-14)
    assert plain.structure == "identity"
    assert isinstance(scaled.A, Scalar)
    assert plain.gauge != scaled.gauge


def test_multi_head_is_block_diagonal_over_heads():
    """Heads in one state: blkdiag of (eta_(t-1)/eta_t) I, the form that holds for elu + 1."""
    q, k, v = qkv(head=3)
    r = linear_attention_recurrence(q, k, gauge="dsf")
    eye = torch.eye(3, dtype=torch.float64)
    blocks = r.A.decay()[..., None, None] * eye  # (batch, time, head as block, 3, 3)
    B = torch.einsum("bthn,hg->bthng", r.B[..., 0], eye).flatten(2, 3)
    C = torch.einsum("bthn,hg->btghn", r.C[..., 0, :], eye).flatten(3, 4)
    whole = dsf.Recurrence(BlockDiagonal(blocks[:, :, None], 3), B[:, :, None], C[:, :, None])
    near(dsf.scan(whole, v[:, :, None])[:, :, 0], dsf.scan(r, v))


def test_taylor_tends_to_softmax():
    q, k, v = qkv(length=8, head=1, width=4)
    logits = torch.einsum("bthf,bshf->bhts", q, k)
    target = dsf.scan(softmax_attention_recurrence(q, k, scale=1.0), v)
    top, errors = float(logits.abs().max()), []
    for order in range(2, 21, 2):
        r = linear_attention_recurrence(q, k, feature_map=f"taylor_{order}")
        assert r.n_state == n_taylor_features(4, order)
        plain = linear_attention_recurrence(
            q, k, feature_map=f"taylor_{order}", normalise=False)  # fmt: skip
        missing = (dsf.materialise(plain) - logits.exp().tril()).abs()
        bound = taylor_error_bound(logits, order).tril()
        assert bool((missing <= bound + 1e-12 * logits.exp().max()).all())
        if order > top:
            errors.append(float((dsf.scan(r, v) - target).abs().max()))
    assert len(errors) >= 4
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("name", ["identity", "elu_plus_one", "taylor"])
def test_order_of_the_map(name):
    """rank M[t:, :t] <= N, attained for random data."""
    q, k, _ = qkv(length=40)
    r = linear_attention_recurrence(q, k, feature_map=name)
    weights = dsf.materialise(r)
    ranks = [int(torch.linalg.matrix_rank(weights[0, 0, t:, :t], rtol=1e-10))
             for t in range(1, 40)]  # fmt: skip
    assert max(ranks) == r.n_state


def test_padding_a_feature():
    """Zero rows of W_q, W_k: exact for identity features, another function for elu + 1."""
    q, k, v = qkv()
    padded = [torch.nn.functional.pad(x, (0, 2)) for x in (q, k)]

    def output(*args, name):
        return dsf.scan(linear_attention_recurrence(*args, feature_map=name, normalise=False), v)

    near(output(*padded, name="identity"), output(q, k, name="identity"))
    difference = output(*padded, name="elu_plus_one") - output(q, k, name="elu_plus_one")
    assert float(difference.abs().max()) > 1e-3


def test_a_larger_system_holds_a_smaller_one():
    """Lemma 2: [[A, 0], [X, Y]], [B; Z], [C, 0] gives the same outputs."""
    q, k, v = qkv()
    r = linear_attention_recurrence(q, k, gauge="dsf")
    A = torch.zeros(2, 9, 2, 5, 5, dtype=torch.float64)
    A[..., :3, :3] = r.A.as_dense()
    A[..., 3:, :] = 0.3 * normal(2, 9, 2, 2, 5, seed=5)
    B = torch.cat([r.B, normal(2, 9, 2, 2, 1, seed=6)], dim=3)
    C = torch.nn.functional.pad(r.C, (0, 2))
    near(dsf.scan(dsf.Recurrence(Dense(A), B, C), v), dsf.scan(r, v))


def test_refusals():
    q, k, _ = qkv()
    with pytest.raises(DsfValueError, match="gauge: expected one of"):
        linear_attention_recurrence(q, k, gauge="other")
    with pytest.raises(DsfValueError, match="initial_state: expected None for causal=False"):
        linear_attention_recurrence(q, k, causal=False, initial_state=normal(2, 2, 3, 4))
    with pytest.raises(DsfValueError, match="expected one of"):
        LinearAttention(8, feature_map="cosine")
