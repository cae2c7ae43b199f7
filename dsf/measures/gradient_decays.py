"""How fast do gradients and states die with distance?"""

from __future__ import annotations

from typing import Literal

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfShapeError, DsfValueError
from dsf.map_blocks import Side
from dsf.measures._maps import MapLike, open_map, widened, with_length
from dsf.measures._one_side import decay_logs, dense_step, matrix_dtype, one_side, side_attrs
from dsf.memory import require_memory
from dsf.transitions import Transition
from dsf.wrappers import System, total_length

__all__ = ["gradient_decay", "state_product_norm"]


def gradient_decay(
    system: MapLike, statistic: Literal["rms", "largest"] = "rms", *, length: int | None = None,
    block: int | None = None,
) -> xr.DataArray:  # fmt: skip
    """The size of dy_t/du_j by the distance |t - j|: how far back a gradient reaches.

        rms(lag) = sqrt(mean over |t-j|=lag of |w_tj|^2),    largest(lag) = max |w_tj|

    over the pairs that the system's direction allows (the causal ones of a causal system). The
    coefficients are held: what u does to A, B and C is not differentiated. No basis of the states
    enters. Unlike `lag_mass` nothing is divided by the rows' sums.

    Returns (batch, head, [channel, output, input,] step) with the lag as `step`. Raises
    DsfValueError for another statistic, DsfShapeError for an empty map. Cost: one pass over the
    map by tiles, memory O(length x block).
    """
    if statistic not in ("rms", "largest"):
        raise DsfValueError(
            f"dsf.gradient_decay: statistic: expected rms or largest, got {statistic!r}."
        )
    source = open_map(system, length=length)
    query, key = source.positions
    if not (len(query) and len(key)):
        raise DsfShapeError(
            f"dsf.gradient_decay: system: expected at least one step, got {len(query)} queries "
            f"and {len(key)} keys."
        )
    span = int(max(query.max() - key.min(), key.max() - query.min(), 0)) + 1
    found = torch.zeros(*source.lead_shape, span, dtype=torch.float64)
    count = torch.zeros(span, dtype=torch.float64)
    for rows, columns in source.tiles(block):
        for cols in columns:
            part = widened(source.read(rows, cols)).abs().cpu().flatten(-2)
            lag = query[rows.start : rows.stop, None] - key[cols.start : cols.stop]
            index = lag.abs().flatten()
            # entries that the direction forbids are zero: they add nothing, and do not count
            if statistic == "largest":
                where = index.expand(*source.lead_shape, -1)
                found.scatter_reduce_(-1, where, part, "amax")
                continue
            allowed = {"causal": lag >= 0, "anticausal": lag <= 0}.get(
                source.attrs["direction"], torch.ones_like(lag) > 0
            )
            found.index_add_(-1, index, part.square())
            count.index_add_(0, index, allowed.double().flatten())
    return source.result(
        found if statistic == "largest" else torch.sqrt(found / count), ("step",),
        "gradient_decay", units="1", statistic=statistic, method="absolute weights by tiles",
        long_name=f"|dy_t/du_j| by distance, {statistic}",
    )  # fmt: skip


def state_product_norm(
    system: System, *, side: Side | None = None, length: int | None = None,
    max_memory: int | None = None,
) -> xr.Dataset:  # fmt: skip
    """ln ||A_t ... A_(t-m+1)||_2 over t, for lags m = 1, 2, 4, ...: what a state can keep.

    Mean and largest over all windows of m transitions among A_2 ... A_L (A_1 acts on the initial
    state alone). Products double, P_2m(t) = P_m(t) P_m(t-m): logs add for scalar and diagonal
    transitions (-inf where every state is wiped out); matrices carry their size as a logarithm,
    so that nothing underflows. Of a time-invariant transition there is one window for each lag.
    The norm is the Euclidean one of the given states: attrs name the gauge; `gradient_decay` is
    what does not depend on it. A rate: divide by the lag.

    Returns a Dataset (batch, head, step) with the lag as `step`: `mean_log`, `largest_log`, in
    nats. Cost: O(length log(length) state^3), for logs O(length log(length) state); memory
    O(length state^2), refused when it does not fit (DsfMemoryError).
    """
    r, used = one_side(system, side, "state_product_norm")
    batch, _, head = r.lead_shape()
    own = r.A.lead_shape()[1]
    count = (own if own > 1 else total_length(with_length(system, length))) - 1
    logs = decay_logs(r.A)
    lags = [2**i for i in range(max(count, 1).bit_length())]
    if logs is not None:
        windows = _log_windows(logs[:, 1:] if own > 1 else logs, lags)
        method = "sums of log decays, doubled"
    else:
        require_memory(
            "dsf.state_product_norm", "products", ("time", "batch", "head", "state", "state"),
            (3 * own, *r.A.lead_shape()[::2], r.n_state, r.n_state), matrix_dtype(r.A),
            max_memory=max_memory, advice="Measure fewer steps with dsf.slice_time.",
        )  # fmt: skip
        windows, method = _matrix_windows(r.A, lags), "products of matrices, doubled"
    mean, top = (torch.stack([f(w) for w in windows], -1).expand(batch, head, -1)
                 for f in (lambda w: w.mean(1), lambda w: w.amax(1)))  # fmt: skip
    meta = {**side_attrs(system, r, used), "units": "1", "method": method,
            "norm": "Euclidean, of the states as given"}  # fmt: skip
    return xr.Dataset({
        name: to_xarray(x, ("batch", "head", "step"), name=name, coords={"step": lags},
                        attrs={**meta, "long_name": f"{text} log norm of products by lag"})
        for name, x, text in (("mean_log", mean, "mean"), ("largest_log", top, "largest"))
    })  # fmt: skip


def _log_windows(logs: Tensor, lags: list[int]) -> list[Tensor]:
    """The largest sum of logs over the states, (batch, window, head), for each lag."""
    shared, found = logs.shape[1] == 1, []
    for lag in lags:
        found.append(logs.amax(-1))
        later, earlier = _halves(logs, lag, shared)
        logs = later + earlier
    return found


def _matrix_windows(A: Transition, lags: list[int]) -> list[Tensor]:
    """ln of the spectral norm of each window's product, (batch, window, head), for each lag."""
    own = A.lead_shape()[1]
    P = torch.stack([dense_step(A, t) for t in (range(1, own) if own > 1 else [0])], 1)
    shared, found = P.shape[1] == 1, []
    size = torch.zeros(P.shape[:3], dtype=torch.float64)
    for lag in lags:
        norm = torch.linalg.matrix_norm(P, ord=2).to(size)
        size = size + torch.log(norm)
        found.append(size)
        P = P / torch.where(norm > 0, norm, 1.0)[..., None, None]
        later, earlier = _halves(P, lag, shared)
        P = later @ earlier
        later, earlier = _halves(size, lag, shared)
        size = later + earlier
    return found


def _halves(x: Tensor, lag: int, shared: bool) -> tuple[Tensor, Tensor]:
    """The later and the earlier part of every window of twice the lag."""
    return (x, x) if shared else (x[:, lag:], x[:, :-lag])


MEASURES = (gradient_decay, state_product_norm)
