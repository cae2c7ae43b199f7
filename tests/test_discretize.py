"""Discretisation rules against scipy, dense exponentials and each other at their limits."""

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.signal import cont2discrete

from dsf.discretize import (
    RULES,
    bilinear,
    discretized,
    exponential_euler,
    exponential_quotient,
    forward_euler,
    zero_order_hold,
)
from dsf.errors import DsfValueError

EXACT = 1e-14
"""Two float64 expressions of one number, relative."""
GRADIENT = 1e-8
"""An analytic derivative at the series' limit against its closed form."""

REAL = torch.tensor([-3.0, -1.0, -1e-9, 0.0, 0.4], dtype=torch.float64)
COMPLEX = torch.tensor([-0.5 + 3j, -1e-7 + 1e-7j, 0j, -2 - 40j, 2j], dtype=torch.complex128)


def axes(x):
    return x[None, None, None]


@pytest.mark.parametrize("A", [REAL, COMPLEX], ids=["real", "complex"])
@pytest.mark.parametrize(
    ("rule", "method"),
    [("zero_order_hold", "zoh"), ("forward_euler", "euler"), ("bilinear", "bilinear")],
)
def test_rules_match_scipy(rule, method, A):
    s = 0.37
    decay, gain = discretized(axes(A), torch.full((1, 1, 1, 1), s, dtype=torch.float64), rule)
    for n, a in enumerate(A):
        # the dense integrator of scipy fails on complex systems: rotate-and-scale as a real one
        a = complex(a)
        real = np.array([[a.real, -a.imag], [a.imag, a.real]])
        Ad, Bd, *_ = cont2discrete((real, np.eye(2), np.eye(2), np.zeros((2, 2))), s, method)
        expected = complex(Ad[0, 0], Ad[1, 0]), complex(Bd[0, 0], Bd[1, 0])
        got = complex(decay.decay()[0, 0, 0, n]), complex(gain.expand(1, 1, 1, len(A))[0, 0, 0, n])
        assert got == pytest.approx(expected, rel=10 * EXACT, abs=10 * EXACT)


def test_zero_order_hold_is_the_exact_integral_near_zero():
    # block exponential: exp([[a, 1], [0, 0]]) holds (e^a - 1)/a in its corner
    for a in (0.0, 1e-300, -1e-12, 1e-5, -0.499999, -0.5, 0.500001, -30.0):
        z = torch.tensor(a, dtype=torch.float64)
        expected = expm(np.array([[a, 1.0], [0.0, 0.0]]))[0, 1]
        assert float(exponential_quotient(z)) == pytest.approx(expected, rel=10 * EXACT)


def test_exponential_quotient_derivatives_are_exact_at_zero():
    z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    derivative, expected = exponential_quotient(z), 1.0
    for order in range(1, 5):
        (derivative,) = torch.autograd.grad(derivative, z, create_graph=True)
        expected = 1 / (order + 1)  # d^k/dz^k sum z^m/(m+1)! at 0 = 1/(k+1)
        assert float(derivative.detach()) == pytest.approx(expected, rel=GRADIENT)


def test_exponential_quotient_gradcheck_across_the_series_radius():
    z = torch.tensor([-0.7, -0.3, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exponential_quotient, (z,))
    w = torch.tensor([0.1 - 0.2j, 1 + 3j, -2 + 0j], dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(exponential_quotient, (w,))


def test_slow_decays_keep_their_digits_in_float32():
    A, s = axes(torch.tensor([-1e-6])), torch.full((1, 1, 1, 1), 1e-3)
    for rule in RULES:
        decay, _ = discretized(A, s, rule)
        assert float(decay.log_decay) == pytest.approx(-1e-9, rel=1e-5), rule


def test_exact_zeros_and_negative_decays():
    s = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    A = axes(torch.tensor([-1.0, -1.5, -2.0, -5.0], dtype=torch.float64))
    decay = forward_euler(A, s).transition
    assert decay.decay().flatten().tolist() == pytest.approx([0, -0.5, -1, -4], abs=EXACT)
    assert float(decay.log_decay[..., 0]) == -torch.inf
    decay = bilinear(A, s).transition
    assert decay.decay().flatten().tolist() == pytest.approx([1 / 3, 1 / 7, 0, -3 / 7], abs=EXACT)


def test_complex_forward_euler_and_bilinear():
    s = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    z = axes(COMPLEX)
    assert torch.allclose(forward_euler(z, s).transition.decay(), 1 + z, atol=EXACT * 100, rtol=0)
    expected = (1 + z / 2) / (1 - z / 2)
    assert torch.allclose(bilinear(z, s).transition.decay(), expected, atol=EXACT * 100, rtol=0)


def test_rules_agree_to_their_order_for_small_steps():
    A = axes(torch.tensor([-0.8 + 0.3j], dtype=torch.complex128))
    errors = {}
    for s in (1e-2, 1e-3):
        step = torch.full((1, 1, 1, 1), s, dtype=torch.float64)
        exact = zero_order_hold(A, step).transition.decay()
        for rule in (forward_euler, bilinear):
            error = float((rule(A, step).transition.decay() - exact).abs())
            errors.setdefault(rule.__name__, []).append(error)
    for name, order in (("forward_euler", 2), ("bilinear", 3)):
        large, small = errors[name]
        assert np.log10(large / small) == pytest.approx(order, abs=0.05)


def test_exponential_euler_is_the_rule_of_s6():
    A, s = axes(REAL), torch.full((1, 1, 1, 1), 0.2, dtype=torch.float64)
    decay, gain = exponential_euler(A, s)
    assert torch.equal(decay.log_decay, A * 0.2)
    assert torch.equal(gain, s)


@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule):
    A = axes(torch.tensor([-0.3 + 0.7j, -1 + 0.1j], dtype=torch.complex128)).requires_grad_()
    s = torch.full((1, 1, 1, 1), 0.6, dtype=torch.float64, requires_grad=True)

    def decay_and_gain(A, s):
        decay, gain = discretized(A, s, rule)
        return decay.decay(), gain * torch.ones_like(A)

    assert torch.autograd.gradcheck(decay_and_gain, (A, s))


def test_unknown_rule_names_the_known_ones():
    with pytest.raises(DsfValueError, match="zero_order_hold"):
        discretized(axes(REAL), torch.ones(1, 1, 1, 1, dtype=torch.float64), "tustin")
