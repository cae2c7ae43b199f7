"""Small helpers of the layers with heads: split, merge, share groups, check sizes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dsf.errors import DsfShapeError, DsfValueError


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """(batch, time, head x width) -> (batch, time, head, width)."""
    return x.unflatten(-1, (n_head, -1))


def merge_heads(x: Tensor) -> Tensor:
    """(batch, time, head, width) -> (batch, time, head x width)."""
    return x.flatten(-2)


def share_groups(x: Tensor, n_head: int) -> Tensor:
    """(batch, time, group, width) -> (..., head, width): head h takes group h // (head/group)."""
    return x if x.shape[2] == n_head else x.repeat_interleave(n_head // x.shape[2], dim=2)


def check_query_key(function: str, query: Tensor, key: Tensor) -> None:
    """Raise DsfShapeError unless key (batch, key, group, width) fits query's heads and width."""
    heads, groups = query.shape[2], key.shape[2]
    if groups == 0 or heads % groups:
        raise DsfShapeError(
            f"{function}: key: expected a group count that divides head={heads}, got {groups}."
        )
    if key.shape[-1] != query.shape[-1] or key.shape[0] != query.shape[0]:
        raise DsfShapeError(
            f"{function}: key: expected axes (batch={query.shape[0]}, key, group, "
            f"width={query.shape[-1]}), got {tuple(key.shape)}; both are fixed by the query."
        )


def check_shapes(
    function: str, fixed_by: str, parts: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]
) -> None:
    """Raise DsfShapeError unless every tensor that is given has the shape beside it."""
    for name, (x, wanted) in parts.items():
        if x is not None and tuple(x.shape) != wanted:
            raise DsfShapeError(
                f"{function}: {name}: expected shape {wanted}, got {tuple(x.shape)}; fixed by "
                f"{fixed_by}."
            )


def check_at_least(layer: str, name: str, least: int, given: int) -> None:
    """Raise DsfValueError on a size below `least`."""
    if given < least:
        raise DsfValueError(f"dsf.{layer}: {name}: expected at least {least}, got {given}.")


def check_divides(layer: str, name: str, part: int, whole_name: str, whole: int) -> None:
    """Raise DsfValueError unless `part` is positive and divides `whole`."""
    if part < 1 or whole % part:
        raise DsfValueError(
            f"dsf.{layer}: {name}: expected a divisor of {whole_name}={whole}, got {part}."
        )
