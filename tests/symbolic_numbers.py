"""The numeric system that each symbolic one must agree with, called on the same numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from sympy import Symbol
from torch import Tensor

from dsf.feature_maps import identity
from dsf.symbolic import FAMILIES, SymbolicSystem
from dsf.trees import tree_from_branching


class Numbers:
    """Random numbers for the symbols of a system, and the tensors they make up."""

    def __init__(self, system: SymbolicSystem, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.system = system
        self.arrays: dict[str, np.ndarray] = {}
        for family in dict.fromkeys(f for f, _ in system.places.values()):
            indices = [i for f, i in system.places.values() if f == family]
            shape = tuple(np.max(indices, axis=0)) if indices[0] else ()
            self.arrays[family] = _draw(rng, FAMILIES[family].domain, shape)

    def values(self) -> dict[Symbol, Any]:
        """A number for every symbol; the index 0 (of the running maximum) is given the last's."""
        return {
            s: self.arrays[family][tuple(i - 1 for i in indices)]
            for s, (family, indices) in self.system.places.items()
        }

    def shared(self, family: str) -> Tensor:
        """What all tokens share, as it is."""
        return torch.as_tensor(self.arrays[family])

    def __getattr__(self, family: str) -> Tensor:
        """(batch=1, time, head=1, ...) of a family with one value or vector a token."""
        if family.startswith("_"):
            raise AttributeError(family)
        return self.shared(family)[None, :, None]

    @property
    def gates(self) -> tuple[Tensor, Tensor, Tensor]:
        """First, higher and zero order of ZeroS."""
        return self.g1, self.gh, self.g0


def _draw(rng: np.random.Generator, domain: str, shape: tuple[int, ...]) -> np.ndarray:
    normal = rng.standard_normal(shape)
    if domain == "unit":
        return np.asarray(rng.uniform(0.1, 0.9, shape))
    if domain == "positive":
        return np.asarray(rng.uniform(0.2, 1.5, shape))
    return np.asarray(normal + 1j * rng.standard_normal(shape) if domain == "complex" else normal)


def evaluated(
    matrices: Sequence[sympy.ImmutableMatrix], values: Mapping[Symbol, Any]
) -> list[np.ndarray]:
    """The matrices at these numbers, in double precision."""
    f = sympy.lambdify(list(values), list(matrices), "numpy", cse=True)
    return [np.asarray(m) for m in f(*values.values())]


Numeric = Callable[..., Any]
Call = Callable[[Numeric, Numbers], Any]


def numeric(name: str) -> Numeric:
    """`<name>_recurrence` of dsf.models."""
    module = importlib.import_module(f"dsf.models.{name}")
    prefix = "gated_" if name == "short_convolution" else ""
    return getattr(module, f"{prefix}{name}_recurrence")


def _logit(gate: Tensor) -> Tensor:
    return torch.log(gate) - torch.log1p(-gate)


def _log(gate: Tensor) -> Tensor:
    return torch.log(gate)


def _tokens_first(v: Numbers, family: str) -> Tensor:
    """(batch=1, time, ...): a key or query without a head axis."""
    return v.shared(family)[None]


def _and_one_more(log_decay: Tensor) -> Tensor:
    """A decay after the last token, which no row reads."""
    return torch.nn.functional.pad(log_decay, (0, 0, 0, 0, 0, 1))


def _inner_mlp(f: Numeric, v: Numbers) -> Any:
    """TTT-MLP on tokens of its own; its hidden activations become the numbers of k and q."""
    torch.manual_seed(0)
    length, hidden = v.system.length, v.system.n_state - 1
    q, k, value = torch.randn(3, 1, length, 1, 3, dtype=torch.float64)
    first, second = torch.randn(1, 1, 4, hidden), torch.randn(1, 1, hidden + 1, 3)
    r = f(q, k, value, v.delta, first.double(), second.double(), write_strength=v.beta)[0]
    strength = (v.delta * v.beta)[0, :, 0, None]
    v.arrays["k"] = (r.B[0, :, 0, :-1, 0] / strength).numpy()
    v.arrays["q"] = r.C[0, :, 0, 0, :-1].numpy()
    return r


