"""Over-large requests are refused before allocation: every map, measure, reduction, factor."""

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
MANY = 10**12
"""Samples that share one system: not one number for each would fit."""
HEADROOM = 2**29
"""How much address space may be taken while requests are refused: no request fits in it."""
CASES = 100
"""Requests there are at least."""
COST_NOTHING = {
    "n_state": "the same number for all, a view",
    "Family": "a type", "FAMILIES": "a table",
    "attention_steps": "a schedule of `length` numbers",
    "conditions": "its maps are of one length, 32 unless asked otherwise",
    "dynamic_memory": "five states unless asked otherwise",
    "linear_complexity": "reads sizes of what the caller builds",
    "feature_allocation": "numbers of layers and heads", "features_for_accuracy": "a formula",
    "query_mean": "averages of what is measured already",
}  # fmt: skip
"""Public names of dsf.measures that no request can make large, and why."""


OF_SOFTMAX = ("degrees_of_freedom", "token_leverage", "taylor_growth")


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
    A = Diagonal(-random(1, 8, 1, 2).abs())
    r = dsf.Recurrence(A, random(1, 8, 1, 2, 1), random(1, 8, 1, 1, 2))
    return r.replace(B=r.B.expand(MANY, -1, -1, -1, -1))


def many_softmax() -> dsf.Recurrence:
    q = random(1, 8, 1, 2).expand(MANY, -1, -1, -1)
    return dsf.Recurrence(Identity(8), dsf.OneHot(8, 8), dsf.SoftmaxRows(q, q), system="softmax")


def other_measures(giant: dsf.Recurrence, soft: dsf.Recurrence) -> dict[str, tuple]:
    """Arguments far too large for every public measure that is not registered."""
    wide, keys = torch.ones(1, 1).expand(LENGTH, 10**8), torch.ones(1, 4).expand(MANY, 4)
    values, gate = torch.ones(1, 8, 1, 1), torch.ones(1, 8, 1, 1).expand(MANY, -1, -1, -1)
    square = torch.ones(1, 1, 1, 1).expand(1, 1, 10**8, 10**8)
    family = measures.FAMILIES["metala"] if "metala" in measures.FAMILIES else next(
        iter(measures.FAMILIES.values()))  # fmt: skip
    return {
        "collision": (giant,), "confusion_counts": (giant,), "cut_singular_values": (giant,),
        "decode_query": (wide, keys), "distance_to_hull": (keys, torch.ones(4)),
        "eigenvalue_shift": (giant, torch.eye(2)), "expand_state": (giant, 9),
        "expansion_error": (lambda q, k: giant, gate, gate),
        "feature_error": (square, square, 0.1), "feature_row_error": (square, square),
        "gate_sparsity": (gate,), "hankel_values": (giant,), "history_scaled": (giant,),
        "masking_effect": (giant, values), "massive_activations": (gate[..., 0],),
        "nearest_attention": (giant, gate, gate), "order_shares": ({"a": giant, "b": giant},),
        "principles": (giant,), "query_collision": (keys,), "query_injectivity": (keys,),
        "query_modulus": (keys, torch.ones(6, 4)),
        "ray_collision": (torch.relu, torch.ones(4), keys),
        "reach": (gate, torch.ones(1)), "row_statistics": (giant,),
        "similarity_spectrum": (soft,), "static_approximation": (family, wide),
    }  # fmt: skip


def of_measures(giant: dsf.Recurrence) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every public measure."""
    soft = many_softmax()
    for name, measure in measures.registered().items():
        if name not in COST_NOTHING:
            yield f"{name} of many", partial(measure, soft if name in OF_SOFTMAX else giant)
            yield f"{name} of many softmax", partial(measure, soft)
    for name, arguments in other_measures(giant, soft).items():
        yield f"{name} of many", partial(getattr(measures, name), *arguments)


def of_systems(giant: dsf.Recurrence) -> Iterator[tuple[str, Callable[[], object]]]:
    """Reductions, realisations, Gramians."""
    encoder = systems()["encoder"]
    far = recurrence(Diagonal(-random(1, 1, 1, 1024).abs()), 1024)
    for name, size in (("reduce", 1), ("balance", None)):
        for kind, system in (("long", far), ("many", giant)):
            work = getattr(dsf, name)
            yield f"{name} of {kind}", partial(work, system, *([] if size is None else [size]))
    both = dsf.Bidirectional(far, dsf.anticausal(far, strict=True))
    yield "reduce of both ways", partial(dsf.reduce, both, 1)
    yield "reduce of backwards", partial(dsf.reduce, dsf.anticausal(far), tol=0.1)
    yield "reduce of softmax", partial(dsf.reduce, softmax(), 1)
    yield "reduce of encoder", partial(dsf.reduce, encoder, 1)
    for name, shape in (("long", (1, 1, LENGTH, LENGTH)), ("many", (MANY, 1, 8, 8))):
        yield f"realise of {name}", partial(dsf.realise, torch.ones(1, 1, 1, 1).expand(shape))
    for name in ("gramian", "hankel_singular_values", "predictor_form",
                 "stationary_hankel_values"):  # fmt: skip
        yield f"{name} of many", partial(getattr(dsf, name), giant)
    yield "gramian of long", partial(dsf.gramian, far)


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
        for system in ("complex map", "several ports", "gated"):
            yield f"{name} of {system}", partial(measure, found[system])
    giant = many()
    yield from of_measures(giant)
    yield from of_systems(giant)
    for name in ("row_sum", "entropy", "receptive_field"):
        yield f"a row of many, {name}", partial(getattr(measures, name), giant, queries=[7])
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


def test_every_public_measure_is_asked_for_too_much() -> None:
    """A new measure needs its request here, or a reason why none can be too large."""
    names = [name for name, _ in requests()]
    assert len(names) == len(set(names)) >= CASES
    public = {name for module in measures._modules() for name in module.__all__}
    asked = {name.split(" ")[0] for name in names}
    assert public - asked == set(COST_NOTHING)
    assert {"reduce", "realise", "balance", "map", "labelled"} <= asked


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_over_large_requests_are_refused_before_allocation(unchecked) -> None:
    """All of them, each with its size and a way out, while hardly any memory can be had."""
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
    assert len(asked) >= CASES


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
