"""Linear attention whose rows are divided by their own sums: Based and ReBased differ in phi."""

from __future__ import annotations

from typing import ClassVar, TypedDict

import torch
from torch import Tensor

from dsf.feature_maps import FeatureMap
from dsf.models._heads import check_query_key, share_groups
from dsf.models._projections import HeadedMixer
from dsf.models._windowed import divided_by_row_sums
from dsf.recurrence import Recurrence
from dsf.transitions import Identity


def guarded_sum(sums: Tensor, eps: float) -> Tensor:
    """sums + eps; a row that sums to exactly zero stays undivided."""
    total = sums + eps
    return torch.where(total == 0, 1.0, total)


class KernelOptions(TypedDict, total=False):
    """What Based and ReBased have in common.

    scale: multiplies the query before phi, width^(-1/2) if None. normalise: divide by eta. eps:
    added to eta (1e-6). initial_state (batch, head, feature, channel) and initial_key_sum (batch,
    head, feature): the sums of phi(k) v^T and of phi(k) so far.
    """

    scale: float | None
    normalise: bool
    eps: float
    initial_state: Tensor | None
    initial_key_sum: Tensor | None


def kernel_recurrence(
    system: str, query: Tensor, key: Tensor, feature_map: FeatureMap, *,
    scale: float | None = None, normalise: bool = True, eps: float = 1e-6,
    initial_state: Tensor | None = None, initial_key_sum: Tensor | None = None,
) -> Recurrence:  # fmt: skip
    """A = I, B_t = phi(k_t), C_t = phi(scale q_t) / eta_t, eta_t = phi(scale q_t).n_t + eps.

    n_t = sum_{j <= t} phi(k_j). Groups of keys serve consecutive heads. Raises DsfShapeError.
    """
    check_query_key(f"dsf.{system}_recurrence", query, key)
    q = feature_map(query * (query.shape[-1] ** -0.5 if scale is None else scale))
    k = share_groups(feature_map(key), query.shape[2])
    r = Recurrence(
        Identity(q.shape[-1]), k[..., None], q[..., None, :], initial_state=initial_state,
        system=system, gauge="A = I",
    )  # fmt: skip
    if not normalise:
        return r
    return divided_by_row_sums(
        r, lambda sums: guarded_sum(sums, eps), query.shape[1], initial_key_sum
    )


class KernelMixer(HeadedMixer):
    """Narrow queries and keys, no norm, no gate: q, k (feature_width a head), v, output."""

    is_divided: bool = True
    default_eps: ClassVar[float] = 1e-6

    def __init__(
        self, width: int, n_head: int = 4, *, feature_width: int = 16, eps: float | None = None
    ) -> None:
        super().__init__(width, n_head, key_width=n_head * feature_width, norm=None)
        self.eps = self.default_eps if eps is None else eps

    def divisor(self, sums: Tensor) -> Tensor:
        """The row's sum plus eps."""
        return guarded_sum(sums, self.eps)
