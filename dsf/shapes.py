"""Shape annotations (jaxtyping's where installed: tests check them), and shapes that broadcast."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Inexact, Int
else:
    try:
        from jaxtyping import Bool, Float, Inexact, Int
    except ImportError:

        class _Unchecked:
            """`Float[Tensor, "batch time"]` without jaxtyping is just Tensor."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Inexact = Int = _Unchecked

__all__ = ["Bool", "Float", "Inexact", "Int", "broadcast_shapes"]


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """The shape that all broadcast to, aligned at their ends.

    As `torch.broadcast_shapes`, which imports sympy on its first call: a second of waiting.
    Raises RuntimeError where two sizes differ and neither is 1.
    """
    found = []
    for sizes in zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1):
        wide = 1
        for size in sizes:
            if size != 1 and wide not in (1, size):
                raise RuntimeError(f"shapes do not broadcast: {[tuple(s) for s in shapes]}")
            wide = wide if size == 1 else size
        found.append(wide)
    return torch.Size(found[::-1])
