"""The noun: one linear time-varying system, h = A h + B u, y = C h + D u at every step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsf.axes import C_AXES
from dsf.errors import DsfTypeError
from dsf.factors import MixingRows, OneHot
from dsf.memory import require_memory
from dsf.shapes import Inexact, broadcast_shapes
from dsf.transitions._base import Transition, complex_dtype, real_dtype, register, static


@register
@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The coefficients of one system for one batch of input.

        h_t = A_t h_{t-1} + B_t u_t,    y_t = C_t h_t + D_t u_t,    t = 1..length

    A: a transition; B (batch, time, head, state, input) or OneHot; C (batch, time, head, output,
    state) or MixingRows; D (batch, time, head, output, input) or None; initial_state (batch, head,
    state, channel) or None for zero. Sizes 1 of batch, time and head broadcast: time of size 1
    is time-invariant. `real_output` means y_t = Re(C_t h_t + D_t u_t), u real (conjugate pairs).
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
        batch, time, head = broadcast_shapes(*shapes)
        if self.initial_state is not None:
            batch, head = broadcast_shapes(self.initial_state.shape[:2], (batch, head))
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
        dtypes = [t.dtype for t in _tensors(self) if t.is_floating_point() or t.is_complex()]
        dtype = dtypes[0] if dtypes else torch.get_default_dtype()
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        complex_a = self.A.is_complex and not dtype.is_complex
        return torch.promote_types(dtype, torch.complex64) if complex_a else dtype

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        tensors = _tensors(self)
        return tensors[0].device if tensors else torch.device("cpu")

    def __repr__(self) -> str:
        """One line of names and shapes, no numbers."""
        named = (("B", self.B), ("C", self.C), ("D", self.D))
        shapes = [f"{name} {tuple(x.shape)}" for name, x in named if x is not None]
        structure = getattr(self.A, "structure", type(self.A).__name__)
        parts = [f"A {structure}", *shapes, self.mode]
        return f"Recurrence({self.system or 'unnamed'}: {', '.join(parts)})"

    # -- small changes -------------------------------------------------------------------------

    def replace(self, **changes: Any) -> Recurrence:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to(self, target: torch.dtype | torch.device | str) -> Recurrence:
        """A copy on another device, or in another real precision (complex fields follow).

        Raises DsfTypeError on a dtype that is not real and floating.
        """
        dtype = target if isinstance(target, torch.dtype) else None
        if dtype is not None and not dtype.is_floating_point:
            raise DsfTypeError(
                f"dsf.Recurrence.to: target: expected a real floating dtype, got {dtype}. Complex "
                f"fields take the complex dtype of the same precision."
            )

        def move(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if dtype is None:
                return x.to(target)
            if x.is_complex():
                return x.to(complex_dtype(dtype))
            return x.to(dtype) if x.is_floating_point() else x

        return pytree.tree_map(move, self)

    def time_slice(self, start: int, stop: int) -> Recurrence:
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

    def dense_input_output(self) -> tuple[Tensor, Tensor]:
        """B and C as dense tensors, whatever they were: length x n_slot memory for a cache.

        Raises DsfMemoryError where that would not fit.
        """
        B, C = self.B, self.C
        if isinstance(C, MixingRows):
            require_memory(
                "dsf.Recurrence", "dense C", C_AXES, C.shape, self.dtype, device=self.device,
                advice="Ask for a tile of the map, or scan with backend='auto', which needs none.",
            )  # fmt: skip
            C = C.tile(slice(0, C.shape[1]), slice(0, C.n_key)).transpose(1, 2)[..., None, :]
        if isinstance(B, OneHot):
            B = B.as_dense(real_dtype(self.dtype)).to(self.device)
        return B, C

    def dense_factors(self) -> Recurrence:
        """The same system with dense B and C (see `dense_input_output`)."""
        B, C = self.dense_input_output()
        return self.replace(B=B, C=C)

    def dense_transition(self) -> Inexact[Tensor, "batch time head state state"]:
        """A as matrices, (batch, time, head, state, state), in this system's dtype and device."""
        matrix = self.A.as_dense()
        if self.A.tensors():
            return matrix
        return matrix.to(self.device, real_dtype(self.dtype))

    def flip_time(self) -> Recurrence:
        """The same coefficients in reverse order of time (dense B and C)."""

        def flip(x: Tensor) -> Tensor:
            return x.flip(1) if x.shape[1] > 1 else x

        B, C = self.dense_input_output()
        D = None if self.D is None else flip(self.D)
        return self.replace(A=self.A.flip_time(), B=flip(B), C=flip(C), D=D)

    # -- checks --------------------------------------------------------------------------------

    def validate(
        self, *, allow_nonfinite: bool = False, function: str = "dsf.Recurrence"
    ) -> Recurrence:
        """Return self if every axis fits, else raise one error that names all faults.

        Checked: kinds, dtypes, devices, axis counts and sizes, and (unless `allow_nonfinite`)
        that no coefficient is NaN or infinite; log_decay, bias and sink may be -inf. Cost: one
        pass over the tensors. Messages begin with `function`. Raises DsfTypeError,
        DsfShapeError, DsfValueError.
        """
        from dsf.validation import check_recurrence

        check_recurrence(self, allow_nonfinite=allow_nonfinite, function=function)
        return self


def _tensors(r: Recurrence) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(r) if isinstance(t, Tensor)]
