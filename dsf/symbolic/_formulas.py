"""Formulas given as text: names, numbers, + - * / **, exp, log, sqrt, and nothing that runs."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

import sympy
from sympy import Expr, Symbol

from dsf.errors import DsfValueError

_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.Pow: operator.pow, ast.USub: operator.neg,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable] = {"exp": sympy.exp, "log": sympy.log, "sqrt": sympy.sqrt}


def parsed(text: str, names: Mapping[str, Symbol]) -> Expr:
    """The formula as an expression. Raises DsfValueError on anything it does not know."""
    try:
        return _value(ast.parse(text, mode="eval").body, names)
    except (SyntaxError, KeyError) as error:
        raise DsfValueError(
            f"dsf.symbolic: assumptions: expected a formula in the families {sorted(names)} with "
            f"+ - * / ** and {sorted(_FUNCTIONS)}, got {text!r}."
        ) from error


def _value(node: ast.AST, names: Mapping[str, Symbol]) -> Expr:
    match node:
        case ast.Name(id=name):
            return names[name]
        case ast.Constant(value=int() | float() as number):
            return sympy.nsimplify(number)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](_value(operand, names))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            return _FUNCTIONS[name](_value(argument, names))
    raise KeyError(type(node).__name__)
