"""Random features: means, variances, optimal and leverage sampling, and attention by them."""

import math

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models._random_features import (
    KINDS,
    draw_directions,
    expected_kernel_error,
    leverage_directions,
    leverage_scores,
    random_features,
    tilted_directions,
)
from dsf.models.random_feature_attention import (
    RandomFeatureAttention,
    random_feature_attention_recurrence,
)

EXACT = 1e-12
STANDARD_ERRORS = 4
VARIANCE_RTOL = 0.05
CLOSED_FORM = 1e-5
"""The closed forms are quoted with six digits."""


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def phi(x, directions, kind="positive", log_weight=None):
    """The features as plain numbers; x (..., head, width)."""
    f = random_features(x, directions, kind, log_weight)
    return f.signed * torch.exp(f.log_scale)[..., None]


def qkv(length=9, head=2, width=3, channel=4):
    return (normal(2, length, head, width), normal(2, length, head, width, seed=1),
            normal(2, length, head, channel, seed=2))  # fmt: skip


# -- features ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_means_and_variances_of_one_direction(kind):
    """E phi.phi = exp(x.y); the variances of Choromanski et al. for |x + y|^2 <= 1."""
    x, y = 0.3 * normal(3), 0.25 * normal(3, seed=1)
    w = draw_directions(1_000_000, 3, generator=seeded())[0]
    plus, half = w @ (x + y), (x.square().sum() + y.square().sum()) / 2
    samples = {
        "positive": torch.exp(plus - half), "hyperbolic": torch.cosh(plus) * torch.exp(-half),
        "trigonometric": torch.cos(w @ (x - y)) * torch.exp(half),
    }[kind]  # fmt: skip
    features = [phi(z[None], w[None, :1000], kind)[0] for z in (x, y)]
    near((features[0] * features[1]).sum(), samples[:1000].mean())
    kernel, total = torch.exp(x @ y), (x + y).square().sum()
    assert float(total) <= 1
    error = samples.std() / len(samples) ** 0.5
    assert abs(float(samples.mean() - kernel)) <= STANDARD_ERRORS * float(error)
    positive = torch.exp(total) * kernel**2 * (1 - torch.exp(-total))
    predicted = {
        "positive": positive, "hyperbolic": positive * (1 - torch.exp(-total)) / 2,
        "trigonometric": torch.exp(total) / kernel**2
        * (1 - torch.exp(-(x - y).square().sum())) ** 2 / 2,
    }[kind]  # fmt: skip
    assert abs(float(samples.var() / predicted) - 1) <= VARIANCE_RTOL


def test_orthogonal_blocks():
    """Orthogonal within blocks, chi norms, and a smaller error than independent draws."""
    w = draw_directions(10, 4, n_head=3, orthogonal=True, generator=seeded())
    assert w.shape == (3, 10, 4)
    for block in (w[:, :4], w[:, 4:8], w[:, 8:]):
        gram = block @ block.mT
        near(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)))
    many = draw_directions(4, 4, n_head=20_000, orthogonal=True, generator=seeded())
    assert abs(float(many.square().sum(-1).mean()) / 4 - 1) < 0.02
    x, y = 0.5 * normal(4), 0.5 * normal(4, seed=1)
    kernel = torch.exp(x @ y)

    def mean_square(directions):
        f = [phi(z.expand(20_000, 4), directions) for z in (x, y)]
        return float(((f[0] * f[1]).sum(-1) - kernel).square().mean())

    independent = mean_square(draw_directions(4, 4, n_head=20_000, generator=seeded(1)))
    half = torch.exp(-(x.square().sum() + y.square().sum()) / 2)
    gain = float(0.75 * (2 / 6) * (kernel - half) ** 2)
    assert mean_square(many) <= (independent - gain) * (1 + VARIANCE_RTOL)


# -- densities ---------------------------------------------------------------------------------


def test_closed_forms_of_the_kernel_error():
    assert abs(expected_kernel_error(0.12, tilted=True) - 0.285682) <= CLOSED_FORM
    assert abs(expected_kernel_error(0.12, tilted=False) - 0.667004) <= CLOSED_FORM
    assert math.isinf(expected_kernel_error(1 / 6, tilted=False))
    assert math.isfinite(expected_kernel_error(0.3, tilted=True))
    assert math.isinf(expected_kernel_error(0.5, tilted=True))


def test_the_tilt_attains_its_error():
    """Monte Carlo over directions, quadrature-free: x, y from N(0, 0.12)."""
    v, n = 0.12, 200_000
    z, log_weight = tilted_directions(n, 1, v, generator=seeded())
    assert abs(float(z.var()) / ((1 + 2 * v) / (1 - 2 * v)) - 1) < 0.02
    # integral of a(z) |phi|^4, with |phi(.; z)|^2 = (1 + 2v)^(-1/2) exp(2 b z^2) a coordinate
    b = v / (1 + 2 * v)
    square = (1 + 2 * v) ** -0.5 * torch.exp(2 * b * z[0, :, 0] ** 2)
    x = math.sqrt(v) * torch.randn(n, dtype=torch.float64, generator=seeded(1))
    at = torch.tensor([0.7], dtype=torch.float64)
    found = torch.exp(2 * (0.7 * x - x**2 / 2)).mean()
    expected = (1 + 2 * v) ** -0.5 * torch.exp(2 * b * at**2)
    assert abs(float(found / expected) - 1) < 0.02
    samples = torch.exp(2 * log_weight[0]) * square**2
    mean, error = samples.mean(), samples.std() / n**0.5
    total = expected_kernel_error(v, tilted=True) + (1 - 4 * v**2) ** -0.5
    assert abs(float(mean) - total) <= STANDARD_ERRORS * float(error) + EXACT


