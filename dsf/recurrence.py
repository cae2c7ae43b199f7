"""The noun: one linear time-varying system, h_t = A_t h_{t-1} + B_t u_t, y_t = C_t h_t + D_t u_t."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsf.axes import B_AXES, C_AXES, D_AXES, named_sizes
from dsf.errors import DsfShapeError, DsfTypeError, DsfValueError
from dsf.factors import MixingRows, OneHot
from dsf.transitions._base import Transition, register, static


@register
@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The coefficients of one system for one batch of input.

        h_t = A_t h_{t-1} + B_t u_t,    y_t = C_t h_t + D_t u_t,    t = 1..length

    A: a transition; B (batch, time, head, state, input) or OneHot; C (batch, time, head, output,
    state) or MixingRows; D (batch, time, head, output, input) or None; initial_state (batch, head,
    state, channel) or None for zero. Sizes 1 of batch, time and head broadcast: time of size 1
    is time-invariant. `real_output` means y_t = Re(C_t h_t) + D_t u_t (conjugate pairs).
    Source: Sieber et al. (2024), equation 11.

    `system`, `gauge` (the state coordinates) and `mode` ("exact", "exact_along_trajectory",
    "linearised") are labels that every map and measure carries on.
    """

    A: Transition
    B: Tensor | OneHot
    C: Tensor | MixingRows
    D: Tensor | None = None
    initial_state: Tensor | None = None
    real_output: bool = static(default=False)
    system: str = static(default="")
    gauge: str = static(default="as given")
    mode: str = static(default="exact")

    # -- sizes ---------------------------------------------------------------------------------

    def lead_shape(self) -> tuple[int, int, int]:
        """Broadcast (batch, time, head)."""
        shapes = [self.A.lead_shape(), self.B.shape[:3], self.C.shape[:3]]
        if self.D is not None:
            shapes.append(self.D.shape[:3])
        batch, time, head = torch.broadcast_shapes(*shapes)
        if self.initial_state is not None:
            batch, head = torch.broadcast_shapes(self.initial_state.shape[:2], (batch, head))
        return batch, time, head

    @property
    def n_state(self) -> int:
        """Number of states N of one head (per value channel)."""
        return self.A.n_state

    @property
    def n_head(self) -> int:
        """Number of heads."""
        return self.lead_shape()[2]

    @property
    def length(self) -> int:
        """Number of steps; 1 also for a time-invariant system, whose values set the length."""
        return self.lead_shape()[1]

    @property
    def n_input(self) -> int:
        """Size of the input axis."""
        return self.B.shape[-1]

    @property
    def n_output(self) -> int:
        """Size of the output axis."""
        return self.C.shape[-2]

    @property
    def structure(self) -> str:
        """Name of the transition's structure."""
        return self.A.structure

    @property
    def dtype(self) -> torch.dtype:
        """The promoted dtype of all coefficients."""
        dtype = None
        for tensor in pytree.tree_leaves(self):
            if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
        if dtype is None:
            dtype = torch.get_default_dtype()
        complex_a = self.A.is_complex and not dtype.is_complex
        return torch.promote_types(dtype, torch.complex64) if complex_a else dtype

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        tensors = [t for t in pytree.tree_leaves(self) if isinstance(t, Tensor)]
        return tensors[0].device if tensors else torch.device("cpu")

    # -- small changes -------------------------------------------------------------------------

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to(self, target: torch.dtype | torch.device | str) -> Self:
        """A copy on another device or in another real precision (complex fields follow)."""

        def move(x: Any) -> Any:
            if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
                return x if isinstance(target, torch.dtype) or not isinstance(x, Tensor) else (
                    x.to(target))  # fmt: skip
            if isinstance(target, torch.dtype) and x.is_complex():
                return x.to(target.to_complex())
            return x.to(target)

        return pytree.tree_map(move, self)

    def time_slice(self, start: int, stop: int) -> Self:
        """Steps start..stop-1 (0-based); the initial state is dropped unless start is 0."""

        def cut(x: Any) -> Any:
            if x is None:
                return None
            if not isinstance(x, Tensor):
                return x.time_slice(start, stop)
            return x[:, start:stop] if x.shape[1] > 1 else x

        first = self.initial_state if start == 0 else None
        return self.replace(
            A=self.A.time_slice(start, stop), B=cut(self.B), C=cut(self.C), D=cut(self.D),
            initial_state=first,
        )  # fmt: skip

    def dense_factors(self) -> Self:
        """B and C as dense tensors, whatever they were: length x n_slot memory for a cache."""
        B, C = self.B, self.C
        if isinstance(B, OneHot):
            B = B.as_dense(self.dtype).to(self.device)
        if isinstance(C, MixingRows):
            C = C.tile(slice(0, C.shape[1]), slice(0, C.n_key)).transpose(1, 2)[..., None, :]
        return self.replace(B=B, C=C)

    def flip_time(self) -> Self:
        """The same coefficients in reverse order of time (dense B and C)."""

        def flip(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[1] == 1 else x.flip(1)

        r = self.dense_factors()
        return r.replace(A=r.A.flip_time(), B=flip(r.B), C=flip(r.C), D=flip(r.D))

    # -- checks --------------------------------------------------------------------------------

    def validate(self, *, allow_nonfinite: bool = False) -> Self:
        """Return self if every axis fits, else raise one error that names all faults.

        Checked: kinds, axis counts and sizes, devices, and (unless `allow_nonfinite`) that no
        coefficient is NaN or infinite; log_decay may be -inf. Cost: one pass over the tensors.
        Raises DsfTypeError, DsfShapeError, DsfValueError.
        """
        _check_kinds(self)
        faults = _shape_faults(self)
        if faults:
            raise DsfShapeError("dsf.Recurrence: " + "\n  ".join(faults))
        if not allow_nonfinite:
            _check_finite(self)
        return self


def _check_kinds(r: Recurrence) -> None:
    kinds = {"A": Transition, "B": (Tensor, OneHot), "C": (Tensor, MixingRows)}
    for name, kind in kinds.items():
        if not isinstance(getattr(r, name), kind):
            expected = "a dsf.Transition" if name == "A" else "a tensor or a factor"
            raise DsfTypeError(
                f"dsf.Recurrence: {name}: expected {expected}, got {type(getattr(r, name))}."
            )
    for tensor in pytree.tree_leaves(r):
        if isinstance(tensor, Tensor) and tensor.device != r.device:
            raise DsfShapeError(
                f"dsf.Recurrence: expected all tensors on {r.device}, got one on "
                f"{tensor.device}. Call .to(device)."
            )


def _shape_faults(r: Recurrence) -> list[str]:
    faults = []
    lead = []
    for tensor in r.A.tensors():
        if tensor.ndim < 3:
            faults.append(
                f"A: expected leading axes (batch, time, head), got {tuple(tensor.shape)}."
            )
    fields = [("B", r.B, B_AXES), ("C", r.C, C_AXES), ("D", r.D, D_AXES)]
    for name, value, axes in fields:
        if value is not None and len(value.shape) != len(axes):
            faults.append(f"{name}: expected axes {axes}, got shape {tuple(value.shape)}.")
    if faults:
        return faults
    try:
        lead = list(r.lead_shape())
    except RuntimeError:
        shapes = {"A": r.A.lead_shape(), "B": tuple(r.B.shape[:3]), "C": tuple(r.C.shape[:3])}
        if r.D is not None:
            shapes["D"] = tuple(r.D.shape[:3])
        return [f"expected (batch, time, head) of size 1 or equal in all fields, got {shapes}."]
    n, i, o = r.n_state, r.n_input, r.n_output
    wanted = {"B": (B_AXES, [*lead, n, i]), "C": (C_AXES, [*lead, o, n]),
              "D": (D_AXES, [*lead, o, i])}  # fmt: skip
    reason = {"B": "state is fixed by A", "C": "state is fixed by A",
              "D": "output is fixed by C, input by B"}  # fmt: skip
    for name, value, _ in fields:
        if value is not None and list(value.shape[3:]) != wanted[name][1][3:]:
            faults.append(
                f"{name}: expected axes {named_sizes(*wanted[name])}, got {tuple(value.shape)}; "
                f"{reason[name]}."
            )
    h0 = r.initial_state
    if h0 is not None and (h0.ndim != 4 or h0.shape[2] != n):
        faults.append(
            f"initial_state: expected axes (batch, head, state={n}, channel), "
            f"got {tuple(h0.shape)}; state is fixed by A."
        )
    return faults


def _check_finite(r: Recurrence) -> None:
    named = [(f.name, getattr(r, f.name)) for f in dataclasses.fields(r)]
    for name, value in named:
        if isinstance(value, MixingRows):
            continue
        for tensor in pytree.tree_leaves(value):
            if not isinstance(tensor, Tensor):
                continue
            bad = torch.isnan(tensor)
            if name == "A":
                bad = bad | (tensor == torch.inf) if not tensor.is_complex() else bad
            else:
                bad = ~torch.isfinite(tensor)
            if bool(bad.any()):
                raise DsfValueError(
                    f"dsf.Recurrence: {name}: expected finite numbers, got {int(bad.sum())} NaN or "
                    f"infinite of {tensor.numel()}. Pass allow_nonfinite=True to keep them."
                )
