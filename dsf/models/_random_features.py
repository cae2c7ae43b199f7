"""Random features of exp(x.y): positive, hyperbolic, trigonometric; how directions are drawn."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.shapes import Float

KINDS = ("positive", "hyperbolic", "trigonometric")


class Features(NamedTuple):
    """Numbers signed * exp(log_scale): (..., feature) of moderate size and (...)."""

    signed: Tensor
    log_scale: Tensor


def random_features(
    x: Float[Tensor, "*lead head width"],
    directions: Float[Tensor, "#head direction width"],
    kind: str = "positive",
    log_weight: Float[Tensor, "#head direction"] | None = None,
) -> Features:
    """phi(x) with E phi(x).phi(y) = exp(x.y) over directions w from N(0, I), unit weights.

        positive       sqrt(a_m/M) exp(w_m.x - |x|^2/2)
        hyperbolic     sqrt(a_m/2M) exp(+-w_m.x - |x|^2/2)
        trigonometric  sqrt(a_m/M) exp(|x|^2/2) (cos w_m.x, sin w_m.x)     signed

    a = exp(log_weight) corrects directions drawn from another density. The scale is kept apart as
    a logarithm, so nothing overflows. M directions, 2 M features but for positive. Raises
    DsfValueError on an unknown kind. Source: Choromanski et al. (2021), lemmas 1 and 2.
    """
    if kind not in KINDS:
        raise DsfValueError(
            f"dsf.random_features: kind: expected one of {list(KINDS)}, got {kind!r}."
        )
    projected = (x[..., None, :] @ directions.mT).squeeze(-2)
    half = x.square().sum(-1) / 2
    amount = projected.shape[-1] * (2 if kind == "hyperbolic" else 1)
    log_root = torch.zeros_like(projected[..., :1]) - math.log(amount) / 2
    if log_weight is not None:
        log_root = log_root + log_weight / 2
    if kind == "trigonometric":
        root = torch.exp(log_root)
        return Features(torch.cat([root * projected.cos(), root * projected.sin()], -1), half)
    exponent = projected + log_root
    if kind == "hyperbolic":
        exponent = torch.cat([exponent, log_root - projected], -1)
    exponent = exponent - half[..., None]
    top = exponent.detach().amax(-1)  # any shift will do: it carries no gradient
    return Features(torch.exp(exponent - top[..., None]), top)


def draw_directions(
    n_direction: int, width: int, *, n_head: int = 1, orthogonal: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "head direction width"]:  # fmt: skip
    """Directions from N(0, I), float64; orthogonal within blocks of `width` with the same norms.

    Orthogonal blocks never have a larger error for positive features. Source: Choromanski et al.
    (2021), section 2.4.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if not orthogonal:
        return normal(n_head, n_direction, width)
    n_block = -(-n_direction // width)
    q, r = torch.linalg.qr(normal(n_head, n_block, width, width))
    # the sign of R's diagonal makes the rotation uniform
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    norms = normal(n_head, n_block, width, width).norm(dim=-1, keepdim=True)
    return (q.mT * norms).flatten(1, 2)[:, :n_direction]


def tilted_directions(
    n_direction: int, width: int, variance: float, *, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "1 direction width"], Float[Tensor, "1 direction"]]:
    """Directions and log weights of the smallest kernel error for x from N(0, variance I).

        z ~ N(0, (1 + 2v)/(1 - 2v)),   a(z) = 1/q(z),   q = prod (1 - 4b)^(1/2) exp(2 b z_i^2)

    with b = v/(1 + 2v), v the variance of a coordinate of x = q/width^(1/4). Raises DsfValueError
    for v >= 1/2, where exp(x.y) has no finite mean. Source: derived, degrees of freedom.
    """
    if not 0 <= variance < 0.5:
        raise DsfValueError(
            f"dsf.tilted_directions: variance: expected a number in [0, 0.5), got {variance}."
        )
    b = variance / (1 + 2 * variance)
    z = draw_directions(n_direction, width, generator=generator) * (1 - 4 * b) ** -0.5
    log_q = 0.5 * math.log1p(-4 * b) * width + 2 * b * z.square().sum(-1)
    return z, -log_q


def expected_kernel_error(variance: float, *, tilted: bool) -> float:
    """M times the mean of |K - K^|^2 for x, y from N(0, variance) on the line; inf if not finite.

    Plain N(0, 1) directions, or `tilted_directions`. Source: derived, degrees of freedom.
    """
    v = variance
    if not 0 <= v < 0.5:
        return math.inf
    square = (1 - 4 * v**2) ** -0.5
    if tilted:
        return 1 / (1 - 2 * v) - square
    b = v / (1 + 2 * v)
    return math.inf if v >= 1 / 6 else (1 - 8 * b) ** -0.5 / (1 + 2 * v) - square


def leverage_scores(
    directions: Float[Tensor, "direction width"],
    vectors: Float[Tensor, "sample width"],
    regularisation: float,
) -> Float[Tensor, " direction"]:
    """l(z) = phi_z(X)^T (G/J + lambda)^-1 phi_z(X) / J with G = exp(X X^T), J samples.

    Their mean over z from N(0, I) is the number of degrees of freedom at lambda. The Gram matrix
    is divided by J: the printed un-normalised one grows with the sample. Cost O(J^3 + J^2 M).
    Source: Nishikawa et al. (2025), eq. of q_lambda.
    """
    count = vectors.shape[0]
    gram = torch.exp(vectors @ vectors.mT) / count
    eye = torch.eye(count, dtype=gram.dtype, device=gram.device)
    phi = torch.exp(vectors @ directions.mT - vectors.square().sum(-1, keepdim=True) / 2)
    solved = torch.linalg.solve(gram + regularisation * eye, phi)
    return (phi * solved).sum(0) / count


def leverage_directions(
    vectors: Float[Tensor, "sample width"],
    n_direction: int,
    *,
    regularisation: float = 2.0**-8,
    n_pool: int = 4096,
    spread: float = 2.0,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "1 direction width"], Float[Tensor, "1 direction"]]:
    """Directions drawn by their leverage on given vectors, and the log weights that correct it.

    vectors: queries and keys of a head, divided by width^(1/4), float64. lambda = regularisation x
    trace(G)/J (relative to the trace). A pool from N(0, spread I) is resampled in proportion to
    leverage; weights are 1/q, q the density relative to N(0, I). Source: Nishikawa et al. (2025),
    section 3.
    """
    width = vectors.shape[1]
    pool = math.sqrt(spread) * draw_directions(n_pool, width, generator=generator)[0]
    square = pool.square().sum(-1)
    log_ratio = 0.5 * width * math.log(spread) - 0.5 * square * (1 - 1 / spread)
    trace = float(torch.exp(vectors.square().sum(-1)).mean())
    scores = leverage_scores(pool, vectors, regularisation * trace)
    weighted = torch.exp(log_ratio) * scores
    chosen = torch.multinomial(weighted, n_direction, replacement=True, generator=generator)
    log_weight = torch.log(weighted.mean()) - torch.log(scores[chosen])
    return pool[chosen][None], log_weight[None]
