"""map_tiles and map_statistics against the loops that define maps: in Triton's interpreter (a
child process), on the GPU, and compiled ahead of time; the loops against scans of impulses,
SoftmaxRows and the measures. Run as a script it prints the interpreter's errors as JSON."""

import importlib
import json
import math

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT, log_decay_families

pytest.importorskip("triton", reason="triton is not installed")
from dsf_kernels.reference import (
    diagonal_decay_scan_reference,
    linear_map_reference,
    map_statistics_reference,
    softmax_map_reference,
)

from dsf.factors import SoftmaxRows
from dsf.measures import row_statistics

ROUNDING = 1e-13  # of numbers near 1 in float64
LIMIT = 16.0  # units
LENGTH, HEAD, STATE = 13, 2, 4
FAMILIES = log_decay_families(LENGTH, STATE)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-2]))


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_map_is_the_scan_of_impulses(family):
    query, key = draw(1, LENGTH, HEAD, STATE), draw(1, LENGTH, 1, STATE)
    shape = (1, LENGTH, HEAD, STATE)
    logs = FAMILIES[family][None, :, None].expand(shape)
    impulses = torch.eye(LENGTH)[None, :, None].expand(1, LENGTH, HEAD, LENGTH)
    expected, _ = diagonal_decay_scan_reference(query, key.expand(shape), impulses, logs, scale=2)
    found = linear_map_reference(query, key, logs, scale=2)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=ROUNDING)
    assert not found.triu(1).any()


def test_softmax_map_is_that_of_softmax_rows():
    query, key = draw(1, LENGTH, HEAD, STATE).double(), draw(1, LENGTH, 1, STATE).double()
    bias = draw(1, HEAD, LENGTH, LENGTH).double()
    bias[:, :, 4] = -math.inf
    every = slice(0, LENGTH)
    for causal in (True, False):
        rows = SoftmaxRows(query, key, bias=bias, scale=0.3, causal=causal).tile(every, every)
        found = softmax_map_reference(query, key, bias, scale=0.3, causal=causal)
        torch.testing.assert_close(found, rows, rtol=0, atol=ROUNDING)
        assert not found[:, :, 4].any()


def test_statistics_are_those_of_the_measures():
    weights = linear_map_reference(draw(1, LENGTH, HEAD, STATE), draw(1, LENGTH, HEAD, STATE))
    found = map_statistics_reference(weights, [0, 1, 4, LENGTH])
    named = row_statistics(weights)
    for name, measure in {"sum": "row_sum", "absolute": "l1_mass", "entropy": "entropy"}.items():
        expected = torch.from_numpy(named[measure].values)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=ROUNDING)
    diagonal = weights.diagonal(dim1=-2, dim2=-1).abs()
    torch.testing.assert_close(found["lag_mass"][..., 0], diagonal, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found["lag_mass"].sum(-1), found["absolute"], rtol=0, atol=ROUNDING)


def test_nothing_gives_nothing():
    empty = draw(1, 0, HEAD, STATE)
    for function in (linear_map_reference, softmax_map_reference):
        weights = function(empty, empty)
        assert weights.shape == (1, HEAD, 0, 0)
        assert all(v.shape == (1, HEAD, 0) for v in map_statistics_reference(weights).values())


# -- kernels -----------------------------------------------------------------------------------


def arguments(length, head=1, state=4, decay=None, bias=False, dtype=torch.float32, batch=1,
              groups=1, n_key=None, **options) -> tuple[dict, dict]:  # fmt: skip
    """decay: "head", "state", or logs (time, head) or (time, head, state)."""
    generator = torch.Generator().manual_seed(length + state)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    given = {
        "query": noise(batch, length, head, state).to(dtype),
        "key": noise(batch, n_key or length, groups, state).to(dtype),
    }
    if isinstance(decay, torch.Tensor):
        given["log_decay"] = decay[None].expand(batch, *decay.shape)
    elif decay is not None:
        wide = (batch, length, head) + (state,) * (decay == "state")
        given["log_decay"] = -noise(*wide).abs()
        given["log_decay"][:, 5:6] = -math.inf
    if bias:
        given["bias"] = noise(1, head, length, n_key or length)
        given["bias"][:, :, 4], given["bias"][..., 2] = -math.inf, -math.inf
    return given, {"scale": 0.5} | options


