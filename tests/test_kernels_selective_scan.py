"""selective_scan against its float64 loop: in Triton's interpreter (a child process), on the GPU,
and compiled ahead of time. Run as a script it prints the interpreter's errors as JSON."""

import importlib
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 16.0  # units
SPLIT = 1e-5  # two parts against the whole, numbers near 1 in float32
HALF_ULP = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
LOGS = ("A", "step_size", "bias")
UNBATCHED = ("A", "D", "bias")
UNDERFLOW = 2.0**-120


def tensors(length, channels=5, n_state=3, group=1, dtype=torch.float32, batch=1, full=True):
    """Arguments of selective_scan; without gate, bias, skip and initial state unless `full`."""
    generator = torch.Generator().manual_seed(length + channels + n_state)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    found = {
        "u": draw(batch, length, channels).to(dtype),
        "step_size": (draw(batch, length, channels) - 1).to(dtype),
        "A": -torch.rand(channels, n_state, generator=generator),
        "B": draw(batch, length, group, n_state).to(dtype),
        "C": draw(batch, length, group, n_state).to(dtype),
    }
    more = {
        "D": draw(channels),
        "z": draw(batch, length, channels).to(dtype),
        "bias": 0.1 * draw(channels),
        "initial_state": draw(batch, channels, n_state),
    }
    return found | (more if full else dict.fromkeys(more))


def families(length):
    """One channel for each decay family that exp(step A), A = -1, can hold; 0 is exp(-200)."""
    generator = torch.Generator().manual_seed(7)
    decays = kernel_laws.decay_families(length, generator=generator).values()
    decays = torch.cat([*decays, torch.full((length, 1), 3.7e-44)], 1)  # -100 a step
    found = tensors(length, 9, 2, full=False)
    found["initial_state"] = torch.randn(1, 9, 2, generator=generator)
    found["A"] = -torch.ones(9, 2)
    return found | {"step_size": -decays.double().log().clamp(min=-200.0).float()[None]}


def cases(lengths, channels, n_state, tile):
    """{name: (tensors, options)}: lengths, decays, types, layouts."""
    plus = {"softplus": True}
    found = {f"length {n}": (tensors(n, channels, n_state), plus) for n in lengths}
    found["wide"] = (tensors(tile - 1, 19, 2), plus)
    found["families"] = (families(tile + 3), {})
    for dtype in (torch.bfloat16, torch.float16):
        found[f"{dtype}"] = (tensors(tile + 1, channels, n_state + 1, dtype=dtype), plus)
    found["full tiles"] = (tensors(2 * tile, 4, 2, dtype=torch.bfloat16, full=False), plus)
    found["groups"] = (tensors(tile + 1, 4, 2, group=2, full=False), plus)
    strided = tensors(tile + 1, 4, 1, batch=2)
    strided["u"] = strided["u"].mT.contiguous().mT
    strided["step_size"] = torch.rand(2, 2 * tile + 9, 9)[:, 3 : 2 * tile + 4 : 2, 2:6]
    strided["B"] = strided["B"].transpose(1, 3).contiguous().transpose(1, 3)
    found["strided"] = (strided, {})
    return found


def step_units(arguments, softplus):
    """Error of the gradient of step_size in units of the sum of its absolute terms.

    Its two terms, through the decay and through the write, have opposite signs on absolute
    values, so their sum is no bound; here they are taken apart.
    """
    from dsf_kernels.reference import selective_scan_reference as loop
    from dsf_kernels.selective_scan import selective_scan

    if arguments["u"].numel() == 0:
        return 0.0

    def gradient(function, given, grads, *extra):
        step = given["step_size"].clone().requires_grad_()
        outputs = function(**given | {"step_size": step}, softplus=softplus)
        return torch.autograd.grad(outputs, (step, *extra), grads)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        shapes = selective_scan(**arguments, softplus=softplus)
    grads = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in shapes]
    found = gradient(selective_scan, arguments, grads)[0]
    exact = {k: None if v is None else v.double() for k, v in arguments.items()}
    truth = gradient(loop, exact, [g.double() for g in grads])[0]
    size = {k: v if v is None or k in LOGS else v.abs() for k, v in exact.items()}
    factor = torch.ones_like(exact["u"]).requires_grad_()
    size |= {"u": size["u"] * factor, "D": None}
    total, write = gradient(loop, size, [g.double().abs() for g in grads], factor)
    x = exact["step_size"] + (0.0 if exact["bias"] is None else exact["bias"])
    if softplus:
        write = write / torch.nn.functional.softplus(x) * torch.sigmoid(x)
    else:
        write = torch.where(x == 0, total, write / x)
    bound = write.abs() + (total - write).abs()
    error = (found.double() - truth).abs() - HALF_ULP[found.dtype] * truth.abs() - UNDERFLOW
    ratio = torch.where(error > 0, error / (UNIT[found.dtype] * bound), torch.zeros_like(error))
    ratio = torch.where(torch.isfinite(found), ratio, torch.inf)
    return float(ratio.max())


def measure(case, device="cpu", steps=True):
    from dsf_kernels.reference import error_units, selective_scan_reference
    from dsf_kernels.selective_scan import selective_scan

    arguments, options = case
    moved = kernel_laws.moved(arguments, device)
    unit = UNIT[arguments["u"].dtype]
    found = error_units(
        selective_scan, selective_scan_reference, moved, LOGS, unit=unit, **options
    )
    found.pop("grad bias", None)  # the sum over time of the gradient of step_size
    found.pop("grad step_size")
    own = step_units(moved, options.get("softplus", False)) if steps else 0.0
    return found | {"grad step_size": own}


