"""gated_scan and rglru_scan against their float64 loops: in Triton's interpreter (a child), on the
GPU, and compiled ahead of time. Run as a script it prints the interpreter's errors."""

import importlib
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 16.0  # units
CLOSE = 1e-12
SMALL = {"T": 4, "S": 2, "C": 4}
LOGS = ("logit", "recurrence_logit", "input_logit", "parameter", "lower_bound")


def tensors(kind, length, width=5, dtype=torch.float32, initial=True, batch=1, spread=1.0):
    """Arguments of rglru_scan or gated_scan; spread: of the logits."""
    generator = torch.Generator().manual_seed(length + width)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    shape = (batch, length, width)
    names = ("recurrence_logit", "input_logit") if kind == "rglru" else ("logit",)
    found = {"inputs": draw(*shape).to(dtype)}
    found |= {name: (spread * draw(*shape)).to(dtype) for name in names}
    if kind == "rglru":
        found["parameter"] = draw(width) - 3
    else:
        found["lower_bound"] = torch.rand(width, generator=generator) / 2
    return found | {"initial_state": draw(batch, width) if initial else None}


def cases(kind, lengths, width, tile):
    """{name: (kind, tensors, type, options)}."""
    options = [{}] if kind == "rglru" else [{"complement": True}]
    found = {}
    for option in options:
        for length in lengths:
            found[f"length {length}"] = (tensors(kind, length, width), torch.float32, option)
        for dtype, size in ((torch.bfloat16, 2 * SMALL["C"]), (torch.float16, width)):
            found[f"{dtype} width {size}"] = (tensors(kind, tile + 1, size, dtype), dtype, option)
        wide = tensors(kind, tile + 1, initial=False, batch=2, spread=30.0)
        for logit in (name for name in wide if name.endswith("logit")):
            wide[logit] = wide[logit].clamp(-80, 80)  # a gate below 2^-126 counts as 0
        found["closed and open gates"] = (wide, torch.float32, option)
        ends = tensors(kind, tile + 1)
        name = "recurrence_logit" if kind == "rglru" else "logit"
        ends[name][:, 2], ends[name][:, 4] = -torch.inf, torch.inf
        found["infinite logits"] = (ends, torch.float32, option)
        strided = tensors(kind, tile + 1, batch=2)
        strided["inputs"] = strided["inputs"].mT.contiguous().mT
        strided[name] = torch.randn(2, 2 * tile + 9, 9)[:, 3 : 2 * tile + 4 : 2, 2:7]
        found["strided"] = (strided, torch.float32, option)
    if kind == "rglru":
        slow = tensors(kind, tile + 1)
        slow["parameter"] = torch.tensor([-20.0, -12.0, -6.0, 0.0, 1.0])
        found["slow and fast"] = (slow, torch.float32, {})
        starts = torch.zeros(2, 2 * tile + 1, dtype=torch.bool)
        starts[:, 0] = starts[1, 3] = starts[0, tile] = starts[:, -1] = True
        documents = tensors(kind, 2 * tile + 1, batch=2)
        found["documents"] = (documents, torch.float32, {"reset": starts})
    else:
        bare = tensors(kind, tile + 1)
        bare["lower_bound"] = None
        found["no bound"] = (bare, torch.float32, {"complement": True})
        found["input as it comes"] = (tensors(kind, tile + 1), torch.float32, {})
    return {f"{kind} {name}": (kind, *case) for name, case in found.items()}


def gated_bound(logit, inputs, initial_state=None, lower_bound=None, *, complement=False):
    """The loop with the falling part of the gradient turned round, so that its terms only add."""
    from dsf_kernels.reference import diagonal_scan_reference
    from dsf_kernels.reference.diagonal_gates import sigmoid

    low = torch.zeros_like(inputs[0, 0]) if lower_bound is None else lower_bound
    shut = (1 - low) * sigmoid(-logit)
    shut = 2 * shut.detach() - shut
    decay = low + (1 - low) * sigmoid(logit)
    return diagonal_scan_reference(decay, shut * inputs if complement else inputs, initial_state)


