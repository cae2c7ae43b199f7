"""InLine attention's coefficients: running means of the keys, two coordinates of one system."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsf.errors import DsfValueError
from dsf.feature_maps import FeatureMap, feature_map
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import DiagonalLowRank, Identity

SYSTEM = "inline_attention"
SCALES = ("released", "published")
COORDINATES = {"sums": "prefix sums (S, u)", "centred": "centred sums (t Cov, mean v)"}
INLINE_MAPS: dict[str, FeatureMap] = {
    "leaky_relu": nn.functional.leaky_relu, "exp": lambda x: torch.exp(0.2 * x),
}  # fmt: skip
"""The released maps beside identity and relu; `exp` has a factor 0.2."""


class KeyMeans(NamedTuple):
    """What rows need of the keys so far: tokens seen, an anchor, the mean of phi(k) - anchor.

    The anchor (the first phi(k)) drops out of every weight; it keeps the digits of keys that share
    a large offset. count is a number or (time, 1, 1); the others (batch, time, head, feature).
    """

    count: Any
    anchor: Tensor
    mean: Tensor


def inline_map(which: str | FeatureMap) -> FeatureMap:
    """The feature map of that name, the released ones first."""
    known = isinstance(which, str) and which in INLINE_MAPS
    return INLINE_MAPS[which] if known else feature_map(which)  # type: ignore[index]


def key_means(
    features: Float[Tensor, "batch time head feature"], past: KeyMeans | None = None
) -> KeyMeans:
    """Count, anchor and mean of phi(k) - anchor after every token."""
    before = 0 if past is None else past.count
    anchor = features[:, :1] if past is None else past.anchor
    count = torch.arange(1, features.shape[1] + 1, dtype=features.dtype, device=features.device)
    count = count[:, None, None] + before
    total = (features - anchor).cumsum(1)
    if past is not None:
        total = total + before * past.mean
    return KeyMeans(count, anchor, total / count)


def check_names(coordinates: str, scale: str) -> None:
    """Raise DsfValueError on an unknown name."""
    for name, value, known in [
        ("coordinates", coordinates, list(COORDINATES)), ("scale", scale, list(SCALES)),
    ]:  # fmt: skip
        if value not in known:
            raise DsfValueError(
                f"dsf.inline_attention_recurrence: {name}: expected one of {known}, got {value!r}."
            )


def one_pass(
    q: Tensor, k: Tensor, means: KeyMeans, rows: KeyMeans, g: float | None, coordinates: str
) -> Recurrence:
    """One pass: `means` run over its tokens, `rows` are the means that its rows subtract."""
    q = q if g is None else q * (g / rows.count)
    ones = torch.ones_like(k[..., :1])
    if coordinates == "sums":
        own = 1 / rows.count - (q * (rows.mean + rows.anchor)).sum(-1, keepdim=True)
        A: Identity | DiagonalLowRank = Identity(k.shape[-1] + 1)
        B = torch.cat([k, ones], -1)
    else:
        n = means.count
        a = (k - means.anchor) - means.mean
        gap = (q * (means.mean - rows.mean)).sum(-1, keepdim=True)
        own = n / rows.count + n * gap
        log_decay = torch.cat([torch.zeros_like(k), torch.log1p(-1 / n) * ones], -1)
        unit = torch.nn.functional.pad(ones, (k.shape[-1], 0))
        A = DiagonalLowRank(
            log_decay, left=torch.nn.functional.pad(a, (0, 1))[..., None], right=unit[..., None]
        )
        B = torch.cat([a, ones / n], -1)
    C = torch.cat([q, own.expand(*q.shape[:-1], 1)], -1)
    return Recurrence(
        A, B[..., None], C[..., None, :], system=SYSTEM, gauge=COORDINATES[coordinates]
    )
