"""Published equivalences of systems, and published differences, as pairs of symbolic systems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from dsf.symbolic import Inputs, SymbolicSystem, symbol
from dsf.symbolic import system as make

LENGTH = 3
Pair = tuple[Any, Any, dict[str, Any]]


def _history_scaled() -> Pair:
    """SSD, and linear attention on q_t e^(-r S_t), k_j delta_j e^(r S_j), S the sum of steps."""
    ssd = make("mamba2")

    def steps(t: int) -> Any:
        return symbol("r") * sum(symbol("delta", i) for i in range(1, t + 1))

    attention = make("linear_attention", normalise=False).substitute({
        "q": lambda t, n: symbol("q", t, n) * sympy.exp(-steps(t)),
        "k": lambda t, n: symbol("k", t, n) * symbol("delta", t) * sympy.exp(steps(t)),
    })  # fmt: skip
    return ssd, attention, {"d": 0}


def _lambert_schedule() -> Pair:
    """delta_t e^(r delta_t) = delta_{t-1}, the one schedule with which SSD is attention.

    Written from the last step backwards, where it needs no Lambert W; then 1/eta_t = delta_t.
    """

    def step(t: int) -> Any:
        later = symbol("delta", LENGTH) if t == LENGTH else step(t + 1)
        return later if t == LENGTH else later * sympy.exp(symbol("r") * later)

    return "mamba2", "normalized_attention", {
        "d": 0, "delta": step, "zn": lambda t: -sympy.log(step(t)),
    }  # fmt: skip


def _fixed_decay_as_attention() -> Pair:
    """gamma^(t-j) q_t.k_j, and un-normalised attention on q_t gamma^t, k_j gamma^-j."""
    gamma = symbol("gamma")
    attention = make("linear_attention", normalise=False).substitute({
        "q": lambda t, n: symbol("q", t, n) * gamma**t,
        "k": lambda t, n: symbol("k", t, n) / gamma**t,
    })  # fmt: skip
    return "retention", attention, {}


def _softmax_of_token_logits() -> Pair:
    """MetaLA's key-free channel with a_t = E_{t-1}/E_t, and softmax of logits s_j = k_j."""

    def total(t: int) -> Any:
        return sum((sympy.exp(symbol("k", j, 1)) for j in range(1, t + 1)), sympy.Integer(0))

    return make("metala", size=1), make("softmax_attention", size=1), {
        "q": 1, "a": lambda t, n: total(t - 1) / total(t),
    }  # fmt: skip


def _radial_zeros() -> Pair:
    """ZeroS without its cosine, and ZeroS-SM with logits of the key alone."""
    radial = make("zeros", size=1).substitute({"q": 1, "k": 1, "s": lambda t: symbol("k", t, 1)})
    return radial, make("zeros_softmax", size=1), {"q": 1}


def _one_write() -> Pair:
    one = make("gated_delta_product", n_write=1).substitute({
        "k": lambda t, j, n: symbol("k", t, n), "beta": lambda t, j: symbol("beta", t),
    })  # fmt: skip
    return one, "gated_delta_net", {}


def _scalar_decay() -> Pair:
    ssd = make("mamba2")
    return ssd, make("gla").substitute({"a": "exp(-r*delta)", "k": "delta*k"}, like=ssd), {"d": 0}


def _rwkv7_as_kimi() -> Pair:
    kimi = make("kimi_delta_attention")
    rwkv7 = make("rwkv7").substitute({"b": "beta*k", "p": "a*k", "k": "beta*k"}, like=kimi)
    return rwkv7, kimi, {}


def _ttt_as_delta_rule() -> Pair:
    """TTT-Linear without norm, and the delta rule with a last key and query of 1."""
    inner = make("ttt_linear", normalised=False, size=2)

    def with_one(family: str) -> Callable[[int, int], Any]:
        return lambda t, n: symbol(family, t, n) if n < 3 else 1

    rule = make("delta_net", size=3).substitute(
        {"k": with_one("k"), "q": with_one("q"), "beta": "delta*beta"}, like=inner
    )
    return inner, rule, {}


def _s5_as_s4d() -> Pair:
    s5 = make("s5", size=1).substitute({"bc": 1, "cc": lambda i, n: symbol("cc", n)})
    return s5, make("s4d", size=1), {}


