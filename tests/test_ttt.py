"""TTT-Linear and TTT-MLP against released numbers, autograd's own inner gradients, and limits."""

import functools
import math

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import assert_near, check_all, fresh_input, normal, shaken, stepped

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models.delta_net import delta_net_recurrence
from dsf.models.ttt_linear import TttLinear, ttt_linear_recurrence
from dsf.models.ttt_mlp import TttMlp, ttt_mlp_recurrence
from dsf.transitions import BlockDiagonal, Dense, Householder, Identity

EXACT = 1e-13
JACOBIAN = 1e-11


def test_golden_ttt_linear():
    case = golden("fla_ttt_linear")
    q, k, v = (case[f"in.{n}"] for n in "qkv")
    eta, size = case["in.eta"][..., 0], int(case["opt.mini_batch_size"])
    weight, bias, eps = case["param.ln_w"], case["param.ln_b"], float(case["opt.eps"])
    start = torch.cat([case["in.initial_state"], case["in.initial_state_bias"]], 2)
    for first, end in ((None, ""), (start, "_with_initial_state")):
        r, u = ttt_linear_recurrence(
            q, k, v, eta, weight, bias, mini_batch=size, scale=float(case["opt.scale"]), eps=eps,
            initial_state=first,
        )  # fmt: skip
        assert r.mode == "exact_along_trajectory"
        assert isinstance(r.A, BlockDiagonal)
        for backend in ("reference", "auto"):
            z, state = dsf.scan(r, u, backend, return_state=True)
            normal_z = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=eps)
            assert_golden(z + weight * normal_z + bias, case["out.o" + end])
            both = state.unflatten(2, (-1, 2))
            last = both[:, :, :, 0] + eta[:, -1, :, None, None] * both[:, :, :, 1]
            assert_golden(last[:, :, :-1], case["out.final_state" + end])
            if first is None:
                assert_golden(last[:, :, -1:], case["out.final_state_bias"])


def test_without_a_norm_it_is_the_delta_rule():
    q, k, v = normal(2, 9, 3, 4), normal(2, 9, 3, 4, seed=1), normal(2, 9, 3, 5, seed=2)
    beta = torch.sigmoid(normal(2, 9, 3, seed=3))
    r, u = ttt_linear_recurrence(q, k, v, beta)
    assert isinstance(r.A, Householder)
    assert r.mode == "exact"
    assert torch.equal(u, v)
    ones = torch.ones_like(q[..., :1])
    delta = delta_net_recurrence(
        torch.cat([q, ones], -1), torch.cat([k, ones], -1), beta, scale=1.0
    )
    assert_near("delta rule", dsf.scan(r, v), dsf.scan(delta, v), EXACT)


def test_one_mini_batch_without_a_norm_is_linear_attention():
    q, k, v = (normal(2, 7, 3, 4, seed=s) for s in range(3))
    rate = torch.full((2, 7, 3), 0.5, dtype=torch.float64)
    r, u = ttt_linear_recurrence(q, k, v, rate, mini_batch=7)
    weights = 0.5 * (torch.einsum("bthd,bshd->bhts", q, k) + 1).tril()
    assert_near("map", dsf.materialise(r), weights, EXACT)
    assert_near("scan", dsf.scan(r, u), torch.einsum("bhts,bshp->bthp", weights, v), EXACT)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_without_a_norm_every_mini_batch_is_exact(size):
    q, k, v = (normal(1, 10, 2, 3, seed=s) for s in range(3))
    rate, beta = (torch.sigmoid(normal(1, 10, 2, seed=s)) for s in (3, 4))
    r, u = ttt_linear_recurrence(q, k, v, rate, write_strength=beta, mini_batch=size)
    assert r.mode == "exact"
    assert isinstance(r.A, Householder if size == 1 else Dense)
    start = written = torch.zeros(1, 2, 4, 3, dtype=torch.float64)
    one = torch.ones(1, 2, 1, dtype=torch.float64)
    for t in range(10):
        if t and t % size == 0:
            start, written = start + rate[:, t - 1, :, None, None] * written, 0 * written
        key, query = (torch.cat([x[:, t], one], -1) for x in (k, q))
        miss = v[:, t] - torch.einsum("bhn,bhnp->bhp", key, start)
        written = written + beta[:, t, :, None, None] * key[..., None] * miss[:, :, None]
        now = start + rate[:, t, :, None, None] * written
        y = torch.einsum("bhn,bhnp->bhp", query, now)
        for backend in ("reference", "auto"):
            assert_near(f"token {t}", dsf.scan(r, u, backend)[:, t], y, EXACT)


