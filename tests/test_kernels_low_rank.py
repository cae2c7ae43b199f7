"""low_rank_scan, step by step and by chunks, and kda_scan against their float64 loops.

In Triton's interpreter (a child process), on a GPU, and compiled ahead of time. Run as a script it
prints the interpreter's errors as JSON. Errors are in units of round-off of the size of a row."""

import functools
import importlib
import json
import re

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 64.0
SAME = 1e-12
"""Largest difference of two float64 forms."""
FORMS = ("serial", "chunk")


def tensors(length, state=3, channel=2, group=1, decay=None, batch=1, dtype=torch.float32,
            strided=True):  # fmt: skip
    """decay: (time, state), "none", or drawn when None."""
    generator = torch.Generator().manual_seed(length + state)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def unit(*shape):
        return torch.nn.functional.normalize(draw(*shape), dim=-1).to(dtype)

    wide = (batch, length, group, state)
    log_decay = None if isinstance(decay, str) else -draw(batch, length, 2, state).abs()
    if isinstance(decay, torch.Tensor):
        log_decay = decay[None, :, None].expand(batch, length, 2, state)
    value = draw(batch, length, 2, channel)
    if strided and channel <= 4 and batch == 1:
        value = kernel_laws.strided_values(length)[..., :channel]
    return {"query": draw(*wide).to(dtype), "key": draw(batch, length, 2, state).to(dtype),
            "value": value.to(dtype), "left": -unit(*wide), "right": unit(*wide),
            "log_decay": log_decay, "initial_state": draw(batch, 2, state, channel)}  # fmt: skip


def kda_tensors(length, state=3, channel=2, dtype=torch.float32):
    arguments = tensors(length, state, channel, 2, dtype=dtype)
    arguments["key"] = arguments.pop("right")
    arguments["write_strength"] = torch.rand(1, length, 2)
    arguments.pop("left")
    return arguments


def measure(arguments, device="cpu", form="serial", scan="low_rank_scan"):
    import dsf_kernels.reference as reference

    module = importlib.import_module(f"dsf_kernels.{'kda' if 'kda' in scan else 'low_rank'}_scan")
    function = functools.partial(getattr(module, scan), form=form)
    loop = getattr(reference, f"{scan}_reference")
    unit = UNIT[arguments["value"].dtype]
    return reference.row_units(
        function, loop, kernel_laws.moved(arguments, device), unit=unit, scale=0.5
    )


def families(length, state):
    return kernel_laws.log_decay_families(length, state).items()


STRONG = torch.tensor([-torch.inf, -100.0, -0.3, -torch.inf])[:, None].expand(4, 3)
INTERPRETED = (
    {f"serial length {n}": ("serial", tensors(n)) for n in (0, 1, 33)}
    | {f"chunk length {n}": ("chunk", tensors(n)) for n in (0, 1, 33)}
    | {f"{form} strong decay": (form, tensors(4, decay=STRONG)) for form in FORMS}
    | {"chunk without decay": ("chunk", tensors(18, decay="none", group=2))}
    | {"chunk, wider": ("chunk", tensors(5, 33, 17))}
)
ON_GPU = {
    f"{dtype} length {n}": tensors(n, dtype=dtype)
    for n in (0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 257)
    for dtype in UNIT
}
ON_GPU |= {
    f"{dtype} {state} x {channel}": tensors(67, state, channel, dtype=dtype)
    for state, channel in ((1, 3), (16, 100), (64, 64), (100, 60), (128, 128))
    for dtype in UNIT
}
ON_GPU |= {
    f"{dtype} decay {name}": tensors(70, 20, 16, decay=decay, dtype=dtype)
    for name, decay in families(70, 20)
    for dtype in (torch.float32, torch.bfloat16)
}
ON_GPU |= {f"{dtype} no decay": tensors(70, 64, 64, 2, "none", dtype=dtype) for dtype in UNIT}
ON_GPU |= {
    f"{dtype} 128 x 128, length 1021": tensors(1021, 128, 128, 2, batch=2, dtype=dtype)
    for dtype in (torch.float32, torch.bfloat16)
}


def test_the_interpreted_kernels_follow_the_loop():
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("split on the edge of a chunk is the whole, bit by bit")
    kernel_laws.all_within(found, LIMIT)


@pytest.mark.parametrize("length", [0, 1, 5, 16, 37])
def test_the_chunk_form_is_the_loop(length):
    from dsf_kernels.reference.low_rank import low_rank_chunk_reference, low_rank_scan_reference

    decay = -3 * torch.rand(length, 5)
    decay[2::5], decay[3::7] = -torch.inf, -100.0
    arguments = tensors(length, 5, 2, 2, decay)
    arguments["log_decay"] = arguments["log_decay"].double()
    for found, expected in zip(
        low_rank_chunk_reference(**arguments, scale=0.5),
        low_rank_scan_reference(**arguments, scale=0.5),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=SAME, atol=SAME)


