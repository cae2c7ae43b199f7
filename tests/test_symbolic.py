"""dsf.symbolic: every registered system agrees with the numeric one, and writes itself down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsf
from dsf.models import registered

sympy = pytest.importorskip("sympy", reason="sympy is not installed")

from symbolic_numbers import CALLS, VARIANTS, Numbers, evaluated, numeric  # noqa: E402

from dsf import symbolic  # noqa: E402
from dsf.errors import DsfValueError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-10
"""Relative to the largest entry."""
OTHER_COORDINATES = {
    "gated_attention": "the numeric gates are a wrapper around C",
    "hierarchical_attention": "a cache, not the stream of groups",
    "lru": "a pair of states for each complex one",
    "random_feature_attention": "not divided by the largest feature so far",
    "s4d": "a pair of states for each complex one",
    "s5": "a pair of states for each complex one",
    "slstm": "not divided by exp(m)",
}
"""Systems whose coefficients differ from the numeric ones, while their maps agree."""
LENGTH = 3


def numeric_map(r: Any, length: int) -> np.ndarray:
    """The map of one head as a matrix, rows of one token and inputs of one token together."""
    m = dsf.materialise(r, length=length)[0]
    m = m.reshape(-1, *m.shape[1:])[0]
    while m.shape[0] == 1 and length > 1:
        m = m[0]
    if m.ndim == 4:
        m = m.transpose(1, 2).flatten(2).flatten(0, 1)
    return m.numpy()


def check_map(symbolic_system: symbolic.SymbolicSystem, v: Numbers, r: Any) -> None:
    found = evaluated([symbolic_system.map()], v.values())[0]
    expected = numeric_map(r, symbolic_system.length)
    assert np.abs(expected).max() > 0
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def coefficients_agree(written: symbolic.SymbolicSystem, v: Numbers, r: dsf.Recurrence) -> bool:
    """Whether A, B, C of every token are the numeric ones; what meets a zero state is skipped."""
    dense, skipped = r.dense_factors(), {("A", 0)}
    if written.name == "zeros":  # its first row is zero, and C is too
        skipped.add(("C", 0))
    numbers = {"A": dense.dense_transition(), "B": dense.B, "C": dense.C}
    matrices = [m for field in numbers for m in getattr(written, field)]
    found = iter(evaluated(matrices, v.values()))
    for field, tensor in numbers.items():
        for t in range(LENGTH):
            here = next(found)
            expected = tensor[0, t if tensor.shape[1] > 1 else 0, 0].numpy()
            if (field, t) in skipped:
                continue
            if here.shape != expected.shape or np.abs(here - expected).max() > TOLERANCE:
                return False
    return True


@pytest.mark.parametrize("name", sorted(registered()))
def test_agrees_with_the_numeric_system(name: str) -> None:
    """A new system fails here until it has an entry and a call in tests/symbolic_numbers.py."""
    written = symbolic.system(name, length=LENGTH)
    v = Numbers(written)
    r = CALLS[name](numeric(name), v)
    check_map(written, v, r)
    core = getattr(r, "system", r) if isinstance(r, dsf.Gated) else r
    assert written.mode == core.mode
    assert (name in OTHER_COORDINATES) == (not coefficients_agree(written, v, core))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v)))
def test_options_agree_with_the_numeric_system(variant: tuple[str, str, Any]) -> None:
    name, option, value = variant
    written = symbolic.system(name, length=LENGTH, **{option: value})
    v = Numbers(written)
    check_map(written, v, VARIANTS[variant](numeric(name), v))


@pytest.mark.parametrize("name", ["hierarchical_attention", "monarch_attention"])
def test_groups_of_longer_sequences_agree(name: str) -> None:
    """Past the last full group, and past one level of groups."""
    for length in (4, 7):
        written = symbolic.system(name, length=length, size=1)
        v = Numbers(written)
        check_map(written, v, CALLS[name](numeric(name), v))


def test_every_system_has_an_entry() -> None:
    assert symbolic.registered() == sorted(registered()) == sorted(CALLS)


# -- one system --------------------------------------------------------------------------------


def test_map_of_two_tokens_written_out() -> None:
    written = symbolic.system("gla", length=2, size=1)
    q, k, a = ([symbolic.symbol(f, t, 1) for t in (1, 2)] for f in ("q", "k", "a"))
    expected = [[k[0] * q[0], 0], [a[1] * k[0] * q[1], k[1] * q[1]]]
    assert written.map() == sympy.Matrix(expected)
    assert written.n_state == 1
    assert written.length == 2


def test_latex_of_one_system() -> None:
    text = symbolic.system("hgrn", length=2).latex()
    assert text == (
        "\\begin{align*}\n"
        "A_{2} &= \\left[\\begin{matrix}f_{2}\\end{matrix}\\right] \\\\\n"
        "B_{2} &= \\left[\\begin{matrix}1 - f_{2}\\end{matrix}\\right] \\\\\n"
        "C_{2} &= \\left[\\begin{matrix}1\\end{matrix}\\right] \\\\\n"
        "D_{2} &= \\left[\\begin{matrix}0\\end{matrix}\\right] \\\\\n"
        "M &= \\left[\\begin{matrix}1 - f_{1} & 0\\\\f_{2} \\left(1 - f_{1}\\right) & "
        "1 - f_{2}\\end{matrix}\\right]\n"
        "\\end{align*}"
    )


def test_text_of_one_system() -> None:
    text = symbolic.system("min_gru", length=1).text()
    assert (
        text == "A_1 =\n[1 - z_{1}]\n\nB_1 =\n[z_{1}]\n\nC_1 =\n[1]\n\nD_1 =\n[0]\n\nM =\n[z_{1}]"
    )


@pytest.mark.parametrize("name", symbolic.registered())
def test_latex_of_every_system(name: str) -> None:
    """Complete, braces and environments closed."""
    text = symbolic.system(name, length=1).latex()
    assert all(f"\n{field}_{{1}} &= " in text for field in "ABCD")
    assert "\nM &= " in text
    assert text.count("{") == text.count("}")
    assert text.count("\\left[") == text.count("\\right]") == 5
    assert text.count("\\begin") == text.count("\\end")


def test_latex_refuses_a_token_that_is_not_there() -> None:
    with pytest.raises(DsfValueError, match=r"expected a token of 1\.\.2, got 3"):
        symbolic.system("gla", length=2).latex(3)


def test_latex_of_answers() -> None:
    yes = symbolic.equivalent("hgrn", "min_gru", {"f": "1 - z"}, length=1)
    assert yes.latex() == ("M = \\tilde M = \\left[\\begin{matrix}z_{1}\\end{matrix}\\right]")
    no = symbolic.equivalent("hgrn", "min_gru", length=1)
    assert no.latex().startswith("M_{1,1} - \\tilde M_{1,1} = ")
    assert "f_{1} = " in no.latex()


@pytest.mark.parametrize("name", ["gla", "delta_net", "inline_attention"])
def test_change_of_basis_keeps_the_map(name: str) -> None:
    written = symbolic.system(name, length=2)
    n = written.n_state
    T = sympy.eye(n) + sympy.Matrix(n, n, lambda i, j: int(int(i) < int(j)))
    moved = written.change_of_basis(lambda t: T * t)
    assert moved.C != written.C
    assert all(sympy.cancel(e) == 0 for e in moved.map() - written.map())


def test_substitution_forms_agree() -> None:
    """Text, expression, function of the indices, one symbol: the same system."""
    gla, a = symbolic.system("gla", size=1), symbolic.symbol
    text = gla.substitute({"k": "1 - a"})
    assert text.map() == gla.substitute({"k": lambda t, n: 1 - a("a", t, n)}).map()
    one_by_one = {a("k", t, 1): 1 - a("a", t, 1) for t in (1, 2, 3)}
    assert text.map() == gla.substitute(one_by_one).map()
    shared = gla.substitute({"a": "gamma"})
    assert a("gamma", 3, 1) in shared.map().free_symbols
    shared = gla.substitute({"a": "gamma"}, like=symbolic.system("retention"))
    assert a("gamma") in shared.map().free_symbols


@pytest.mark.parametrize(
    "text", ["1 +", "nothing", "a.b", "print(a)", "a if a else a", "[a]", "exp(a, a)", "'a'"]
)
def test_text_that_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(DsfValueError, match="expected a formula"):
        symbolic.system("gla").substitute({"k": text})


def test_letters_are_told_apart() -> None:
    """No two families share a letter, a complex and a real one that look alike excepted."""
    seen = {(f.tex or name, f.domain == "complex") for name, f in symbolic.FAMILIES.items()}
    assert len(seen) == len(symbolic.FAMILIES)
    assert symbolic.symbol("gamma").is_positive
    assert symbolic.symbol("q", 1, 1).is_real
    assert not symbolic.symbol("xi", 1).is_real


# -- the page and the package ------------------------------------------------------------------


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_example_of_the_page_prints_what_it_says() -> None:
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    section = page.split("## Equality proved in symbols")[1]
    code = section.split("```python\n")[1].split("```")[0]
    assert run_python(code) == section.split("```text\n")[1].split("```")[0]


def test_missing_sympy_names_the_extra() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'sympy' else find(name, *rest)\n"
        "import dsf, sys\n"
        "assert 'dsf.symbolic' not in sys.modules\n"
        "try:\n    dsf.symbolic\nexcept ImportError as error:\n    print(error)"
    )
    assert "pip install 'dsf-torch[symbolic]'" in run_python(code)
