"""mlstm_scan against its float64 loop: in Triton's interpreter (a child process), on the GPU, and
compiled ahead of time; the loop against the model. Run as a script it prints the interpreter's
errors as JSON.

Errors are in units of round-off times the sum of the absolute values of all terms."""

import importlib
import json
import math
from typing import Any

import kernel_laws
import pytest
import torch
from dsf_kernels.reference.mlstm import LEAST, mlstm_scan_reference
from kernel_laws import UNIT

import dsf
from dsf.models._exponential_gates import running_maximum
from dsf.models.mlstm import mlstm_recurrence

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 16.0  # units
CLOSE = 1e-11  # of two float64 loops
LOGS = ("input_gate", "forget_gate", "initial_maximum")
GATES = ("offset", "rising", "falling", "closed", "open", "shut")
PARTS = ("initial_state", "initial_key_sum", "initial_maximum")


def tensors(length, head=2, group=2, state=4, channel=4, dtype=torch.float32, gates="plain",
            initial=True, batch=1, signed=False) -> dict[str, Any]:  # fmt: skip
    """Positive queries and keys unless `signed`, so that divisors do not cancel."""
    generator = torch.Generator().manual_seed(length + state)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def keys():
        x = draw(batch, length, group, state)
        return (x if signed else x.abs()).to(dtype)

    token, time = (batch, length, head), torch.arange(length)[:, None]
    shut = -math.inf
    i, f = draw(*token), 2 + 2 * draw(*token)
    i, f = {
        "plain": (i, f), "offset": (i + 1000, f), "rising": (i + 2.0 * time, f),
        "falling": (i - 2.0 * time, f), "closed": (i, 0 * f - 100), "open": (i, 0 * f + 100),
        "never written": (torch.full(token, shut), f),
        "shut": (i.masked_fill(time % 7 < 3, shut), f.masked_fill(time % 5 == 3, shut)),
        "high and open": (i + 1000, f + 8),
    }[gates]  # fmt: skip
    found = {"query": keys(), "key": keys(), "value": draw(batch, length, head, channel).to(dtype),
             "input_gate": i, "forget_gate": f}  # fmt: skip
    starts = draw(batch, head, state, channel), draw(batch, head, state).abs(), draw(batch, head)
    return found | dict(zip(PARTS, starts if initial else [None] * 3, strict=True))


