"""Run a system on its values: the float64 reference loop, the chunked path, one step."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from dsf.axes import VALUE_AXES, named_sizes
from dsf.errors import DsfShapeError, DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.factors import MixingRows, OneHot
from dsf.recurrence import Recurrence
from dsf.transitions import Identity, Transition
from dsf.transitions._base import mm
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core

Backend = Literal["auto", "reference", "chunked", "triton"]


def loop(
    A: Transition, B: Tensor, C: Tensor, values: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition: one step after another in the dtype given.

    B (batch, time, head, state, input), C (batch, time, head, output, state), values (batch,
    time, head, input, channel), state (batch, head, state, channel). Returns C_t h_t (batch,
    time, head, output, channel) and h_L. Every fast path is tested against this function.
    """
    outputs = []
    for t in range(values.shape[1]):
        b = B[:, t if B.shape[1] > 1 else 0]
        c = C[:, t if C.shape[1] > 1 else 0]
        state = A.at(t).apply(state) + mm(b, values[:, t])
        outputs.append(mm(c, state))
    if not outputs:
        return values.new_zeros(*values.shape[:3], C.shape[-2], values.shape[-1]), state
    return torch.stack(outputs, dim=1), state


@overload
def scan(system: System, values: Tensor, backend: Backend = ..., return_state: Literal[False] = ...,
         *, chunk: int | None = ..., allow_nonfinite: bool = ...) -> Tensor: ...  # fmt: skip
@overload
def scan(system: System, values: Tensor, backend: Backend = ..., *, return_state: Literal[True],
         chunk: int | None = ..., allow_nonfinite: bool = ...) -> tuple[Tensor, Any]: ...  # fmt: skip
def scan(
    system: System,
    values: Tensor,
    backend: Backend = "auto",
    return_state: bool = False,
    *,
    chunk: int | None = None,
    allow_nonfinite: bool = False,
) -> Any:
    """The output y of a system on `values`, and its final state if asked for.

        h_t = A_t h_{t-1} + B_t u_t,    y_t = C_t h_t + D_t u_t

    Parameters
    ----------
    system: Recurrence, Anticausal, Bidirectional or Gated.
    values: u, (batch, time, head, input, channel); the input axis is left out when it is 1.
    backend: "reference" (the float64 loop), "chunked" (torch, matmul form, the input's dtype),
        "triton" (CUDA kernels where the structure has one), "auto".
    return_state: also return h_L (batch, head, state, channel); a pair for Bidirectional.
    chunk: length of a chunk; by default chosen by the structure.
    allow_nonfinite: let NaN and infinity through instead of refusing them.

    Returns
    -------
    y: (batch, time, head, output, channel), the output axis left out when it is 1.

    Raises DsfShapeError, DsfTypeError, DsfValueError before any work. Cost: O(length * state *
    channel) for identity, scalar, diagonal; O(length * state^2) for dense; memory O(length).
    Differentiable any number of times.
    """
    if backend not in ("auto", "reference", "chunked", "triton"):
        raise DsfValueError(
            f"dsf.scan: backend: expected auto, reference, chunked or triton, got {backend!r}."
        )
    if isinstance(system, Gated):
        y, state = scan(system.system, values, backend, True, chunk=chunk,
                        allow_nonfinite=allow_nonfinite)  # type: ignore[misc]  # fmt: skip
        y = system.gate.to(y.dtype) * y
    elif isinstance(system, Bidirectional):
        y, state = _scan_bidirectional(system, values, backend, chunk, allow_nonfinite)
    else:
        recurrence = core(system)
        u = check_values("dsf.scan", recurrence, values)
        if not allow_nonfinite and not _is_traced():
            _refuse_nonfinite(recurrence, values)
        strict = isinstance(system, Anticausal) and system.strict
        backwards = isinstance(system, Anticausal)
        y, state = _scan_one(recurrence, u, backend, chunk, backwards=backwards, strict=strict)
        y = y.squeeze(3) if recurrence.n_output == 1 else y
    return (y, state) if return_state else y


def step(recurrence: Recurrence, values: Tensor, state: Tensor | None = None) -> tuple:
    """One token: y_t and h_t from u_t and h_{t-1}, in constant memory.

    `recurrence` has length 1 (see `Recurrence.time_slice`); values (batch, head, input, channel),
    the input axis left out when it is 1; state (batch, head, state, channel) or None for
    `recurrence.initial_state` or zero. Returns y (batch, head, output, channel) and the new state.
    """
    start = recurrence if state is None else recurrence.replace(initial_state=state)
    y, new = scan(start, values.unsqueeze(1), return_state=True)
    return y.squeeze(1), new


