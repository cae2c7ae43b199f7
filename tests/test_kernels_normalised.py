"""normalised_scan against its float64 loop, and the loop against the model's own recurrence.

Queries and keys are >= 0 where errors are judged: a divisor near 0 has no bound.
"""

import functools
import importlib
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

LIMIT = 16.0  # units
CLOSE = 1e-11
EPS = 1e-3


def tensors(*sizes, **options):
    """As every matrix state, with positive query and key, and a sum of keys."""
    given = kernel_laws.matrix_states(*sizes, **options)
    positive = {name: given[name].abs() for name in ("query", "key")}
    state, key_sum = given["initial_state"], None
    if state is not None:
        generator = torch.Generator().manual_seed(sizes[0] + 1)
        key_sum = torch.randn(state.shape[:3], generator=generator).abs()
    return given | positive | {"initial_key_sum": key_sum}


def cases(lengths, chunk, widths, families=None, **sizes):
    found = kernel_laws.matrix_state_cases(tensors, lengths, chunk, widths, families, **sizes)
    return found | {"no decay": (tensors(chunk + 1, decay=None), torch.float32)}


def joined(scan):
    """The scan with its key sum as one more column of the last state."""

    def run(**arguments):
        y, state, key_sum = scan(**arguments)
        return y, torch.cat([state, key_sum[..., None]], -1)

    return run


FORMS = {  # what the launch module's constants are in each form
    "walk": {"SHORT": 0, "FEW": 0},
    "short": {"SHORT": 1024, "FEW": 0},
    "split": {"SHORT": 0, "FEW": 8, "SEGMENT": 1},
}


def measure(case, device="cpu", constant=False, form="walk"):
    """Errors in units; constant: the log decay needs no gradient."""
    from dsf_kernels.normalised_scan import normalised_scan
    from dsf_kernels.reference import error_units, normalised_scan_reference
    from dsf_kernels.reference.normalised import normalised_scan_bound

    arguments, dtype = case
    moved = kernel_laws.moved(arguments, device)
    scans = normalised_scan, normalised_scan_reference, normalised_scan_bound
    functions = [joined(scan) for scan in scans]
    if constant:
        decay = moved.pop("log_decay")
        functions = [functools.partial(function, log_decay=decay) for function in functions]
    kernel, loop, most = functions
    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    with pytest.MonkeyPatch.context() as patch:
        for name, number in FORMS[form].items():
            patch.setattr(launch, name, number)
        return error_units(kernel, loop, moved, {"log_decay"}, unit=UNIT[dtype], bound=most,
                           scale=0.5, eps=EPS)  # fmt: skip


FEW = ("bits", "-100 a step")
INTERPRETED = cases((0, 1, 17), 16, [(3, 20)], FEW)
ON_GPU = cases((0, 1, 2, 31, 32, 33, 257), 64, [(1, 3), (16, 100), (128, 60), (256, 256)]) | {
    f"{dtype} length {length} decay {decay}": (
        tensors(length, 4, 2, 128, 128, dtype, decay, batch=2), dtype,
    )
    for dtype in (torch.bfloat16, torch.float16)
    for length in (63, 64, 65, 509)
    for decay in ("token", "head", None)
}  # fmt: skip