def _ttt_linear(f: Numeric, v: Numbers) -> Any:
    """With a norm: the values are the gradients, the system that of the trajectory."""
    torch.manual_seed(0)
    length = v.system.length
    value, norm = torch.randn(1, length, 1, 2).double(), torch.ones(1, 2).double()
    return f(v.q, v.k, value, v.delta, norm, 0 * norm, write_strength=v.beta)[0]


def _ttt_plain(f: Numeric, v: Numbers) -> Any:
    return f(v.q, v.k, v.k, v.delta, write_strength=v.beta)[0]


def _skip(v: Numbers) -> Tensor:
    return v.shared("d").reshape(-1)


CALLS: dict[str, Call] = {
    "based": lambda f, v: f(v.q, v.k, scale=1.0, eps=0.0),
    "comba": lambda f, v: f(v.q, v.k, v.p, _log(v.f), v.beta, scale=1.0),
    "delta_net": lambda f, v: f(v.q, v.k, v.beta, scale=1.0),
    "expanded_rglru": lambda f, v: f(
        v.zr, _tokens_first(v, "k"), _tokens_first(v, "q"), v.shared("Lambda")[:, None],
        c=float(v.shared("c"))),
    "forgetting_attention": lambda f, v: f(
        v.q, v.k, _log(v.f), scale=1.0),
    "gated_attention": lambda f, v: f(
        v.q, v.k, output_gate=v.o[..., None], value_gate=v.i[..., None], scale=1.0),
    "gated_delta_net": lambda f, v: f(
        v.q, v.k, _log(v.f), v.beta, scale=1.0),
    "gated_delta_product": lambda f, v: f(
        v.q, v.k, _log(v.f), v.beta, scale=1.0),
    "gated_slot_attention": lambda f, v: f(
        v.q, v.k, _log(v.a), scale=1.0),
    "gla": lambda f, v: f(v.q, v.k, _log(v.a), scale=1.0),
    "gru": lambda f, v: f(_logit(v.z)),
    "hgrn": lambda f, v: f(_log(v.f)),
    "hgrn2": lambda f, v: f(v.q, _log(v.a), scale=1.0),
    "hierarchical_attention": lambda f, v: f(
        v.q, v.k, tree_from_branching(v.system.length, (2, 2)), rows="free", causal=True,
        scale=1.0),
    "inline_attention": lambda f, v: f(
        v.q, v.k, scale="published"),
    "kimi_delta_attention": lambda f, v: f(
        v.q, v.k, _log(v.a), v.beta, scale=1.0),
    "lightning_attention": lambda f, v: f(
        v.q, v.k, _log(v.shared("gamma"))[None]),
    "linear_attention": lambda f, v: f(
        v.q, v.k, feature_map=identity),
    "lru": lambda f, v: f(
        v.shared("nu")[None], v.shared("theta")[None], torch.zeros(1).double(), v.shared("bc"),
        v.shared("cc"), _skip(v)),
    "lstm": lambda f, v: f(_logit(v.f), _logit(v.i)),
    "mamba": lambda f, v: f(
        v.delta, -v.shared("rho")[None], _tokens_first(v, "k"), _tokens_first(v, "q"), _skip(v)),
    "mamba2": lambda f, v: f(
        v.delta, -v.shared("r")[None], v.k, v.q, _skip(v)),
    "mamba3": lambda f, v: f(
        _log(v.f), v.delta, v.l, v.k[..., None, :], v.q[..., None, :], _skip(v)),
    "metala": lambda f, v: f(v.q, _log(v.a)),
    "min_gru": lambda f, v: f(_logit(v.z)),
    "mlstm": lambda f, v: f(v.q, v.k, v.zi, v.zf, scale=1.0),
    "monarch_attention": lambda f, v: f(
        v.q, v.k, block=2, causal=True, scale=1.0),
    "normalized_attention": lambda f, v: f(
        v.q, v.k, v.zn),
    "path_attention": lambda f, v: f(
        v.q, v.k, v.w, v.beta, scale=1.0),
    "qlstm": lambda f, v: f(v.zf, v.zi, v.zo),
    "random_feature_attention": lambda f, v: (
        f(
            v.q, v.k, v.shared("w")[None], scale=1.0)),
    "rebased": lambda f, v: f(v.q, v.k, scale=1.0, eps=0.0),
    "retention": lambda f, v: f(
        v.q, v.k, _log(v.shared("gamma"))[None], scale=1.0),
    "rglru": lambda f, v: f(
        v.zr, v.zi, v.shared("Lambda")[None], c=float(v.shared("c"))),
    "rnn": lambda f, v: f(_tokens_first(v, "g"), v.shared("U")),
    "rwkv4": lambda f, v: f(
        v.k, _log(v.shared("gamma"))[None], v.shared("u")[None]),
    "rwkv6": lambda f, v: f(
        v.q, v.k, _and_one_more(_log(v.a)), v.shared("u")[None]),
    "rwkv7": lambda f, v: f(v.q, v.k, _log(v.a), v.p, v.b),
    "s4": lambda f, v: f(
        v.shared("delta")[None], v.shared("xi")[None], v.shared("P")[None, None],
        v.shared("bc")[None], v.shared("cc")[None], _skip(v)),
    "s4d": lambda f, v: f(
        v.shared("delta")[None], v.shared("xi")[None], v.shared("cc")[None], _skip(v)),
    "s5": lambda f, v: f(
        v.shared("delta")[None], v.shared("xi"), v.shared("bc"), v.shared("cc"), _skip(v)),
    "short_convolution": lambda f, v: f(
        v.shared("w").flip(0)[None], input_gate=v.i, output_gate=v.o),
    "sigmoid_attention": lambda f, v: f(
        v.q, v.k, scale=1.0),
    "sliding_window_attention": lambda f, v: (
        f(v.q, v.k, 2, scale=1.0)),
    "slstm": lambda f, v: f(v.zi, v.zf, v.zo),
    "softmax_attention": lambda f, v: f(
        v.q, v.k, scale=1.0),
    "taylor_attention": lambda f, v: f(
        v.q, v.k, scale=1.0),
    "ttt_linear": _ttt_linear,
    "ttt_mlp": _inner_mlp,
    "zeros": lambda f, v: f(v.q, v.k, v.s, *v.gates),
    "zeros_softmax": lambda f, v: f(
        v.q, v.k, *v.gates, scale=1.0),
}  # fmt: skip
"""By system: its numeric function f on these numbers, one head, scale 1."""