# -- one recurrence ----------------------------------------------------------------------------


def _scan_one(
    r: Recurrence, u: Tensor, backend: Backend, chunk: int | None, *, backwards: bool, strict: bool
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        r, u = r.to(torch.float64), u.to(torch.complex128 if u.is_complex() else torch.float64)
    out_dtype = torch.promote_types(r.dtype, u.dtype)
    dtype = torch.promote_types(out_dtype, torch.float32)
    state = _initial_state(r, u, dtype)
    rows = isinstance(r.C, MixingRows) and isinstance(r.B, OneHot) and isinstance(r.A, Identity)
    if rows and backend != "reference":
        y, state = _mix_rows(r, u.to(dtype), state, backwards=backwards, strict=strict)
    else:
        r = r.dense_factors()
        u = u.to(dtype)
        run, v = (r.flip_time(), u.flip(1)) if backwards else (r, u)
        if strict and backend == "reference":
            y, state = _strict_loop(run.A, run.B, run.C, v, state)
        else:
            y, state = _run(run, v, state, backend, chunk)
        y = y.flip(1) if backwards else y
        if strict and backend != "reference":
            y = y - mm(r.C, mm(r.B, u))  # the token's own term
    if r.real_output:
        y = y.real if y.is_complex() else y
    if r.D is not None:
        y = y + mm(r.D, u)
    return (y if y.dtype == out_dtype or r.real_output else y.to(out_dtype)), state


def _run(r: Recurrence, u: Tensor, state: Tensor, backend: Backend, chunk: int | None) -> tuple:
    if backend == "triton":
        kernel = getattr(r.A, "scan_triton", None)
        if kernel is None or not u.is_cuda:
            raise DsfUnsupportedError(
                f"dsf.scan: backend: structure {r.structure!r} on {u.device} has no Triton kernel. "
                f"Use backend='chunked'."
            )
        return kernel(r.B, r.C, u, state)
    if backend == "reference":
        return loop(r.A, r.B, r.C, u, state)
    return r.A.scan_chunked(r.B, r.C, u, state, chunk)


def _strict_loop(A: Transition, B: Tensor, C: Tensor, values: Tensor, state: Tensor) -> tuple:
    outputs = []
    for t in range(values.shape[1]):
        carried = A.at(t).apply(state)
        outputs.append(mm(C[:, t if C.shape[1] > 1 else 0], carried))
        state = carried + mm(B[:, t if B.shape[1] > 1 else 0], values[:, t])
    if not outputs:
        return values.new_zeros(*values.shape[:3], C.shape[-2], values.shape[-1]), state
    return torch.stack(outputs, dim=1), state


def _initial_state(r: Recurrence, u: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (u.shape[0], u.shape[2], r.n_state, u.shape[-1])
    if r.initial_state is None:
        return torch.zeros(shape, dtype=dtype, device=u.device)
    return r.initial_state.to(dtype).expand(shape)


def _mix_rows(r: Recurrence, u: Tensor, state: Tensor, *, backwards: bool, strict: bool) -> tuple:
    """A cache read by map rows: what slot s holds at step t is its start value plus u_s if seen."""
    rows, slots = r.C, r.B
    assert isinstance(rows, MixingRows) and isinstance(slots, OneHot)
    written = u.squeeze(3).transpose(1, 2)
    pad = (0, 0, slots.offset, slots.n_slot - slots.offset - slots.length)
    cache = torch.nn.functional.pad(written, pad)
    everything_seen = rows.causal and not backwards
    if everything_seen:
        y = rows.mix(state + cache)
    else:
        y = _masked_mix(rows, state, cache, slots.offset, backwards=backwards, strict=strict)
    return y.transpose(1, 2).unsqueeze(3), state + cache


def _masked_mix(
    rows: MixingRows, state: Tensor, cache: Tensor, offset: int, *, backwards: bool, strict: bool
) -> Tensor:
    length, n_key = rows.shape[1], rows.n_key
    block = max(1, 2**22 // max(n_key, 1))
    position = torch.arange(n_key, device=cache.device) - offset
    out = []
    for t in range(0, length, block):
        stop = min(t + block, length)
        weights = rows.tile(slice(t, stop), slice(0, n_key)).to(cache.dtype)
        query = torch.arange(t, stop, device=cache.device)[:, None]
        seen = position <= query
        if backwards:
            seen = position > query if strict else position >= query
        out.append(weights * seen @ cache + weights @ state)
    return torch.cat(out, 2) if out else cache[:, :, :0]


def _scan_bidirectional(
    system: Bidirectional, values: Tensor, backend: Backend, chunk: int | None, nonfinite: bool
) -> tuple[Tensor, tuple]:
    causal, other = system.causal, system.anticausal.recurrence
    if (
        isinstance(causal.C, MixingRows)
        and causal.C is other.C
        and system.anticausal.strict
        and (
            backend != "reference" and causal.initial_state is None and other.initial_state is None
        )
    ):
        full = causal.replace(C=_Everything(causal.C))
        y, state = scan(full, values, backend, True, allow_nonfinite=nonfinite)  # type: ignore[misc]
        return y, (state, state)
    y1, s1 = scan(causal, values, backend, True, chunk=chunk, allow_nonfinite=nonfinite)  # type: ignore[misc]
    y2, s2 = scan(system.anticausal, values, backend, True, chunk=chunk, allow_nonfinite=nonfinite)  # type: ignore[misc]
    return y1 + y2, (s1, s2)


class _Everything(MixingRows):
    """The rows of a full map, read in one pass: both halves of a Bidirectional at once."""

    causal = True  # nothing needs masking: every slot is filled before it is read

    def __init__(self, rows: MixingRows) -> None:
        self.rows, self.shape = rows, rows.shape

    def tile(self, queries: slice, keys: slice) -> Tensor:
        return self.rows.tile(queries, keys)

    def mix(self, values: Tensor) -> Tensor:
        return self.rows.mix(values)


# -- checks ------------------------------------------------------------------------------------


def check_values(function: str, r: Recurrence, values: Tensor) -> Tensor:
    """`values` with its input axis, or an error that names the axes (before any work)."""
    if not isinstance(r, Recurrence):
        raise DsfTypeError(f"{function}: system: expected a dsf system, got {type(r)}.")
    if not isinstance(values, Tensor):
        raise DsfTypeError(f"{function}: values: expected torch.Tensor, got {type(values)}.")
    if not (values.is_floating_point() or values.is_complex()):
        raise DsfTypeError(
            f"{function}: values: expected a floating dtype, got {values.dtype}. Call .double()."
        )
    u = values.unsqueeze(3) if values.ndim == 4 and r.n_input == 1 else values
    batch, length, head = r.lead_shape()
    sizes = [batch, length, head, r.n_input]
    expected = named_sizes(VALUE_AXES, [*sizes, "any"])  # type: ignore[list-item]
    if (
        u.ndim != 5
        or u.shape[3] != r.n_input
        or any(
            want not in (1, got) and (axis == 1 or got != 1)
            for axis, (want, got) in enumerate(zip(sizes[:3], u.shape[:3], strict=True))
        )
    ):
        raise DsfShapeError(
            f"{function}: values: expected axes {expected}, got {tuple(values.shape)}; "
            f"sizes are fixed by the recurrence (1 stands for any, the input axis may be left out "
            f"when it is 1)."
        )
    h0 = r.initial_state
    if h0 is not None and h0.shape[3] not in (1, u.shape[4]):
        raise DsfShapeError(
            f"{function}: initial_state: expected channel={u.shape[4]}, got {h0.shape[3]}; channel "
            f"is fixed by the values."
        )
    if u.device != r.device and r.device.type != "cpu":
        raise DsfShapeError(f"{function}: values: expected on {r.device}, got {u.device}.")
    full = [max(want, got) if axis != 1 else got
            for axis, (want, got) in enumerate(zip(sizes[:3], u.shape[:3], strict=True))]  # fmt: skip
    return u.expand(*full, *u.shape[3:])


def _is_traced() -> bool:
    """Under compile, vmap or grad transforms a look at the numbers is impossible."""
    inside = torch._C._functorch.maybe_current_level() is not None
    return torch.compiler.is_compiling() or inside


def _refuse_nonfinite(r: Recurrence, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise DsfValueError(
            "dsf.scan: values: expected finite numbers, got NaN or infinity. "
            "Pass allow_nonfinite=True to let them through."
        )
    r.validate()
