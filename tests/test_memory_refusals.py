"""Over-large requests are refused before allocation, 100 of 100: maps, rows, dense factors."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import dsf
from dsf import measures
from dsf.errors import DsfMemoryError
from dsf.transitions import (
    BlockDiagonal,
    Dense,
    Diagonal,
    DiagonalLowRank,
    Householder,
    Identity,
    Scalar,
    Shift,
)

LENGTH = 1_000_000
"""A map of this length takes 4 TB in float32; the coefficients are views of one step."""
MANY = 10**9
"""Samples of a system that is shared by all: no row statistic of each would fit."""
HEADROOM = 2**29
"""How much address space may be taken while requests are refused: no request fits in it."""
CASES = 100


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def long(x: torch.Tensor) -> torch.Tensor:
    """One step seen as LENGTH steps."""
    return x.expand(x.shape[0], LENGTH, *x.shape[2:])


def recurrence(A, states: int = 2, *, ports: int = 1, dtype=torch.float32) -> dsf.Recurrence:
    B = long(random(1, 1, 1, states, ports, dtype=dtype))
    return dsf.Recurrence(A, B, random(1, 1, 1, ports, states, seed=1, dtype=dtype))


def softmax(causal: bool = True, **options) -> dsf.Recurrence:
    q = long(random(1, 1, 1, 2))
    rows = dsf.SoftmaxRows(q, q, causal=causal, **options)
    return dsf.Recurrence(Identity(LENGTH), dsf.OneHot(LENGTH, LENGTH), rows, system="softmax")


def systems() -> dict[str, object]:
    """One of every structure and wrapper, LENGTH steps, a few bytes."""
    log = -random(1, 1, 1, 2).abs()
    key = torch.nn.functional.normalize(random(1, 1, 1, 2), dim=-1)
    column = random(1, 1, 1, 2, 1)
    plain = recurrence(Diagonal(log))
    pairs = recurrence(Diagonal(log, phase=log), dtype=torch.complex64)
    return {
        "identity": recurrence(Identity(2)), "scalar": recurrence(Scalar(log[..., 0], n_state=2)),
        "diagonal": plain, "complex": pairs.replace(real_output=True), "complex map": pairs,
        "householder": recurrence(Householder(log[..., 0].exp(), key)),
        "low rank": recurrence(DiagonalLowRank(log, left=column, right=column)),
        "blocks": recurrence(BlockDiagonal(random(1, 1, 1, 1, 2, 2) / 2, n_block=1)),
        "dense": recurrence(Dense(random(1, 1, 1, 2, 2) / 2)), "shift": recurrence(Shift(2)),
        "several ports": recurrence(Diagonal(log), ports=2),
        "softmax": softmax(), "windowed": softmax(window=64),
        "encoder": dsf.Bidirectional.from_rows(softmax(causal=False)),
        "backwards": dsf.anticausal(plain), "strictly": dsf.anticausal(plain, strict=True),
        "both ways": dsf.Bidirectional(plain, dsf.anticausal(plain, strict=True)),
        "gated": dsf.Gated(plain, long(random(1, 1, 1, 3))),
        "gated softmax": dsf.Gated(softmax(), long(random(1, 1, 1, 1))),
    }  # fmt: skip


def many() -> dsf.Recurrence:
    """A short system for MANY samples."""
    r = dsf.Recurrence(Identity(2), random(1, 8, 1, 2, 1), random(1, 8, 1, 1, 2))
    return r.replace(B=r.B.expand(MANY, -1, -1, -1, -1))


def requests() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kind of request that makes a map, a part of one, rows, or sums over them."""
    rows, cols = slice(10, LENGTH // 2), slice(LENGTH // 2)
    found = systems()
    for name, system in found.items():
        yield f"map of {name}", partial(dsf.materialise, system)
        yield f"tile of {name}", partial(dsf.materialise, system, rows, cols)
        yield f"labelled map of {name}", partial(dsf.attention_map, system)
    plain = found["diagonal"]
    for name in ("effective_rank", "stable_rank"):
        measure = getattr(measures, name)
        for system in ("diagonal", "complex", "dense", "softmax", "encoder", "gated"):
            yield f"{name} of {system}", partial(measure, found[system])
    giant = many()
    for name in ("row_sum", "spread", "scaled_spread", "l1_mass", "negative_mass",
                 "negative_count_share", "participation", "first_token_share",
                 "attention_distance", "entropy", "perplexity", "receptive_field", "lag_mass",
                 "effective_horizon", "row_statistics"):  # fmt: skip
        yield f"{name} of many", partial(getattr(measures, name), giant)
    for name in ("row_sum", "entropy", "receptive_field"):
        yield f"a row of many, {name}", partial(getattr(measures, name), giant, queries=[7])
    yield "orders of many", partial(measures.order_shares, {"a": giant, "b": giant})
    for name in ("zero_sum_signs", "zero_sum_bounds"):
        for shape in ((MANY, 8, 1), (1, 8, MANY)):
            x = torch.ones(1, 8, 1).expand(shape)
            yield f"{name} of {shape}", partial(getattr(measures, name), x, x, x)
    for name in ("softmax", "windowed"):
        yield f"dense C of {name}", found[name].dense_input_output
        yield f"dense factors of {name}", found[name].dense_factors
    short = dsf.Recurrence(plain.A, random(1, 64, 1, 2, 1), random(1, 1, 1, 1, 2))
    yield "map above max_memory", partial(dsf.materialise, short, max_memory=1000)
    yield "labelled map above max_memory", partial(dsf.attention_map, short, max_memory=1000)
    wanted = torch.eye(12, dtype=torch.float64)
    for name in ("epsilon_rank", "cut_singular_values"):
        measure = getattr(measures, name)
        yield f"{name} above max_memory", partial(measure, wanted, max_memory=1000)


def test_a_hundred_requests_are_named_apart() -> None:
    names = [name for name, _ in requests()]
    assert len(names) == len(set(names)) == CASES


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_over_large_requests_are_refused_before_allocation(unchecked) -> None:
    """100 of 100, each with its size and a way out, while hardly any memory can be had."""
    asked = list(requests())
    accepted = {}
    with short_of_memory():
        for name, work in asked:
            try:
                work()
                accepted[name] = "carried out"
            except DsfMemoryError as refusal:
                if "GiB" not in str(refusal):
                    accepted[name] = str(refusal)
            except Exception as error:
                accepted[name] = f"{type(error).__name__}: {error}"[:300]
    assert accepted == {}
    assert len(asked) == CASES


@contextlib.contextmanager
def short_of_memory() -> Iterator[None]:
    """With an address space of HEADROOM more than is mapped now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_fits_is_not_refused() -> None:
    """The same requests on a few steps are carried out."""
    assert sys.maxsize > MANY
    r = dsf.Recurrence(Identity(2), random(1, 8, 1, 2, 1), random(1, 8, 1, 1, 2))
    assert dsf.materialise(r).shape == (1, 1, 8, 8)
    assert measures.row_sum(r).shape == (1, 1, 8)
    with short_of_memory():
        assert measures.entropy(r, queries=[7]).shape == (1, 1, 1)
