"""The scans that run sequences packed in one row, and what their tests give them."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


def scan_units(packed, loop, given, lengths, unit):
    reference = importlib.import_module("dsf_kernels.reference")
    return reference.error_units(packed, loop, given, {"log_decay"}, unit=unit)


class Family(NamedTuple):
    """What one scan is tested with."""

    name: str  # of the function
    tensors: Callable  # (length, sequences, **sizes): its arguments
    timed: tuple[str, ...]  # those with a time
    shared: tuple[str, ...]  # those with a gradient summed over the sequences
    limit: float  # units
    options: dict
    shrink: Callable  # small tiles, for the interpreter
    operands: tuple[str, ...]  # of its operator
    rest: tuple  # what comes between them and cu_seqlens
    units: Callable = scan_units
    term: Callable = torch.square  # of the results, whose sum gives gradients
    file: str = ""  # where the function is, if not in one of its name
    lengths: tuple[int, ...] = (0, 1, 63, 64, 65, 130, 0)  # on the GPU: edges of its tiles

    @property
    def module(self):
        return importlib.import_module(f"dsf_kernels.{self.file or self.name}")

    @property
    def scan(self):
        return getattr(self.module, self.name)

    @property
    def loop(self):
        return getattr(importlib.import_module("dsf_kernels.reference"), f"{self.name}_reference")


def drawing(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def matrix_state(draw, length, count, head, group, state, channel, dtype, initial):
    return {
        "query": draw(1, length, group, state).to(dtype),
        "key": draw(1, length, group, state).to(dtype),
        "value": draw(1, length, head, channel).to(dtype),
        "initial_state": draw(count, head, state, channel) if initial else None,
    }


def diagonal_decay(length, count, head=1, state=4, channel=4, dtype=torch.float32, bonus=False,
                   initial=True):  # fmt: skip
    draw = drawing(length + state)
    found = matrix_state(draw, length, count, head, head, state, channel, dtype, initial)
    log_decay = -draw(1, length, head, state).abs()
    return found | {"log_decay": log_decay, "bonus": draw(head, state) if bonus else None}


def shrink_diagonal_decay():
    launch = importlib.import_module("dsf_kernels.diagonal_decay_launch")
    launch.CHUNK[True] = 8
    launch.PAIR[True]["SLAB"] = launch.GRADIENT[True]["SLAB"] = 16
    launch.WALK[True]["SLAB"] = launch.GRADIENT[True]["PART"] = 16


def delta(length, count, head=2, group=1, state=4, channel=4, dtype=torch.float32, decay=True,
          initial=True):  # fmt: skip
    draw = drawing(length + state)
    found = matrix_state(draw, length, count, head, group, state, channel, dtype, initial)
    found["key"] = torch.nn.functional.normalize(found["key"].float(), dim=-1).to(dtype)
    found["write_strength"] = draw(1, length, head).sigmoid()
    return found | {"log_decay": -0.3 * draw(1, length, head).abs() if decay else None}


def shrink_delta():
    """Its tiles are as small as they can be."""


def delta_units(packed, loop, given, lengths, unit):
    """Units of rows over the condition of the solve."""
    reference = importlib.import_module("dsf_kernels.reference")
    solved = [given[name] for name in ("key", "write_strength", "log_decay")]
    parts = [t if t is None else t.split(lengths, 1) for t in solved]
    condition = max(
        reference.solve_condition(*(p if p is None else p[s] for p in parts), 64)
        for s in range(len(lengths))
    )
    units = reference.row_units(packed, loop, given, unit=unit)
    return {name: value / condition for name, value in units.items()}


def diagonal(length, count, width=5, dtype=torch.float32, initial=True):
    draw = drawing(length + width)
    return {
        "decay": draw(1, length, width).tanh().to(dtype),
        "inputs": draw(1, length, width).to(dtype),
        "initial_state": draw(count, width) if initial else None,
    }


def shrink_diagonal():
    module = importlib.import_module("dsf_kernels.diagonal_scan")
    for tile in (module.FORWARD, module.ADJOINT, module.FORWARD_16, module.ADJOINT_16):
        tile.clear()
        tile.update({"T": 4, "S": 2, "C": 4})


def selective(length, count, channels=3, state=2, dtype=torch.float32, full=True, group=1):
    draw = drawing(length + channels)
    found = {
        "u": draw(1, length, channels).to(dtype),
        "step_size": (draw(1, length, channels) - 1).to(dtype),
        "A": -draw(channels, state).abs(),
        "B": draw(1, length, group, state).to(dtype),
        "C": draw(1, length, group, state).to(dtype),
    }
    more = {
        "D": draw(channels),
        "z": draw(1, length, channels).to(dtype),
        "bias": 0.1 * draw(channels),
        "initial_state": draw(count, channels, state),
    }
    return found | (more if full else dict.fromkeys(more))


def shrink_selective():
    launch: Any = importlib.import_module("dsf_kernels.selective_launch")
    launch.TILE["T"], launch.NARROW["C"] = 4, 16
    launch.SEGMENT["narrow"], launch.UNROLL = 8, 2
    launch.SEGMENTED = (torch.float32,)  # bf16 in one piece


def selective_units(packed, loop, given, lengths, unit):
    """Without the step size and the bias: see test_kernels_selective_scan.step_units."""
    reference = importlib.import_module("dsf_kernels.reference")
    logs = ("A", "step_size", "bias")
    units = reference.error_units(packed, loop, given, logs, unit=unit)
    return {k: v for k, v in units.items() if k not in ("grad step_size", "grad bias")}


def complex_diagonal(length, count, width=5, initial=True, dtype=torch.float32):
    draw = drawing(length + width)
    start = torch.complex(draw(count, width), draw(count, width))
    return {
        "log_modulus": -draw(1, length, width).abs(),
        "phase": draw(1, length, width),
        "inputs": torch.complex(draw(1, length, width), draw(1, length, width)),
        "initial_state": start if initial else None,
    }


def shrink_complex_diagonal():
    module = importlib.import_module("dsf_kernels.diagonal_complex")
    for tile in (module.FORWARD, module.ADJOINT):
        tile.clear()
        tile.update({"T": 2, "S": 4, "C": 4})


def largest_units(packed, loop, given, lengths, unit):
    """Largest difference over the largest number, of results and gradients, in units."""
    found, wanted = (gradients_of(run, given) for run in (packed, loop))
    return {
        str(n): relative(*pair) / unit for n, pair in enumerate(zip(found, wanted, strict=True))
    }


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max()) if wanted.numel() else 0.0


def gradients_of(run, arguments):
    """Results, and the gradients of the sum of their squares."""
    leaves = {k: None if v is None else v.detach().requires_grad_() for k, v in arguments.items()}
    results = run(**leaves)
    terms = [y.abs().square().sum() for y in results]
    grads = torch.autograd.grad(terms, [v for v in leaves.values() if v is not None])
    return [y.detach() for y in (*results, *grads)]


FAMILIES = {
    family.name: family
    for family in (
        Family("diagonal_decay_scan", diagonal_decay, ("query", "key", "value", "log_decay"),
               ("bonus",), 16.0, {"scale": 0.5}, shrink_diagonal_decay,
               ("query", "key", "value", "log_decay", "initial_state"), (1.0,)),
        Family("delta_scan", delta, ("query", "key", "write_strength", "log_decay", "value"), (),
               64.0, {"scale": 0.5}, shrink_delta,
               ("query", "key", "value", "write_strength", "log_decay", "initial_state"), (1.0,),
               delta_units),
        Family("diagonal_scan", diagonal, ("decay", "inputs"), (), 16.0, {}, shrink_diagonal,
               ("decay", "inputs", "initial_state"), (False,),
               lengths=(0, 1, 127, 128, 129, 300, 0)),
        Family("complex_diagonal_scan", complex_diagonal, ("log_modulus", "phase", "inputs"), (),
               256.0, {}, shrink_complex_diagonal,
               ("log_modulus", "phase", "inputs", "initial_state"), (), largest_units, torch.abs,
               "diagonal_complex"),
        Family("selective_scan", selective, ("u", "step_size", "B", "C", "z"),
               ("A", "D", "bias"), 16.0, {"softplus": True}, shrink_selective,
               ("u", "step_size", "A", "B", "C", "D", "bias", "z", "initial_state"),
               (False, True), selective_units, lengths=(0, 1, 15, 16, 17, 300, 0)),
    )
}  # fmt: skip
EMPTY = {"nothing": {"lengths": (0, 0)}, "no sequence": {"lengths": ()}}
ODD = {"decay": False, "initial": False, "state": 17, "channel": 3, "head": 1,
       "lengths": (5, 0, 2)}  # fmt: skip
CASES = {
    "diagonal_scan": {
        "states": {},
        "bf16, no initial state": {"initial": False, "width": 8, "dtype": torch.bfloat16},
    } | EMPTY,
    "diagonal_decay_scan": {
        "plain": {},
        "bonus, no initial state, odd widths": {
            "bonus": True, "initial": False, "state": 5, "channel": 3, "lengths": (2, 0),
        },
        "nothing, bonus": {"lengths": (0, 0), "bonus": True},
    } | EMPTY,
    "delta_scan": {
        "gated": {"lengths": (0, 1, 17, 0)},
        "plain, no initial state, odd widths": ODD,
    } | EMPTY,
    "selective_scan": {
        "segments": {},
        "in one piece": {"lengths": (3, 0, 5), "full": False, "dtype": torch.bfloat16},
    } | EMPTY,
    "complex_diagonal_scan": {
        "states": {},
        "no initial state": {"initial": False, "lengths": (2, 0)},
    } | EMPTY,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_GPU = {
    "diagonal_scan": {
        f"{dtype} {width}{' no state' * (not initial)}": {
            "dtype": dtype, "width": width, "initial": initial,
        }
        for dtype in DTYPES
        for width, initial in ((67, True), (128, False))
    },
    "diagonal_decay_scan": {
        f"{dtype} {state} x {channel}{' bonus' * bonus}": {
            "dtype": dtype, "state": state, "channel": channel, "bonus": bonus, "head": 3,
        }
        for dtype, state, channel, bonus in (
            (torch.float32, 100, 60, False), (torch.float32, 64, 200, True),
            (torch.bfloat16, 17, 20, True), (torch.bfloat16, 100, 60, False),
            (torch.bfloat16, 128, 64, True), (torch.float16, 100, 60, False),
        )
    },
    "delta_scan": {
        f"{dtype} {state} x {channel}{' gated' * decay}": {
            "dtype": dtype, "state": state, "channel": channel, "decay": decay, "head": 4,
            "group": group,
        }
        for dtype, state, channel, group, decay in (
            (torch.float32, 100, 60, 4, True), (torch.float32, 64, 200, 1, False),
            (torch.bfloat16, 100, 60, 1, True), (torch.bfloat16, 128, 64, 2, True),
            (torch.bfloat16, 64, 128, 4, False), (torch.float16, 100, 60, 4, True),
        )
    },
    "selective_scan": {
        f"{dtype} {channels} of {state}": {
            "dtype": dtype, "channels": channels, "state": state, "full": state == 16,
        }
        for dtype in DTYPES
        for channels, state in ((67, 16), (128, 3))
    },
    "complex_diagonal_scan": {
        f"{width}{' no state' * (not initial)}": {"width": width, "initial": initial}
        for width, initial in ((67, True), (64, False))
    },
}  # fmt: skip