def truth(given, options):
    """The map, and the size of the terms that each entry is rounded by."""
    if not options.get("softmax"):
        size = given | {"query": given["query"].abs(), "key": given["key"].abs()}
        return linear_map_reference(**given, **options), linear_map_reference(**size, **options)
    rest = {k: v for k, v in options.items() if k != "softmax"}
    weights = softmax_map_reference(**given, **rest)
    query, key = given["query"].double().abs(), given["key"].double().abs()
    key = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
    logits = options["scale"] * torch.einsum("bihn,bjhn->bhij", query, key)
    if "bias" in given:
        logits = logits + given["bias"].double().abs().nan_to_num(posinf=0)
    most = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits
    return weights, weights * (1 + logits + most)


def worst(found, true, size, unit):
    error = (found.double() - true).abs() - 2.0**-120
    ratio = torch.where(error > 0, error / (unit * size), torch.zeros_like(error))
    return float(ratio.nan_to_num(nan=math.inf).max()) if ratio.numel() else 0.0


def measure(case, device="cpu", edges=(0, 1, 4, 9, 1000)):
    """Units of error of the map and of each statistic; inf where zeros are not the loop's."""
    from dsf_kernels.map_tiles import map_statistics, map_tiles

    given: dict = kernel_laws.moved(case[0], device)
    options = case[1]
    unit = UNIT[given["query"].dtype]
    weights, size = truth(given, options)
    found = map_tiles(**given, **options)
    units = {"map": worst(found, weights, size, unit)}
    if (found[size == 0] != 0).any():
        units["zeros"] = math.inf
    named = map_statistics(**given, **options, edges=edges)
    exact, most = (map_statistics_reference(w, edges) for w in (weights, size))
    logs = torch.where(weights == 0, 0.0, weights.abs().log().abs())
    moment = (size * (logs + 1)).sum(-1)
    absolute = exact["absolute"].clamp_min(2.0**-140)
    spread = exact["log_moment"].abs() / absolute + 1
    bounds = most | {"squares": 2 * (weights.abs() * size).sum(-1), "negative": most["absolute"],
                     "sum": most["absolute"], "log_moment": moment,
                     "entropy": (moment + spread * most["absolute"]) / absolute}  # fmt: skip
    for name, true in exact.items():
        dead = true.isnan()
        if not torch.equal(dead, named[name].isnan()):
            units[name] = math.inf
        else:
            units[name] = worst(named[name][~dead], true[~dead], bounds[name][~dead], unit)
    return units


def cases(tile, chunk, states):
    """{name: (tensors, options)}; every decay family is a head, or a state, of one map."""
    heads = torch.stack([v[:, 0] for v in log_decay_families(tile + 3).values()], 1)
    each = torch.stack([v[:, 0] for v in log_decay_families(chunk + 3).values()], 1)[:, None]
    found = {f"length {n}": arguments(n, 2, decay="head") for n in (0, 1, tile)}
    found["no decay"] = arguments(tile + 1, 2, state=states)
    found["decays of heads"] = arguments(tile + 3, heads.shape[1], decay=heads)
    found["decays of states"] = arguments(chunk + 3, state=each.shape[2], decay=each)
    found["decay of states, heads"] = arguments(chunk + 1, 2, decay="state", batch=2)
    found["whole chunks"] = arguments(3 * chunk, state=16, decay="state")
    found["whole tiles"] = arguments(2 * tile, state=16, decay="head")
    found["softmax"] = arguments(tile + 1, 2, softmax=True, bias=True)
    found["softmax, all keys"] = arguments(5, 1, softmax=True, causal=False, n_key=tile + 2)
    found["softmax, whole tiles"] = arguments(tile, 1, 16, softmax=True)
    strided = arguments(tile + 1, 2, decay="head")
    strided[0]["query"] = strided[0]["query"].mT.contiguous().mT
    strided[0]["log_decay"] = strided[0]["log_decay"][:, :1].expand(-1, tile + 1, -1)
    found["strided"] = strided
    found["bf16"] = arguments(tile + 1, decay="head", dtype=torch.bfloat16)
    found["bf16 of states"] = arguments(chunk + 1, decay="state", dtype=torch.bfloat16)
    return found


