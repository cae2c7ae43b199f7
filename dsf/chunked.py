"""Fast paths by chunks."""

from __future__ import annotations

from typing import Any

from dsf.scanning import loop


def scan_scalar(A: Any, B: Any, C: Any, values: Any, state: Any, chunk: Any) -> Any:
    from dsf.transitions import Identity

    return loop(Identity(B.shape[-2]) if A is None else A, B, C, values, state)


def scan_diagonal(A: Any, B: Any, C: Any, values: Any, state: Any, chunk: Any) -> Any:
    return loop(A, B, C, values, state)


scan_diagonal_low_rank = scan_diagonal
