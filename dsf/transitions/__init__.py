"""The structures of A_t, one file each. A new one is one file and one line here."""

from dsf.transitions._base import Transition
from dsf.transitions._decay import Decay
from dsf.transitions.block_diagonal import BlockDiagonal
from dsf.transitions.dense import Dense
from dsf.transitions.diagonal import Diagonal
from dsf.transitions.diagonal_low_rank import DiagonalLowRank
from dsf.transitions.householder import Householder
from dsf.transitions.identity import Identity
from dsf.transitions.scalar import Scalar
from dsf.transitions.shift import Shift

__all__ = [
    "BlockDiagonal", "Decay", "Dense", "Diagonal", "DiagonalLowRank", "Householder", "Identity",
    "Scalar", "Shift", "Transition",
]  # fmt: skip
