"""The queries and keys of softmax heads as plain vectors, and the spectrum of exp(q.k)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from dsf.errors import DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.factors import SoftmaxRows
from dsf.maps import system_attrs
from dsf.measures._verdicts import NOISE
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core

Form = Literal["cross", "pooled"]
Gauge = Literal["as given", "balanced"]
Relative = Literal["norm", "trace", "absolute"]
Similarity: TypeAlias = System | SoftmaxRows | tuple[Tensor, Tensor]
"""A softmax system, its rows, or (query, key) as `SoftmaxRows` takes them."""


@dataclasses.dataclass(frozen=True)
class Head:
    """One head of one sample: vectors (token, width) with q.k the logit, and where they stood."""

    batch: int
    head: int
    query: Tensor
    key: Tensor
    keys: Tensor


def rows_of(system: Similarity, function: str) -> tuple[SoftmaxRows, dict[str, Any]]:
    """The rows and the labels of a softmax system.

    Raises DsfTypeError on other systems, which have no exponential similarity, and
    DsfUnsupportedError on capped logits.
    """
    attrs: dict[str, Any] = {"system": "", "gauge": "as given"}
    rows: Any = system
    if isinstance(system, Recurrence | Anticausal | Bidirectional | Gated):
        attrs, rows = system_attrs(system), core(system).C
    elif isinstance(system, tuple):
        rows = SoftmaxRows(*system)
    if not isinstance(rows, SoftmaxRows):
        raise DsfTypeError(
            f"dsf.{function}: system: expected a softmax system, SoftmaxRows or (query, key), got "
            f"{type(rows).__name__}. For the states of other systems see "
            f"dsf.measures.memory_half_life and cut_rank."
        )
    if rows.softcap is not None:
        raise DsfUnsupportedError(
            f"dsf.{function}: system: softcap: expected None, got {rows.softcap}; a capped logit "
            f"is no inner product."
        )
    n = max(rows.shape[1], rows.n_key)
    require_memory(
        f"dsf.{function}", "one number a token", ("batch", "head", "token"),
        (rows.shape[0], rows.shape[2], n), torch.float64,
        advice="Measure fewer samples or heads at a time.",
    )  # fmt: skip
    left_out = [n for n in ("bias", "sink", "window") if getattr(rows, n) is not None]
    return rows, {**attrs, "left_out": ", ".join(left_out) or "nothing", "precision": "float64"}


def heads_of(rows: SoftmaxRows, *, centre: bool) -> Iterator[Head]:
    """Every head of every sample in float64, times the root of the scale; masked keys left out.

    `centre` takes the mean off the keys, which no softmax notices.
    """
    batch, _, head = rows.shape[:3]
    shared = rows.query.shape[2] // max(rows.key.shape[2], 1)
    root = abs(rows.logit_scale) ** 0.5
    sign = -1.0 if rows.logit_scale < 0 else 1.0
    for b in range(batch):
        at = [b if x.shape[0] > 1 else 0 for x in (rows.query, rows.key)]
        keys = torch.arange(rows.n_key, device=rows.key.device)
        if rows.key_mask is not None:
            keys = keys[rows.key_mask[b if rows.key_mask.shape[0] > 1 else 0].bool()]
        for h in range(head):
            q = rows.query[at[0], :, h].detach().double() * (root * sign)
            k = rows.key[at[1], keys, h // shared].detach().double() * root
            k = k - k.mean(0) if centre and len(k) else k
            yield Head(b, h, q.cpu(), k.cpu(), keys.cpu())


def balanced(query: Tensor, key: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """The same logits with cov q = cov k: q -> A^-T q, k -> A k.

        A^T A = S_k^-1 # S_q = S_k^(-1/2) (S_k^(1/2) S_q S_k^(1/2))^(1/2) S_k^(-1/2)

    Raises DsfValueError where a covariance has no full rank, as with fewer tokens than width.
    """
    S_q, S_k = (torch.cov(x.mT, correction=0).reshape(x.shape[1], -1) for x in (query, key))
    for name, S in (("query", S_q), ("key", S_k)):
        values = torch.linalg.eigvalsh(S)
        if not float(values[0]) > 1e-12 * float(values[-1]):
            raise DsfValueError(
                f"dsf.{function}: gauge: expected {name} covariances of full rank "
                f"{S.shape[0]} for 'balanced', got smallest over largest eigenvalue "
                f"{float(values[0] / values[-1]):.3g}. Use form='cross', which needs no gauge."
            )
    root_k, inverse_k = _power(S_k, 0.5), _power(S_k, -0.5)
    A = _power(inverse_k @ _power(root_k @ S_q @ root_k, 0.5) @ inverse_k, 0.5)
    return torch.linalg.solve(A, query.mT).mT, key @ A.mT


def similarity(query: Tensor, key: Tensor, function: str) -> tuple[Tensor, float]:
    """exp(q_i.k_j - top)/sqrt(n m) and top, the largest logit: what estimates the operator.

    Refused before allocation when it would not fit (DsfMemoryError).
    """
    require_memory(
        f"dsf.{function}", "similarity", ("query", "key"), (len(query), len(key)), torch.float64,
        advice="Pass fewer samples=.",
    )  # fmt: skip
    logits = query @ key.mT
    top = float(logits.max()) if logits.numel() else 0.0
    return torch.exp(logits - top) / max(len(query) * len(key), 1) ** 0.5, top


def shifted(regularisation: float | int, top: float, s: Tensor) -> Tensor:
    """An absolute lambda beside values s that were divided by exp(top).

    NaN where it lies below their rounding: what it would count is noise.
    """
    value = s.new_tensor(regularisation * math.exp(max(min(-top, 700.0), -745.0)))
    noise = NOISE * len(s) * 2.0**-53 * (s.max() if len(s) else 0.0)
    return value.masked_fill(value < noise, math.nan)


def prepared(
    head: Head, form: Form, gauge: Gauge, function: str, samples: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The two lists of vectors of one operator, at most `samples` of each."""
    q, k = head.query, head.key
    if form == "pooled":
        if gauge == "balanced":
            q, k = balanced(q, k, function)
        q = k = torch.cat([q, k])
    if samples is None:
        return q, k
    generator = torch.Generator().manual_seed(seed)
    q = _some(q, samples, generator)
    return q, q if form == "pooled" else _some(k, samples, generator)


def check_options(function: str, regularisation: float | int, form: str, gauge: str) -> None:
    """Raise DsfValueError on what no operator has."""
    if not regularisation > 0:
        raise DsfValueError(
            f"dsf.{function}: regularisation: expected above 0, got {regularisation}."
        )
    for name, value, allowed in (("form", form, Form), ("gauge", gauge, Gauge)):
        if value not in allowed.__args__:  # type: ignore[attr-defined]
            raise DsfValueError(
                f"dsf.{function}: {name}: expected one of {allowed.__args__}, got {value!r}."  # type: ignore[attr-defined]
            )


def _some(x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    if len(x) <= samples:
        return x
    return x[torch.randperm(len(x), generator=generator)[:samples]]


def _power(S: Tensor, exponent: float) -> Tensor:
    """S^exponent of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh((S + S.mT) / 2)
    return (vectors * values.clamp(min=0) ** exponent) @ vectors.mT