def interpret():
    """Errors of every interpreted case, a zero divisor and opcheck, in this process."""
    module = importlib.import_module("dsf_kernels.normalised_scan")
    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    launch.CHUNK, launch.SLAB = 32, 16  # 16 steps a chunk, as products are exact here
    found = {name: measure(case) for name, case in INTERPRETED.items()}
    for name in ("no decay, no initial state",):
        found[f"{name}, short"] = measure(INTERPRETED[name], form="short")
    found["split"] = measure((tensors(35, 1, 1), torch.float32), form="split")
    found["constant"] = measure(INTERPRETED["decay bits"], constant=True)
    arguments = tensors(3, decay=None, initial=False)
    arguments["query"][:, 1] = 0
    outputs = [module.normalised_scan(**arguments)[0]]
    launch.SHORT = launch.FEW = 0
    outputs.append(module.normalised_scan(**arguments)[0])
    found["zero"] = max(float(output[:, 1].abs().max()) for output in outputs)
    numbers = torch.rand(3, 5, requires_grad=True), torch.rand(3, requires_grad=True)
    torch.library.opcheck(torch.ops.dsf.divide_rows, (*numbers, 0.5),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    query, key, _, log_decay, _, key_sum = tensors(3).values()
    torch.library.opcheck(torch.ops.dsf.key_sum_scan, (query, key, log_decay, key_sum, 2, 0.5),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    torch.library.opcheck(torch.ops.dsf.normalised_walk, (*tensors(3).values(), 0.5, EPS),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case; a row whose divisor is 0 is not divided."""
    pytest.importorskip("triton", reason="triton is not installed")
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("zero") == 0.0
    assert set(found) > set(INTERPRETED)
    kernel_laws.all_within(found, LIMIT)


@pytest.mark.parametrize("length", [1, 2, 13])
def test_the_loop_is_linear_attention_with_gradients(length):
    from dsf_kernels.reference.normalised import normalised_scan_reference

    import dsf
    from dsf.models.linear_attention import linear_attention_recurrence

    torch.manual_seed(5)
    inputs = q, k, v = [
        torch.randn(2, length, 3, width, dtype=torch.float64, requires_grad=True)
        for width in (4, 4, 5)
    ]
    r = linear_attention_recurrence(q, k, feature_map="identity", eps=EPS)
    ours, _, _ = normalised_scan_reference(q, k, v, eps=EPS)
    theirs = dsf.scan(r, v)
    size = theirs.detach().abs().max()
    torch.testing.assert_close(ours / size, theirs / size, rtol=CLOSE, atol=CLOSE)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).reshape(ours.shape)
    got, expected = (torch.autograd.grad((y / size * weight).sum(), inputs)
                     for y in (ours, theirs))  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": 0}, "normalised_scan: scale: expected a finite nonzero number, got 0"),
        ({"initial_key_sum": torch.zeros(1, 2, 3)}, "expected CUDA"),
    ],
)
def test_messages(wrong, message):
    pytest.importorskip("triton", reason="triton is not installed")
    from dsf_kernels.normalised_scan import normalised_scan

    with pytest.raises((ValueError, NotImplementedError), match=message):
        normalised_scan(**tensors(3) | wrong)


WALK = {"X_SHARE": 1, "Y_SHARE": 1, "FIXED": False, "HAS_INITIAL": False, "HAS_SUM": False,
        "FULL": True, "WIDTH": 64, "SLAB": 64, "x_w": 1, "y_w": 1, "w_w": 1, "i_p": 1,
        "s_n": 1}  # fmt: skip
ROWS = {"ROWS": 16, "WIDTH": 128}
BUILDS = {  # module, kernel, constants
    "divide": ("normalised_kernels", "divide_kernel", ROWS),
    "divide back": ("normalised_kernels", "divide_adjoint_kernel", ROWS | {"DIVIDED": True}),
    "walk": ("normalised_walk", "normalised_kernel", WALK | {"HAS_DECAY": False}),
    "walk, decay": ("normalised_walk", "normalised_kernel", WALK | {"HAS_DECAY": True}),
}
NUMBERS = ("x", "y", "w", "out", "numerator", "grad", "grad_numerator")
FLOATS = ("divisor", "grad_divisor", "high", "low", "initial", "initial_sum", "final", "final_sum")


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_builds(name, arch, record_property):
    pytest.importorskip("triton", reason="triton is not installed")
    from test_kernels_scalar_decay_builds import overtaken

    module, kernel, constants = BUILDS[name]
    kernel = getattr(importlib.import_module(f"dsf_kernels.{module}"), kernel)
    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    settings = launch.settings_of(torch.bfloat16, 64)._asdict()
    options = {"num_warps": settings.pop("num_warps")}
    types = dict.fromkeys(NUMBERS, "*bf16") | dict.fromkeys(FLOATS, "*fp32")
    types |= {"scale": "fp32", "eps": "fp32"}
    fixed = settings | constants
    built = kernel_laws.build(kernel, arch, types, fixed, options, record_property)
    copies, wrong = overtaken(built.asm["ttgir"])
    assert not wrong
    assert copies or name != "walk, decay"


@kernel_laws.on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name, form):
    units = measure(ON_GPU[name], "cuda", form=form)
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", [name for name in ON_GPU if "decay" in name])
def test_gpu_matches_loop_under_constant_decays(name):
    units = measure(ON_GPU[name], "cuda", constant=True)
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.normalised_scan import normalised_scan

    arguments = tensors(1000, 3, 1, 128, 64, torch.bfloat16, batch=4)
    run = kernel_laws.with_gradients(joined(normalised_scan))
    kernel_laws.repeats_and_rows_stand_alone(run, arguments, compared=1)


@kernel_laws.on_gpu
def test_gpu_long_and_opcheck():
    from dsf_kernels.normalised_scan import normalised_scan

    rows = torch.rand(1, 1_048_576, 1, 16, device="cuda", dtype=torch.bfloat16)
    output, *_ = normalised_scan(rows, rows, rows, torch.full((1,), -0.01, device="cuda"))
    assert torch.isfinite(output).all()
    assert (output <= 1.02).all()  # means of numbers in [0, 1], rounded
    query, key, _, log_decay, _, key_sum = (
        v.cuda() for v in tensors(70, dtype=torch.bfloat16).values()
    )
    torch.library.opcheck(torch.ops.dsf.key_sum_scan, (query, key, log_decay, key_sum, 2, 0.5))


if __name__ == "__main__":
    interpret()
