"""inline_scan and inline_mix against their float64 loops, and the loops against the model."""

import importlib
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

LIMIT = 16.0  # units
CLOSE = 1e-11
STATE = ("memory", "key_sum", "value_sum", "anchor")
SEEN = 5  # tokens before, where there is an initial state


def tensors(length, head=2, group=2, state=4, channel=4, dtype=torch.float32, initial=True,
            batch=1):  # fmt: skip
    generator = torch.Generator().manual_seed(length + state)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    found = {
        "query": draw(batch, length, group, state).to(dtype),
        "key": draw(batch, length, group, state).to(dtype),
        "value": draw(batch, length, head, channel).to(dtype),
    }
    if initial:
        shapes = ((head, state, channel), (head, state), (head, channel), (group, state))
        found |= {name: draw(batch, *s) for name, s in zip(STATE, shapes, strict=True)}
        found["anchor"] = found["anchor"].to(dtype)
    return found


def cases(lengths, chunk, widths):
    """{name: (tensors, type, options)}."""
    released, published = {"scale": 0.5, "over_count": True}, {"scale": 1.0}
    found = {f"length {n}": (tensors(n), torch.float32, released) for n in lengths}
    for state, channel in widths:
        arguments = tensors(chunk + 1, 2, 1, state, channel)
        found[f"state {state} channel {channel}"] = (arguments, torch.float32, published)
    for dtype in (torch.bfloat16, torch.float16):
        found[f"{dtype}"] = (tensors(chunk + 1, dtype=dtype), dtype, released)
    for name, options in {"released": released, "published": published}.items():
        found[f"no initial state, {name}"] = (
            tensors(chunk + 1, initial=False), torch.float32, options,
        )  # fmt: skip
    strided = tensors(chunk + 1)
    strided["query"] = strided["query"].mT.contiguous().mT
    strided["value"] = kernel_laws.strided_values(chunk + 1)
    found["strided"] = (strided, torch.float32, released)
    return found


def joined(scan):
    """The scan with its three sums as one matrix, and the initial ones as plain arguments."""
    from dsf_kernels.inline_scan import InlineState

    def run(query, key, value, memory=None, key_sum=None, value_sum=None, anchor=None, **options):
        initial = None
        if memory is not None:
            initial = InlineState(memory, key_sum, value_sum, anchor, SEEN)
        y, (memory, key_sum, value_sum, _, _) = scan(query, key, value, initial, **options)
        wide = torch.cat([memory, key_sum[..., None]], -1)
        last = torch.nn.functional.pad(value_sum, (0, 1))[..., None, :]
        return y, torch.cat([wide, last], -2)

    return run


FORMS = {  # what the launch module's constants are in each form
    "walk": {"SHORT": 0, "FEW": 0},
    "short": {"SHORT": 1024, "FEW": 0},
    "split": {"SHORT": 0, "FEW": 8, "SEGMENT": 1},
}


def measure(case, device="cpu", form="walk"):
    """Errors in units."""
    from dsf_kernels.inline_scan import inline_scan
    from dsf_kernels.reference import error_units, inline_scan_reference
    from dsf_kernels.reference.inline import inline_scan_bound

    arguments, dtype, options = case
    loops = [joined(scan) for scan in (inline_scan, inline_scan_reference, inline_scan_bound)]
    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    with pytest.MonkeyPatch.context() as patch:
        for name, number in FORMS[form].items():
            patch.setattr(launch, name, number)
        return error_units(*loops[:2], kernel_laws.moved(arguments, device), unit=UNIT[dtype],
                           bound=loops[2], **options)  # fmt: skip


def measure_mix(case, device="cpu"):
    """Errors of the form that sees all tokens, in units."""
    from dsf_kernels.inline_scan import inline_mix
    from dsf_kernels.reference import error_units, inline_mix_reference
    from dsf_kernels.reference.inline import inline_mix_bound

    arguments, dtype, options = case
    arguments = {k: v for k, v in arguments.items() if k not in STATE}

    def twice(mix):
        return lambda **a: (mix(**a, **options),) * 2

    mixes = [twice(mix) for mix in (inline_mix, inline_mix_reference, inline_mix_bound)]
    moved = kernel_laws.moved(arguments, device)
    return error_units(*mixes[:2], moved, unit=UNIT[dtype], bound=mixes[2])