INTERPRETED = cases(16, 8, 20)
ON_GPU = {f"{k} {tile}": v for tile in (64, 128) for k, v in cases(tile, tile, 100).items()} | {
    f"{kind} {state} {dtype}": arguments(193, 2, state, dtype=dtype, **rest)
    for kind, rest in {
        "head": {"decay": "head"},
        "state": {"decay": "state"},
        "softmax": {"softmax": True},
    }.items()
    for state in (1, 16, 64, 128, 256)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
PIECES = {
    "head": arguments(40, 2, decay="head"),
    "state": arguments(40, decay="state", state=2),
    "softmax": arguments(40, softmax=True),
}
PART = range(16, 39), range(0, 37)


def pieces(case, device="cpu"):
    """Whether part of a map, and of the statistics of its rows, has the bits of the whole."""
    from dsf_kernels.map_tiles import map_statistics, map_tiles

    given, options = dict(kernel_laws.moved(case[0], device)), case[1]
    rows, columns = PART
    whole = map_tiles(**given, **options)[
        :, :, rows.start : rows.stop, columns.start : columns.stop
    ]
    same = torch.equal(map_tiles(**given, **options, queries=rows, keys=columns), whole)
    every = map_statistics(**given, **options)
    some = map_statistics(**given, **options, queries=rows)
    return same and all(
        torch.equal(some[name].nan_to_num(), v[:, :, rows.start : rows.stop].nan_to_num())
        for name, v in every.items()
    )


def materialised(kind, device):
    """Units of error of dsf.materialise by a kernel; inf where the wrong path is taken."""
    from dsf import Recurrence, materialise
    from dsf.kernel_maps import map_gap
    from dsf.transitions import Diagonal, Identity, Scalar

    given, options = arguments(19, 2, decay=None if kind == "none" else kind)
    given: dict = kernel_laws.moved(given, device)
    A = Identity(4)
    if kind != "none":
        A = (
            Diagonal(given["log_decay"])
            if kind == "state"
            else Scalar(given["log_decay"], n_state=4)
        )
    C = 0.5 * given["query"][..., None, :]
    r = Recurrence(A, given["key"][..., None], C)
    wanted = r.replace(C=C.clone().requires_grad_())
    if map_gap(r) or not map_gap(wanted) or not map_gap(r.to(torch.float64)):
        return {"gap": math.inf}
    weights, size = truth(given, options)
    rows, columns = range(2, 17), range(1, 19)
    units = {"whole": worst(materialise(r), weights, size, UNIT[torch.float32])}
    part = materialise(r, rows, columns)
    weights, size = (w[:, :, 2:17, 1:19] for w in (weights, size))
    return units | {"part": worst(part, weights, size, UNIT[torch.float32])}


def interpret():
    """Errors of every interpreted case, in this process."""
    module = importlib.import_module("dsf_kernels.map_tiles")
    launch = importlib.import_module("dsf_kernels.diagonal_decay_launch")
    launch.CHUNK[True] = 8
    launch.PAIR[True] |= {"SLAB": 16, "HIGH": 4}
    found = {name: measure(case) for name, case in INTERPRETED.items()}
    found |= {f"piece {name}": pieces(case) for name, case in PIECES.items()}
    found |= {f"materialise {n}": materialised(n, "cpu") for n in ("none", "head", "state")}
    above = module.map_tiles(**PIECES["head"][0], queries=range(0, 3), keys=range(3, 9))
    found["above"] = bool(above.any())
    given, options = PIECES["head"]
    stored = module.map_tiles(**given, **options, dtype=torch.float16)
    found["stored"] = torch.equal(stored, module.map_tiles(**given, **options).half())
    given, options = arguments(3, decay="head")
    wanted = module.map_tiles(given["query"].requires_grad_(), given["key"], **options)
    found["gradient"] = wanted.requires_grad
    operands = (given["query"].detach(), given["key"], given["log_decay"], None)
    block = ([0, 3, 0, 3], torch.float32)
    torch.library.opcheck(torch.ops.dsf.map_tiles, (*operands, 0.5, False, True, 1, *block),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    edges = torch.tensor([0, 2, 4], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.dsf.map_statistics, (*operands, edges, 0.5, False, True, 1, 0, 3),
        test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case; maps made by pieces are those made at once."""
    found = kernel_laws.run_interpreted(__file__)
    assert all(found.pop(f"piece {name}") for name in PIECES)
    assert not found.pop("above")
    assert not found.pop("gradient")
    assert found.pop("stored")
    assert set(found) >= set(INTERPRETED)
    kernel_laws.all_within(found, LIMIT)


WRONG = {
    "scale: expected a finite nonzero": {"scale": 0},
    "log_decay: expected None with softmax": {"softmax": True},
    "expected no bias and causal=True": {"causal": False},
    "queries: expected a range of step 1 within 0..3": {"queries": range(2, 5)},
    "keys: expected a range of step 1 within 0..3": {"keys": range(0, 3, 2)},
    "divides head=2, got 3": {"key": torch.zeros(1, 3, 3, 4)},
    "expected axes .*time=3": {"key": torch.zeros(1, 2, 2, 4)},
}


@pytest.mark.parametrize("message", WRONG)
def test_messages(message, monkeypatch):
    from dsf_kernels import launch
    from dsf_kernels.map_tiles import map_statistics, map_tiles

    given, _ = arguments(3, 2, decay="head")
    with pytest.raises(NotImplementedError, match="expected CUDA tensors, got cpu"):
        map_tiles(**given)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(ValueError, match=message):
        map_tiles(**given | WRONG[message])
    for edges in ([3], [2, 1], list(range(70)), torch.ones(2)):
        with pytest.raises(ValueError, match="edges: expected 2 to 65 ascending"):
            map_statistics(**given, edges=edges)


KERNELS = ("running_kernel", "linear_tiles_kernel", "linear_statistics_kernel",
           "softmax_rows_kernel", "softmax_tiles_kernel", "diagonal_tiles_kernel",
           "diagonal_statistics_kernel")  # fmt: skip


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_ahead_of_time(name, architecture, record_property):
    """The bf16 tiles of 128 states, without bins."""
    launch = importlib.import_module("dsf_kernels.map_launch")
    query = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
    table = launch.TILES if "tiles" in name else launch.STATISTICS
    fixed = launch._tiles(table, query) | launch.products_of(query) | {"BINS": 1, "BIAS": False}
    fixed |= dict.fromkeys(("FULL", "DECAY", "CAUSAL", "STATISTICS", "WHOLE"), True)
    fixed |= dict.fromkeys(("q_n", "k_n"), 1)
    if name == "running_kernel":
        fixed |= launch.RUNNING
    elif name.startswith("diagonal"):
        fixed |= {"CHUNK": launch.CHUNK[False]} | launch.DIAGONAL
    options = {"num_warps": fixed.pop("num_warps")}
    halves = ("query", "key", "score", "queries", "keys")
    single = ("log_decay", "high", "low", "bias", "peak", "total", "out")
    types = dict.fromkeys(halves, "*bf16") | dict.fromkeys(single, "*fp32")
    types |= {"scale": "fp32", "found": "*fp64", "mass": "*fp64", "edges": "*i32"}
    built = kernel_laws.build(getattr(launch, name), architecture, types, fixed, options,
                              record_property)  # fmt: skip
    used = kernel_laws.resources(built)
    if architecture == 90 and "STACK" in used:
        assert "STACK:0 " in used


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name):
    kernel_laws.all_within({name: measure(ON_GPU[name], "cuda")}, LIMIT)


@kernel_laws.on_gpu
@pytest.mark.parametrize("kind", ["none", "head", "state"])
def test_gpu_materialise(kind):
    kernel_laws.all_within({kind: materialised(kind, "cuda")}, LIMIT)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", PIECES)
def test_gpu_pieces(name):
    assert pieces(PIECES[name], "cuda")


@kernel_laws.on_gpu
@pytest.mark.parametrize("decay", [None, "head", "state"])
def test_gpu_repeats_and_is_independent_of_batch(decay):
    from dsf_kernels.map_tiles import map_statistics, map_tiles

    def run(**given):
        named = map_statistics(**given, softmax=decay is None, edges=(0, 4, 90))
        weights = map_tiles(**given, softmax=decay is None)
        return weights, *(v.nan_to_num() for v in named.values())

    given, _ = arguments(500, 3, 64, decay, dtype=torch.bfloat16, batch=4)
    kernel_laws.repeats_and_rows_stand_alone(run, given, repeats=20)


@kernel_laws.on_gpu
@pytest.mark.parametrize("decay", [None, "head", "state"])
def test_gpu_last_rows_of_a_long_sequence(decay):
    """A tile at the end of 1,048,576 tokens is that of its own last tokens."""
    from dsf_kernels.map_tiles import map_tiles

    length, last = 1_048_576, 128
    given, _ = arguments(length, 1, 16, decay, dtype=torch.bfloat16)
    given: dict = kernel_laws.moved(given, "cuda")
    place = range(length - last, length)
    found = map_tiles(**given, queries=place, keys=place)
    end = {name: tensor[:, -last:] for name, tensor in given.items()}
    weights, size = truth(end, {"scale": 1.0})
    assert worst(found, weights, size, UNIT[torch.bfloat16]) <= LIMIT


if __name__ == "__main__":
    interpret()
