"""Systems in symbols (sympy, extra `symbolic`): their maps written out, and proofs of equality.

Imported on first use only: `import dsf` loads no sympy.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("sympy") is None:
    raise ImportError("dsf.symbolic needs sympy: pip install 'dsf-torch[symbolic]'")

from dsf.symbolic._bases import change_of_basis
from dsf.symbolic._equivalence import Equivalence, equivalent
from dsf.symbolic._inputs import FAMILIES, Inputs, symbol
from dsf.symbolic._systems import SymbolicSystem
from dsf.symbolic.entries import registered, system

__all__ = [
    "FAMILIES", "Equivalence", "Inputs", "SymbolicSystem", "change_of_basis", "equivalent",
    "registered", "symbol", "system",
]  # fmt: skip