def cases(lengths, chunk, widths, **sizes):
    """{name: (tensors, type, options)}: lengths, gates, widths, groups, layouts."""
    found = {f"length {n}": (tensors(n, **sizes), torch.float32, {}) for n in lengths}
    for gates in GATES:
        found[gates] = (tensors(chunk + 3, 1, 1, gates=gates), torch.float32, {})
    for state, channel in widths:
        arguments = tensors(chunk // 2 + 1, 2, 1, state, channel)
        found[f"state {state} channel {channel}"] = (arguments, torch.float32, {})
    for dtype in (torch.bfloat16, torch.float16):
        found[f"{dtype}"] = (tensors(chunk // 2 + 1, dtype=dtype, **sizes), dtype, {})
    arguments = tensors(chunk // 2 + 1, 1, 1, initial=False, gates="open")
    found["exponential, eps, no start"] = (
        arguments | {"forget_gate": arguments["input_gate"].flip(1)}, torch.float32,
        {"forget": "exponential", "eps": 1e-2},
    )  # fmt: skip
    found["signed"] = (tensors(chunk // 2 + 1, 1, 1, signed=True), torch.float32, {})
    strided = tensors(chunk // 2 + 1, 2)
    strided["query"] = strided["query"].mT.contiguous().mT
    strided["value"] = kernel_laws.strided_values(chunk // 2 + 1)
    strided["input_gate"] = strided["input_gate"].mT.contiguous().mT
    found["strided"] = (strided, torch.float32, {})
    return found


def flat(function, anchor, tied=None):
    """The scan with its start as three arguments and its last state, n beside S, in units of
    exp(anchor); outputs that are `tied` have no gradient."""

    def run(initial_state=None, initial_key_sum=None, initial_maximum=None, **arguments):
        start = (initial_state, initial_key_sum, initial_maximum)
        start = None if initial_state is None else start
        y, (state, key_sum, m) = function(initial=start, **arguments)
        unit = torch.exp(m.detach().double() - anchor).to(state.dtype)[..., None, None]
        y = y if tied is None else torch.where(tied, y.detach(), y)
        return y, unit * torch.cat([state, key_sum[..., None]], -1)

    return run


class Stored(torch.autograd.Function):
    """What the error of numbers >= 0 kept in a narrow type grows with, and that of their
    gradients: themselves, but `least` at least, unless 0."""

    @staticmethod
    def forward(ctx, x, least):
        ctx.least = least
        return torch.where(x == 0, x, x.clamp_min(least))

    @staticmethod
    def backward(ctx, grad):
        return Stored.apply(grad, ctx.least), None


def magnitudes(arguments, dtype, scale, forget="sigmoid", **_):
    """The last m; outputs whose divisor is within rounding of its least, where the derivative
    jumps; and the scan in which all terms add: it bounds them before they cancel.

    y = (x / c + z x_0 / c^2) k, x and z numerator and divisor of absolute values, c the true
    divisor, k = max(1, z / c) the condition of the division, x_0 = x; c, k and x_0 are constant.
    Weighted values, weights, x and z are what the kernel keeps in the type of the values, after
    the weights in float32, 0 below 2^-126.
    """
    from dsf_kernels.reference import scalar_decay_scan_reference

    least_of, least_log = torch.finfo(dtype).tiny, math.log(2.0**-126 / UNIT[dtype])

    def parts(query, key, value, input_gate, forget_gate, state, key_sum, start, kept=True):
        decay = forget_gate
        if forget == "sigmoid":
            decay = torch.nn.functional.logsigmoid(forget_gate)
        open_decay, written = decay > LEAST, input_gate > LEAST
        decay, input_gate = decay.clamp_min(LEAST), input_gate.clamp_min(LEAST)
        m = running_maximum(decay, input_gate, 0.0 if start is None else start)
        m = m.clamp_min(LEAST)
        before = torch.cat([m[:, :1], m[:, 1:-1].detach()], 1)
        decay = decay + before[:, : decay.shape[1]] - m[:, 1:].detach()
        decay = torch.where(open_decay, decay, LEAST)
        log = input_gate - m[:, 1:].detach()
        log = log + (log.clamp_min(least_log) - log).detach() if kept else log
        write = torch.where(written, torch.exp(log), 0.0)[..., None]
        columns = torch.cat([write * value, write], -1)
        columns = Stored.apply(columns, least_of) if kept else columns
        start = None if state is None else torch.cat([state, key_sum[..., None]], -1)
        both, last = scalar_decay_scan_reference(query, key, columns, decay, start, scale=scale)
        return both[..., :-1], both[..., -1:], last, m.detach()

    given = {k: v if v is None else v.double() for k, v in arguments.items()}
    sizes = {k: v if v is None or k in LOGS else v.abs() for k, v in given.items()}
    _, sums, _, m = parts(*given.values(), kept=False)
    least = torch.exp(-m[:, 1:, :, None]).clamp_min(1e-300)
    divisor = torch.maximum(sums.abs(), least)
    most = parts(*sizes.values())[1]
    tied = (sums.abs() - least).abs() <= 4 * UNIT[dtype] * most

    def bound(**sizes):
        sizes = {k: v for k, v in sizes.items() if k in given}
        x, z, last, _ = parts(*sizes.values())
        x, z = Stored.apply(x, least_of), Stored.apply(z, least_of)
        condition = (z / divisor).detach().clamp_min(1.0)
        by_divisor = (x / divisor**2).detach() * (sums.abs() > least)
        y = condition * (x / divisor + by_divisor * z)
        return torch.where(tied, y.detach(), y), last

    return m[:, -1], tied, bound


def measure(case, device="cpu"):
    """Errors of outputs, last state and gradients in units."""
    from dsf_kernels.mlstm_scan import mlstm_scan
    from dsf_kernels.reference.units import error_units

    arguments, dtype, options = case
    moved = kernel_laws.moved(arguments, device)
    anchor, tied, bound = magnitudes(moved, dtype, 0.5, **options)
    functions = [flat(f, anchor, tied) for f in (mlstm_scan, mlstm_scan_reference)]
    return error_units(*functions, moved, LOGS, unit=UNIT[dtype], bound=bound, scale=0.5,
                       **options)  # fmt: skip


INTERPRETED = cases((0, 1, 2, 33), 16, [(17, 1), (3, 20)], head=1, group=1)
ON_GPU = cases((0, 1, 2, 31, 32, 33, 257), 64, [(1, 3), (16, 100), (128, 60), (256, 256)]) | {
    f"{dtype} length {length} {gates}": (
        tensors(length, 4, 2, 128, 64, dtype, gates, batch=2), dtype, {},
    )
    for dtype in (torch.bfloat16, torch.float16)
    for length in (63, 64, 65, 509, 2053)
    for gates in (*GATES, "plain", "high and open", "never written")
}  # fmt: skip


def shifted(module, arguments):
    """How far outputs and gradients move when the maximum is replaced by something near it."""
    maximum, results = module._running_maximum, []
    for step in (0.0, 0.7):
        leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
        with pytest.MonkeyPatch.context() as patch:
            shift = step * torch.sin(torch.arange(9.0))[:, None]
            patch.setattr(
                module, "_running_maximum", lambda *given, by=shift: maximum(*given) + by
            )
            y, _ = module.mlstm_scan(**leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))))
    pairs = [(a.detach(), b.detach()) for a, b in zip(*results, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def interpret():
    """Errors of every interpreted case and of a scan in two, in this process."""
    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    scalar = importlib.import_module("dsf_kernels.scalar_decay_scan")
    module = importlib.import_module("dsf_kernels.mlstm_scan")
    launch.CHUNK, launch.SLAB, launch.SHORT, launch.FEW, module.TILE = 32, 16, 0, 0, 8
    scalar.PARALLEL = (torch.float32, torch.float16, torch.bfloat16)
    found = {name: measure(case) for name, case in INTERPRETED.items()}
    arguments = {k: v for k, v in tensors(21).items() if k not in PARTS}
    y, last = module.mlstm_scan(**arguments)
    head, tail = ({k: v[:, rows] for k, v in arguments.items()}
                  for rows in (slice(0, 16), slice(16, None)))  # fmt: skip
    early, middle = module.mlstm_scan(**head)
    late, end = module.mlstm_scan(**tail, initial=middle)
    parts = (torch.cat([early, late], 1), *end)
    found["split"] = max(
        float((a - b).abs().max()) for a, b in zip(parts, (y, *last), strict=True)
    )
    found["other m"] = shifted(module, {k: v[:, :9] for k, v in arguments.items()})
    i, f = arguments["input_gate"], arguments["forget_gate"]
    top = torch.ops.dsf.mlstm_maximum(i, f, None, False)
    value = arguments["value"]
    column = value[..., :1].contiguous()
    for operator, given in {
        "mlstm_weights": (value.requires_grad_(), i, f, top, None, False),
        "mlstm_divide": (value.detach().clone().requires_grad_(), column, top, 0.0),
    }.items():
        torch.library.opcheck(getattr(torch.ops.dsf, operator), given,
                              test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case, a split, and another stabiliser; all are judged."""
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("split") < 1e-5
    assert found.pop("other m") < 1e-5
    assert set(found) == set(INTERPRETED)
    kernel_laws.all_within(found, LIMIT)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"scale": 0}, ValueError, "scale: expected a finite nonzero number, got 0"),
        ({"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
        ({"forget": "tanh"}, ValueError, "forget: expected one of .*, got 'tanh'"),
    ],
)
def test_messages(wrong, error, message):
    from dsf_kernels.mlstm_scan import mlstm_scan

    arguments = {k: v for k, v in tensors(3).items() if k not in PARTS}
    kernel_laws.refuses(mlstm_scan, arguments, error, message, **wrong)


def test_messages_on_shapes():
    from dsf_kernels.mlstm_scan import mlstm_scan

    arguments = {k: v.to("meta") for k, v in tensors(3).items()}
    state, key_sum, m = (arguments.pop(part) for part in PARTS)
    with pytest.raises(ValueError, match=r"initial_key_sum: expected axes \(batch=1, head=2, sta"):
        mlstm_scan(**arguments, initial=(state, m, key_sum))
    with pytest.raises(ValueError, match=r"forget_gate: expected axes .*time=3.*\(1, 2, 2\)"):
        mlstm_scan(**arguments | {"forget_gate": arguments["forget_gate"][:, 1:]})


# -- the loop against the model ----------------------------------------------------------------


def draws(length, *widths):
    torch.manual_seed(5)
    return [torch.randn(2, length, 3, *w, dtype=torch.float64, requires_grad=True) for w in widths]


def agree(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).reshape(ours.shape)
    got = torch.autograd.grad((ours * weight).sum(), inputs)
    expected = torch.autograd.grad((theirs * weight).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_loop_is_the_model(length, eps):
    """Without eps: unstabilised, gradients through the gates whole. With eps the divisor depends
    on m itself, which the model does not hold constant: values, gradients of q, k, v."""
    inputs = q, k, v, i, f = draws(length, (4,), (4,), (5,), (), ())
    ours, _ = mlstm_scan_reference(q, k, v, i, f, scale=0.5, eps=eps)
    theirs = dsf.scan(mlstm_recurrence(q, k, i, f, scale=0.5, eps=eps), v)
    agree(ours, theirs, inputs[:3] if eps else inputs)


def test_loop_does_not_depend_on_the_units_of_its_start():
    q, k, v, i, f = draws(7, (4,), (4,), (5,), (), ())
    _, end = mlstm_scan_reference(q, k, v, i, f)
    state, key_sum, m = (part.detach() for part in end)
    ours, _ = mlstm_scan_reference(q, k, v, i, f, (state, key_sum, m))
    unit = torch.e**3
    moved, _ = mlstm_scan_reference(q, k, v, i, f, (state / unit, key_sum / unit, m + 3))
    agree(ours, moved, [q, k, v, i, f])


def test_loop_has_the_derivative_by_the_maximum_it_starts_from():
    q, k, v, i, f = draws(5, (4,), (4,), (5,), (), ())
    state, key_sum, m = (t.detach() for t in mlstm_scan_reference(q, k, v, i, f)[1])
    inputs = [q, k, v, i - 3, f]

    def outputs(start):
        return mlstm_scan_reference(*inputs, (state, key_sum, start))[0].sum()

    m = m.requires_grad_()
    (found,) = torch.autograd.grad(outputs(m), m)
    step = torch.zeros_like(m)
    step[1, 2] = 1e-6
    slope = (outputs(m + step) - outputs(m - step)) / 2e-6
    torch.testing.assert_close(found[1, 2], slope, rtol=1e-6, atol=1e-8)


# -- compiled ahead of time --------------------------------------------------------------------

KERNELS = ("maximum", "weights", "weights_adjoint", "divide", "divide_adjoint")
SIXTEEN = ("value", "weighted", "weights", "numerator", "divisor", "out", "grad", "d_weighted",
           "d_weights", "d_value", "d_numerator", "d_divisor")  # fmt: skip
FLOATS = ("input_gate", "forget_gate", "top", "initial", "log_decay", "d_decay", "d_input",
          "d_forget")  # fmt: skip


def build(name, architecture, record_property):
    module = importlib.import_module("dsf_kernels.mlstm_kernels")
    types = dict.fromkeys(SIXTEEN, "*bf16") | dict.fromkeys(FLOATS, "*fp32") | {"eps": "fp32"}
    fixed = {"HAS_INITIAL": True, "EXPONENTIAL": False, "TILE": 1024, "ROWS": 8, "WIDE": 128,
             "v_p": 1, "g_p": 1}  # fmt: skip
    kernel = getattr(module, f"{name}_kernel")
    return kernel_laws.build(kernel, architecture, types, fixed, {"num_warps": 4}, record_property)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "divide" in n else ()) for n in KERNELS]
)
def test_builds_for_hopper_without_spills(name, record_property):
    used = kernel_laws.resources(build(name, 90, record_property))
    assert "STACK:0" in used or "not known" in used


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_builds_for_ampere(name, record_property):
    build(name, 80, record_property)


# -- on the GPU --------------------------------------------------------------------------------


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name):
    units = measure(ON_GPU[name], "cuda")
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.mlstm_scan import mlstm_scan

    arguments = tensors(1000, 3, 1, 128, 64, torch.bfloat16, batch=4)
    run = kernel_laws.with_gradients(flat(mlstm_scan, 0.0))
    kernel_laws.repeats_and_rows_stand_alone(run, arguments, compared=1)


@kernel_laws.on_gpu
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_gpu_long(offset):
    """A weighted mean of values stays in their range at 1,048,576 tokens, and equal ones equal."""
    from dsf_kernels.mlstm_scan import mlstm_scan

    shape = (1, 1_048_576, 1)
    rows = torch.ones(*shape, 16, device="cuda", dtype=torch.bfloat16)
    i = offset + torch.randn(shape, device="cuda")
    f = 12 + torch.randn(shape, device="cuda")
    values = torch.rand_like(rows)
    values[..., 0] = 1.0
    y, (_, _, m) = mlstm_scan(rows, rows, values, i, f)
    assert torch.isfinite(m).all()
    assert (y >= 0).all()
    assert (y <= 1 + 16 * UNIT[torch.bfloat16]).all()
    if offset:  # |q.n| exceeds exp(-m): the mean of ones is one
        assert ((y[..., 0] - 1).abs() <= 16 * UNIT[torch.bfloat16]).all()


@kernel_laws.on_gpu
def test_gpu_under_compile():
    from dsf_kernels.mlstm_scan import mlstm_scan

    arguments = {k: v for k, v in tensors(70, dtype=torch.bfloat16).items() if k not in PARTS}
    arguments = kernel_laws.moved(arguments, "cuda")
    y, _ = torch.compile(mlstm_scan, fullgraph=True)(**arguments)
    assert torch.equal(y, mlstm_scan(**arguments)[0])


if __name__ == "__main__":
    interpret()