def test_mean_leverage_is_the_number_of_degrees_of_freedom():
    x = 0.6 * normal(40, 2)
    gram = torch.exp(x @ x.mT) / 40
    lam = 0.05
    eye = torch.eye(40, dtype=torch.float64)
    freedom = float(torch.linalg.solve(gram + lam * eye, gram).trace())
    scores = leverage_scores(draw_directions(200_000, 2, generator=seeded())[0], x, lam)
    error = float(scores.std() / len(scores) ** 0.5)
    assert abs(float(scores.mean()) - freedom) <= STANDARD_ERRORS * error
    twice = leverage_scores(normal(5, 2), torch.cat([x, x]), lam)
    near(twice, leverage_scores(normal(5, 2), x, lam), 1e-10)


def test_leverage_sampling_is_unbiased_and_better():
    x = 0.5 * normal(60, 4)
    kernel = torch.exp(x @ x.mT)

    def error(directions, log_weight):
        f = phi(x[:, None], directions, log_weight=log_weight)[:, 0]
        return f @ f.mT - kernel

    leverage, plain = [], []
    for seed in range(20):
        g = seeded(seed)
        leverage.append(error(*leverage_directions(x, 64, generator=g)))
        plain.append(error(draw_directions(64, 4, generator=g), None))
    size = [float(torch.stack(e).square().mean()) for e in (leverage, plain)]
    assert size[0] < size[1] / 10
    bias = torch.stack(leverage).mean(0)
    assert float(bias.square().mean()) < 4 * size[0] / 20


# -- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_is_attention_with_the_sampled_kernel(kind, causal, normalise):
    q, k, v = qkv()
    w, a = draw_directions(7, 3, n_head=2, generator=seeded()), 0.3 * normal(2, 7, seed=5)
    system = random_feature_attention_recurrence(
        q, k, w, kind=kind, log_weight=a, causal=causal, normalise=normalise)  # fmt: skip
    fq, fk = (phi(3**-0.25 * x, w, kind, a) for x in (q, k))
    weights = torch.einsum("bthf,bshf->bhts", fq, fk)
    weights = weights.tril() if causal else weights
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    near(dsf.materialise(system), weights, 1e-11)
    for backend in ("auto", "reference"):
        near(dsf.scan(system, v, backend), torch.einsum("bhts,bshc->bthc", weights, v), 1e-11)


def test_many_features_tend_to_softmax():
    q, k = (0.5 * x for x in qkv()[:2])
    logits = torch.einsum("bthf,bshf->bhts", q, k) * 3**-0.5
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    softmax = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1)
    errors = []
    for n in (30, 30_000):
        w = draw_directions(n, 3, orthogonal=True, generator=seeded())
        rows = dsf.materialise(random_feature_attention_recurrence(q, k, w))
        errors.append(float((rows - softmax).abs().max()))
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.02


def test_huge_keys_stay_finite():
    """float32, |k|^2 in the hundreds of one token: the running scale keeps every row a mean."""
    q, k, v = (x.float() for x in qkv())
    k = k.clone()
    k[:, 4] *= 40
    for kind in ("positive", "hyperbolic", "trigonometric"):
        w = draw_directions(16, 3, generator=seeded()).float()
        r = random_feature_attention_recurrence(q, k, w, kind=kind)
        y = dsf.scan(r, v)
        assert bool(torch.isfinite(y).all())
        if kind != "trigonometric":
            rows = dsf.materialise(r)
            near(rows.sum(-1), torch.ones_like(rows[..., 0]), 1e-5)


OPTIONS = {"hyperbolic": {"kind": "hyperbolic"}, "trigonometric": {"kind": "trigonometric"},
           "encoder": {"causal": False}, "independent": {"orthogonal": False}}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    torch.manual_seed(0)
    layer = shaken(RandomFeatureAttention(8, 4, n_direction=16, **OPTIONS[name]))
    check_all(layer, fresh_input(8))


@torch.no_grad()
def test_fit_brings_the_layer_nearer_to_softmax():
    torch.manual_seed(0)
    layer = shaken(RandomFeatureAttention(16, 2, n_direction=64))
    x = fresh_input(16, length=32)
    q, k, _ = layer.project(x)
    logits = torch.einsum("bthf,bshf->bhts", q, k) * 8**-0.5
    softmax = torch.softmax(logits.masked_fill(logits.triu(1) != 0, -torch.inf), -1)

    def distance():
        return float((dsf.materialise(layer.recurrence(x)[0]) - softmax).abs().sum(-1).mean())

    before = distance()
    layer.fit(x, generator=seeded())
    assert distance() < before
    assert_near("system", layer.readout(dsf.scan(*layer.recurrence(x)), x), layer(x), EXACT)


def test_refusals():
    q, k, _ = qkv()
    with pytest.raises(DsfShapeError, match="width=3, got 4"):
        random_feature_attention_recurrence(q, k[..., :3], draw_directions(5, 4))
    with pytest.raises(DsfValueError, match="kind: expected one of"):
        RandomFeatureAttention(8, kind="cosine")
    with pytest.raises(DsfValueError, match="variance"):
        tilted_directions(4, 2, 0.5)
