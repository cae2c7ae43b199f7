"""zeros_scan against its float64 loop, in the interpreter and on a GPU; the loop against dsf."""

import importlib
import json
from typing import Any

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

LIMIT = 64.0  # units of round-off, of the size of a row
CLOSE = 1e-11
TILES = {"NARROW": {"CHUNK": 32, "COLUMNS": 16, "SLAB": 16, "num_warps": 4, "STAGES": 1},
         "BLOCK": 32, "FACTORS": 32}  # fmt: skip
SPLIT = {"FEW": 8, "PARTS": 3, "LEAST": 1}  # rows cut in time, however short
HALVES = (torch.bfloat16, torch.float16)


def logit_families(length):
    """Logits (length,) that strain a softmax, a mean, or their difference."""
    step = torch.arange(length).float()
    return {
        "offset 1000": 1000 + torch.randn(length, generator=torch.Generator().manual_seed(3)),
        "rising": 3 * step,
        "falling": -3 * step,
        "equal but one": torch.where(step == 0, 4.3, 7.3),
        "one high": torch.where(step == length // 2, 60.0, 0.0),
    }


def tensors(length, state=3, channel=4, head=2, batch=1, dtype=torch.float32, logit=None,
            zero=True, past=0) -> dict[str, Any]:  # fmt: skip
    """Arguments of `run`; past: how many tokens the initial state has seen, None: no state."""
    from dsf_kernels.reference import zeros_scan_reference

    generator = torch.Generator().manual_seed(length + state)

    def draw(time):
        sizes = (batch, time, head)
        found = {name: torch.randn(*sizes, state, generator=generator).to(dtype)
                 for name in ("query", "key")}  # fmt: skip
        found["value"] = torch.randn(*sizes, channel, generator=generator).to(dtype)
        for name in ("logit", "first", "higher", "zero"):
            found[name] = torch.randn(sizes, generator=generator)
        return found if zero else found | {"zero": None}

    found = draw(length) | {"moments": None, "totals": None}
    if past:
        _, moments, totals = zeros_scan_reference(**draw(past))
        found |= {"moments": moments.float(), "totals": totals.float()}
    if logit is not None:
        found["logit"] = logit[None, :, None].expand(batch, length, head)
    return found


def run(moments=None, totals=None, **arguments):
    """The kernel with its state laid out: outputs, moments, and totals less the count."""
    from dsf_kernels.zeros_scan import ZerosState, zeros_scan

    state = None if moments is None else ZerosState(moments, known(totals))
    output, (moments, totals) = zeros_scan(**arguments, initial_state=state)
    return output, moments, totals[..., :2]


def loop(moments=None, totals=None, **arguments):
    from dsf_kernels.reference import zeros_scan_reference

    totals = None if totals is None else known(totals)
    output, moments, totals = zeros_scan_reference(**arguments, moments=moments, totals=totals)
    return output, moments, totals[..., :2]


def known(totals):
    """Totals in float64, whose count no gradient reaches."""
    return torch.cat([totals[..., :2], totals[..., 2:].detach()], -1).double()


def measure(case, device="cpu"):
    from dsf_kernels.reference import row_units

    arguments, dtype = case
    return row_units(run, loop, kernel_laws.moved(arguments, device), unit=UNIT[dtype])


def cases(lengths, chunk, widths, halves):
    found = {f"length {n}": (tensors(n, past=0 if n < 2 else 5), torch.float32) for n in lengths}
    for name, logit in logit_families(chunk + 3).items():
        found[name] = tensors(chunk + 3, logit=logit, zero=name != "falling"), torch.float32
    for state, channel in widths:
        found[f"state {state} channel {channel}"] = (
            tensors(chunk + 1, state, channel, past=3),
            torch.float32,
        )
    for dtype, length in halves:
        found[f"{dtype} length {length}"] = tensors(length, dtype=dtype, past=3), dtype
    strided = tensors(chunk + 1, channel=4, zero=False)
    strided["query"] = strided["query"].mT.contiguous().mT
    strided["value"] = kernel_laws.strided_values(chunk + 1)
    strided["first"] = strided["first"].mT.contiguous().mT
    found["strided"] = strided, torch.float32
    return found


def small():
    found = cases((1, 2, 33), 16, [(17, 20)], [(torch.float16, 19)])
    return {name: case for name, case in found.items() if name != "one high"}


def large():
    halves = [(dtype, length) for dtype in HALVES for length in (63, 64, 65, 2503)]
    widths = [(1, 3), (64, 64), (100, 60), (128, 128)]
    return cases((1, 2, 31, 32, 33, 63, 64, 65, 257, 2503), 64, widths, halves)


def moved(arguments, device) -> dict[str, Any]:
    return kernel_laws.moved(arguments, device)


def laws(device="cpu"):
    """First outputs without a zero order; what later logits change; two calls against one."""
    first = logit_families(6) | {"drawn": None, "equal": torch.full((6,), 7.3)}
    alone = [run(**moved(tensors(6, logit=s, zero=False), device))[0][:, 0]
             for s in first.values()]  # fmt: skip
    arguments = moved(tensors(12), device)
    output = run(**arguments)[0]
    arguments["logit"] = arguments["logit"].clone()
    arguments["logit"][:, 6:] += 80
    later = run(**arguments)[0]
    module = importlib.import_module("dsf_kernels.zeros_scan")
    arguments = {k: v for k, v in moved(tensors(23), device).items()
                 if k not in ("moments", "totals")}  # fmt: skip
    whole, state = module.zeros_scan(**arguments)
    end: Any
    pair, end = kernel_laws.scan_in_two(module.zeros_scan, arguments | {"initial_state": None}, 9)
    far = (whole - pair).abs().max() / whole.abs().max()
    totals = (end.totals - state.totals).abs().max()
    return {"alone": float(torch.stack(alone).abs().max()),
            "later": float((later - output)[:, :6].abs().max()),
            "in two": float(far), "totals": float(totals)}  # fmt: skip


def interpret():
    launch = importlib.import_module("dsf_kernels.zeros_launch")
    vars(launch).update(TILES)
    found = {name: measure(case) for name, case in small().items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SPLIT.items():
            patch.setattr(launch, name, value)
        found["in segments"] = measure((tensors(49, past=3), torch.float32))
    empty = run(**tensors(0, past=4))
    found["empty"] = {"moments": float((empty[1] - tensors(0, past=4)["moments"]).abs().max())}
    arguments = tensors(3, past=3)
    arguments["totals"] = known(arguments["totals"])
    torch.library.opcheck(torch.ops.dsf.zeros_scan, tuple(arguments.values()),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps({"units": found, "laws": laws()}))


def holds(found):
    assert found["alone"] == 0.0
    assert found["later"] == 0.0
    assert found["in two"] < 1e-5
    assert found["totals"] < 1e-12


def test_the_interpreted_kernels_follow_the_loop():
    pytest.importorskip("triton", reason="triton is not installed")
    found = kernel_laws.run_interpreted(__file__)
    assert found["units"].pop("empty") == {"moments": 0.0}
    kernel_laws.all_within(found["units"], LIMIT)
    holds(found["laws"])


@pytest.mark.parametrize("length", [1, 2, 13])
def test_the_loop_is_the_model_with_gradients(length):
    from dsf_kernels.reference.zeros import zeros_scan_reference

    import dsf
    from dsf.models.zeros import zeros_recurrence

    arguments = {k: v.double().requires_grad_() for k, v in tensors(length).items()
                 if v is not None}  # fmt: skip
    query, key, value, logit, *gates = arguments.values()
    theirs = dsf.scan(zeros_recurrence(query, key, logit, *gates), value)
    ours, _, _ = zeros_scan_reference(**arguments)
    torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).reshape(ours.shape)
    got, expected = (torch.autograd.grad((y * weight).sum(), list(arguments.values()))
                     for y in (ours, theirs))  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"logit": torch.zeros(1, 2, 2)}, ValueError, "logit: expected axes"),
        ({"key": torch.zeros(1, 3, 1, 3)}, ValueError, "key: expected axes"),
        ({"value": torch.zeros(1, 3, 2, 4).half()}, TypeError, "the type of value"),
        ({"first": torch.zeros(1, 3, 2).double()}, TypeError, "first: expected float32"),
    ],
)
def test_messages(wrong, error, message, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from dsf_kernels import launch
    from dsf_kernels.zeros_scan import zeros_scan

    arguments = {k: v for k, v in tensors(3).items() if k not in ("moments", "totals")}
    with pytest.raises(NotImplementedError, match="expected CUDA tensors, got cpu"):
        zeros_scan(**arguments)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(error, match=message):
        zeros_scan(**arguments | wrong)


SLOW = pytest.mark.slow
BUILDS = [("walk", 90, False), pytest.param("walk", 90, True, marks=SLOW),
          *(pytest.param("adjoint", 90, parts, marks=SLOW) for parts in (False, True)),
          *(pytest.param(n, 80, False, marks=SLOW) for n in ("walk", "adjoint"))]  # fmt: skip


@pytest.mark.parametrize(("name", "arch", "parts"), BUILDS)
def test_the_walks_build(name, arch, parts, record_property):
    pytest.importorskip("triton", reason="triton is not installed")
    launch = importlib.import_module("dsf_kernels.zeros_launch")
    kernel = getattr(importlib.import_module(f"dsf_kernels.zeros_{name}"), f"{name}_kernel")
    fixed = launch.settings(torch.bfloat16, 128, 128)
    options = {"num_warps": fixed.pop("num_warps")}
    names = ("query", "left", "right", "other", "pull", "values", "asked", "out")
    types: dict[str, str] = dict.fromkeys(names, "*bf16")
    types |= dict.fromkeys(("factors", "moments", "final", "parts"), "*fp32")
    fixed |= dict.fromkeys(("HAS_INITIAL", "STORE", "FINAL", "FULL"), True) | {"PARTS": parts}
    fixed |= dict.fromkeys(("q_c", "k_c", "v_c", "a_c"), 1) | {"ROWS": 17}
    kernel_laws.build(kernel, arch, types, fixed, options, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["zeros_kernels.totals_kernel", "zeros_kernels.factors_kernel", "zeros_adjoint.close_kernel",
     "zeros_segments.carry_kernel"],
)  # fmt: skip
def test_the_sums_build(name, record_property):
    pytest.importorskip("triton", reason="triton is not installed")
    module, kernel = name.split(".")
    kernel = getattr(importlib.import_module(f"dsf_kernels.{module}"), kernel)
    singles = ("logit", "first", "higher", "zero", "factors", "parts", "own", "out", "d_first",
               "d_higher", "d_zero", "moments", "starts")  # fmt: skip
    types: dict[str, str] = dict.fromkeys(singles, "*fp32")
    types |= dict.fromkeys(("log_total", "mean", "initial", "first_ends"), "*fp64")
    types |= {"ends": "*fp32" if "carry" in name else "*fp64",
              "final": "*fp64" if "totals" in name else "*fp32"}  # fmt: skip
    fixed = dict.fromkeys(("HAS_INITIAL", "HAS_STATE", "HAS_ZERO"), True)
    fixed |= {"REVERSE": False, "EXACT": False, "ROWS": 17, "CHUNK": 64, "BLOCK": 256}
    kernel_laws.build(kernel, 90, types, fixed, {"num_warps": 8}, record_property)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", list(large()) if torch.cuda.is_available() else [])
def test_gpu_matches_loop(name):
    units = measure(large()[name], "cuda")
    assert max(units.values()) <= LIMIT, units


def closed(query, key, value, logit, first, higher, zero, moments=None, totals=None):
    """The loop from nothing by cumulative sums in float64, for ordinary logits and long rows."""
    assert moments is None
    assert totals is None
    count = torch.arange(1, query.shape[1] + 1, device=query.device).double()[:, None]
    outer, weight = torch.einsum("bthn,bthp->bthnp", key, value), logit.exp()
    total, sums = weight.cumsum(1), logit.cumsum(1)
    mean = sums / count
    far, slopes, plain = ((w[..., None, None] * outer).cumsum(1) for w in
                          (weight, logit, torch.ones_like(logit)))  # fmt: skip
    gap = far / total[..., None, None] - plain / count[..., None, None]
    slopes = slopes - mean[..., None, None] * plain
    read = higher[..., None, None] * gap
    read = read + ((first - higher) / count)[..., None, None] * slopes
    read = read + (zero / count)[..., None, None] * plain
    output = torch.einsum("bthn,bthnp->bthp", query, read)
    held = torch.stack([gap[:, -1], slopes[:, -1], plain[:, -1]], 2)
    return output, held, torch.stack([total[:, -1].log(), mean[:, -1]], -1)


def test_the_closed_form_is_the_loop():
    arguments = {k: v if v is None else v.double() for k, v in tensors(37).items()}
    for ours, theirs in zip(closed(**arguments), loop(**arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)


ONE_HEAD = pytest.mark.xfail(reason="gradients of one head's gates: 86 to 343 units on an H200")


@kernel_laws.on_gpu
@pytest.mark.parametrize(
    ("length", "head"),
    [(20_000, 16), (20_000, 24), (131_071, 16), (131_071, 24), (1_048_576, 8)]
    + [pytest.param(n, 1, marks=ONE_HEAD) for n in (20_000, 131_071, 1_048_576)],
)
def test_gpu_error_does_not_grow_with_the_length(length, head):
    """Up to 16 heads cut in time, more of them walked; with one a gate's row is one number."""
    from dsf_kernels.reference import row_units

    arguments = moved(tensors(length, head=head), "cuda")
    units = row_units(run, closed, arguments, unit=UNIT[torch.float32])
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
def test_gpu_holds_the_laws():
    holds(laws("cuda"))


@kernel_laws.on_gpu
def test_gpu_repeats_and_is_independent_of_batch():
    arguments = tensors(1000, 128, 64, batch=4, dtype=torch.bfloat16)

    def scan(**given):
        return run(**given)[:2]

    kernel_laws.repeats_and_rows_stand_alone(
        kernel_laws.with_gradients(scan), {k: v for k, v in arguments.items() if v is not None}
    )


@kernel_laws.on_gpu
def test_gpu_long_and_opcheck():
    rows = torch.ones(1, 1_048_576, 1, 16, device="cuda", dtype=torch.bfloat16)
    number = torch.linspace(1000, 1001, rows.shape[1], device="cuda")[None, :, None]
    none = torch.zeros_like(number)
    output = run(query=rows, key=rows, value=rows, logit=number, first=none, higher=none,
                 zero=none + 1)[0]  # fmt: skip
    assert ((output - 16).abs() <= 0.2).all()  # the mean of ones, times q.k = 16
    arguments = moved(tensors(70, dtype=torch.bfloat16, past=3), "cuda")
    arguments["totals"] = known(arguments["totals"])
    torch.library.opcheck(torch.ops.dsf.zeros_scan, tuple(arguments.values()))


if __name__ == "__main__":
    torch.manual_seed(0)
    interpret()
