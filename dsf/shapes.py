"""Shape annotations: jaxtyping's where installed (tests check them), plain text elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

__all__ = ["Bool", "Float", "Inexact", "Int"]
