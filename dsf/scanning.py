"""Run a system on its values: the float64 reference loop, the fast paths, one step."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from dsf.errors import DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.factors import OneHot
from dsf.kernel_scans import kernel_dtype, kernel_gap
from dsf.mixing_rows import MixingRows, Part
from dsf.recurrence import Recurrence
from dsf.shapes import Inexact
from dsf.transitions import Transition
from dsf.transitions._base import is_traced, mm, real_dtype, time_steps
from dsf.validation import check_run, check_values, run_checked
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, is_cache

Backend = Literal["auto", "reference", "chunked", "triton"]


def loop(
    A: Transition,
    B: Inexact[Tensor, "#batch #time #head state input"],
    C: Inexact[Tensor, "#batch #time #head output state"],
    values: Inexact[Tensor, "batch time head input channel"],
    state: Inexact[Tensor, "batch head state channel"],
) -> tuple[
    Inexact[Tensor, "batch time head output channel"], Inexact[Tensor, "batch head state channel"]
]:
    """The definition: one step after another in the dtype given.

    B (batch, time, head, state, input), C (batch, time, head, output, state), values (batch,
    time, head, input, channel), state (batch, head, state, channel). Returns C_t h_t (batch,
    time, head, output, channel) and h_L. Every fast path is tested against this function.
    """
    length, outputs = values.shape[1], []
    columns = (time_steps(x, length) for x in (B, C, values))
    for a, b, c, u in zip(A.steps(length), *columns, strict=True):
        state = a.apply(state) + mm(b, u)
        outputs.append(mm(c, state))
    if not outputs:
        return values.new_zeros(*values.shape[:3], C.shape[-2], values.shape[-1]), state
    return torch.stack(outputs, dim=1), state


@overload
def scan(
    system: System, values: Tensor, backend: Backend = ..., return_state: Literal[False] = ...,
    *, chunk: int | None = ..., allow_nonfinite: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def scan(
    system: System, values: Tensor, backend: Backend = ..., *, return_state: Literal[True],
    chunk: int | None = ..., allow_nonfinite: bool = ...,
) -> tuple[Tensor, Any]: ...  # fmt: skip
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
    backend: "reference" (the float64 loop, float64 out), "chunked" (torch, matmul form),
        "triton" (CUDA kernels where the structure has one; 16-bit values are multiplied as such),
        "auto" (the fastest there is; `dsf.which_backend` tells which).
    return_state: also return h_L (batch, head, state, channel); a pair for Bidirectional.
    chunk: length of a chunk; by default chosen by the structure.
    allow_nonfinite: let NaN and infinity through instead of refusing them.

    Returns
    -------
    y: (batch, time, head, output, channel), the output axis left out when it is 1, in the
    promoted dtype of system and values; computed in float32 at least.

    Raises DsfShapeError, DsfTypeError, DsfValueError before any work. Cost: O(length * state *
    channel) for identity, scalar, diagonal; O(length * state^2) for dense; memory O(length).
    Differentiable any number of times with "chunked" and "reference"; once where "auto" takes
    PyTorch's fused attention or a Triton kernel.
    """
    run = _Run("dsf.scan", backend, chunk)
    run.check(system, values, allow_nonfinite)
    if not (allow_nonfinite or is_traced()):
        y, state = run_checked(_scan, run, system, values)
    else:
        y, state = _scan(run, system, values)
    return (y, state) if return_state else y


