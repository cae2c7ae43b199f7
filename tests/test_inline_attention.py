"""InLine attention against the released code, its quadratic forms and its two coordinates."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models._inline_core import COORDINATES, inline_map, key_means
from dsf.models._local_residual import convolved, register_recurrence
from dsf.models.inline_attention import InlineAttention, inline_attention_recurrence
from dsf.transitions import DiagonalLowRank, Identity

EXACT = 1e-12
FORMS = 1e-13
RANK_THRESHOLD = 1e-10
MAPS = ["identity", "relu", "leaky_relu", "exp"]


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def qkv(length=12, head=2, width=4, channel=3):
    return (normal(2, length, head, width), normal(2, length, head, width, seed=1),
            normal(2, length, head, channel, seed=2))  # fmt: skip


def direct(q, k, *, causal, scale, phi="identity"):
    """Equation 6.1, row by row."""
    phi = inline_map(phi)
    fq, fk = phi(q), phi(k)
    length = q.shape[1]
    weights = torch.zeros(q.shape[0], q.shape[2], length, length, dtype=q.dtype)
    for t in range(length):
        n = t + 1 if causal else length
        g = 1.0 if scale == "published" else q.shape[-1] ** -0.5 / n
        centred = fk[:, :n] - fk[:, :n].mean(1, keepdim=True)
        row = g * torch.einsum("bhf,bjhf->bhj", fq[:, t], centred) + 1 / n
        weights[:, :, t, :n] = row
    return weights


# -- released code -----------------------------------------------------------------------------

CASES = {
    "inline_deit_core": {"class_token": True},
    "inline_deit_local_conv": {"class_token": True, "local": "grid"},
    "inline_swin_relu": {"local": "grid", "feature_map": "relu"},
}


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("name", CASES)
def test_released_layers(name, coordinates):
    case = golden(name)
    x = case["in.x"]
    layer = InlineAttention(
        x.shape[-1], int(case["opt.num_heads"]), causal=False, coordinates=coordinates,
        **CASES[name],
    ).double()  # fmt: skip
    own = layer.state_dict()
    layer.load_state_dict({k: v for k, v in case.group("param").items() if k in own})
    system, values = layer.recurrence(x)
    assert_golden(layer(x), case["out.y"])
    assert_golden(layer.readout(dsf.scan(system, values), x), case["out.y"])
    weights = dsf.materialise(system)
    if layer.local is None:
        assert_golden(weights, case["weights"])
    else:
        assert_golden(weights, case["weights_per_channel"])
        assert_golden(layer._kernel(x), case["mid.local_conv_kernel_per_image_channel"])


# -- forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", MAPS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", ["released", "published"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_both_coordinates_are_the_quadratic_form(phi, causal, scale, coordinates):
    q, k, v = qkv()
    system = inline_attention_recurrence(
        q, k, causal=causal, coordinates=coordinates, feature_map=phi, scale=scale)  # fmt: skip
    weights = direct(q, k, causal=causal, scale=scale, phi=phi)
    near(dsf.materialise(system), weights)
    for backend in ("auto", "reference"):
        near(dsf.scan(system, v, backend), torch.einsum("bhts,bshc->bthc", weights, v))
    near(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("scale", ["released", "published"])
def test_three_forms_of_the_full_map(scale):
    """Weights; S - z u^T / n; mean + n Cov: equal to 1e-13."""
    q, k, v = qkv()
    n = q.shape[1]
    g = 1.0 if scale == "published" else 0.5 / n
    y = dsf.scan(inline_attention_recurrence(q, k, causal=False, scale=scale), v)
    S, z, u = torch.einsum("bjhf,bjhc->bhfc", k, v), k.sum(1), v.sum(1)
    second = torch.einsum("bthf,bhfc->bthc", g * q, S - z[..., None] * u[:, :, None] / n)
    near(y, second + u[:, None] / n, FORMS)
    centred_k, centred_v = k - k.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    cov = torch.einsum("bjhf,bjhc->bhfc", centred_k, centred_v) / n
    near(y, v.mean(1, keepdim=True) + n * torch.einsum("bthf,bhfc->bthc", g * q, cov), FORMS)


def test_coordinates_are_one_change_of_basis_apart():
    """h^(ii) = T_t h^(i) with T_t = [[I, -kbar_t], [0, 1/t]], and A^(ii) = T_t T_(t-1)^-1."""
    q, k, v = qkv()
    sums = inline_attention_recurrence(q, k)
    centred = inline_attention_recurrence(q, k, coordinates="centred")
    assert isinstance(sums.A, Identity)
    assert isinstance(centred.A, DiagonalLowRank)
    count = torch.arange(1, 13, dtype=torch.float64)[:, None, None]
    kbar = k.cumsum(1) / count
    T = torch.eye(5, dtype=torch.float64).repeat(2, 12, 2, 1, 1)
    T[..., :4, 4] = -kbar
    T[..., 4, 4] = (1 / count)[..., 0]
    for t in (1, 5, 12):
        first, second = (dsf.scan(r.time_slice(0, t), v[:, :t], return_state=True)[1]
                         for r in (sums, centred))  # fmt: skip
        near(second, T[:, t - 1] @ first)
    A = centred.A.as_dense()
    near(A[:, 1:], T[:, 1:] @ torch.linalg.inv(T[:, :-1]))
    step = (count - 1) / count * (k - torch.cat([torch.zeros_like(k[:, :1]), kbar[:, :-1]], 1))
    near(centred.B[:, 1:, :, :4, 0], step[:, 1:], 1e-14)
    near(centred.C[..., 0, 4], torch.ones(2, 12, 2, dtype=torch.float64), 1e-15)


def test_predictor_split():
    q, k, v = qkv()
    for coordinates in COORDINATES:
        r = inline_attention_recurrence(q, k, coordinates=coordinates)
        own = (r.C @ r.B)[..., 0]
        near(own, direct(q, k, causal=True, scale="released")
             .diagonal(dim1=-2, dim2=-1).transpose(1, 2)[..., None])  # fmt: skip
        states = [dsf.scan(r.time_slice(0, t), v[:, :t], return_state=True)[1]
                  for t in range(1, 12)]  # fmt: skip
        for t, before in enumerate(states, start=1):
            y = (r.C[:, t] @ r.A.at(t).apply(before)).squeeze(-2) + own[:, t] * v[:, t]
            near(y, dsf.scan(r, v)[:, t])


def test_rank_is_the_number_of_features_plus_one():
    q, k, _ = qkv(length=24)
    weights = dsf.materialise(inline_attention_recurrence(q, k))
    ranks = [int(torch.linalg.matrix_rank(weights[0, 0, t:, :t], rtol=RANK_THRESHOLD))
             for t in range(1, 24)]  # fmt: skip
    assert max(ranks) == 5


def test_first_order_of_softmax():
    """|softmax(eps s) - InLine| / eps^2 tends to a constant."""
    q, k, _ = qkv()
    ratio = []
    for eps in (1e-2, 1e-3):
        soft = torch.softmax(eps * torch.einsum("bthf,bshf->bhts", q, k), -1)
        line = direct(eps * q, k / 12, causal=False, scale="published")
        ratio.append(float((soft - line).norm()) / eps**2)
    assert abs(ratio[0] / ratio[1] - 1) < 0.05


def test_float32_keys_with_an_offset():
    """The centred coordinates keep more digits of keys that share an offset of 100."""
    q, k, v = qkv(length=60)
    k = (k + 100).float().double()  # what both get
    truth = dsf.scan(inline_attention_recurrence(q, k, coordinates="centred"), v)
    error = {}
    for name in COORDINATES:
        r = inline_attention_recurrence(q.float(), k.float(), coordinates=name)
        error[name] = float((dsf.scan(r, v.float()) - truth).abs().max() / truth.abs().max())
    assert error["centred"] < error["sums"] / 2, error


# -- local residual ----------------------------------------------------------------------------


def test_register_is_the_convolution():
    """Current-state form (A, B, C) and predictor form, read before the update."""
    v, taps = normal(2, 9, 3), normal(2, 9, 3, 4, seed=1)
    expected = torch.zeros_like(v)
    for t in range(9):
        for lag in range(min(4, t + 1)):
            expected[:, t] += taps[:, t, :, lag] * v[:, t - lag]
    near(convolved(v, taps), expected)
    r = register_recurrence(taps)
    y, state = dsf.scan(r, v[..., None], return_state=True)
    near(y[..., 0], expected)
    near(state[..., 0], v[:, 5:].flip(1).mT, 1e-15)
    near(convolved(v[:, 6:], taps[:, 6:], v[:, 3:6]), expected[:, 6:])
    before = dsf.scan(r.time_slice(0, 8), v[:, :8, :, None], return_state=True)[1][..., 0]
    predicted = taps[:, 8, :, 0] * v[:, 8] + (taps[:, 8, :, 1:] * before[..., :3]).sum(-1)
    near(predicted, expected[:, 8])


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_attention_with_register(coordinates):
    q, k, v = qkv()
    taps = normal(2, 12, 2, 3, seed=5)
    r = inline_attention_recurrence(q, k, coordinates=coordinates, behind=taps)
    assert r.n_state == 5 + 3
    plain = dsf.scan(inline_attention_recurrence(q, k), v)
    for c in range(3):
        near(dsf.scan(r, v)[..., c], plain[..., c] + convolved(v[..., c], taps))


OPTIONS = {
    "plain": {}, "centred": {"coordinates": "centred"}, "published": {"scale": "published"},
    "relu": {"feature_map": "relu"}, "exp": {"feature_map": "exp"},
    "centred_taps": {"coordinates": "centred", "local": "causal"},
    "running_mean": {"local": "causal", "taps_from": "running_mean", "taps": 4},
    "bidirectional": {"causal": False},
    "bidirectional_centred": {"causal": False, "coordinates": "centred"},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    torch.manual_seed(0)
    check_all(shaken(InlineAttention(8, 4, **OPTIONS[name])), fresh_input(8))


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_grid_layer_agrees_with_its_system(class_token):
    torch.manual_seed(0)
    layer = shaken(InlineAttention(8, 2, causal=False, local="grid", class_token=class_token))
    x = fresh_input(8, length=9 + class_token)
    system, values = layer.recurrence(x)
    near(layer.readout(dsf.scan(system, values), x), layer(x))
    near(layer.readout(dsf.scan(system, values, "reference"), x), layer(x))
    with pytest.raises(DsfShapeError, match="patches"):
        layer(x[:, :-1])


def test_grid_layer_keeps_the_contract():
    torch.manual_seed(0)
    layer = InlineAttention(8, 2, causal=False, local="grid", feature_map="leaky_relu")
    check_all(shaken(layer), fresh_input(8, length=9))


def test_no_token_gives_no_output():
    layer = InlineAttention.small(8).double()
    assert layer(fresh_input(8, length=0)).shape == (2, 0, 8)


def test_key_means_go_on():
    _, k, _ = qkv()
    whole = key_means(k)
    first = key_means(k[:, :7])
    rest = key_means(k[:, 7:], first._replace(count=7, mean=first.mean[:, -1:]))
    near(rest.mean, whole.mean[:, 7:])
    near(rest.count, whole.count[7:])


def test_refusals():
    q, k, _ = qkv()
    with pytest.raises(DsfValueError, match="coordinates: expected one of"):
        inline_attention_recurrence(q, k, coordinates="other")
    with pytest.raises(DsfValueError, match="scale: expected one of"):
        inline_attention_recurrence(q, k, scale="other")
    with pytest.raises(DsfValueError, match="ahead: expected None for causal=True"):
        inline_attention_recurrence(q, k, ahead=normal(2, 12, 2, 3))
    with pytest.raises(DsfValueError, match="local, taps_from"):
        InlineAttention(8, local="grid")
