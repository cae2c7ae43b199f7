"""What do the coefficient dynamics of a system allow? The six principles as numbers.

    x_t = A_t x_(t-1) for t > j,   x_j = b_j k_j,   alpha_tj = phi(q_t.x_t) / eta_t

Statements: Sieber et al. (2025), arXiv 2510.09389; the measurements are ours.
"""

from __future__ import annotations

import dataclasses

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.coefficient_forms import coefficient_dynamics
from dsf.coefficients import CoefficientDynamics
from dsf.errors import DsfTypeError, DsfValueError
from dsf.measures._size_checks import require_states
from dsf.measures._verdicts import FLAGS, NO, UNDECIDED, YES
from dsf.recurrence import Recurrence
from dsf.transitions import Identity
from dsf.wrappers import System

__all__ = ["principles"]

AT_ONE = 1e-9
"""How far from 1 the norm of a transition may be to count as 1: rounding of its decays."""


def principles(
    system: System | CoefficientDynamics, *, zero: float = 0.0, seed: int = 0
) -> xr.Dataset:
    """The six principles of coefficient dynamics, measured on one input, (batch, head) each.

    1. `linear_readout`: yes where phi is the identity, so that the small states add up to one of
       `n_state` x channels; otherwise every token keeps its own.
    2. `zero_share`: the share of past tokens whose |phi(q_t.x_t)| is at most `zero`, exactly 0
       by default; `zero_keys`: how many independent keys one query can null, n - 1 for the
       identity, 0 for exp and sigmoid, which have no zero.
    3. `position`: how far the weights of the last row move, as a part of its l1 norm, when the
       tokens before it are put in another order (by `seed`); 0 where A_t = I.
    4. `turn`: mean of |A_t - tr(A_t)/n I|_F / |A_t|_F, 0 where A_t only rescales a key; the
       structure of A_t stands in attrs.
    5. `response_variance` of q_t.x_t over the past; near 1 with b = 1/sqrt(n) and q, k of unit
       variance.
    6. `largest_norm` of A_t (spectral), and the verdict `stable`: yes below 1, where sum_j
       |alpha_tj| is bounded without eta, no above, where no eta is safe; undecided at 1, where it
       grows like t; `weight_growth`: the exponent p of sum_j |phi| ~ t^p over the second half of
       the rows.

    Cost O(length^2 state) time, O(length^2) memory, O(length state^3) for the norms. Raises
    DsfTypeError on what is neither a causal recurrence nor coefficient dynamics, DsfValueError
    for fewer than 4 tokens, and what `dsf.coefficient_dynamics` raises.
    """
    require_states("principles", system)
    form = _form(system)
    length = form.query.shape[1]
    if length < 4:
        raise DsfValueError(f"dsf.principles: system: expected 4 tokens or more, got {length}.")
    response = form.responses()
    past = torch.ones(length, length, dtype=torch.bool).tril()
    phi = form.phi(response).abs() * past
    batch, head, n = *response.shape[:2], form.A.n_state
    linear = form.readout == "identity" and form.softcap is None
    norm, turn = _norms(form)
    growth = _exponent(phi.sum(-1))
    found: dict[str, tuple[Tensor, str]] = {
        "linear_readout": (torch.tensor(YES if linear else NO), "phi is the identity"),
        "n_state": (torch.tensor(n if linear else n * length), "numbers kept per value channel"),
        "zero_share": ((phi[..., past] <= zero).double().mean(-1), "share of weights at zero"),
        "zero_keys": (torch.tensor(n - 1 if linear else 0), "keys that one query can null"),
        "position": (_position(form, seed), "change of the last row when the past is permuted"),
        "turn": (turn, "distance of A_t from a multiple of I"),
        "response_variance": (response[..., past].abs().var(-1) if response.is_complex()
                              else response[..., past].var(-1), "variance of the responses"),
        "largest_norm": (norm, "largest spectral norm of A_t"),
        "stable": (_stable(norm), "sum of |weights| bounded without a normaliser"),
        "weight_growth": (growth, "exponent of the sum of |phi| over time"),
    }  # fmt: skip
    attrs = {"units": "1", "method": "coefficient dynamics of one input", "system": form.system,
             "structure": form.A.structure, "readout": form.readout,
             "gauge": "coefficient dynamics"}  # fmt: skip
    verdicts = ("linear_readout", "stable")
    return xr.Dataset({
        name: to_xarray(x.expand(batch, head), ("batch", "head"), name=name, attrs={
            **attrs, "long_name": said, **(FLAGS if name in verdicts else {})})
        for name, (x, said) in found.items()
    })  # fmt: skip


def _form(system: System | CoefficientDynamics) -> CoefficientDynamics:
    if isinstance(system, CoefficientDynamics):
        return system
    if not isinstance(system, Recurrence):
        raise DsfTypeError(
            f"dsf.principles: system: expected a causal dsf.Recurrence or "
            f"dsf.CoefficientDynamics, got {type(system)}."
        )
    return coefficient_dynamics(system)


def _position(form: CoefficientDynamics, seed: int) -> Tensor:
    """The last row's weights against those of the same tokens in another order."""
    last = form.query.shape[1] - 1
    order = torch.randperm(last, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([order, torch.tensor([last])])

    def moved(x: Tensor) -> Tensor:
        return x[:, order] if x.shape[1] > 1 else x

    other = dataclasses.replace(form, A=form.A.map_tensors(moved), key=moved(form.key),
                                injection=moved(form.injection))  # fmt: skip
    row, found = form.weights()[..., last, :], other.weights()[..., last, :]
    return (found - row[..., order]).abs().sum(-1) / row.abs().sum(-1)


def _norms(form: CoefficientDynamics) -> tuple[Tensor, Tensor]:
    """(batch, head) each: the largest spectral norm of A_t, and how far A_t turns a key."""
    if isinstance(form.A, Identity):
        return torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    dense = form.A.as_dense()
    dense = dense.to(torch.promote_types(dense.dtype, torch.float64))
    size, n = torch.linalg.matrix_norm(dense), dense.shape[-1]
    mean = dense.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    rest = torch.linalg.matrix_norm(dense - mean * torch.eye(n, dtype=dense.dtype))
    turn = torch.where(size > 0, rest / size, 0.0).mean(1)
    return torch.linalg.matrix_norm(dense, 2).amax(1), turn


def _stable(norm: Tensor) -> Tensor:
    verdict = torch.full(norm.shape, UNDECIDED, dtype=torch.int8)
    return verdict.masked_fill(norm < 1 - AT_ONE, YES).masked_fill(norm > 1 + AT_ONE, NO)


def _exponent(sums: Tensor) -> Tensor:
    """The slope of log sums over log t, t the second half of the rows; NaN where sums are 0."""
    half = sums.shape[-1] // 2
    x = torch.arange(half + 1, sums.shape[-1] + 1, dtype=torch.float64).log()
    y, x = sums[..., half:].double().log(), x - x.mean()
    return (y * x).sum(-1) / x.square().sum()


MEASURES = ()