def step(
    system: Recurrence | Gated, values: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token: y_t and h_t from u_t and h_{t-1}, in constant memory.

    `system` has length 1 (see `Recurrence.time_slice`); values (batch, head, input, channel),
    the input axis left out when it is 1; state (batch, head, state, channel) or None for
    `initial_state` or zero. Returns y (batch, head, output, channel), the output axis left out
    when it is 1, and the new state. Raises as `scan`; DsfTypeError on a system that looks ahead.
    """
    inner = system.system if isinstance(system, Gated) else system
    if not isinstance(inner, Recurrence):
        raise DsfTypeError(
            f"dsf.step: system: expected a causal dsf.Recurrence, gated or not, got {type(inner)}."
        )
    start = inner if state is None else inner.replace(initial_state=state)
    whole = Gated(start, system.gate) if isinstance(system, Gated) else start
    run = _Run("dsf.step", "auto", None)
    u = values.unsqueeze(1)
    run.check(whole, u)
    y, new = _scan(run, whole, u)
    return y.squeeze(1), new


# -- any system --------------------------------------------------------------------------------


class _Run(NamedTuple):
    """How one call wants its scans."""

    function: str
    backend: Backend
    chunk: int | None

    def check(self, system: System, values: Tensor, allow_nonfinite: bool = False) -> None:
        """Refuse what cannot be run, before any work."""
        if self.backend not in ("auto", "reference", "chunked", "triton"):
            raise DsfValueError(
                f"{self.function}: backend: expected auto, reference, chunked or triton, got "
                f"{self.backend!r}."
            )
        if self.chunk is not None and self.chunk < 1:
            raise DsfValueError(
                f"{self.function}: chunk: expected a positive length, got {self.chunk}."
            )
        check_run(self.function, system, values, allow_nonfinite=allow_nonfinite)


def _scan(run: _Run, system: System, values: Tensor) -> tuple[Tensor, Any]:
    if isinstance(system, Gated):
        y, state = _scan(run, system.system, values)
        gate = system.gate if y.ndim == 4 else system.gate.unsqueeze(3)
        return gate * y, state
    if isinstance(system, Bidirectional):
        one, two = system.causal, system.anticausal.recurrence
        parts = (one.initial_state, two.initial_state, two.D)
        if system.is_one_map and run.backend != "reference" and parts == (None, None, None):
            y, state = _scan_part(run, one, values, "full")
            return y, (state, state)
        y1, s1 = _scan_part(run, one, values, "causal")
        y2, s2 = _scan(run, system.anticausal, values)
        return y1 + y2, (s1, s2)
    if isinstance(system, Anticausal):
        part: Part = "strict" if system.strict else "anticausal"
        return _scan_part(run, system.recurrence, values, part)
    return _scan_part(run, system, values, "causal")


def _scan_part(run: _Run, r: Recurrence, values: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    u = check_values(run.function, r, values)
    y, state = run_one(r, u, run.backend, run.chunk, part)
    return (y.squeeze(3) if r.n_output == 1 else y), state


# -- one recurrence ----------------------------------------------------------------------------


def run_one(
    r: Recurrence,
    values: Inexact[Tensor, "batch time head input channel"],
    backend: Backend = "auto",
    chunk: int | None = None,
    part: Part = "causal",
) -> tuple[
    Inexact[Tensor, "batch time head output channel"], Inexact[Tensor, "batch head state channel"]
]:
    """y and the last state of one recurrence, without checks; every axis of `values` in full.

    `part`: "causal" runs forwards, "anticausal" backwards, "strict" backwards without the token
    itself; "full" reads a cache that is filled already.
    """
    if backend == "reference":
        r, values = r.to(torch.float64), values.to(_in_float64(values.dtype))
    wanted = torch.promote_types(r.dtype, values.dtype)
    dtype = torch.promote_types(wanted, torch.float32)
    cached = is_cache(r) and backend != "reference"
    if backend in ("auto", "triton") and not cached:
        gap = kernel_gap(r, values)
        if gap and backend == "triton":
            raise DsfUnsupportedError(f"dsf.scan: backend: {gap}. Use backend='chunked'.")
        one_step = backend == "auto" and values.shape[1] == 1
        backend = "chunked" if gap or one_step else "triton"
    if backend == "triton" and not cached:  # keeps 16-bit types, and the decays as they are
        kind = torch.complex64 if r.A.is_complex else torch.float32
        u, state = values, _initial_state(r, values.to(kind))
    else:
        r, u = r.to(real_dtype(dtype)), values.to(dtype)
        state = _initial_state(r, u)
    if cached:
        y, state = _mix_cache(r, u, state, part, fused=backend == "auto")
    else:
        y, state = _run_dense(r, u, state, backend, chunk, part)
    if r.D is not None:
        y = y + mm(r.D, u)
    if r.real_output:
        return (y.real if y.is_complex() else y).to(real_dtype(wanted)), state
    return y.to(wanted), state


def _in_float64(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _initial_state(r: Recurrence, u: Tensor) -> Tensor:
    shape = (u.shape[0], u.shape[2], r.n_state, u.shape[-1])
    if r.initial_state is None:
        return torch.zeros(shape, dtype=u.dtype, device=u.device)
    return r.initial_state.to(u.dtype).expand(shape)


def _run_dense(
    r: Recurrence, u: Tensor, state: Tensor, backend: Backend, chunk: int | None, part: Part
) -> tuple[Tensor, Tensor]:
    if part == "causal":
        B, C = r.dense_input_output()
        return _run(r.A, B, C, u, state, backend, chunk)
    r = r.flip_time()
    B, C = r.dense_input_output()
    run = _run_strict if part == "strict" else _run
    y, state = run(r.A, B, C, u.flip(1), state, backend, chunk)
    return y.flip(1), state


def _run(
    A: Transition, B: Tensor, C: Tensor, u: Tensor, state: Tensor, backend: Backend,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend == "triton":
        dtype = kernel_dtype(B, C, u)
        return A.scan_triton(B.to(dtype), C.to(dtype), u.to(dtype), state)
    if backend == "reference" or u.shape[1] == 1:
        return loop(A, B, C, u, state)
    return A.scan_chunked(B, C, u, state, chunk)


def _run_strict(
    A: Transition, B: Tensor, C: Tensor, u: Tensor, state: Tensor, backend: Backend,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_t = (C_t A_t) h_{t-1}: the states of one step before, read through C_t A_t.

    Nothing is subtracted, so the token's own entry of the map is an exact zero.
    """
    last = u.shape[1] - 1
    if last < 0:
        return _run(A, B, C, u, state, backend, chunk)
    C = A.apply_transposed(C.mT).mT
    first = mm(C[:, 0], state)

    def cut(x: Tensor, start: int, stop: int) -> Tensor:
        return x[:, start:stop] if x.shape[1] > 1 else x

    rest, state = _run(
        A.time_slice(0, last), cut(B, 0, last), cut(C, 1, last + 1), u[:, :last], state,
        backend, chunk,
    )  # fmt: skip
    state = A.at(-1).apply(state) + mm(B[:, -1], u[:, -1])
    return torch.cat([first[:, None], rest], dim=1), state


def _mix_cache(
    r: Recurrence, u: Tensor, state: Tensor, part: Part, *, fused: bool
) -> tuple[Tensor, Tensor]:
    """A cache read by map rows: slot s holds its start value, plus u_s once that is written."""
    rows, slots = cast(MixingRows, r.C), cast(OneHot, r.B)
    written = u.squeeze(3).transpose(1, 2)
    pad = (0, 0, slots.offset, slots.n_slot - slots.offset - slots.length)
    cache = torch.nn.functional.pad(written, pad)
    filled = state + cache
    # causal rows read no slot that is still empty, so that nothing needs to be masked
    seen = part == "causal" and rows.causal and rows.query_start <= slots.offset
    if seen or part == "full":
        y = rows.mix(filled) if fused else rows.mix_part(filled, "full", 0)
    else:
        y = rows.mix_part(cache, part, slots.offset)
        if r.initial_state is not None:
            y = y + rows.mix_part(state, "full", 0)
    return y.transpose(1, 2).unsqueeze(3), filled
