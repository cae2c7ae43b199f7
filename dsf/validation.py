"""What must hold of a system and its values before any work: one error that names the faults."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsf.axes import B_AXES, C_AXES, D_AXES, GATE_AXES, STATE_AXES, VALUE_AXES, named_sizes
from dsf.errors import DsfShapeError, DsfTypeError, DsfValueError
from dsf.factors import MixingRows, OneHot
from dsf.recurrence import Recurrence
from dsf.shapes import Inexact, broadcast_shapes
from dsf.transitions import Transition
from dsf.transitions._base import is_traced
from dsf.wrappers import Gated, System, recurrences

_MAY_BE_MINUS_INFINITY = ("log_decay", "bias", "sink")


def check_recurrence(r: Recurrence, *, allow_nonfinite: bool, function: str) -> None:
    """Raise DsfTypeError, DsfShapeError or DsfValueError unless every coefficient fits."""
    _check_kinds(r, function)
    faults = _shape_faults(r)
    if faults:
        raise DsfShapeError(f"{function}: " + "\n  ".join(faults))
    if not allow_nonfinite:
        check_finite(_named_tensors(r), function)


def check_system(function: str, system: System, *, allow_nonfinite: bool = False) -> None:
    """Raise unless `system` is one, and each recurrence in it is sound. Nothing under compile."""
    if not isinstance(system, System):
        raise DsfTypeError(
            f"{function}: system: expected dsf.Recurrence, Anticausal, Bidirectional or Gated, "
            f"got {type(system)}."
        )
    if torch.compiler.is_compiling():
        return  # a trace cannot look at numbers
    for r in recurrences(system):
        check_recurrence(r, allow_nonfinite=allow_nonfinite or is_traced(), function=function)


CHECKED: ContextVar[bool] = ContextVar("checked", default=False)
"""Whether `check_run` has found every number of this call finite: nobody has to look again."""


def run_checked(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) after a full check, and so with CHECKED."""

    def call() -> Any:
        CHECKED.set(True)
        return function(*args)

    return copy_context().run(call)


def check_run(function: str, system: System, values: Tensor, *, allow_nonfinite: bool) -> None:
    """Raise unless `system` can run on `values`: kinds, shapes, dtypes, devices, numbers."""
    check_system(function, system, allow_nonfinite=allow_nonfinite)
    if torch.compiler.is_compiling():
        return
    blind = allow_nonfinite or is_traced()
    gate = system.gate if isinstance(system, Gated) else None
    for r in recurrences(system):
        u = check_values(function, r, values)
        if gate is not None:
            _check_gate(function, gate, u)
    if not blind:
        numbers = [("values", values)] + ([] if gate is None else [("gate", gate)])
        check_finite(numbers, function)


def _check_gate(function: str, gate: Tensor, u: Tensor) -> None:
    sizes = [*u.shape[:3], u.shape[4]]
    fits = gate.ndim == 4 and all(
        got in (1, want) or (want == 1 and axis != 1)
        for axis, (want, got) in enumerate(zip(sizes, gate.shape, strict=True))
    )
    if not fits:
        raise DsfShapeError(
            f"{function}: gate: expected axes {named_sizes(GATE_AXES, sizes)} or sizes 1, got "
            f"{tuple(gate.shape)}; values and recurrence fix them."
        )


def check_values(
    function: str, r: Recurrence, values: Tensor
) -> Inexact[Tensor, "batch time head input channel"]:
    """`values` with its input axis and the system's sizes, or an error that names the axes."""
    if not isinstance(values, Tensor):
        raise DsfTypeError(f"{function}: values: expected torch.Tensor, got {type(values)}.")
    if not (values.is_floating_point() or values.is_complex()):
        raise DsfTypeError(
            f"{function}: values: expected a floating dtype, got {values.dtype}. Call .double()."
        )
    if r.real_output and values.is_complex():
        raise DsfTypeError(
            f"{function}: values: expected real values, got {values.dtype}; the recurrence takes "
            f"the real part (real_output=True). Pass values.real and values.imag one by one."
        )
    u = values.unsqueeze(3) if values.ndim == 4 and r.n_input == 1 else values
    sizes = r.lead_shape()
    fits = u.ndim == 5 and u.shape[3] == r.n_input and all(
        want in (1, got) or (got == 1 and axis != 1)
        for axis, (want, got) in enumerate(zip(sizes, u.shape[:3], strict=True))
    )  # fmt: skip
    if not fits:
        wanted = [s if s != 1 else "any" for s in sizes]
        expected = named_sizes(VALUE_AXES, [*wanted, r.n_input, "any"])
        raise DsfShapeError(
            f"{function}: values: expected axes {expected}, got {tuple(values.shape)}; sizes are "
            f"fixed by the recurrence. The input axis may be left out when it is 1."
        )
    h0 = r.initial_state
    if h0 is not None and h0.shape[3] not in (1, u.shape[4]):
        raise DsfShapeError(
            f"{function}: initial_state: expected channel={u.shape[4]}, got {h0.shape[3]}; "
            f"channel is fixed by the values."
        )
    if u.device != r.device:
        raise DsfShapeError(
            f"{function}: values: expected on {r.device} like the recurrence, got {u.device}. "
            f"Call .to(device)."
        )
    batch, _, head = (got if want == 1 else want
                      for want, got in zip(sizes, u.shape[:3], strict=True))  # fmt: skip
    return u.expand(batch, -1, head, -1, -1)


