"""Device functions: exponentials, softplus and sigmoid, one instruction or exact to an ulp."""

# Triton's functions are typed as returning a tensor or a tuple of them.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.launch import INTERPRETED

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_LOW = tl.constexpr(2.0259770126e-08)  # log2(e) - float32(log2(e))
LN_2 = tl.constexpr(0.6931471805599453)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to an integer
ASSEMBLY = tl.constexpr(not INTERPRETED)  # the interpreter has none


@triton.jit
def _instruction(x, CODE: tl.constexpr):
    return tl.inline_asm_elementwise(CODE, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fast_exp2(x):
    """2^x in one instruction, denormal results flushed to 0."""
    return _instruction(x, "ex2.approx.ftz.f32 $0, $1;") if ASSEMBLY else tl.exp2(x)


@triton.jit
def fast_log2(x):
    """log2(x) in one instruction, to 2^-22 absolute between 1/2 and 2."""
    return _instruction(x, "lg2.approx.ftz.f32 $0, $1;") if ASSEMBLY else tl.log2(x)


@triton.jit
def fast_reciprocal(x):
    """1 / x in one instruction, to one unit in the last place."""
    return _instruction(x, "rcp.approx.ftz.f32 $0, $1;") if ASSEMBLY else 1.0 / x


@triton.jit
def exact_exp2(x, rest):
    """2^(x + rest), rest small, to one unit in the last place; results below 2^-126 are 0."""
    x = tl.minimum(tl.maximum(x, -150.0), 130.0)
    whole = (x + ROUND) - ROUND
    part = ((x - whole) + rest) * LN_2
    power = 1.0 / 720 + part * (1.0 / 5040)
    power = 1.0 / 120 + part * power
    power = 1.0 / 24 + part * power
    power = 1.0 / 6 + part * power
    power = 0.5 + part * power
    power = 1.0 + part * (1.0 + part * power)
    exponent = tl.minimum(tl.maximum(whole, -127.0), 128.0).to(tl.int32) + 127
    return power * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """e^x."""
    if EXACT:
        high = x * LOG2_E
        value = exact_exp2(high, tl.fma(x, LOG2_E, -high) + x * LOG2_E_LOW)
    else:
        value = fast_exp2(x * LOG2_E)
    return value


@triton.jit
def decay_of(delta, rate, EXACT: tl.constexpr):
    """exp(Delta A): `rate` is A where EXACT, else A log2(e)."""
    if EXACT:
        product = delta * rate
        high = product * LOG2_E
        rest = tl.fma(product, LOG2_E, -high) + product * LOG2_E_LOW
        value = exact_exp2(high, rest + tl.fma(delta, rate, -product) * LOG2_E)
    else:
        value = fast_exp2(delta * rate)
    return value


@triton.jit
def softplus(x, EXACT: tl.constexpr):
    """log(1 + e^x), accurate relative to itself."""
    small = exponential(-tl.abs(x), EXACT)
    if EXACT:
        s = tl.div_rn(small, 2.0 + small)
        q = s * s
        series = 1.0 / 15 + q * (1.0 / 17 + q * (1.0 / 19))
        series = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * series))
        series = 1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * series))
        log = 2.0 * s * (1.0 + q * series)
    else:
        series = small * (1.0 - small * (0.5 - small * 0.3333333))
        log = tl.where(small < 0.015, series, LN_2 * fast_log2(1.0 + small))
    return tl.maximum(x, 0.0) + log


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    value = 1.0 + exponential(-x, EXACT)
    return tl.div_rn(1.0, value) if EXACT else fast_reciprocal(value)
