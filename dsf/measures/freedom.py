"""How many features does the similarity of a softmax head need?"""

from __future__ import annotations

import math

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.measures._similarities import (
    Form,
    Gauge,
    Similarity,
    check_options,
    heads_of,
    prepared,
    rows_of,
    shifted,
    similarity,
)

__all__ = ["degrees_of_freedom", "similarity_spectrum"]

LAMBDA = 2.0**-8
"""The relative regularisation unless given (the paper's absolute one for Pythia-1B)."""


def degrees_of_freedom(
    system: Similarity,
    regularisation: float | int = LAMBDA,
    *,
    form: Form = "cross",
    gauge: Gauge = "as given",
    centre: bool = True,
    samples: int | None = 1024,
    seed: int = 0,
) -> xr.Dataset:
    """The effective number of features of K(q, k) = exp(scale q.k) at a regularisation lambda.

        N = sum_i s_i/(s_i + lambda)

    `form="cross"` (default): s_i the singular values of [K(q_i, k_j)]/sqrt(n m), the operator from
    functions of keys to functions of queries; the same for q -> A^-T q, k -> A k, which softmax
    does not notice. `form="pooled"`, as published: the eigenvalues of G/J, G the Gram matrix of J
    vectors drawn from queries and keys together. It changes with that gauge (by factors of ten);
    `gauge="balanced"` fixes it by cov q = cov k. Keys are centred unless centre=False: a common
    shift of all keys is not noticed by softmax either.

    Two faults of the published estimate are mended: it takes G and not G/J, so that the value
    grows with J; and its lambda is absolute, so that the value depends on the scale of K. Here
    lambda = regularisation times the largest value (`by_norm`), times their sum (`by_trace`), or
    as it is (`absolute`, NaN where that is below the rounding of the largest value). Heavy-tailed
    norms let one value dominate and push by_norm to 1: `top_share`, the largest value's share of
    the sum, shows it. Estimates depend on J: compare at one `samples`. Causality, bias, sink and
    window do not enter (attrs `left_out`); a key mask does. Rotated queries and keys are taken as
    they stand in the rows.

    Parameters
    ----------
    system: a softmax system, its `SoftmaxRows`, or (query, key), (batch, time, head, width) and
        (batch, key, group, width). samples: J, the largest number of queries and of keys (pooled:
        of both) that are drawn, None for all.

    Returns a Dataset (batch, head), each 1. Raises DsfTypeError on systems without queries and
    keys, DsfUnsupportedError on capped logits, DsfValueError, DsfMemoryError. Cost: O(J^3) a head.
    Source: Nishikawa et al. (2025), section 3 and algorithm 1; cross form derived.
    """
    check_options("degrees_of_freedom", regularisation, form, gauge)
    rows, attrs = rows_of(system, "degrees_of_freedom")
    shape = (rows.shape[0], rows.shape[2])
    names = ("by_norm", "by_trace", "absolute", "top_share")
    found = {n: torch.full(shape, math.nan, dtype=torch.float64) for n in names}
    used = 0
    for head in heads_of(rows, centre=centre):
        q, k = prepared(head, form, gauge, "degrees_of_freedom", samples, seed)
        s, top = _values(q, k, form)
        used = max(used, len(q), len(k))
        at = head.batch, head.head
        if not len(s):
            continue
        total = s.sum()
        found["by_norm"][at] = _count(s, regularisation * s[0])
        found["by_trace"][at] = _count(s, regularisation * total)
        found["absolute"][at] = _count(s, shifted(regularisation, top, s))
        found["top_share"][at] = s[0] / total
    meta = {**attrs, **_labels(form, gauge, centre), "regularisation": regularisation,
            "samples": used, "seed": seed, "units": "1"}  # fmt: skip
    texts = {"by_norm": "lambda relative to the largest value",
             "by_trace": "lambda relative to the sum of the values",
             "absolute": "lambda as given"}  # fmt: skip
    return xr.Dataset({
        n: to_xarray(x, ("batch", "head"), name=n, attrs={**meta, "long_name": (
            f"degrees of freedom, {texts[n]}" if n in texts else "share of the largest value")})
        for n, x in found.items()
    })  # fmt: skip


def similarity_spectrum(
    system: Similarity,
    *,
    form: Form = "cross",
    gauge: Gauge = "as given",
    centre: bool = True,
    samples: int | None = 1024,
    seed: int = 0,
) -> xr.DataArray:
    """ln of the values s_i behind `degrees_of_freedom`, falling: (batch, head, rank).

    No kernel of M features comes nearer to K in L2 of queries and keys than sqrt(sum_(i>M) s_i^2)
    (Eckart and Young). Logarithms, as exp(q.k) may not fit a float; NaN fills up heads with fewer
    keys. Arguments, errors and cost as `degrees_of_freedom`.
    """
    check_options("similarity_spectrum", 1.0, form, gauge)
    rows, attrs = rows_of(system, "similarity_spectrum")
    lines = []
    for head in heads_of(rows, centre=centre):
        s, top = _values(*prepared(head, form, gauge, "similarity_spectrum", samples, seed), form)
        lines.append(torch.log(s) + top)
    count = max((len(x) for x in lines), default=0)
    padded = [torch.nn.functional.pad(x, (0, count - len(x)), value=math.nan) for x in lines]
    values = torch.stack(padded).reshape(rows.shape[0], rows.shape[2], count)
    return to_xarray(
        values, ("batch", "head", "rank"), name="similarity_spectrum",
        attrs={**attrs, **_labels(form, gauge, centre), "units": "1", "seed": seed,
               "long_name": "log singular value of the similarity"},
    )  # fmt: skip


def _values(q: Tensor, k: Tensor, form: Form) -> tuple[Tensor, float]:
    """Singular values (pooled: eigenvalues) divided by exp(top), falling, and top."""
    K, top = similarity(q, k, "degrees_of_freedom")
    if form == "pooled":
        return torch.linalg.eigvalsh(K).flip(-1).clamp(min=0), top
    return torch.linalg.svdvals(K), top


def _count(s: Tensor, regularisation: Tensor) -> Tensor:
    return (s / (s + regularisation)).sum()


def _labels(form: Form, gauge: Gauge, centre: bool) -> dict[str, str | bool]:
    pooled = form == "pooled"
    return {
        "form": form, "gauge": gauge if pooled else "none: the same in every one",
        "keys_centred": centre,
        "method": "eigenvalues of the pooled Gram matrix over J" if pooled
        else "singular values of query x key similarities over J",
    }  # fmt: skip


MEASURES = (degrees_of_freedom,)