def by_autograd(layer, x):
    """The layer of one sample and token by token, with autograd's gradient of the inner loss."""
    _, (q, k, v, rate, strength) = layer._run(x)
    norm, size, outputs = layer._norm(), layer.mini_batch, []
    weights = [w.detach().clone()[None] for w in layer.start]
    sums = [torch.zeros_like(w) for w in weights]

    def speak(layers, row):
        for i, w in enumerate(layers):
            row = torch.cat([row, torch.ones_like(row[..., :1])], -1) @ w
            row = torch.nn.functional.gelu(row, approximate="tanh") if i < len(layers) - 1 else row
        return row

    for t in range(x.shape[1]):
        at = slice(t, t + 1)
        if t and t % size == 0:
            weights = [w + rate[:, :, t - 1 : t] * s for w, s in zip(weights, sums, strict=True)]
            sums = [torch.zeros_like(w) for w in weights]
        leaves = [w.detach().requires_grad_() for w in weights]
        with torch.enable_grad():
            guess = norm.forward(speak(leaves, k[:, :, at]))
            loss = (guess - (v - k)[:, :, at]).square().sum() / 2
            slopes = torch.autograd.grad(loss, leaves)
        sums = [s - strength[:, :, at] * g for s, g in zip(sums, slopes, strict=True)]
        now = [w + rate[:, :, at] * s for w, s in zip(weights, sums, strict=True)]
        outputs.append(q[:, :, at] + norm.forward(speak(now, q[:, :, at])))
    y = torch.cat(outputs, 2).transpose(1, 2).flatten(-2)
    return layer.out(layer.post_norm(y))


@pytest.mark.parametrize("kind", [TttLinear, TttMlp])
@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_layer_descends_by_the_gradient_of_its_loss(kind, size):
    torch.manual_seed(0)
    layer = shaken(kind(12, 3, mini_batch=size, base_rate=2.0), 0.3)
    x = fresh_input(12, length=8, batch=1)
    assert_near("autograd", layer(x), by_autograd(layer, x), EXACT * 10)


