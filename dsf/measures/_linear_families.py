"""Linear models by what they may choose: the rows of MetaLA's Table 2."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Diagonal, Identity


@dataclasses.dataclass(frozen=True)
class Family:
    """What a linear model may choose of its three parameter groups.

    query, key: free, or 1 throughout; key "tied" is 1 - a. decay: none (a = 1), fixed (one number
    for all tokens), dynamic (a_t in [0, 1] from the token).
    """

    query: bool
    key: Literal["free", "one", "tied"]
    decay: Literal["none", "fixed", "dynamic"]

    @property
    def n_group(self) -> int:
        """Parameter groups out of (query, key, decay)."""
        return self.query + (self.key == "free") + (self.decay != "none")

    def recurrence(
        self, decay: Float[Tensor, "time state"], query: Float[Tensor, "time state"] | None = None,
        key: Float[Tensor, "time state"] | None = None,
    ) -> Recurrence:  # fmt: skip
        """The recurrence of these numbers, batch and head of size 1.

        Raises DsfValueError where a number is given that the family may not choose.
        """
        wrong = [n for n, x, free in (("query", query, self.query),
                                      ("key", key, self.key == "free"))
                 if x is not None and not free]  # fmt: skip
        moves = not torch.equal(decay, decay[:1].expand_as(decay))
        wrong += ["decay"] * ((self.decay == "none" and bool((decay != 1).any()))
                              or (self.decay == "fixed" and moves))  # fmt: skip
        if wrong:
            raise DsfValueError(
                f"dsf.Family.recurrence: {wrong[0]}: expected what {self} may choose, got other "
                f"numbers."
            )
        q = torch.ones_like(decay) if query is None else query
        k = 1 - decay if self.key == "tied" else torch.ones_like(decay) if key is None else key
        A = Identity(decay.shape[1]) if self.decay == "none" else Diagonal.from_decay(
            decay[None, :, None])  # fmt: skip
        return Recurrence(A, k[None, :, None, :, None], q[None, :, None, None, :])


FAMILIES: dict[str, Family] = {
    "retention": Family(True, "free", "fixed"),
    "lightning_attention": Family(True, "free", "fixed"),
    "s4d": Family(True, "free", "fixed"),
    "gla": Family(True, "free", "dynamic"),
    "mamba": Family(True, "free", "dynamic"),
    "linear_attention": Family(True, "free", "none"),
    "random_feature_attention": Family(True, "free", "none"),
    "rwkv4": Family(False, "free", "fixed"),
    "glru": Family(False, "free", "dynamic"),
    "metala": Family(True, "tied", "dynamic"),
    "lru": Family(False, "one", "fixed"),
    "s5": Family(False, "one", "fixed"),
    "hgrn": Family(False, "tied", "dynamic"),
    "rglru": Family(False, "tied", "dynamic"),
}
"""Table 2 of the paper, under the names that these models have here; `glru` is the unit that HGRN
is built of. RG-LRU writes sqrt(1 - a^2), as much a function of its decay as 1 - a."""