@kernel_laws.on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_follows_the_loop(name, form):
    kernel_laws.all_within({name: measure(ON_GPU[name], "cuda", form)}, LIMIT)


@kernel_laws.on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", list(UNIT))
def test_gpu_kda_follows_the_loop(dtype, form):
    arguments = kda_tensors(131, 64, 32, dtype)
    kernel_laws.all_within({"kda": measure(arguments, "cuda", form, "kda_scan")}, LIMIT)


@kernel_laws.on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_repeats_and_is_independent_of_batch(dtype, form):
    """Bitwise, with the gradients."""
    from dsf_kernels.low_rank_scan import low_rank_scan

    arguments = tensors(1000, 128, 64, batch=4, dtype=dtype)
    run = kernel_laws.with_gradients(low_rank_scan, term=torch.square, form=form)
    kernel_laws.repeats_and_rows_stand_alone(run, arguments, repeats=20)


@kernel_laws.on_gpu
def test_gpu_long_and_opcheck():
    from dsf_kernels.low_rank_scan import low_rank_scan

    for dtype in (torch.bfloat16, torch.float32):
        arguments = kernel_laws.moved(tensors(1_048_576, 16, 16, dtype=dtype), "cuda")
        run = kernel_laws.with_gradients(low_rank_scan, form="chunk")
        assert all(torch.isfinite(t).all() for t in run(**arguments))
    given = [t.cuda() for t in tensors(70, dtype=torch.bfloat16).values()]
    for name in ("low_rank_scan", "low_rank_chunk_scan"):
        torch.library.opcheck(getattr(torch.ops.dsf, name), (*given, 1.0))


def test_wrong_arguments_are_refused():
    from dsf_kernels.low_rank_scan import low_rank_scan

    with pytest.raises(ValueError, match="form: expected chunk, serial or None, got 'fast'"):
        low_rank_scan(**tensors(3), form="fast")
    with pytest.raises(NotImplementedError, match="expected CUDA tensors, got cpu"):
        low_rank_scan(**tensors(3))


@pytest.mark.parametrize("name", ["prepare", "walk", "chunk_gradient", "pair_gradient"])
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_compiles_ahead_of_time(name, architecture, record_property):
    launch = importlib.import_module("dsf_kernels.low_rank_chunk_launch")
    kernel = getattr(launch, f"{name}_kernel")
    tiles = dict(getattr(launch, name.upper())[False])
    warps = tiles.pop("num_warps")
    fixed = launch.products(torch.bfloat16) | tiles | {"WIDTH": 64, "CHANNELS": 64}
    fixed |= {"CHUNK": 16, "LEVELS": 4}  # quicker than those of 32
    shares = ("Q_SHARE", "K_SHARE", "X_SHARE", "W_SHARE")
    fixed |= dict.fromkeys((*shares, "q_n", "k_n", "x_n", "w_n", "g_n", "v_p", "y_p", "i_p"), 1)
    fixed |= dict.fromkeys(("HAS_DECAY", "HAS_INITIAL", "STORE", "FINAL", "SAVE", "FULL"), True)
    fixed |= {"REVERSE": True}
    floats = ("log_decay", "total", "initial", "final", "d_decay", "d_total")
    number = re.compile(r"._[bthnp]$|length|n_chunk|n_head|width|channels")
    types = {n: "*bf16" for n in kernel.arg_names if not number.match(n)}
    types |= dict.fromkeys(floats, "*fp32") | {"scale": "fp32"}
    options = {"num_warps": warps}
    kernel_laws.build(kernel, architecture, types, fixed, options, record_property)


def interpret():
    from dsf_kernels.low_rank_scan import low_rank_scan

    torch.manual_seed(0)
    found: dict = {name: measure(case, form=form) for name, (form, case) in INTERPRETED.items()}
    found["kda"] = measure(kda_tensors(5), form="serial", scan="kda_scan")
    given = tuple(tensors(3).values())
    for name in ("low_rank_scan", "low_rank_chunk_scan"):
        torch.library.opcheck(getattr(torch.ops.dsf, name), (*given, 1.0),
                              test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    scan = functools.partial(low_rank_scan, form="chunk")
    given = tensors(20)
    whole, parts = scan(**given), kernel_laws.scan_in_two(scan, given, 16)
    same = all(map(torch.equal, whole, parts))
    found["split on the edge of a chunk is the whole, bit by bit"] = same
    print(json.dumps(found))


if __name__ == "__main__":
    interpret()