def descended(q, k, v, rate, beta, first, second, norm, size):
    """z_t of every token, both layers trained by autograd's gradient, one token after another."""
    gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    one, outputs = torch.ones_like(q[:, 0, :, :1]), []

    def network(weights, x):
        inner = gelu(torch.einsum("bhi,bhij->bhj", torch.cat([x, one], -1), weights[0]))
        return torch.einsum("bhi,bhij->bhj", torch.cat([inner, one], -1), weights[1])

    start, sums = [first, second], [torch.zeros_like(first), torch.zeros_like(second)]
    for t in range(q.shape[1]):
        if t and t % size == 0:
            last = rate[:, t - 1, :, None, None]
            start = [w + last * s for w, s in zip(start, sums, strict=True)]
            sums = [torch.zeros_like(s) for s in sums]
        leaves = [w.detach().requires_grad_() for w in start]
        guess, target = network(leaves, k[:, t]), v[:, t]
        if norm is not None:
            weight, bias, eps = norm
            target = target - k[:, t]
            guess = (
                weight * torch.nn.functional.layer_norm(guess, guess.shape[-1:], eps=eps) + bias
            )
        slopes = torch.autograd.grad((guess - target).square().sum() / 2, leaves)
        sums = [s - beta[:, t, :, None, None] * g for s, g in zip(sums, slopes, strict=True)]
        now = [w + rate[:, t, :, None, None] * s for w, s in zip(start, sums, strict=True)]
        outputs.append(network(now, q[:, t]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_mlp_system_is_its_second_layer_trained_by_autograd(size, normalised):
    channel = 4 if normalised else 5  # v - k asks for one width
    q, k, v = normal(2, 8, 3, 4), normal(2, 8, 3, 4, seed=1), normal(2, 8, 3, channel, seed=2)
    rate, beta = (torch.sigmoid(normal(2, 8, 3, seed=s)) for s in (3, 4))
    first, second = 0.5 * normal(2, 3, 5, 6, seed=5), 0.5 * normal(2, 3, 7, channel, seed=6)
    norm = (1 + 0.1 * normal(3, 4, seed=7), normal(3, 4, seed=8), 1e-6) if normalised else None
    r, u = ttt_mlp_recurrence(
        q, k, v, rate, first, second, *(norm or ())[:2], write_strength=beta, mini_batch=size,
        eps=1e-6,
    )  # fmt: skip
    assert r.mode == "exact_along_trajectory"
    assert isinstance(r.A, Identity if size == 1 else BlockDiagonal)
    expected = descended(q, k, v, rate, beta, first, second, norm, size)
    for backend in ("reference", "auto"):
        assert_near(backend, dsf.scan(r, u, backend), expected, EXACT * 10)
    start = first.new_zeros(first.shape)
    y = dsf.scan(*ttt_mlp_recurrence(q, k, v, rate, start, 0 * second))
    assert not bool(y.isnan().any())
    for length in (0, 1, 2):
        parts = [x[:, :length] for x in (q, k, v, rate)]
        r, u = ttt_mlp_recurrence(*parts, first, second, mini_batch=size)
        assert dsf.scan(r, u).shape == (2, length, 3, channel)


def test_mlp_system_names_the_argument_that_does_not_fit():
    q, rate = normal(1, 5, 2, 3), normal(1, 5, 2)
    first, second = normal(1, 2, 4, 6), normal(1, 2, 7, 3)
    wanted = {
        r"first: expected shape \(1, 2, 4, 6\), got \(1, 2, 3, 6\)": (first[:, :, 1:], second),
        r"second: expected shape \(1, 2, 7, 3\), got \(1, 2, 6, 3\)": (first, second[:, :, 1:]),
        r"norm_bias: expected shape \(2, 3\), got \(2, 2\)":
            (first, second, normal(2, 3), normal(2, 2)),
    }  # fmt: skip
    for message, given in wanted.items():
        with pytest.raises(DsfShapeError, match=message):
            ttt_mlp_recurrence(q, q, q, rate, *given)
    with pytest.raises(DsfValueError, match="mini_batch: expected at least 1, got 0"):
        ttt_mlp_recurrence(q, q, q, rate, first, second, mini_batch=0)


@pytest.mark.parametrize(
    "layer",
    [lambda: TttLinear(12, 3, mini_batch=1), lambda: TttMlp(8, 2, mini_batch=1, expand=2),
     lambda: TttLinear(12, 3, mini_batch=3, normalised=False),
     lambda: TttLinear(8, 2, mini_batch=1, normalised=False, rope_base=None)],
)  # fmt: skip
def test_options_keep_the_contract(layer):
    torch.manual_seed(0)
    layer = shaken(layer())
    check_all(layer, fresh_input(layer.query.in_features))


@torch.no_grad()
def test_structures_and_modes():
    x = fresh_input(8)
    torch.manual_seed(0)
    for layer, kind, mode in [
        (TttLinear(8, 2, mini_batch=1), Identity, "exact_along_trajectory"),
        (TttMlp(8, 2, mini_batch=5), BlockDiagonal, "exact_along_trajectory"),
        (TttLinear(8, 2, mini_batch=1, normalised=False), Householder, "exact"),
    ]:
        r, _ = layer.double().recurrence(x)
        assert isinstance(r.A, kind)
        assert r.mode == mode


@pytest.mark.parametrize("kind", [TttLinear, TttMlp])
def test_linearisation_is_the_jacobian(kind):
    torch.manual_seed(0)
    options = {} if kind is TttLinear else {"expand": 1}
    layer = shaken(kind(6, 2, mini_batch=2, rope_base=None, **options))
    x = fresh_input(6, length=5, batch=1)
    with torch.no_grad():
        got = dsf.materialise(layer.linearized(x))[0, 0]
    jacobian = torch.autograd.functional.jacobian(layer, x)[0, :, :, 0]
    assert_near("Jacobian", got, jacobian.permute(0, 2, 1, 3), JACOBIAN)


@torch.no_grad()
def test_rates_strengths_and_places_are_the_printed_ones():
    """Rates fall as 1/i in a mini-batch and stop at zero; rotations start anew in each."""
    torch.manual_seed(0)
    layer = shaken(TttLinear(8, 2, mini_batch=3, base_rate=0.7))
    layer.offset.copy_(torch.tensor([0.5, -0.1, -2.0], dtype=torch.float64))
    x = fresh_input(8, length=7)
    x[:, 3:6] = x[:, :3]
    _, tokens = layer._run(x)
    rate = torch.tensor([1.5, 0.4, 0.0, 1.5, 0.4, 0.0, 1.5], dtype=torch.float64)
    assert_near("rate", tokens.rate[..., 0], rate.expand(2, 2, 7), EXACT)
    strength = 0.7 * torch.sigmoid(x @ layer.strength.weight.T + layer.strength.bias) / 4
    assert_near("strength", tokens.strength[..., 0], strength.mT, EXACT)
    plain = (x @ layer.key.weight.T).unflatten(-1, (2, 4)).transpose(1, 2)
    assert_near("first place", tokens.key[:, :, ::3], plain[:, :, ::3], EXACT)
    assert_near("same place", tokens.key[:, :, 3:6], tokens.key[:, :, :3], EXACT)
    even, odd = plain[:, :, 1, 0], plain[:, :, 1, 1]
    turned = math.cos(1) * even - math.sin(1) * odd
    assert_near("second place", tokens.key[:, :, 1, 0], turned, EXACT)


@torch.no_grad()
def test_steps_over_long_sequences_and_bad_sizes():
    torch.manual_seed(0)
    layer = shaken(TttLinear(8, 2))
    x = fresh_input(8, length=37)
    assert_near("steps", stepped(layer, x), layer(x), 1e-10)
    with pytest.raises(DsfValueError, match="mini_batch: expected at least 1, got 0"):
        TttLinear(8, 2, mini_batch=0)
    q, rate = normal(1, 5, 2, 3), normal(1, 5, 2)
    with pytest.raises(DsfValueError, match="mini_batch: expected at least 1, got 0"):
        ttt_linear_recurrence(q, q, q, rate, mini_batch=0)
    with pytest.raises(DsfShapeError, match=r"norm_weight: expected shape \(2, 3\), got \(4, 3\)"):
        ttt_linear_recurrence(q, q, q, rate, normal(4, 3))
    with pytest.raises(DsfShapeError, match=r"initial_state: expected shape \(1, 2, 4, 3\)"):
        ttt_linear_recurrence(q, q, q, rate, initial_state=normal(1, 2, 3, 3))
