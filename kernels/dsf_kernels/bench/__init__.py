"""What is timed: one file per family beside this one, each with its `CASES`."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Work(NamedTuple):
    """The least that any implementation must do; its floor is the slowest of the three."""

    bytes: float  # each input read once, each output written once
    operations: float  # of the matrix units; a multiplication and an addition are two
    exponentials: float = 0.0


class Case(NamedTuple):
    """One line of the table: a kernel on one shape, and what it is compared with.

    function(*tensors) gives one output tensor; gradients go to every floating-point tensor.
    `reference` is the float64 loop with the same arguments, `short` a short input of the same kind
    for the error. `peers`: name -> (function, tensors in the peer's own layout). `by_row`: errors
    in units of the largest number of their row, where a run on absolute values has no bound.
    `bound`: the loop whose terms all add, for the absolute values, where `reference` subtracts.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    forward: Work
    backward: Work
    reference: Callable[..., Tensor]
    short: tuple[Tensor, ...]
    peers: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]
    by_row: bool = False
    bound: Callable[..., Tensor] | None = None
