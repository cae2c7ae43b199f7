"""monarch_attention against its float64 definition: in Triton's interpreter (a child process), on
the GPU, and compiled ahead of time. Run as a script it prints the interpreter's errors as JSON."""

import importlib
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 64.0  # units of the row: two products and two softmax a step, each of rounded operands
PEER = 1.25  # times the units of the definition in float32
HALF = 1e-2  # absolute, of numbers of unit size in fp16
BRAIN = 5e-2  # in bf16
EXACT = 1e-12
NAMES = ("query", "key", "value")


def tensors(length, head=1, width=16, channel=None, dtype=torch.float32, group=None, batch=1):
    generator = torch.Generator().manual_seed(length + width)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "query": draw(batch, length, head, width),
        "key": draw(batch, length, group or head, width),
        "value": draw(batch, length, head, channel or width),
    }


def masked(length, *real):
    """A mask (batch, time) whose row r keeps the first real[r] tokens."""
    return torch.arange(length)[None] < torch.tensor(real)[:, None]


def scattered(length):
    return torch.rand(1, length, generator=torch.Generator().manual_seed(3)) < 0.6


def strided(length):
    """Heads first, every other row, channels last but one."""
    found = tensors(length, 2, 16, 4)
    found["query"] = found["query"].mT.contiguous().mT
    found["key"] = found["key"][:, :, :1].expand(-1, -1, 2, -1)
    found["value"] = kernel_laws.strided_values(length)
    return found


INTERPRETED = {
    "length 0": (tensors(0), {"block": 4}),
    "length 1": (tensors(1), {"block": 4, "steps": 2}),
    "one step": (tensors(8), {"block": 4}),
    "prime, before, two steps": (
        tensors(7, 2, 5, 7, group=1, batch=2),
        {"block": 3, "steps": 2, "padding": "before", "key_mask": masked(7, 7, 3)},
    ),
    "two steps": (tensors(6), {"block": 3, "steps": 2}),
    "places without a query, three steps": (
        tensors(6), {"block": 3, "steps": 3, "key_mask": scattered(6)},
    ),
    "rows in two parts": (tensors(20, 1, 4), {"block": 18}),
    "blocks in two parts": (tensors(17, 1, 4), {"block": 1, "steps": 2}),
    "nothing kept": (tensors(5, batch=2), {"block": 2, "steps": 2, "key_mask": masked(5, 0, 2)}),
    "block 1": (tensors(5, 1, 4), {"block": 1, "steps": 2, "key_mask": scattered(5)}),
    "one block": (tensors(5, 1, 4), {"block": 20, "steps": 2, "key_mask": scattered(5)}),
    "strided": (strided(5), {"block": 2, "steps": 2}),
    "peaked": ({k: v * 5 for k, v in tensors(16).items()}, {"block": 4}),
}  # fmt: skip
WIDE = {  # tiles that no program holds: forward, one step
    "wide blocks": (tensors(80, 1, 4, 5), {"block": 40, "key_mask": scattered(80)}),
    "wide, before, nothing kept": (
        tensors(69, 1, 4, batch=2),
        {"block": 35, "padding": "before", "key_mask": masked(69, 0, 33)},
    ),
    "wide, peaked": ({k: v * 5 for k, v in tensors(36, 1, 4).items()}, {"block": 1}),
}
SIXTEEN = {
    f"{str(dtype)[6:]} {name}": (
        {k: v.to(dtype) for k, v in INTERPRETED[name][0].items()}, INTERPRETED[name][1],
    )
    for dtype in (torch.float16, torch.bfloat16)
    for name in ("two steps",)
}  # fmt: skip
# type, length, block, steps, width, and whether a row of the batch keeps a third of its keys:
# every side of a tile, one step and more, and all of these in 16 bits, as few as that takes
SHAPES = [
    (torch.float32, 997, 31, 3, 64, True), (torch.float32, 4096, 64, 1, 64, True),
    (torch.float32, 16384, 128, 1, 64, True),
    (torch.float16, 19, 4, 2, 16, True), (torch.float16, 256, 16, 1, 64, False),
    (torch.float16, 2000, 90, 2, 32, True), (torch.float16, 4096, 64, 1, 64, False),
    (torch.float16, 8191, 127, 2, 128, False), (torch.float16, 16384, 128, 1, 64, False),
    (torch.bfloat16, 1024, 8, 2, 60, True), (torch.bfloat16, 4096, 64, 3, 64, True),
    (torch.bfloat16, 1024, 128, 1, 100, True),
]  # fmt: skip
SMALL = ("length 0", "length 1", "prime, before, two steps", "blocks in two parts",
         "places without a query, three steps", "nothing kept", "strided", "peaked")  # fmt: skip