INTERPRETED = cases((0, 1, 2, 3, 4, 5, 9), 3, 1, 4)
STEPS = ("length 5", "families")  # half the time of a case
ON_GPU = (
    cases((0, 1, 2, 15, 16, 17, 257, 509), 67, 16, 16)
    | {"segments": (tensors(1021, 40, 16, 1, torch.bfloat16, 2), {"softplus": True})}
    | {
        f"state {n}": (tensors(33, 40, n, dtype=torch.bfloat16), {"softplus": True})
        for n in (1, 17, 64, 256)
    }
)


def interpret():
    """Errors of every interpreted case, the split and the summary, in this process."""
    module = importlib.import_module("dsf_kernels.selective_scan")
    launches = importlib.import_module("dsf_kernels.selective_launch")
    launches.TILE["T"], launches.NARROW["C"] = 4, 16
    launches.SEGMENT["narrow"], launches.UNROLL = 4, 2
    launches.SEGMENTED = (torch.float32, torch.bfloat16, torch.float16)
    found = {name: measure(case, steps=name in STEPS) for name, case in INTERPRETED.items()}
    arguments = tensors(8, 4, 2)
    output, final = module.selective_scan(**arguments, softplus=True)
    parts = kernel_laws.scan_in_two(module.selective_scan, arguments, 4,
                                    (*UNBATCHED, "initial_state"), softplus=True)  # fmt: skip
    pairs = zip(parts, (output, final), strict=True)
    found["split"] = float(max((a - b).abs().max() for a, b in pairs))
    part = {k: arguments[k] for k in ("u", "step_size", "A", "B", "bias")}
    total, end = module.selective_summary(**part, softplus=True)
    found["summary"] = float((total * arguments["initial_state"] + end - final).abs().max())
    order = ("u", "step_size", "A", "B", "C", "D", "bias", "z")
    state = arguments["initial_state"]
    given = (*(arguments[k] for k in order), state, False, True)
    torch.library.opcheck(torch.ops.dsf.selective_scan, given,
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case, a split on a tile's edge and the summary; all are judged."""
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("split") < SPLIT
    assert found.pop("summary") < SPLIT
    assert set(found) == set(INTERPRETED)
    kernel_laws.all_within(found, LIMIT)


def test_messages():
    from dsf_kernels.selective_scan import selective_scan

    arguments, message = tensors(3), "C: expected float32, bfloat16 or float16"
    wrong = arguments["C"].double()
    kernel_laws.refuses(selective_scan, arguments, TypeError, message, C=wrong)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", ["forward_kernel", "adjoint_kernel"])
def test_compiles_ahead_of_time(name, architecture, record_property):
    import triton.language as tl

    module = importlib.import_module("dsf_kernels.selective_launch")
    kernel = getattr(module, name)
    tile = module.TILE | module.WIDE
    options = {"num_warps": tile.pop("num_warps"), "num_stages": 1}
    fixed = tile | {"SOFTPLUS": True, "SKIP": True, "FULL": True, "SAVE": True, "SUMMARY": False}
    fixed |= {"GATE": False, "BIAS": False, "EXACT": False, "N": 16, "MIX": tl.bfloat16}
    fixed |= {"ROWS": module.ROWS, "UNROLL": module.UNROLL, "table": None}
    fixed |= dict.fromkeys(("u_t", "s_t", "z_t", "g_t", "n_channel"), 4096)
    halves = ("u", "step", "gate", "ungated", "grad", "out", "grad_u", "grad_step", "grad_gate")
    floats = ("rates", "skip", "bias", "state", "saved", "grad_state", "grad_rates",
              "grad_pairs", "grad_ends", "span")  # fmt: skip
    pointers = dict.fromkeys(halves, "*bf16") | dict.fromkeys(floats, "*fp32") | {"pairs": "*i64"}
    kernel_laws.build(kernel, architecture, pointers, fixed, options, record_property)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name):
    units = measure(ON_GPU[name], "cuda")
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.selective_scan import selective_scan

    arguments = tensors(700, 160, 16, dtype=torch.bfloat16, batch=4)
    run = kernel_laws.with_gradients(selective_scan, UNBATCHED, softplus=True)
    kernel_laws.repeats_and_rows_stand_alone(run, arguments, shared=UNBATCHED)


@kernel_laws.on_gpu
def test_gpu_long_and_opcheck():
    from dsf_kernels.selective_scan import selective_scan

    u = torch.ones(1, 1_048_576, 8, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(1, 1_048_576, 1, 4, device="cuda", dtype=torch.bfloat16)
    rates = -torch.ones(8, 4, device="cuda")
    output, final = selective_scan(u, u * 0.01, rates, rows, rows)
    assert torch.isfinite(output).all()
    assert torch.isfinite(final).all()
    arguments = {k: v.cuda() for k, v in tensors(40, 33, 4).items()}
    order = ("u", "step_size", "A", "B", "C", "D", "bias", "z", "initial_state")
    torch.library.opcheck(
        torch.ops.dsf.selective_scan, (*(arguments[k] for k in order), True, True)
    )


if __name__ == "__main__":
    interpret()
