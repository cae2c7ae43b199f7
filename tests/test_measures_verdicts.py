"""2,002 systems with known answers, at margins from 1e-2 to 1e-14: no verdict is wrong."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

import dsf
from dsf.measures._verdicts import decide, tolerances
from dsf.measures.confusions import injectivity
from dsf.measures.query_verdicts import query_injectivity
from dsf.models.inline_attention import inline_attention_recurrence
from dsf.transitions import Diagonal, Identity

KEYS, WIDTH = 14, 4
NO, UNDECIDED, YES = -1, 0, 1
EXPONENTS = range(2, 15)
EACH = 11
"""Systems of one family, margin and answer: 7 x 13 x 2 x 11 = 2,002."""
DECIDED_TO = 11
"""Margins of 10^-11 and more are far above rounding: there every verdict is decided."""


def orthonormal(n: int, rows: int, columns: int, rng: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, rows, columns, generator=rng, dtype=torch.float64)).Q


def matrices(
    answer: int, exponent: int, affine: bool, rng: torch.Generator, offset: float = 0.0
) -> torch.Tensor:
    """(system, key, state) with singular values 1, ..., 10^-exponent, for "no" one of the ones 0.

    affine: after the mean key is taken off. offset: then added to every entry; margins are
    relative to the lengths of the columns, so that the last value grows with them.
    """
    left = orthonormal(EACH, KEYS, WIDTH + 1, rng)
    if affine:
        ones = torch.full((EACH, KEYS, 1), KEYS**-0.5, dtype=torch.float64)
        left = torch.linalg.qr(torch.cat([ones, left], -1)).Q[..., 1:]
    sigma = torch.ones(WIDTH, dtype=torch.float64)
    sigma[-1] = 10.0**-exponent * max(1.0, offset * KEYS**0.5)
    if answer == NO:
        sigma[0] = 0
    return left[..., :WIDTH] * sigma @ orthonormal(EACH, WIDTH, WIDTH, rng) + offset


def states(R: torch.Tensor, A: object, rng: torch.Generator, B: torch.Tensor) -> dsf.Recurrence:
    C = torch.randn(EACH, KEYS, 1, 1, R.shape[-1], generator=rng, dtype=torch.float64)
    return dsf.Recurrence(A, B[:, :, None, :, None], C)  # type: ignore[arg-type]


def softmax(keys: torch.Tensor, rng: torch.Generator) -> np.ndarray:
    q = torch.randn(EACH, KEYS, 1, WIDTH, generator=rng, dtype=torch.float64)
    rows = dsf.SoftmaxRows(q, keys[:, :, None])
    return injectivity(dsf.Recurrence(Identity(KEYS), dsf.OneHot(KEYS, KEYS), rows)).verdict.values


def inline(keys: torch.Tensor, rng: torch.Generator, coordinates: str) -> np.ndarray:
    q = torch.randn(EACH, KEYS, 1, WIDTH, generator=rng, dtype=torch.float64)
    r = inline_attention_recurrence(q, keys[:, :, None], coordinates=coordinates)
    return injectivity(r).verdict.values


def linear(R: torch.Tensor, rng: torch.Generator) -> np.ndarray:
    return injectivity(states(R, Identity(WIDTH), rng, R), normalised=False).verdict.values


def decaying(R: torch.Tensor, rng: torch.Generator) -> np.ndarray:
    """B_j so that the reached states are R under decays of 0.4 to 1 a step."""
    log_decay = torch.log(0.4 + 0.6 * torch.rand(EACH, KEYS, 1, WIDTH, generator=rng).double())
    left = (log_decay.sum(1, keepdim=True) - log_decay.cumsum(1))[:, :, 0]
    r = states(R, Diagonal(log_decay), rng, R * torch.exp(-left))
    return injectivity(r, normalised=False).verdict.values


def by_keys(keys: torch.Tensor, rng: torch.Generator) -> np.ndarray:
    """Softmax and InLine by their keys alone, turn by turn."""
    return np.array([query_injectivity(k, ("softmax", "inline")[i % 2]).verdict.item()
                     for i, k in enumerate(keys)])  # fmt: skip


FAMILIES = {
    "softmax": (True, 0.0, softmax),
    "softmax, keys offset by 10": (True, 10.0, softmax),
    "inline": (True, 0.0, lambda keys, rng: inline(keys, rng, "sums")),
    "inline, centred": (True, 0.0, lambda keys, rng: inline(keys, rng, "centred")),
    "linear": (False, 0.0, linear),
    "decaying states": (False, 0.0, decaying),
    "by keys": (True, 0.0, by_keys),
}


@pytest.fixture(scope="module")
def outcomes() -> Counter:
    """How often (family, exponent, answer, verdict) came up."""
    found: Counter = Counter()
    for number, (name, (affine, offset, judge)) in enumerate(FAMILIES.items()):
        for exponent in EXPONENTS:
            rng = torch.Generator().manual_seed(100 * number + exponent)
            for answer in (YES, NO):
                verdicts = judge(matrices(answer, exponent, affine, rng, offset), rng).ravel()
                found.update((name, exponent, answer, int(v)) for v in verdicts)
    return found


def test_no_verdict_is_wrong(outcomes: Counter) -> None:
    assert sum(outcomes.values()) == 2002
    wrong = {key: n for key, n in outcomes.items() if key[2] == -key[3]}
    assert not wrong


def test_undecided_only_where_rounding_decides(outcomes: Counter) -> None:
    early = {key: n for key, n in outcomes.items()
             if key[3] == UNDECIDED and key[1] <= DECIDED_TO}  # fmt: skip
    assert not early, early
    undecided = sum(n for key, n in outcomes.items() if key[3] == UNDECIDED)
    share = undecided / sum(outcomes.values())
    print(f"\nundecided: {undecided} of 2002, {share:.1%}")
    assert share < 0.15


def exact_rank(rows: list[list[int]]) -> int:
    """By elimination in fractions."""
    matrix = [[Fraction(x) for x in row] for row in rows]
    rank = 0
    for column in range(len(matrix[0])):
        pivot = next((i for i in range(rank, len(matrix)) if matrix[i][column]), None)
        if pivot is None:
            continue
        matrix[rank], matrix[pivot] = matrix[pivot], matrix[rank]
        for i in range(rank + 1, len(matrix)):
            factor = matrix[i][column] / matrix[rank][column]
            matrix[i] = [a - factor * b for a, b in zip(matrix[i], matrix[rank], strict=True)]
        rank += 1
    return rank


def test_verdicts_of_whole_numbers_are_those_of_exact_elimination() -> None:
    """Decays 0, 1 and -1, entries -2..2: forgotten states, repeated and cancelled keys."""
    length, n = 7, 3
    rng = torch.Generator().manual_seed(1)
    decay = torch.randint(-1, 2, (120, length, 1, n), generator=rng)
    decay[:, :, :, 0] = decay[:, :, :, 0].abs()
    B = torch.randint(-2, 3, (120, length, 1, n, 1), generator=rng)
    C = torch.randn(120, length, 1, 1, n, generator=rng, dtype=torch.float64)
    A = Diagonal(decay.double().abs().log(), sign=decay.double().sign())
    found = injectivity(dsf.Recurrence(A, B.double(), C), "all", normalised=False)
    seen = Counter()
    for sample in range(120):
        state = torch.zeros(n, length, dtype=torch.int64)
        for t in range(length):
            state = state * decay[sample, t, 0][:, None]
            state[:, t] = B[sample, t, 0, :, 0]
            answer = YES if exact_rank(state.tolist()) == n else NO
            assert int(found.verdict[sample, 0, t]) == answer
            seen[answer] += 1
    assert min(seen.values()) > 150


def test_the_bounds_of_a_verdict() -> None:
    low, high = tolerances(torch.float64, 4, None)
    margins = torch.tensor([0.0, low, 1.01 * low, 0.99 * high, high, 1.0, torch.nan])
    expected = [NO, NO, UNDECIDED, UNDECIDED, YES, YES, UNDECIDED]
    assert decide(margins.double(), low, high).tolist() == expected
    assert tolerances(torch.float32, 4, None)[0] > 1e8 * low
    assert tolerances(torch.float64, 4, 1e-3)[0] == pytest.approx(8e-3)