def rglru_bound(
    inputs, recurrence_logit, input_logit, parameter, initial_state=None, *, reset=None
):
    """The same for the RG-LRU, whose root falls as log a grows."""
    from dsf_kernels.reference import diagonal_scan_reference
    from dsf_kernels.reference.diagonal_gates import sigmoid

    rate = 8.0 * torch.nn.functional.softplus(parameter)
    log_decay = -rate * sigmoid(recurrence_logit)
    gap = -torch.expm1(2 * log_decay)
    none = gap.detach() <= 0
    root = torch.sqrt(gap.masked_fill(none, 1.0)).masked_fill(none, 0.0)
    if reset is not None:
        root = root.masked_fill(reset[..., None], 1.0)
        log_decay = log_decay.masked_fill(reset[..., None], -torch.inf)
    written = (2 * root.detach() - root) * sigmoid(input_logit) * inputs
    return diagonal_scan_reference(log_decay, written, initial_state, log=True)


def rglru_in_float32(
    inputs, recurrence_logit, input_logit, parameter, initial_state=None, *, reset=None
):
    """The same in float32 torch: what no kernel that makes log a in float32 can be far below."""
    log_decay = -8.0 * torch.nn.functional.softplus(parameter) * recurrence_logit.sigmoid()
    root = torch.sqrt(-torch.expm1(2 * log_decay))
    state, states = initial_state, []
    for a, u in zip(log_decay.exp().unbind(1), (root * input_logit.sigmoid() * inputs).unbind(1),
                    strict=True):  # fmt: skip
        state = a * state + u
        states.append(state)
    return torch.stack(states, 1), state


def measure(case, device="cpu", plain=False):
    import dsf_kernels.reference as loops
    from dsf_kernels import gated_scan, rglru_scan

    kind, arguments, dtype, options = case
    scan, loop, bound = (
        (rglru_scan, loops.rglru_scan_reference, rglru_bound) if kind == "rglru"
        else (gated_scan, loops.gated_scan_reference, gated_bound)
    )  # fmt: skip
    scan = rglru_in_float32 if plain else scan
    moved = kernel_laws.moved(arguments, device)
    options = kernel_laws.moved(options, device) if "reset" in options else options
    return loops.error_units(scan, loop, moved, LOGS, unit=UNIT[dtype], bound=bound, **options)


INTERPRETED = cases("rglru", (0, 1, 9, 17), 5, 8) | cases("gated", (0, 2), 5, 8)
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 1021)
ON_GPU = cases("rglru", LENGTHS, 67, 128) | cases("gated", LENGTHS, 67, 128)


def interpret():
    """Errors of every interpreted case and the split, in this process."""
    module = importlib.import_module("dsf_kernels.diagonal_gates")
    for name in ("FORWARD", "ADJOINT", "RAGGED"):
        for tile in (getattr(module, name), getattr(module, f"{name}_16")):
            tile.clear()
            tile.update(SMALL)
    found = {name: measure(case) for name, case in INTERPRETED.items()}
    arguments = tensors("rglru", 20)
    whole = ("initial_state", "parameter")
    parts = kernel_laws.scan_in_two(module.rglru_scan, arguments, 8, whole)
    found["split"] = all(map(torch.equal, parts, module.rglru_scan(**arguments)))
    flat = tensors("rglru", 3)
    rate = flat.pop("parameter").exp()
    sample = (flat["inputs"], flat["recurrence_logit"], flat["input_logit"], rate, None)
    torch.library.opcheck(torch.ops.dsf.gated_scan, (*sample, flat["initial_state"], False),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case and a split on a tile's edge; all are judged."""
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("split")
    assert set(found) == set(INTERPRETED)
    kernel_laws.all_within(found, LIMIT)


def test_messages():
    from dsf_kernels import gated_scan, rglru_scan

    ones = torch.ones(1, 2, 3)
    message = "logit: expected float32, bfloat16 or float16"
    arguments = {"logit": ones, "inputs": ones}
    kernel_laws.refuses(gated_scan, arguments, TypeError, message, logit=ones.double())
    arguments = dict.fromkeys(("inputs", "recurrence_logit", "input_logit"), ones)
    kernel_laws.refuses(rglru_scan, arguments | {"parameter": ones[0, 0]}, TypeError,
                        "parameter: expected float32", parameter=ones[0, 0].double())  # fmt: skip


def test_loops_are_the_models():
    """The RG-LRU and HGRN of dsf in float64: states, and gradients of every argument."""
    from dsf_kernels.reference import gated_scan_reference, rglru_scan_reference

    import dsf
    from dsf.models.hgrn import hgrn_recurrence
    from dsf.models.rglru import rglru_recurrence

    def leaves(kind):
        given = {k: v.double() for k, v in tensors(kind, 9).items()}
        return {k: v.requires_grad_() for k, v in given.items()}

    def same(found, true, given):
        weight = torch.randn(true.shape, dtype=torch.float64)
        grads = (torch.autograd.grad((y * weight).sum(), list(given.values()))
                 for y in (found, true))  # fmt: skip
        torch.testing.assert_close(found, true, rtol=CLOSE, atol=CLOSE)
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, rtol=CLOSE, atol=CLOSE)

    given = leaves("rglru")
    x, start = given["inputs"], given["initial_state"]
    reset = torch.arange(9)[None] % 4 == 2
    r = rglru_recurrence(given["recurrence_logit"], given["input_logit"], given["parameter"],
                         reset=reset, initial_state=start)  # fmt: skip
    same(
        rglru_scan_reference(**given, reset=reset)[0],
        dsf.scan(r, x[..., None], "reference")[..., 0],
        given,
    )

    given = leaves("gated")
    u, low = given["inputs"], given["lower_bound"]
    log_decay = (low + (1 - low) * torch.sigmoid(given["logit"])).log()
    r = hgrn_recurrence(log_decay, initial_state=given["initial_state"])
    found = gated_scan_reference(**given, complement=True)[0]
    same(found, dsf.scan(r, u[..., None], "reference")[..., 0], given)


