"""Offsets on both sides of 2^31 elements: contiguous tensors that long, and views that reach there
by the stride of their time. Each test says what memory it needs, and is skipped without."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from kernel_laws import on_gpu

pytest.importorskip("triton", reason="triton is not installed")
EDGE = 2**31  # elements that a 32-bit offset cannot count
STEP = 2**22  # the widest stride of time that is not copied
SIDES = {"below": -1, "above": 1}
BF16_STEP = 2.0**-7  # of the largest number: one step of bf16
CUT = 4096  # tokens that whole chunks, tiles and segments divide


class Family(NamedTuple):
    """How a scan is called: its arguments, those with a time, sizes of the long call."""

    make: Callable  # (length, draw, wide: numbers a token that reach 2^31 with 2^20 tokens)
    timed: tuple[str, ...]
    gibibytes: int  # that the long call needs
    backward: bool = True  # as far as that memory goes


def matrix(length, draw, wide, state=16, channel=64):
    """Few queries and keys, many values."""
    head = wide // channel
    return {
        "query": draw(1, length, 1, state),
        "key": draw(1, length, 1, state),
        "value": draw(1, length, head, channel),
        "initial_state": draw(1, head, state, channel).float(),
    }


def diagonal(length, draw, wide):
    decay = draw(1, length, 1).sigmoid().expand(1, length, wide)
    return {"decay": decay, "inputs": draw(1, length, wide),
            "initial_state": draw(1, wide).float()}  # fmt: skip


def selective(length, draw, wide):
    return {
        "u": draw(1, length, wide),
        "step_size": draw(1, length, 1).sigmoid().expand(1, length, wide),
        "A": -draw(wide, 2).float().abs(),
        "B": draw(1, length, 1, 2),
        "C": draw(1, length, 1, 2),
        "initial_state": draw(1, wide, 2).float(),
    }


def scalar_decay(length, draw, wide):
    return matrix(length, draw, wide) | {"log_decay": -draw(1, length, wide // 64).abs()}


def diagonal_decay(length, draw, wide):
    return matrix(length, draw, wide) | {"log_decay": -draw(1, length, 1, 16).abs()}


def delta(length, draw, wide):
    found = matrix(length, draw, wide, 64)
    found["key"] = torch.nn.functional.normalize(found["key"], dim=-1)
    found["write_strength"] = draw(1, length, wide // 64).sigmoid()
    return found | {"log_decay": -draw(1, length, wide // 64).abs()}


MATRIX = ("query", "key", "value", "log_decay")
FAMILIES = {
    "diagonal_scan": Family(diagonal, ("decay", "inputs"), 24),
    "selective_scan": Family(selective, ("u", "step_size", "B", "C"), 24),
    "scalar_decay_scan": Family(scalar_decay, MATRIX, 24),
    "diagonal_decay_scan": Family(diagonal_decay, MATRIX, 28),
    "delta_scan": Family(delta, (*MATRIX, "write_strength"), 16, backward=False),
}


def scan_of(name):
    return getattr(importlib.import_module(f"dsf_kernels.{name}"), name)


def drawing(device):
    generator = torch.Generator(device).manual_seed(3)
    options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    return lambda *shape: torch.randn(shape, **options)


class Apart:
    """Copies whose tokens lie STEP numbers apart, all in one buffer."""

    def __init__(self, length, step, device):
        self.step, self.used = step, 0
        self.buffer = torch.zeros(length * step, dtype=torch.bfloat16, device=device)

    def __call__(self, tensor):
        one, length, *sizes = tensor.shape
        strides = torch.empty(sizes, device="meta").stride()
        place = (one, length, *sizes), (length * self.step, self.step, *strides)
        found = self.buffer.as_strided(*place, storage_offset=self.used)
        self.used += -(-torch.Size(sizes).numel() // 64) * 64
        assert self.used <= self.step
        return found.copy_(tensor)


def results(name, arguments, grad=None):
    """Outputs, final state, and, given that of the outputs, the gradients."""
    if grad is None:
        return scan_of(name)(**arguments)
    leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
    output, final = scan_of(name)(**leaves)
    return output, final, *torch.autograd.grad(output, list(leaves.values()), grad)


def apart_differ(name, length, step, device):
    """Which results change when tokens are moved `step` numbers apart."""
    draw = drawing(device)
    family, wide = FAMILIES[name], 128
    arguments = family.make(length, draw, wide)
    arguments = {k: v.contiguous() for k, v in arguments.items()}
    grad = draw(1, length, wide)
    grad = grad if name in ("diagonal_scan", "selective_scan") else grad.unflatten(2, (-1, 64))
    near = results(name, arguments, grad)
    move = Apart(length, step, device)
    moved = {k: move(v) if k in family.timed else v for k, v in arguments.items()}
    found = results(name, moved, move(grad))
    return [n for n, pair in enumerate(zip(near, found, strict=True)) if not torch.equal(*pair)]


def tail_error(name, length, wide, cut, device):
    """Largest difference of a long call's last rows to a call on them alone, over the largest
    number; the state before them comes from a call on the rows before."""
    family = FAMILIES[name]
    whole = family.make(length, drawing(device), wide)
    first = {k: v[:, : length - cut] if k in family.timed else v for k, v in whole.items()}
    state = scan_of(name)(**first)[1]
    last = {k: v[:, length - cut :].clone() if k in family.timed else v for k, v in whole.items()}
    last["initial_state"] = state
    worst = 0.0
    one = torch.ones((), dtype=torch.bfloat16, device=device)
    found = []
    for arguments in (whole, last):
        shape = scan_shape(name, arguments)
        kept = results(name, arguments, one.expand(shape) if family.backward else None)
        timed = [0, *(2 + n for n, k in enumerate(arguments) if k in family.timed)]
        rows = [kept[n][:, -cut:].detach().clone() for n in timed if n < len(kept)]
        found.append([*rows, kept[1].detach()])
        del kept
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        worst = max(worst, float((a - b).float().abs().max() / b.float().abs().max()))
    return worst


def scan_shape(name, arguments):
    """Axes of the outputs."""
    like = {"diagonal_scan": "inputs", "selective_scan": "u"}.get(name, "value")
    return arguments[like].shape


@on_gpu
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_tokens_far_apart(name, side):
    """The last token lies on either side of 2^31 numbers: the bits of tokens that lie close."""
    need(6)
    length = EDGE // STEP + (SIDES[side] > 0)
    assert not apart_differ(name, length, STEP, "cuda")


@on_gpu
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_contiguous(name, side):
    """The last rows of 2^31 numbers, forward and backward."""
    need(FAMILIES[name].gibibytes)
    length = 2**20 + SIDES[side]
    cut = CUT + length % CUT
    assert tail_error(name, length, EDGE // 2**20, cut, "cuda") <= BF16_STEP


def need(gibibytes):
    """Skip where so much memory is not free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free:.0f} are free")