def _named_tensors(r: Recurrence) -> list[tuple[str, Any]]:
    """`("A.log_decay", tensor)` and so on, in the order of the fields."""
    leaves, _ = pytree.tree_flatten_with_path(r)
    return [(pytree.keystr(path).removeprefix("."), leaf) for path, leaf in leaves]


def _check_kinds(r: Recurrence, function: str) -> None:
    kinds: dict[str, tuple[type | tuple[type, ...], str]] = {
        "A": (Transition, "a dsf.transitions object"),
        "B": ((Tensor, OneHot), "torch.Tensor or dsf.OneHot"),
        "C": ((Tensor, MixingRows), "torch.Tensor or dsf.MixingRows"),
        "D": ((Tensor, type(None)), "torch.Tensor or None"),
        "initial_state": ((Tensor, type(None)), "torch.Tensor or None"),
    }
    for name, (kind, expected) in kinds.items():
        found = getattr(r, name)
        if not isinstance(found, kind):
            raise DsfTypeError(f"{function}: {name}: expected {expected}, got {type(found)}.")
    named = _named_tensors(r)
    device = named[0][1].device if named else None
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise DsfTypeError(f"{function}: {name}: expected torch.Tensor, got {type(tensor)}.")
        whole = not (tensor.is_floating_point() or tensor.is_complex())
        if whole and not name.endswith("key_mask"):
            raise DsfTypeError(
                f"{function}: {name}: expected a floating dtype, got {tensor.dtype}. "
                f"Call .double()."
            )
        if tensor.device != device:
            raise DsfShapeError(
                f"{function}: {name}: expected on {device} like the first tensor, got "
                f"{tensor.device}. Call .to(device)."
            )


def _shape_faults(r: Recurrence) -> list[str]:
    faults = r.A.shape_faults()
    for name, value, axes in [("B", r.B, B_AXES), ("C", r.C, C_AXES), ("D", r.D, D_AXES)]:
        if isinstance(value, OneHot | MixingRows):
            faults += value.shape_faults()
        elif value is not None and value.ndim != len(axes):
            faults.append(f"{name}: expected axes {axes}, got shape {tuple(value.shape)}.")
    h0 = r.initial_state
    if h0 is not None and h0.ndim != len(STATE_AXES):
        faults.append(f"initial_state: expected axes {STATE_AXES}, got shape {tuple(h0.shape)}.")
    return faults or _size_faults(r)


def _size_faults(r: Recurrence) -> list[str]:
    h0, n, i, o = r.initial_state, r.n_state, r.n_input, r.n_output
    leads = {f"A.{name}": tuple(getattr(r.A, name).shape[:3]) for name in r.A.own_axes
             if getattr(r.A, name) is not None}  # fmt: skip
    leads |= {name: tuple(x.shape[:3]) for name, x in [("B", r.B), ("C", r.C), ("D", r.D)]
              if x is not None}  # fmt: skip
    if h0 is not None:
        leads["initial_state"] = (h0.shape[0], 1, h0.shape[1])
    try:
        lead = broadcast_shapes(*leads.values())
    except RuntimeError:
        found = ", ".join(f"{name} {sizes}" for name, sizes in leads.items())
        return [f"expected (batch, time, head) of size 1 or equal in all fields, got {found}."]
    faults = []
    for name, x, axes, own, why in [
        ("B", r.B, B_AXES, (n, i), "state is fixed by A"),
        ("C", r.C, C_AXES, (o, n), "state is fixed by A"),
        ("D", r.D, D_AXES, (o, i), "output is fixed by C, input by B"),
    ]:
        if x is not None and tuple(x.shape[3:]) != own:
            faults.append(
                f"{name}: expected axes {named_sizes(axes, [*lead, *own])}, got "
                f"{tuple(x.shape)}; {why}."
            )
    if h0 is not None and h0.shape[2] != n:
        faults.append(
            f"initial_state: expected axes (batch={lead[0]}, head={lead[2]}, state={n}, channel), "
            f"got {tuple(h0.shape)}; state is fixed by A."
        )
    return faults


def check_finite(named: list[tuple[str, Any]], function: str) -> None:
    """Raise DsfValueError if a tensor holds NaN or infinity; some logarithms may be -inf."""
    for name, tensor in named:
        if tensor.dtype == torch.bool or tensor.is_meta or bool(torch.isfinite(tensor.sum())):
            continue  # a finite sum has finite terms only: the cheap test comes first
        bad = ~torch.isfinite(tensor)
        if name.endswith(_MAY_BE_MINUS_INFINITY):
            bad &= tensor != -torch.inf
        if bool(bad.any()):
            raise DsfValueError(
                f"{function}: {name}: expected finite numbers, got {int(bad.sum())} NaN or "
                f"infinite of {tensor.numel()}. Pass allow_nonfinite=True to keep them."
            )
