"""hierarchical_attention and hierarchical_stream against their float64 definition, and that
against the models' core: in Triton's interpreter (a child process), on the GPU, and compiled ahead
of time. Run as a script it prints the interpreter's errors as JSON.
"""

import functools
import importlib
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 64.0  # units of the row in float32, over the size of the scores
SIXTEEN_BITS = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # absolute, of numbers of unit size
ALONE = 1e-6  # absolute, float32: gradients that are zero
EXACT = 1e-13
PAPER = (16, 8, 4, 2)
NAMES = ("query", "key", "value")
FORMS = ("attention", "stream")


def tensors(length, width=4, channel=None, dtype=torch.float32, head=1, batch=1, size=1.0):
    generator = torch.Generator().manual_seed(length + width)

    def draw(width):
        return (size * torch.randn(batch, length, head, width, generator=generator)).to(dtype)

    return {"query": draw(width), "key": draw(width), "value": draw(channel or width)}


def scattered(length, batch=1):
    """A mask with some tokens, and one whole group, taken out."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[:, :6] = False
    mask[:, -2:] = True
    return mask


def strided(length):
    found = tensors(length, 4, 4, head=2)
    found["query"] = found["query"].mT.contiguous().mT
    found["key"] = found["key"][:, :, :1].expand(-1, -1, 2, -1)
    found["value"] = kernel_laws.strided_values(length)
    return found


# name: form, tensors, branching, options
INTERPRETED = {
    "length 0": ("attention", tensors(0), PAPER, {}),
    "length 1": ("attention", tensors(1), PAPER, {}),
    "length 2": ("attention", tensors(2, 4, 3), (2, 2), {}),
    "one tile": ("attention", tensors(11, head=2, batch=2), (2, 3, 2), {}),
    "two tiles, then the root": ("attention", tensors(37, 3, 5), (2, 3, 1, 3), {}),
    "large root": ("attention", tensors(41), (4, 2), {"mask": True}),
    "flat": ("attention", tensors(19), (5,), {"mask": True}),
    "flat, others only": ("attention", tensors(17), (5,), {"self_term": False}),
    "three stages, masked": ("attention", tensors(70), (2,) * 7, {"mask": True}),
    "others only": ("attention", tensors(40), (2,) * 6, {"self_term": False}),
    "strided": ("attention", strided(11), (2, 3, 2), {}),
    "peaked": ("attention", tensors(16, size=5.0), (4, 4), {}),
    "stream length 0": ("stream", tensors(0), PAPER, {}),
    "stream length 2": ("stream", tensors(2), PAPER, {}),
    "stream, one tile": ("stream", tensors(11, head=2, batch=2), (2, 3, 2), {}),
    "stream, families cut": ("stream", tensors(24, 3, 5), PAPER, {}),
    "stream, flat": ("stream", tensors(37), (5,), {"mask": True}),
    "stream, two levels above": ("stream", tensors(70), (2,) * 7, {"mask": True}),
    "stream, wide family": ("stream", tensors(70), (2, 3, 20), {"mask": True}),
    "stream, strided": ("stream", strided(11), (4, 2), {}),
    "stream, peaked": ("stream", tensors(16, size=5.0), (4, 4), {}),
}
SIXTEEN = {
    f"{form} {dtype}": (form, tensors(37, dtype=dtype), (4, 3), {"mask": True})
    for form in FORMS
    for dtype in (torch.float16, torch.bfloat16)
}
# form, type, length, branching, width, channels, mask: every kernel in every type, few builds
SHAPES = [
    ("attention", torch.float32, 2003, (2,) * 11, 60, 100, True),
    ("attention", torch.float32, 997, (5,), 64, 64, True),
    ("attention", torch.float16, 4099, PAPER, 64, 64, True),
    ("attention", torch.float16, 2048, (4,) * 6, 128, 128, False),
    ("attention", torch.float16, 1013, (7, 7, 7, 7), 32, 64, True),
    ("attention", torch.bfloat16, 5000, PAPER, 64, 64, False),
    ("attention", torch.bfloat16, 1024, (16, 64), 128, 64, True),
    ("stream", torch.float32, 64, PAPER, 64, 64, False),
    ("stream", torch.float32, 1021, PAPER, 64, 64, True),
    ("stream", torch.float32, 997, (5,), 64, 64, True),
    ("stream", torch.float16, 4099, PAPER, 64, 64, True),
    ("stream", torch.float16, 2048, (4,) * 6, 128, 128, False),
    ("stream", torch.float16, 1013, (7, 7, 7, 7), 32, 64, True),
    ("stream", torch.bfloat16, 5000, PAPER, 64, 64, False),
    ("stream", torch.bfloat16, 1500, (3, 50, 10), 64, 64, True),
]
SMALL = ("length 0", "length 1", "strided", "stream length 0", "stream length 2",
         "stream, wide family")  # fmt: skip
ON_GPU = {name: INTERPRETED[name] for name in SMALL} | {
    f"{form} {dtype} {length} by {branching}, {width} {channel}, mask {mask}": (
        form, tensors(length, width, channel, dtype, 2, 2), branching, {"mask": mask},
    )
    for form, dtype, length, branching, width, channel, mask in SHAPES
}  # fmt: skip


def both(function, branching, options):
    """The function with its output, and the part of it that is a state: none."""

    def run(**arguments):
        output = function(*arguments.values(), branching, **options)
        return output, output[:, :0]

    return run


def measure(case, device="cpu"):
    """Errors of output and gradients, as parts of what is allowed.

    Rounding of the scores counts by their size, which is that of the inputs squared.
    """
    from dsf_kernels import reference

    form, arguments, branching, options = case
    name, options = f"hierarchical_{form}", dict(options)
    arguments = {k: v.to(device) for k, v in arguments.items()}
    batch, length = arguments["value"].shape[:2]
    if options.pop("mask", False):
        options["key_mask"] = scattered(length, batch).to(device)
    kernel = getattr(importlib.import_module(f"dsf_kernels.{name}"), name)
    loop = getattr(reference, f"{name}_reference")
    kernel, loop = (both(f, branching, options) for f in (kernel, loop))
    dtype = arguments["value"].dtype
    if dtype == torch.float32:
        size = max(1.0, float(arguments["value"].square().mean())) if length else 1.0
        units = reference.row_units(kernel, loop, arguments, unit=UNIT[dtype])
        return {name: value / (LIMIT * size) for name, value in units.items()}
    exact = [v.double() for v in arguments.values()]
    found = zip(_gradients(kernel, arguments.values()), _gradients(loop, exact), strict=True)
    return {
        name: float(((a.double() - b).abs() / b.abs().amax().clamp_min(1)).max())
        / SIXTEEN_BITS[dtype]
        for name, (a, b) in zip(("output", *NAMES), found, strict=True)
    }


def _gradients(function, arguments):
    """Output and gradients under random gradients of the output."""
    leaves = [a.detach().requires_grad_() for a in arguments]
    output = function(**dict(zip(NAMES, leaves, strict=True)))[0]
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    found = torch.autograd.grad(output, leaves, weight, allow_unused=True)
    return output.detach(), *(torch.zeros((), device=output.device) if g is None else g
                              for g in found)  # fmt: skip


def opcheck(device, tests):
    """Schema, fake tensors and gradients of both operators."""
    arguments = [v.to(device).requires_grad_() for v in tensors(21).values()]
    mask = scattered(21).to(device)
    operators = torch.ops.dsf
    tied, free = operators.hierarchical_attention, operators.hierarchical_stream
    torch.library.opcheck(tied, (*arguments, mask, [2, 2, 2, 2], True, 0.5), test_utils=tests)
    torch.library.opcheck(free, (*arguments, mask, [2, 2, 2], 0.5), test_utils=tests)


def interpret():
    """Errors of every interpreted case in tiles of 16, and what is exact."""
    launch = importlib.import_module("dsf_kernels.hierarchical_launch")
    stream = importlib.import_module("dsf_kernels.hierarchical_stream")
    tied = importlib.import_module("dsf_kernels.hierarchical_attention")
    launch.TILE.update(dict.fromkeys(launch.TILE, 16))
    launch.ROOT.update(dict.fromkeys(launch.ROOT, 16))
    launch.__dict__["ITEMS"] = stream.__dict__["PART_ROWS"] = 16
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))  # every number is written
    found: dict = {name: measure(case) for name, case in (INTERPRETED | SIXTEEN).items()}
    torch.empty = empty
    arguments, mask = list(tensors(23).values()), scattered(23)
    for form, run in {"attention": tied.hierarchical_attention,
                      "stream": stream.hierarchical_stream}.items():  # fmt: skip
        clean = run(*arguments, (2, 2, 2), mask)
        dirty = [arguments[0], *(torch.where(mask[..., None, None], t, torch.nan)
                                 for t in arguments[1:])]  # fmt: skip
        found[f"{form} reads no masked key"] = torch.equal(clean, run(*dirty, (2, 2, 2), mask))
    before = stream.hierarchical_stream(*arguments, (2, 2, 2))
    later = [t.clone() for t in arguments]
    for t in later:
        t[:, 13:] += 1
    after = stream.hierarchical_stream(*later, (2, 2, 2))
    found["stream sees no later token"] = torch.equal(before[:, :13], after[:, :13])
    alone, value = tensors(1), tensors(1)["value"]
    output, *grads = _gradients(both(stream.hierarchical_stream, (5,), {}), alone.values())
    found["stream of one token"] = torch.allclose(output, value, rtol=0, atol=ALONE)
    found["which no score moves"] = float(torch.stack(grads[:2]).abs().max()) <= ALONE
    opcheck("cpu", kernel_laws.OPCHECKS)
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case and what holds exactly; all are judged."""
    found = kernel_laws.run_interpreted(__file__)
    for form in FORMS:
        assert found.pop(f"{form} reads no masked key")
    for name in ("stream sees no later token", "stream of one token", "which no score moves"):
        assert found.pop(name), name
    assert set(found) == set(INTERPRETED | SIXTEEN)
    kernel_laws.all_within(found, 1.0)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    ("length", "branching"), [(2, (2, 2)), (11, (2, 3, 2)), (70, PAPER), (37, (2, 3, 1, 3))]
)
@pytest.mark.parametrize("form", [*FORMS, "others"])
def test_definition_is_the_models(form, length, branching, mask):
    """The explicit matrices and the tree passes of the model: outputs and gradients in float64."""
    from dsf_kernels import reference

    import dsf
    from dsf.models.hierarchical_attention import hierarchical_attention_recurrence
    from dsf.trees import tree_from_branching

    kept = scattered(length) if mask else None
    tree = tree_from_branching(length, branching)
    if form == "stream":
        loop, options = reference.hierarchical_stream_reference, {"rows": "free", "causal": True}
        given = {}
    else:
        loop = reference.hierarchical_attention_reference
        options = given = {"self_term": form == "attention"}

    def model(query, key, value):
        system = hierarchical_attention_recurrence(query, key, tree, key_mask=kept, **options)
        return (dsf.scan(system, value),)

    def definition(query, key, value):
        return (loop(query, key, value, branching, kept, **given),)

    arguments = [t.double() for t in tensors(length).values()]
    for got, want in zip(_gradients(definition, arguments), _gradients(model, arguments),
                         strict=True):  # fmt: skip
        assert float((got - want).abs().max()) <= EXACT


