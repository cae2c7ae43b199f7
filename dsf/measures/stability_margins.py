"""Do the states of a system die out, and by which margin?"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.map_blocks import Side
from dsf.measures._one_side import decay_logs, dense_step, one_side, side_attrs
from dsf.measures._products import eigenvalue_conditions, whole_product
from dsf.measures._verdicts import BAND, FLAGS, NO, YES
from dsf.transitions import Shift, Transition
from dsf.wrappers import System

__all__ = ["stability"]

POWERS = 12
"""Norms of A^(2^k) are looked at for k below this."""


def stability(system: System, *, side: Side | None = None) -> xr.Dataset:
    """Whether every state dies out without input, with the margin: yes, no or undecided.

    Time-invariant: margin = 1 - rho(A), rho the largest modulus of an eigenvalue; yes above 0, no
    at 0 and below (a state that is kept for ever, as in a cache, does not die out), the same in
    every basis. Exact for scalar and diagonal transitions, whose numbers are taken as they are
    stored, and for shifts. For others rounding moves an eigenvalue by up to n u ||A|| times its
    condition (Bauer and Fike); within 64 times that, which is `tolerance`, the verdict is
    undecided unless some power A^(2^k) is seen to contract.

    Time-varying: a finite stretch decides nothing about what comes after. yes if every step
    contracts in the Euclidean norm of the given states, max_t ||A_t|| < 1; no if the whole stretch
    keeps some state, ||A_L ... A_2|| >= 1; undecided between, where single steps grow and the
    stretch as a whole shrinks, or where rounding could have decided (`tolerance`, of the margin).
    margin = 1 - ||A_L ... A_2||^(1/(L-1)), the mean loss of a step.

    Returns a Dataset (batch, head): `verdict` (-1, 0, 1), `margin`, `step_margin` = 1 - max_t
    ||A_t||, `tolerance`, all 1 per step. `step_margin` belongs to the state coordinates that attrs
    name as gauge, and so do time-varying margins. Cost: O(length state) from logs, else O(length
    log(length) state^3). Source: Rugh (1996), chapter 22.
    """
    r, used = one_side(system, side, "stability")
    batch, _, head = r.lead_shape()
    invariant = r.A.lead_shape()[1] == 1
    found = _invariant(r.A) if invariant else _varying(r.A)
    meta = {
        **side_attrs(system, r, used), "units": "1/step", "method": (
            "spectral radius" if invariant else "norms of steps and of their product"),
        "invariance": "margin: every constant basis; step_margin: none" if invariant else
        "none: norms of the states as given",
    }  # fmt: skip
    texts = {"margin": "share of the slowest state lost in a step",
             "step_margin": "least share lost in any step, in norm",
             "tolerance": "margins within this are undecided"}  # fmt: skip

    def label(name: str, x: Tensor, **attrs: Any) -> xr.DataArray:
        return to_xarray(x.expand(batch, head), ("batch", "head"), name=name,
                         attrs={**meta, **attrs})  # fmt: skip

    return xr.Dataset({
        "verdict": label("verdict", found["verdict"], long_name="whether every state dies out",
                         **{**FLAGS, "units": "1"}),
        **{n: label(n, found[n], long_name=text) for n, text in texts.items()},
    })  # fmt: skip


def _invariant(A: Transition) -> dict[str, Tensor]:
    logs = decay_logs(A)
    if logs is not None:
        margin = _lost(logs[:, 0].amax(-1))
        return _found(margin, margin, torch.zeros_like(margin), exact=True)
    M = dense_step(A, 0)
    norm = torch.linalg.matrix_norm(M, ord=2)
    if isinstance(A, Shift) and A.amount > 0:  # nilpotent
        return _found(torch.ones_like(norm), 1 - norm, torch.zeros_like(norm), exact=True)
    values, vectors = torch.linalg.eig(M)
    moved = M.shape[-1] * 2.0**-53 * norm[..., None] * eigenvalue_conditions(vectors)
    # the eigenvalue that could be the largest, with all that rounding may have done to it
    largest = values.abs().amax(-1)
    tolerance = (values.abs() + BAND * moved).amax(-1) - largest
    found = _found(1 - largest, 1 - norm, tolerance, exact=False)
    proved = (found["verdict"] == 0) & _contracts(M)
    return {**found, "verdict": found["verdict"].masked_fill(proved, YES)}


def _contracts(M: Tensor) -> Tensor:
    """Whether some power A^(2^k) has norm below 1 beyond its rounding: proves that states die."""
    proved = torch.zeros(M.shape[:-2], dtype=torch.bool)
    error = torch.zeros(M.shape[:-2], dtype=torch.float64)
    for _ in range(POWERS):
        norm = torch.linalg.matrix_norm(M)
        proved = proved | (norm + error < 1)
        error = error * (2 * norm + error) + M.shape[-1] * 2.0**-53 * norm**2
        M = M @ M
    return proved


def _varying(A: Transition) -> dict[str, Tensor]:
    """yes by the steps, no by the whole stretch, each beyond the rounding of its own number."""
    own, logs = A.lead_shape()[1], decay_logs(A)
    if logs is not None:
        logs = logs[:, 1:]
        step, step_noise = _lost(logs.amax((1, 3))), torch.zeros(1, 1, dtype=torch.float64)
        each = logs.sum(1)
        # a sum of logs rounds by the sizes it adds, those of states that were wiped out aside
        doubt = 2.0**-53 * logs.masked_fill(logs.isinf(), 0.0).abs().sum(1)
        kept = (each >= doubt).any(-1)
        whole, slowest = each.max(-1)
        noise = doubt.gather(-1, slowest[..., None])[..., 0]
    else:
        norms = [torch.linalg.matrix_norm(dense_step(A, t), ord=2) for t in range(1, own)]
        step = 1 - torch.stack(norms).amax(0)
        step_noise = BAND * A.n_state * 2.0**-53 * (1 - step).clamp(min=1)
        _, whole, error = whole_product(A)
        noise = torch.where(error < 0.5 / BAND, BAND * error, torch.inf)
        kept = whole >= noise
    margin = _lost(whole / (own - 1))
    verdict = torch.zeros_like(margin, dtype=torch.int8).masked_fill(kept, NO)
    verdict = verdict.masked_fill(step > step_noise, YES)
    return {"verdict": verdict, "margin": margin, "step_margin": step,
            "tolerance": noise.expand_as(margin) / (own - 1)}  # fmt: skip


def _lost(log: Tensor) -> Tensor:
    """1 - exp(log), without cancellation."""
    return -torch.expm1(log)


def _found(margin: Tensor, step: Tensor, tolerance: Tensor, *, exact: bool) -> dict[str, Tensor]:
    """Verdicts: above the band yes, below it no; an exact 0 keeps its state."""
    no = margin <= 0 if exact else margin <= -tolerance
    yes = margin > tolerance
    verdict = torch.zeros_like(margin, dtype=torch.int8).masked_fill(yes, YES)
    return {"verdict": verdict.masked_fill(no, NO), "margin": margin, "step_margin": step,
            "tolerance": tolerance}  # fmt: skip


MEASURES = (stability,)