VARIANTS: dict[tuple[str, str, Any], Call] = {
    ("comba", "decay_first", False): lambda f, v: f(
        v.q, v.k, v.p, _log(v.f), v.beta, scale=1.0, decay_first=False),
    ("inline_attention", "coordinates", "centred"): lambda f, v: (
        f(
            v.q, v.k, scale="published", coordinates="centred")),
    ("linear_attention", "gauge", "dsf"): lambda f, v: f(
        v.q, v.k, feature_map=identity, gauge="dsf"),
    ("linear_attention", "normalise", False): lambda f, v: (
        f(
            v.q, v.k, feature_map=identity, normalise=False)),
    ("mlstm", "normalise", False): lambda f, v: f(
        v.q, v.k, v.zi, v.zf, scale=1.0, normalise=False),
    ("mlstm", "stabilised", True): lambda f, v: f(
        v.q, v.k, v.zi, v.zf, scale=1.0, stabilised=True),
    ("normalized_attention", "gauge", "dsf"): lambda f, v: (
        f(v.q, v.k, v.zn, gauge="dsf")),
    ("qlstm", "reversed_sigmoid", True): lambda f, v: f(
        v.zf, v.zi, v.zo, reversed_sigmoid=True, exponent=float(v.shared("e"))),
    ("rwkv4", "normalise", False): lambda f, v: f(
        v.k, _log(v.shared("gamma"))[None], v.shared("u")[None], normalise=False),
    ("taylor_attention", "gauge", "dsf"): lambda f, v: f(
        v.q, v.k, scale=1.0, gauge="dsf"),
    ("ttt_linear", "normalised", False): _ttt_plain,
    ("zeros", "realisation", "raw"): lambda f, v: f(
        v.q, v.k, v.s, *v.gates, realisation="raw"),
    ("zeros", "realisation", "running_max"): lambda f, v: f(
        v.q, v.k, v.s, *v.gates, realisation="running_max"),
}  # fmt: skip
"""By system, option and its value."""