@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["FORWARD", "ADJOINT", "RAGGED"])
def test_compiles_ahead_of_time(name, kind, architecture, record_property):
    module = importlib.import_module("dsf_kernels.diagonal_gates")
    tile = dict(getattr(module, name + ("" if kind == "fp32" else "_16")))
    options = {k: tile.pop(k) for k in ("num_warps", "maxnreg") if k in tile}
    ragged, exact = name == "RAGGED", kind == "fp32"
    fixed = tile | {"V": 1 if exact else 2, "FULL": not ragged, "RESET": ragged, "RGLRU": True,
                    "COMPLEMENT": False, "EXACT": exact, "SUMS": True}  # fmt: skip
    pointers = {"carry": "*i32", "ticket": "*i32"}
    (pointers if ragged else fixed)["reset"] = "*u8" if ragged else None
    pointers |= dict.fromkeys(("inputs", "logit", "second", "states", "grads", "grad_inputs",
                               "grad_logit", "grad_second"), f"*{kind}")  # fmt: skip
    pointers |= dict.fromkeys(("rate", "initial", "final", "grad_final", "grad_initial", "sums"),
                              "*fp32")  # fmt: skip
    source = module.gated_kernel if name == "FORWARD" else module.gated_adjoint_kernel
    kernel_laws.build(source, architecture, pointers, fixed, options, record_property)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name):
    units = measure(ON_GPU[name], "cuda")
    limits = dict.fromkeys(units, LIMIT)
    if name == "rglru slow and fast":  # a rounded log a of -10 is ten roundings of a
        plain = measure(ON_GPU[name], "cuda", plain=True)
        limits |= {k: max(LIMIT, 1.25 * plain[k]) for k in ("output", "final state")}
    assert all(units[k] <= limits[k] for k in units), (units, limits)


@kernel_laws.on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_repeats_and_is_independent_of_batch(dtype):
    from dsf_kernels import rglru_scan

    arguments = tensors("rglru", 3000, 320, dtype, batch=4)
    run = kernel_laws.with_gradients(rglru_scan, ("parameter",))
    kernel_laws.repeats_and_rows_stand_alone(run, arguments, shared=("parameter",))


@kernel_laws.on_gpu
def test_gpu_long_and_opcheck():
    from dsf_kernels import gated_scan

    logit = torch.randn(1, 1_048_576, 8, device="cuda")
    states, final = gated_scan(logit, torch.ones_like(logit), complement=True)
    assert torch.equal(states[:, -1], final)
    assert float((states[:, 100:] - 1).abs().max()) < 1e-5  # a mean of ones
    flat = {k: v.cuda() for k, v in tensors("rglru", 300, 64).items()}
    sample = (flat["inputs"], flat["recurrence_logit"], flat["input_logit"],
              flat["parameter"].exp(), None, flat["initial_state"], False)  # fmt: skip
    torch.library.opcheck(torch.ops.dsf.gated_scan, sample)


if __name__ == "__main__":
    interpret()