def offset_error(device="cpu"):
    """Largest error of keys that share an offset of 1000, over the largest output."""
    from dsf_kernels.inline_scan import inline_scan
    from dsf_kernels.reference import inline_scan_reference

    arguments = kernel_laws.moved(tensors(40, initial=False), device)
    arguments["key"] = arguments["key"] + 1000
    (found, _), (true, _) = (scan(**arguments, over_count=True)
                             for scan in (inline_scan, inline_scan_reference))  # fmt: skip
    return float((found - true).abs().max() / true.abs().max())


INTERPRETED = cases((0, 1, 17), 16, [(3, 20)])
ON_GPU = cases((0, 1, 2, 31, 32, 33, 257), 64, [(1, 3), (16, 100), (128, 60), (256, 256)]) | {
    f"{dtype} length {length} over count {over_count}": (
        tensors(length, 4, 2, 128, 128, dtype, batch=2), dtype,
        {"scale": 128**-0.5, "over_count": over_count},
    )
    for dtype in (torch.bfloat16, torch.float16)
    for length in (63, 64, 65, 509)
    for over_count in (True, False)
}  # fmt: skip


def in_two(scan, arguments, cut, **options):
    """Outputs and last sums of two scans, the state handed on."""
    early, middle = scan(**{k: v[:, :cut] for k, v in arguments.items()}, **options)
    late, end = scan(**{k: v[:, cut:] for k, v in arguments.items()}, initial=middle, **options)
    return torch.cat([early, late], 1), end


def interpret():
    """Errors of every interpreted case, of a split and of an offset, and opcheck."""
    module = importlib.import_module("dsf_kernels.inline_scan")
    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    launch.CHUNK, launch.SLAB = 32, 16  # 16 steps a chunk, as products are exact here
    found = {name: measure(case) for name, case in INTERPRETED.items()}
    found |= {f"mix {name}": measure_mix(INTERPRETED[name]) for name in ("length 0", "strided")}
    found["length 17, short"] = measure(INTERPRETED["length 17"], form="short")
    found["split"] = measure((tensors(35, 1, 1), torch.float32, {"scale": 0.5}), form="split")
    launch.SHORT = 0
    found["offset"] = offset_error()
    arguments = tensors(21, initial=False)
    whole, end = module.inline_scan(**arguments, over_count=True)
    parts, last = in_two(module.inline_scan, arguments, 16, over_count=True)
    assert end.count == last.count == 21
    pairs = [(whole, parts), *zip(end[:4], last[:4], strict=True)]
    found["parts"] = max(float((a - b).abs().max()) for a, b in pairs)
    value, mean = torch.rand(2, 1, 3, 2, 4, requires_grad=True).unbind(0)
    opcheck = torch.library.opcheck
    for operator, inputs in {
        "running_mean": (value, torch.rand(1, 2, 4), 3),
        "subtract_mean": (value, torch.rand(1, 3, 2), mean, 3, 0.5, True),
    }.items():
        opcheck(getattr(torch.ops.dsf, operator), inputs, test_utils=kernel_laws.OPCHECKS)
    walked = (*list(tensors(3).values())[:6], 3, 0.5, True)
    opcheck(torch.ops.dsf.inline_walk, walked, test_utils=kernel_laws.OPCHECKS)
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case, a split on a tile's edge, and keys with a large offset."""
    pytest.importorskip("triton", reason="triton is not installed")
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("offset") < 1e-5
    assert found.pop("parts") < 1e-5
    assert set(found) > set(INTERPRETED)
    kernel_laws.all_within(found, LIMIT)