def _padded() -> Pair:
    """Lemma 2 in a class of identity feature maps: rows of zeros add states, not weights."""

    def padded(family: str) -> Callable[[int, int], Any]:
        return lambda t, n: symbol(family, t, n) if n < 3 else 0

    wide = make("mamba2", size=3).substitute({"k": padded("k"), "q": padded("q")})
    return wide, make("mamba2", size=2), {}


def _fallback() -> Pair:
    """ZeroS's radial part, and the released fallback (p - 1/t)(g1/t + gh (1 - 1/t))."""
    x = Inputs(LENGTH, 1)
    s, g1, gh = x.number("s"), x.number("g1"), x.number("gh")

    def row(t: int) -> Any:
        total, each = sum(sympy.exp(s(j)) for j in range(1, t + 1)), sympy.Rational(1, t)
        gate = g1(t) * each + gh(t) * (1 - each)
        past = [(sympy.exp(s(j)) / total - each) * gate for j in range(1, t + 1)]
        return sympy.Matrix([past + [0] * (LENGTH - t)])

    one = sympy.eye(LENGTH)
    released = SymbolicSystem.of("fallback", x, lambda t: one, lambda t: one[:, t - 1], row)
    return make("zeros", size=1), released, {"q": 1, "k": 1, "g0": 0}


def _fallback_of_equal_gates() -> Pair:
    a, b, assumptions = _fallback()
    return a, b, {**assumptions, "g1": lambda t: symbol("gh", t)}


REVERSED = {
    "rho": "e", "delta": "log(1 + exp(zf))", "k": "1/(1 + exp(-zi))/log(1 + exp(zf))",
    "q": "1/(1 + exp(-zo))", "d": 0,
}  # fmt: skip
"""S6 with steps softplus(z): its decay exp(-e softplus(z)) is the reversed sigmoid to the e."""

PROVED: dict[str, Callable[[], Pair]] = {
    "MetaLA is GLA with k = 1 - a": lambda: ("metala", "gla", {"k": "1 - a"}),
    "HGRN2 is MetaLA's core": lambda: ("hgrn2", "metala", {}),
    "HGRN is minGRU": lambda: ("hgrn", "min_gru", {"f": "1 - z"}),
    "GRU's states are HGRN's": lambda: ("gru", "hgrn", {"f": "z"}),
    "coupled LSTM is HGRN": lambda: ("lstm", "hgrn", {"i": "1 - f"}),
    "SSD is scalar-decay attention": _scalar_decay,
    "S6 with one rate is SSD": lambda: ("mamba", "mamba2", {"rho": "r"}),
    "SSD is attention on scaled q, k": _history_scaled,
    "SSD with the Lambert schedule is normalised attention": _lambert_schedule,
    "Mamba-3 with Euler's rule is Mamba-2": lambda: (
        "mamba3", "mamba2", {"l": 1, "f": "exp(-r*delta)"}),
    "retention is GLA with fixed decay": lambda: ("retention", "gla", {"a": "gamma"}),
    "retention is attention on scaled q, k": _fixed_decay_as_attention,
    "lightning attention is retention": lambda: ("lightning_attention", "retention", {}),
    "ZeroS: raw is running max": lambda: (
        make("zeros", realisation="raw"), make("zeros", realisation="running_max"), {}),
    "ZeroS: raw is normalised": lambda: (
        make("zeros", realisation="raw"), make("zeros", realisation="normalised"), {}),
    "ZeroS radial is ZeroS-SM on token logits": _radial_zeros,
    "linear attention: DSF and identity gauge": lambda: (
        "linear_attention", make("linear_attention", gauge="dsf"), {}),
    "normalised attention: DSF and identity gauge": lambda: (
        "normalized_attention", make("normalized_attention", gauge="dsf"), {}),
    "reversed sigmoid: qLSTM is S6": lambda: (
        make("qlstm", reversed_sigmoid=True), make("mamba", size=1), REVERSED),
    "mLSTM with running maximum": lambda: ("mlstm", make("mlstm", stabilised=True), {}),
    "sLSTM with running maximum": lambda: ("slstm", make("slstm", stabilised=True), {}),
    "InLine: prefix sums and centred": lambda: (
        "inline_attention", make("inline_attention", coordinates="centred"), {}),
    "Gated DeltaNet without decay": lambda: ("gated_delta_net", "delta_net", {"f": 1}),
    "Comba that erases its key": lambda: ("comba", "gated_delta_net", {"p": "k"}),
    "KDA with one decay a head": lambda: ("kimi_delta_attention", "gated_delta_net", {"a": "f"}),
    "Gated DeltaProduct of one write": _one_write,
    "RWKV-7 as KDA": _rwkv7_as_kimi,
    "TTT-Linear is the delta rule": _ttt_as_delta_rule,
    "FoX without forgetting": lambda: ("forgetting_attention", "softmax_attention", {"f": 1}),
    "PaTH without moves": lambda: ("path_attention", "softmax_attention", {"beta": 0}),
    "gates of 1": lambda: ("gated_attention", "softmax_attention", {"i": 1, "o": 1}),
    "a window of all tokens": lambda: (
        make("sliding_window_attention", window=LENGTH), "softmax_attention", {}),
    "Monarch of one block": lambda: (
        make("monarch_attention", block=LENGTH), "softmax_attention", {}),
    "Based is Taylor of order 2": lambda: ("based", "taylor_attention", {}),
    "softmax of token logits is one MetaLA channel": _softmax_of_token_logits,
    "S5 of one in- and output is S4D": _s5_as_s4d,
    "padding by zeros (Lemma 2)": _padded,
    "ZeroS's released fallback where both gates are equal": _fallback_of_equal_gates,
}  # fmt: skip