ON_GPU = {name: INTERPRETED[name] for name in SMALL} | {
    f"{str(dtype)[6:]} {length} in blocks of {block}, {steps} steps, width {width}, "
    f"{'some' if some else 'all'} kept": (
        tensors(length, 2, width, 64, dtype, batch=2),
        {"block": block, "steps": steps, "key_mask": masked(length, length, length // 3)}
        if some else {"block": block, "steps": steps},
    )
    for dtype, length, block, steps, width, some in SHAPES
}  # fmt: skip


def both(function, options):
    """The function with its output twice, as the units expect an output and a state."""

    def run(**arguments):
        output = function(**arguments, **options)
        return output, output

    return run


def measure(case, device="cpu", *, plain=False):
    """Errors by tensor: units of the row in float32, absolute over the limit times LIMIT else.

    plain: of the definition computed in float32, instead of the kernel.
    """
    from dsf_kernels.monarch_attention import monarch_attention
    from dsf_kernels.reference import monarch_attention_reference, row_units

    arguments, options = case
    arguments, options = kernel_laws.moved(arguments, device), dict(options)
    if options.get("key_mask") is not None:
        options["key_mask"] = options["key_mask"].to(device)
    dtype = arguments["value"].dtype
    kernel, loop = (both(f, options) for f in (monarch_attention, monarch_attention_reference))
    if plain:
        kernel = both(monarch_attention_reference, options | {"dtype": torch.float32})
    if dtype == torch.float32:
        return row_units(kernel, loop, arguments, unit=UNIT[dtype])
    limit = HALF if dtype == torch.float16 else BRAIN
    exact = {k: v.double() for k, v in arguments.items()}
    found = [differentiated(kernel, arguments), differentiated(loop, exact)]
    return {
        name: float(((a - b).abs() / b.abs().amax().clamp_min(1)).max() / limit * LIMIT)
        for name, a, b in zip(("output", *NAMES), *found, strict=True)
    }


def forward_error(case, device="cpu"):
    """Error of the output alone, as `measure`."""
    from dsf_kernels.monarch_attention import monarch_attention
    from dsf_kernels.reference import monarch_attention_reference

    arguments, options = kernel_laws.moved(case[0], device), dict(case[1])
    if options.get("key_mask") is not None:
        options["key_mask"] = options["key_mask"].to(device)
    found, true = (f(**arguments, **options).double()
                   for f in (monarch_attention, monarch_attention_reference))  # fmt: skip
    error = (found - true).abs()
    if arguments["value"].dtype == torch.float32:
        size = true.abs().amax(-1, keepdim=True).clamp_min(true.square().mean().sqrt())
        return float((error / (UNIT[torch.float32] * size)).max())
    limit = HALF if arguments["value"].dtype == torch.float16 else BRAIN
    return float((error / true.abs().amax().clamp_min(1)).max() / limit * LIMIT)


def differentiated(function, arguments):
    """Output and gradients under random gradients of the output, in float64."""
    leaves = [v.detach().requires_grad_() for v in arguments.values()]
    output = function(**dict(zip(arguments, leaves, strict=True)))[0]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad(output, leaves, grad.to(output))
    return [t.detach().double() for t in (output, *grads)]


def interpret():
    """Errors of every interpreted case, and bits of a strided and of a masked input."""
    module = importlib.import_module("dsf_kernels.monarch_attention")
    found = {name: measure(case) for name, case in (INTERPRETED | SIXTEEN).items()}
    arguments, options = INTERPRETED["strided"]
    plain = {k: v.contiguous() for k, v in arguments.items()}
    results = [module.monarch_attention(**a, **options) for a in (arguments, plain)]
    dirty, options = tensors(5, batch=2), INTERPRETED["nothing kept"][1]
    clean = module.monarch_attention(**dirty, **options)
    for name in ("key", "value"):
        dirty[name][1, 2:] = torch.nan
    found["strides"] = torch.equal(*results)
    found["zero without keys"] = not bool(clean[0].any())
    found["masked rows unread"] = torch.equal(
        clean[1], module.monarch_attention(**dirty, **options)[1]
    )
    launch = importlib.import_module("dsf_kernels.monarch_launch")
    launch.__dict__["MAX_TILE"] = 16
    found |= {name: {"output": forward_error(case)} for name, case in WIDE.items()}
    small = [*tensors(5).values(), None, 2, 2, False, 0.5]
    torch.library.opcheck(torch.ops.dsf.monarch_attention, tuple(small),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case, a strided and a masked input; all are judged."""
    found = kernel_laws.run_interpreted(__file__)
    for law in ("strides", "zero without keys", "masked rows unread"):
        assert found.pop(law), law
    assert set(found) == set(INTERPRETED | SIXTEEN | WIDE)
    kernel_laws.all_within(found, LIMIT)


@pytest.mark.parametrize("name", [n for n in INTERPRETED if n != "length 0"])
def test_definition_is_the_model(name):
    """The float64 definition equals the model's rows, gradients included."""
    from dsf_kernels.reference import monarch_attention_reference

    import dsf
    from dsf.models.monarch_attention import monarch_attention_recurrence

    arguments, options = INTERPRETED[name]
    results = []
    for ours in (True, False):
        leaves = [v.double().requires_grad_() for v in arguments.values()]
        if ours:
            y = monarch_attention_reference(*leaves, **options)
        else:
            y = dsf.scan(monarch_attention_recurrence(*leaves[:2], **options), leaves[2])
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= EXACT * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize(("message", "wrong"), [
    ("padding: expected one of", {"padding": "post"}),
    ("steps: expected at least 1, got 0", {"steps": 0}),
    ("block: expected at least 1, got 0", {"block": 0}),
    ("a mask per query does not fit", {"key_mask": torch.ones(1, 3)}),
    ("scale: expected a finite nonzero number", {"scale": 0.0}),
    ("key: expected axes", {"key": torch.zeros(1, 3, 1, 4)}),
    ("group count that divides", {"key": torch.zeros(1, 3, 2, 16)}),
])  # fmt: skip
def test_messages(message, wrong, monkeypatch):
    from dsf_kernels import launch, monarch_attention

    arguments = tensors(3) | {"block": 2}
    with pytest.raises(NotImplementedError, match="expected CUDA tensors, got cpu"):
        monarch_attention(**arguments)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(ValueError, match=message):
        monarch_attention(**arguments | wrong)


def test_large_tiles_are_refused(monkeypatch):
    from dsf_kernels import launch, monarch_attention

    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(NotImplementedError, match=r"got 2 and 130\. Use dsf"):
        monarch_attention(**tensors(260), block=2, steps=2)
    leaves = {k: v.requires_grad_() for k, v in tensors(260).items()}
    with pytest.raises(NotImplementedError, match=r"for gradients, got 130 and 2\. Use dsf"):
        monarch_attention(**leaves, block=130)


FLOAT = ("entropy", "grad_means", "grad_entropy", "grad_mixed", "sum_query", "sum_key",
         "grad_abar", "sums")  # fmt: skip


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("side", [16, pytest.param(64, marks=pytest.mark.slow),
                                  pytest.param(128, marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.parametrize(
    "name", ["right_kernel", "left_kernel", "left_gradient", "right_gradient"]
)
def test_compiles_ahead_of_time(name, side, architecture, record_property):
    """The fp16 tiles of width 64, first and last step."""
    compiled(name, side, architecture, record_property)


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("name", ["short_kernel", "wide_right_kernel", "wide_left_kernel"])
def test_one_step_compiles_ahead_of_time(name, architecture, record_property):
    compiled(name, 16, architecture, record_property)


def compiled(name, side, architecture, record_property):
    launch = importlib.import_module("dsf_kernels.monarch_launch")
    kernel = getattr(launch, name)
    fixed = launch.tile_settings(side, (64, 64), torch.float16, "gradient" in name)
    fixed |= {"short": launch.SHORT, "wide_": launch.WIDE}.get(name[:5], {})
    options = {k: fixed.pop(k) for k in ("num_warps", "num_stages")}
    fixed |= {"B": side, "M": side, "FIRST": True, "LAST": True, "HAS_MASK": True}
    fixed |= {"RIGHT": True, "LEFT": True}
    fixed |= dict.fromkeys(("q_d", "k_d", "v_d", "o_d", "g_d"), 1)
    pointers = (*NAMES, "abar", "means", "mixed", "out", "grad", "grad_key", "grad_value")
    types = dict.fromkeys(pointers, "*fp16") | dict.fromkeys(FLOAT, "*fp32")
    types |= {"mask": "*u8", "scale": "fp32"}
    types["grad_query"] = "*fp32" if name == "left_gradient" else "*fp16"
    kernel_laws.build(kernel, architecture, types, fixed, options, record_property)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_definition(name):
    """Within LIMIT; in float32, where sums are long, no worse than PEER times torch itself."""
    units = measure(ON_GPU[name], "cuda")
    limit = LIMIT
    if max(units.values()) > LIMIT and ON_GPU[name][0]["value"].dtype == torch.float32:
        limit = PEER * max(measure(ON_GPU[name], "cuda", plain=True).values())
    assert max(units.values()) <= limit, (units, limit)


@kernel_laws.on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_wide_tiles(dtype):
    """128 places and 256 blocks, 256 of both, and 300 places with half of the keys."""
    for length, block in ((32_768, 128), (65_536, 256), (33_011, 300)):
        mask = masked(length, length // 2) if block == 300 else None
        case = tensors(length, 1, 64, dtype=dtype), {"block": block, "key_mask": mask}
        assert forward_error(case, "cuda") <= LIMIT, (length, block)


@kernel_laws.on_gpu
@pytest.mark.parametrize(("block", "steps"), [(16, 1), (64, 2)])
def test_gpu_repeats_and_is_independent_of_batch(block, steps):
    from dsf_kernels.monarch_attention import monarch_attention

    def run(**arguments):
        leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
        output = monarch_attention(**leaves, block=block, steps=steps)
        return output, *torch.autograd.grad(output.float().square().sum(), [*leaves.values()])

    arguments = tensors(1000, 3, 64, dtype=torch.float16, batch=4)
    kernel_laws.repeats_and_rows_stand_alone(run, arguments)


@kernel_laws.on_gpu
def test_gpu_many_rows_large_logits_and_opcheck():
    """65,537 lanes, logits far beyond fp16's exponent, and the operator's laws."""
    from dsf_kernels.monarch_attention import monarch_attention

    many = tensors(4, 1, 16, dtype=torch.float16)
    many = {k: v.expand(65_537, -1, -1, -1).cuda() for k, v in many.items()}
    output = monarch_attention(**many, block=2)
    assert torch.equal(output[0], output[-1])
    large = {k: 200 * v.cuda() for k, v in tensors(256, 1, 64, dtype=torch.float16).items()}
    assert torch.isfinite(monarch_attention(**large, block=16, steps=2)).all()
    small = [*(v.cuda() for v in tensors(70).values()), None, 8, 2, False, 0.5]
    torch.library.opcheck(torch.ops.dsf.monarch_attention, tuple(small))


if __name__ == "__main__":
    interpret()