@pytest.mark.parametrize("scale", ["released", "published"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_the_loops_are_the_model_with_gradients(length, causal, scale):
    from dsf_kernels.reference.inline import inline_mix_reference, inline_scan_reference

    import dsf
    from dsf.models.inline_attention import inline_attention_recurrence

    torch.manual_seed(5)
    inputs = q, k, v = [
        torch.randn(2, length, 3, width, dtype=torch.float64, requires_grad=True)
        for width in (4, 4, 5)
    ]
    theirs = dsf.scan(inline_attention_recurrence(q, k, causal=causal, scale=scale), v)
    over = scale == "released"
    options = {"scale": 0.5 if over else 1.0, "over_count": over}
    if causal:
        ours, _ = inline_scan_reference(q, k, v, **options)
    else:
        ours = inline_mix_reference(q, k, v, **options)
    torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).reshape(ours.shape)
    got, expected = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=CLOSE, atol=CLOSE)


def test_the_loop_goes_on_from_a_state():
    from dsf_kernels.reference.inline import inline_scan_reference

    arguments = tensors(9, initial=False)
    whole, end = inline_scan_reference(**arguments, over_count=True)
    parts, last = in_two(inline_scan_reference, arguments, 4, over_count=True)
    torch.testing.assert_close(parts, whole, rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(last[0], end[0], rtol=CLOSE, atol=CLOSE)


def test_messages():
    pytest.importorskip("triton", reason="triton is not installed")
    from dsf_kernels.inline_scan import inline_mix, inline_scan

    arguments = tensors(3, initial=False)
    message = "inline_scan: scale: expected a finite nonzero number, got 0"
    kernel_laws.refuses(inline_scan, arguments, ValueError, message, scale=0)
    kernel_laws.refuses(inline_mix, arguments, ValueError, "inline_mix: scale", scale=0)


WALK = {"X_SHARE": 1, "Y_SHARE": 1, "HAS_INITIAL": False, "FULL": True, "WIDTH": 64, "SLAB": 64,
        "x_w": 1, "y_w": 1, "w_w": 1, "i_p": 1, "s_n": 1, "v_p": 1}  # fmt: skip
ROWS = {"ROWS": 16, "WIDTH": 128}
BUILDS = {  # module, kernel, constants
    "subtract": ("inline_kernels", "subtract_kernel", ROWS),
    "subtract back": ("inline_kernels", "subtract_adjoint_kernel", ROWS),
    "walk": ("inline_walk", "inline_kernel", WALK),
}
NUMBERS = ("x", "y", "w", "out", "numerator", "mean", "grad", "grad_numerator", "grad_mean")
FLOATS = ("key_sum", "grad_key_sum", "divisor", "initial", "initial_sum", "initial_values",
          "final", "final_sum", "final_values")  # fmt: skip


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_builds(name, arch, record_property):
    pytest.importorskip("triton", reason="triton is not installed")
    module, kernel, constants = BUILDS[name]
    kernel = getattr(importlib.import_module(f"dsf_kernels.{module}"), kernel)
    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    settings = launch.settings_of(torch.bfloat16, 64)._asdict()
    options = {"num_warps": settings.pop("num_warps")}
    types = dict.fromkeys(NUMBERS, "*bf16") | dict.fromkeys(FLOATS, "*fp32") | {"scale": "fp32"}
    fixed = settings | constants | {"OVER_COUNT": True}
    kernel_laws.build(kernel, arch, types, fixed, options, record_property)


@kernel_laws.on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name, form):
    units = measure(ON_GPU[name], "cuda", form)
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_mix_matches_quadratic_form(name):
    units = measure_mix(ON_GPU[name], "cuda")
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
def test_gpu_offset():
    assert offset_error("cuda") < 1e-5


@kernel_laws.on_gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.inline_scan import inline_scan

    arguments = tensors(1000, 3, 1, 128, 64, torch.bfloat16, initial=False, batch=4)
    run = kernel_laws.with_gradients(joined(inline_scan), scale=0.1, over_count=True)
    kernel_laws.repeats_and_rows_stand_alone(run, arguments, compared=1)


@kernel_laws.on_gpu
def test_gpu_long():
    from dsf_kernels.inline_scan import inline_scan

    rows = torch.randn(1, 1_048_576, 1, 16, device="cuda", dtype=torch.bfloat16)
    output, state = inline_scan(rows, rows, rows, scale=0.25, over_count=True)
    assert torch.isfinite(output).all()
    assert state.count == rows.shape[1]


if __name__ == "__main__":
    interpret()
