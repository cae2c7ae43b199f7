"""Is a scalar-decay state space model some linear attention? Which is the nearest, and how far?

SSD, M_tj = c_t^T b_j delta_j e^{-a (S_t - S_j)} with S_t = delta_1 + ... + delta_t, is linear
attention q_t^T k_j / eta_t with q = c, k = b exactly where the steps follow one schedule, which no
input selects; with keys and queries that may depend on the past it always is.
"""

from __future__ import annotations

import torch
import xarray as xr
from scipy.special import lambertw
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfShapeError, DsfTypeError, DsfValueError
from dsf.maps import materialise, system_attrs
from dsf.measures._size_checks import require_states
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Identity, Scalar
from dsf.wrappers import System

__all__ = ["attention_steps", "history_scaled", "nearest_attention"]


def nearest_attention(
    system: System,
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time head state"],
) -> xr.Dataset:
    """The linear attention q_t^T k_j / eta_t nearest to a causal map, row by row, and the rest.

        1/eta_t = <M_t, S_t> / <S_t, S_t>,   residual_t = |M_t - S_t / eta_t| / |M_t|,   S = q k^T

    query, key: those of the attention: c_t and b_t of a state space model for the comparison of
    the paper. Channels of a map that differ by channel are compared one by one.

    Returns `gain` (1/eta_t) and `residual`, (batch, head, [channel,] query); residual 0 where the
    row is that of attention, at most 1; rows of zeros give 0. Cost and memory O(length^2 state).
    Raises DsfTypeError on what is no system, DsfShapeError where query and key do not fit it.
    Source: Sieber et al. (2024), section 4.2; the search is ours.
    """
    require_states("nearest_attention", system)
    name = "dsf.nearest_attention"
    if not isinstance(system, System):
        raise DsfTypeError(f"{name}: system: expected a dsf system, got {type(system)}.")
    weights = materialise(system)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float64))
    scores = torch.einsum("bihn,bjhn->bhij", query.double(), key.double()).tril()
    if weights.shape[-2:] != scores.shape[-2:] or weights.shape[:2] != scores.shape[:2]:
        raise DsfShapeError(
            f"{name}: query: expected (batch={weights.shape[0]}, time={weights.shape[-1]}, "
            f"head={weights.shape[1]}, state), got {tuple(query.shape)}; the system fixes them."
        )
    dims: tuple[str, ...] = ("batch", "head", "query")
    if weights.ndim == 5:
        scores, dims = scores.unsqueeze(2), ("batch", "head", "channel", "query")
    power = scores.square().sum(-1)
    gain = torch.where(power > 0, (weights * scores).sum(-1) / power, 0.0)
    size = weights.norm(dim=-1)
    left = (weights - gain[..., None] * scores).norm(dim=-1)
    found = {
        "gain": (gain, "1 / eta of the nearest linear attention"),
        "residual": (torch.where(size > 0, left / size, 0.0), "relative distance to it"),
    }
    attrs = {**system_attrs(system), "units": "1", "method": "least squares, row by row, float64"}
    return xr.Dataset({
        n: to_xarray(x, dims, name=n, attrs={**attrs, "long_name": said})
        for n, (x, said) in found.items()
    })  # fmt: skip


def attention_steps(length: int, decay: float, gain: float) -> Float[Tensor, " time"]:
    """The one schedule of steps with which SSD is linear attention with the same q and k.

        delta_j e^{a S_j} = g for every j
        delta_j = W_0(a g e^{-a S_{j-1}}) / a,   eta_t = e^{a S_t} / g

    decay: a >= 0, of A_t = e^{-a delta_t}; gain: g > 0. a = 0 gives constant steps g. W_0 is the
    Lambert function. Raises DsfValueError on other numbers. Cost O(length).
    Source: conditions derived from Sieber et al. (2024), section 4.2.
    """
    if decay < 0 or gain <= 0:
        raise DsfValueError(
            f"dsf.attention_steps: decay, gain: expected decay >= 0 and gain > 0, got {decay}, "
            f"{gain}."
        )
    steps, total = torch.empty(length, dtype=torch.float64), 0.0
    for j in range(length):
        e = float(torch.tensor(-decay * total, dtype=torch.float64).exp())
        steps[j] = gain if decay == 0 else float(lambertw(decay * gain * e).real) / decay
        total += float(steps[j])
    return steps


def history_scaled(recurrence: Recurrence) -> Recurrence:
    """The same map with A_t = I: scalar decays as linear attention whose q, k know the past.

        q_t e^{g_t},   k_j e^{-g_j},   g_t = log a_1 + ... + log a_t

    Numbers grow like e^{-g}: for reading, not for running; infinite past e^709. Raises
    DsfTypeError unless A is scalar and positive, and on an initial state, DsfValueError on a
    decay of 0.
    """
    require_states("history_scaled", recurrence)
    r, name = recurrence, "dsf.history_scaled"
    if not isinstance(r.A, Scalar) or r.A.sign is not None or r.A.phase is not None:
        raise DsfTypeError(f"{name}: recurrence: expected a scalar positive decay, got {r.A}.")
    if r.initial_state is not None:
        raise DsfTypeError(f"{name}: recurrence: expected no initial state.")
    B, C = r.dense_input_output()
    length = max(x.shape[1] for x in (r.A.log_decay, B, C))
    log = r.A.log_decay.double().expand(-1, length, -1).cumsum(1)
    if bool(torch.isneginf(log).any()):
        raise DsfValueError(f"{name}: recurrence: expected decays above 0, got 0.")
    scale = log.exp()[..., None, None]
    return r.replace(A=Identity(r.n_state), B=B.double() / scale, C=C.double() * scale,
                     gauge="A = I by history")  # fmt: skip


MEASURES = ()