# -- differences -------------------------------------------------------------------------------


def _late_normaliser() -> Pair:
    """B_t with eta_{t-1}, as the main text of the DSF paper prints its equation 15b."""
    printed = make("linear_attention", gauge="dsf")
    total = [symbol("q", t, 1) * 0 for t in range(LENGTH + 1)]
    for t in range(1, LENGTH + 1):
        keys = [sum(symbol("k", j, n) for j in range(1, t + 1)) for n in (1, 2)]
        total[t] = sum(symbol("q", t, n) * keys[n - 1] for n in (1, 2))
    total[0] = sympy.Integer(1)
    x = Inputs(LENGTH, 2)
    k = x.vector("k")
    wrong = SymbolicSystem.of(
        "15b", x, lambda t: printed.A[t - 1], lambda t: k(t) / total[t - 1],
        lambda t: printed.C[t - 1],
    )  # fmt: skip
    return "linear_attention", wrong, {}


def _padded_positive() -> Pair:
    """Lemma 2 with elu + 1: zero rows have feature 1, which is no padding."""

    def padded(family: str) -> Callable[[int, int], Any]:
        return lambda t, n: symbol(family, t, n) if n < 3 else 1

    wide = make("linear_attention", size=3).substitute({"k": padded("k"), "q": padded("q")})
    return wide, make("linear_attention", size=2), {}


REFUTED: dict[str, Callable[[], Pair]] = {
    "MetaLA is not GLA with a free key": lambda: ("metala", "gla", {}),
    "a selective SSD is not attention on the same q, k": lambda: (
        "mamba2", "normalized_attention", {"d": 0}),
    "equation 15b as printed": _late_normaliser,
    "the released fallback is not ZeroS": _fallback,
    "padding elu + 1 (limit of Lemma 2)": _padded_positive,
    "Comba: reading before and after the decay": lambda: (
        "comba", make("comba", decay_first=False), {}),
    "bilinear is not zero-order hold": lambda: (
        make("s4"), make("s4d", size=1), {"P": 0, "bc": 1, "xi": -1, "cc": 1}),
    "softmax is not its Taylor series": lambda: ("softmax_attention", "taylor_attention", {}),
    "retention is not linear attention on the same q, k": lambda: (
        "retention", make("linear_attention", normalise=False), {}),
    "the normaliser of the mLSTM counts": lambda: ("mlstm", make("mlstm", normalise=False), {}),
    "delta rules erase": lambda: (
        "delta_net", make("linear_attention", normalise=False), {"beta": 1}),
}  # fmt: skip