def test_stages_cover_the_tree():
    """Every level is in one stage, and the last stage holds the root."""
    from dsf_kernels.hierarchical_launch import stages

    paper = stages(16384, PAPER, 64, 32)
    assert [stage.branching for stage in paper] == [(2, 4, 8), ()]
    assert (paper[0].n_sub, paper[1].n_item, paper[1].large) == (256, 256, True)
    binary = stages(2**14, (2,) * 14, 64, 32)
    assert [len(stage.branching) for stage in binary] == [6, 5, 3]
    assert [s.branching for s in stages(49, (7, 7), 64, 32)] == [(7, 7)]
    assert stages(37, (2, 3, 1, 3), 16, 16)[-1].branching == (5,)


def test_outlines_cut_families_where_nodes_end():
    from dsf_kernels.hierarchical_stream import outline

    assert outline(16384, PAPER, 64)[:1] == ((2, 4, 8),)
    assert outline(16384, PAPER, 64).upper == ((64, 0),)
    assert outline(24, PAPER, 16) == ((2, 4, 2), 16, ((8, 64),), 2)
    assert outline(120, (2, 6, 4), 16) == ((4, 2), 8 * 2, ((4, 24), (24, 0)), 2)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"scale": 0}, ValueError, "scale: expected a finite nonzero number, got 0"),
        ({"branching": (4, 65)}, ValueError, r"branching: expected .* got \(4, 65\)"),
        ({"branching": ()}, ValueError, r"branching: expected .* got \(\)"),
        ({"key": torch.zeros(1, 3, 2, 4)}, ValueError, r"key: expected axes \(batch=1, time=3"),
        ({"key_mask": torch.ones(1, 4) > 0}, ValueError, "key_mask: expected axes"),
        ({"key_mask": torch.ones(1, 3)}, TypeError, "key_mask: expected torch.bool"),
        ({"value": torch.zeros(1, 3, 1, 4).half()}, TypeError, "expected torch.float16"),
        ({"query": torch.zeros(1, 3, 1, 129), "key": torch.zeros(1, 3, 1, 129)}, ValueError,
         "got width=129"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_messages(form, wrong, error, message, monkeypatch):
    module = importlib.import_module(f"dsf_kernels.hierarchical_{form}")
    function = getattr(module, f"hierarchical_{form}")
    with pytest.raises(NotImplementedError, match="expected CUDA tensors, got cpu"):
        function(**tensors(3))
    shared = importlib.import_module("dsf_kernels.hierarchical_attention")
    monkeypatch.setattr(shared, "check_kind", lambda *_: None)  # as if on a GPU
    with pytest.raises(error, match=message):
        function(**tensors(3) | wrong)


@functools.lru_cache
def plans():
    """Plans of a call in bf16, 64 wide."""
    attention = importlib.import_module("dsf_kernels.hierarchical_launch")
    stream = importlib.import_module("dsf_kernels.hierarchical_stream")
    like = torch.empty(1, 16384, 1, 64, dtype=torch.bfloat16)
    return (attention.Plan(like, like, like, None, PAPER, True, 0.125),
            stream.Plan(like, like, like, None, PAPER, 0.125))  # fmt: skip


def _settings(name):
    """Module that holds a kernel, and the settings it is launched with."""
    tied, stream = plans()
    if name in ("stream", "stream_gradient"):
        return "hierarchical_stream", stream.tiles()
    if name == "group_gradient":
        sizes = {"SPAN": 64, "TILE": 64, "ROWS": stream.block, "BLOCK": stream.block}
        return "hierarchical_stream", stream.fixed | sizes
    place = int(name.startswith("root"))
    return "hierarchical_launch", tied.common(tied.stages[place], place)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [(name, 90) for name in ("tile", "root", "stream")]
    + [pytest.param(name, 90, marks=pytest.mark.slow)
       for name in ("tile_gradient", "root_rows", "root_columns", "stream_gradient",
                    "group_gradient")]
    + [pytest.param(name, 80, marks=pytest.mark.slow)
       for name in ("tile", "tile_gradient", "root", "stream", "stream_gradient")],
)  # fmt: skip
def test_compiles_ahead_of_time(name, architecture, record_property):
    module, fixed = _settings(name)
    kernel = getattr(importlib.import_module(f"dsf_kernels.{module}"), f"{name}_kernel")
    options = {k: fixed[k] for k in ("num_warps", "num_stages") if k in fixed}
    leaves = ("query", "key", "value", "grad", "out")
    own = () if name == "group_gradient" else ("grad_q", "grad_k", "grad_v")
    raw = () if name.startswith("root") else (*leaves, *own)
    numbers = ("n_", "q_", "k_", "v_", "m_", "g_", "first_", "part_")
    whole = ("width", "channels", "length", "family")
    types = {
        n: "*bf16" if n in raw else "*fp32"
        for n in kernel.arg_names
        if not n.startswith(numbers) and n not in whole
    }
    types |= {"scale": "fp32", "log_scale": "fp32", "mask": "*u8"}
    if module == "hierarchical_launch" and "LEAF" in fixed and fixed["LEAF"]:
        types["count"] = "*u8"
    fixed = fixed | dict.fromkeys(("q_w", "k_w", "v_w", "g_w"), 1)
    kernel_laws.build(kernel, architecture, types, fixed, options, record_property)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_definition(name):
    units = measure(ON_GPU[name], "cuda")
    assert max(units.values()) <= 1, units


