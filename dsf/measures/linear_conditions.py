"""Can a family of linear models remember what it chooses, and reach any softmax map?

MetaLA's conditions on h_t = diag(a_t) h_{t-1} + k_t^T v_t, y_t = q_t h_t, with what q, k and a may
be as the family: linear complexity (C0), dynamic memory (C1), static approximation (C2), least
parameters (C3). Source: Chou et al. (2024), Definition 4.1, Propositions A2.1-A2.3, Table 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfShapeError, DsfUnsupportedError, DsfValueError
from dsf.maps import materialise
from dsf.measures._linear_families import FAMILIES, Family
from dsf.measures._size_checks import require_copies
from dsf.measures._verdicts import FLAGS, NO, YES
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Float
from dsf.wrappers import System, core

__all__ = [
    "FAMILIES", "Family", "conditions", "dynamic_memory", "linear_complexity",
    "static_approximation",
]  # fmt: skip

FADED = 0.05
"""What a fixed decay must have left of a token after `length` steps."""
MOST_GROWTH = 4.0
"""Coefficients that grow by more than this when the length doubles are called unbounded: the
constructions that are bounded do not grow at all, the others exponentially."""


def linear_complexity(
    build: Callable[[int], System], lengths: Sequence[int] = (16, 32, 64)
) -> xr.DataArray:
    """C0: does the state of a head stay of one size, whatever the length?

    build: a system of the given length. Returns the verdict, a number; attrs `sizes` holds the
    states found at each length. Softmax attention keeps a cache and fails.
    """
    sizes = [core(build(n)).n_state for n in lengths]
    return _verdict(
        "linear_complexity", len(set(sizes)) == 1, "states at several lengths", sizes=sizes
    )


def dynamic_memory(family: Family, *, n_state: int = 5, decay: float = 0.9) -> xr.Dataset:
    """C1: can one update put a new value into row 1 of a full state?

    The stored-row construction: row i of the state holds v_i, the token brings v_new; a, k are the
    family's best (a = 1 - e_1, k = e_1 where it is free to). Run by `dsf.step`, in float64.
    decay: the number of a family whose decay is fixed.

    Returns `row_error`, what is left in row 1 of |h - v_new| / |v|, the paper's criterion, with
    its verdict; and `others_error`, how far the other rows moved, which the paper leaves out: a
    key of 1 adds the new value to every row.
    """
    if n_state < 2:
        raise DsfValueError(f"dsf.dynamic_memory: n_state: expected 2 or more, got {n_state}.")
    one = torch.ones(1, n_state, dtype=torch.float64)
    first = torch.zeros_like(one)
    first[0, 0] = 1
    a = {"none": one, "fixed": decay * one, "dynamic": one - first}[family.decay]
    r = family.recurrence(a, key=first if family.key == "free" else None)
    values = torch.eye(n_state + 1, dtype=torch.float64)  # v_1..v_n, then v_new: all of norm 1
    _, state = step(r, values[None, None, n_state], values[None, None, :n_state])
    h = state[0, 0]
    row = float((h[0] - values[n_state]).norm())
    others = float((h[1:] - values[1:n_state]).norm(dim=-1).max())
    verdict = _verdict("dynamic_memory", row == 0, "stored rows, one step in float64")
    error = {"units": "1", "method": "stored rows, one step in float64"}
    return xr.Dataset({"dynamic_memory": verdict, "row_error": ((), row, error),
                       "others_error": ((), others, error)})  # fmt: skip


def static_approximation(
    family: Family, weights: Float[Tensor, "query key"], *, decay: float = 0.9
) -> tuple[Recurrence, xr.Dataset]:
    """C2: coefficients of the family that give this causal map, one channel a row, and their size.

    Channel t carries row t of the map p; its query is e_t. With S_j = sum_{r<=j} p_tr the channel
    t of step j has

        tied key:          a_j = S_{j-1} / S_j,   (prod_{i>j} a_i) (1 - a_j) = p_tj
        free key:          a_j = 1,               k_j = p_tj
        and a fixed decay: a_j = a,               k_j = p_tj / a^(t-j): without bound in t - j

    weights: rows of non-negative numbers that sum to 1, zero above the diagonal. L states.

    Returns the recurrence and `error` (largest |M - p|), `largest_key`, `largest_query`. Raises
    DsfUnsupportedError for a family without query or with a key of 1, which cannot be made so:
    with q = 1 and one channel |M_tj| never rises with t, with a = k = 1 the weights of a row are
    all equal.
    """
    require_copies("static_approximation", weights)
    _check_map(weights)
    if not family.query or family.key == "one":
        raise DsfUnsupportedError(
            f"dsf.static_approximation: family: expected a free query, and a key that is free or "
            f"tied to the decay, got {family}: no channel of it holds one row of any map."
        )
    rows = weights.to(torch.float64)
    length = rows.shape[0]
    eye = torch.eye(length, dtype=torch.float64)
    if family.key == "tied":
        total = rows.cumsum(1)
        before = torch.cat([torch.zeros(length, 1, dtype=torch.float64), total[:, :-1]], 1)
        a = torch.where(total > 0, before / total, 0.0).tril() + torch.ones_like(eye).triu(1)
        r = family.recurrence(a.T, query=eye)
    else:
        a = torch.full_like(rows, decay if family.decay == "fixed" else 1.0)
        lag = torch.arange(length)[:, None] - torch.arange(length)
        key = torch.where(lag >= 0, rows * a ** -lag.to(torch.float64), 0.0)
        r = family.recurrence(a.T, query=eye, key=key.T)
    error = float((materialise(r)[0, 0] - rows).abs().max())
    attrs = {"units": "1", "method": "one channel a row of the map, float64"}
    B, C = r.dense_input_output()
    sizes = {"error": error, "largest_key": B.abs().max(), "largest_query": C.abs().max()}
    return r, xr.Dataset({name: ((), float(x), attrs) for name, x in sizes.items()})


def conditions(
    families: dict[str, Family] | None = None, *, length: int = 32, decay: float = 0.9
) -> xr.Dataset:
    """The paper's table: C0-C3 and the number of parameter groups of each family.

    C2 is tried on uniform rows, the softmax map of equal logits, at `length` and twice it: yes
    where the map is reached with coefficients that do not grow. Where no single channel reaches a
    row, the no is the paper's argument; for sums of channels with signed keys nothing is proved.
    C3: the fewest groups among those with C0-C2. Returns (system,) variables, verdicts and a
    count. Raises DsfValueError where the decay is too weak for the length to tell.
    """
    if not 0 < decay**length < FADED:
        raise DsfValueError(
            f"dsf.conditions: decay: expected decay^length between 0 and {FADED}, so that growth "
            f"shows, got {decay}^{length}. Take a longer length or a stronger decay."
        )
    families = FAMILIES if families is None else families
    found: dict[str, list[int]] = {n: [] for n in ("C0", "C1", "C2", "C3", "n_group")}
    for family in families.values():

        def build(n: int, family: Family = family) -> Recurrence:
            a = torch.full((n, 4), 1.0 if family.decay == "none" else decay, dtype=torch.float64)
            return family.recurrence(a)

        found["C0"].append(int(linear_complexity(build)))
        found["C1"].append(int(dynamic_memory(family, decay=decay).dynamic_memory))
        found["C2"].append(YES if _reaches(family, length, decay) else NO)
        found["n_group"].append(family.n_group)
    met = [min(row) == YES for row in zip(found["C0"], found["C1"], found["C2"], strict=True)]
    least = min((n for n, ok in zip(found["n_group"], met, strict=True) if ok), default=0)
    found["C3"] = [YES if ok and n == least else NO
                   for n, ok in zip(found["n_group"], met, strict=True)]  # fmt: skip
    names = {
        "C0": "linear complexity", "C1": "dynamic memory", "C2": "static approximation",
        "C3": "least parameters", "n_group": "parameter groups",
    }  # fmt: skip
    method = {"units": "1", "method": f"constructions at lengths {length} and {2 * length}"}
    return xr.Dataset({
        name: to_xarray(
            torch.tensor(values), ("system",), name=name, coords={"system": list(families)},
            attrs={"long_name": names[name], **method, **({} if name == "n_group" else FLAGS)})
        for name, values in found.items()
    })  # fmt: skip


def _reaches(family: Family, length: int, decay: float) -> bool:
    sizes = []
    for n in (length, 2 * length):
        uniform = torch.ones(n, n, dtype=torch.float64).tril()
        try:
            _, made = static_approximation(
                family, uniform / uniform.sum(1, keepdim=True), decay=decay
            )
        except DsfUnsupportedError:
            return False
        if float(made.error) > 1e-12:
            return False
        sizes.append(float(max(made.largest_key, made.largest_query)))
    return sizes[1] <= MOST_GROWTH * sizes[0]


def _check_map(weights: Tensor) -> None:
    square = weights.ndim == 2 and weights.shape[0] == weights.shape[1]
    if not square or not bool((weights >= 0).all()) or bool(weights.triu(1).any()):
        raise DsfShapeError(
            f"dsf.static_approximation: weights: expected a square map with rows of non-negative "
            f"numbers and zeros above the diagonal, got {tuple(weights.shape)}. Take one head of "
            f"dsf.materialise."
        )
    if bool((weights.sum(1) - 1).abs().max() > 1e-6):
        raise DsfValueError(
            "dsf.static_approximation: weights: expected rows that sum to 1, got other sums. "
            "Normalise them first."
        )


def _verdict(name: str, holds: bool, method: str, **attrs: object) -> xr.DataArray:
    verdict = torch.tensor(YES if holds else NO)
    return to_xarray(
        verdict, (), name=name, attrs={"units": "1", "method": method, **FLAGS, **attrs}
    )


MEASURES = ()