@kernel_laws.on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_gpu_repeats_and_is_independent_of_batch(form):
    """Bitwise, with the gradients."""
    name = f"hierarchical_{form}"
    function = getattr(importlib.import_module(f"dsf_kernels.{name}"), name)
    run = kernel_laws.with_gradients(both(function, PAPER, {}), term=torch.square)
    arguments: kernel_laws.Arguments = {**tensors(5000, 64, None, torch.bfloat16, 2, 4)}
    kernel_laws.repeats_and_rows_stand_alone(run, arguments, repeats=20)


@kernel_laws.on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_gpu_long(form):
    name = f"hierarchical_{form}"
    function = getattr(importlib.import_module(f"dsf_kernels.{name}"), name)
    rows = torch.randn(1, 1_048_576, 2, 64, device="cuda", dtype=torch.bfloat16)
    rows.requires_grad_()
    output = function(rows, rows, rows, PAPER)
    assert torch.isfinite(output).all()
    (grad,) = torch.autograd.grad(output.float().square().sum(), rows)
    assert torch.isfinite(grad).all()


@kernel_laws.on_gpu
def test_gpu_opcheck():
    for module in ("attention", "stream"):
        importlib.import_module(f"dsf_kernels.hierarchical_{module}")
    opcheck("cuda", ("test_schema", "test_autograd_registration", "test_faketensor",
                     "test_aot_dispatch_dynamic"))  # fmt: skip


if __name__ == "__main__":
    interpret()
