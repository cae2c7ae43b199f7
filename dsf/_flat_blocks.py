"""A block as one plain system per head, its features the inputs and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsf._block_factors import arrays
from dsf._block_residual import matrices, with_residual
from dsf.algebra import series
from dsf.errors import DsfUnsupportedError
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.transitions import Dense, Diagonal, Identity, Scalar, Shift, Transition
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core

if TYPE_CHECKING:
    from dsf.blocks import Block

_SAME_DIRECTION = 1e-12
"""Singular values below this share of the largest are round-off of a projection of lower rank."""


def flat_recurrence(block: Block, cap: int | None) -> System:
    """The block with features as inputs and outputs, states and channels in one long state."""
    heads = _heads(block, cap)
    if block.around is None:
        return heads
    return with_residual(heads, matrices(block, cap, "Ask for apply, map or norm."))


def _heads(block: Block, cap: int | None) -> System:
    inner, gate = block.inner, None
    if isinstance(inner, Gated):
        inner, gate = inner.system, inner.gate
    if block.taps > 1 and not isinstance(inner, Recurrence):
        raise DsfUnsupportedError(
            f"dsf.Block.recurrence: {block.name}: expected a causal recurrence behind a "
            f"convolution, got {type(inner).__name__}. Use apply, map or norm."
        )
    r = core(inner)
    batch, length, head, channel = block.into.output.shape
    n_in = block.input.shape[-1]
    state = r.n_state * channel
    shape = [batch, length, head, state, n_in + block.output.shape[-1]]
    if block.taps > 1:
        shape[3] += block.taps * channel
        shape[4] += shape[3]
    require_memory(
        "dsf.Block.recurrence", "B, C (and A behind a convolution)",
        ("batch", "time", "head", "state", "feature"), shape, r.dtype, device=r.device,
        max_memory=cap, advice="Keep it factored: apply, map, norm and trace need no such array.",
    )  # fmt: skip
    into, out_of = arrays(block, cap)
    out_of = out_of if gate is None else out_of * gate[..., None]
    if block.taps > 1:
        behind = series(_flat(r, None, out_of, channel), _register(into))
        return behind.replace(system=f"block({r.system})", gauge="state by channel")

    def flat(part: Recurrence) -> Recurrence:
        return _flat(part, into[0], out_of, channel)

    if isinstance(inner, Bidirectional):
        behind = inner.anticausal
        return Bidirectional(
            flat(inner.causal), Anticausal(flat(behind.recurrence), behind.strict)
        )
    if isinstance(inner, Anticausal):
        return Anticausal(flat(inner.recurrence), inner.strict)
    return flat(inner)


def _flat(r: Recurrence, into: Tensor | None, out_of: Tensor, channel: int) -> Recurrence:
    """A (x) I, B (x) V, O (C (x) I), O D V; without V the channels themselves are the inputs."""
    B, C = r.dense_input_output()
    eye = torch.eye(channel, dtype=out_of.dtype, device=out_of.device)
    into = eye[None, None, None] if into is None else into
    written = torch.einsum("bthni,bthpd->bthnpd", *_spread(B, into)).flatten(3, 4)
    read = torch.einsum("bthin,bthpd->bthdnp", *_spread(C, out_of)).flatten(4, 5)
    D = None
    if r.D is not None:
        D = torch.einsum("bthio,bthpd,bthpe->bthde", *_spread(r.D, out_of, into))
    return Recurrence(
        _wide(r, channel), written, read, D, real_output=r.real_output,
        system=f"block({r.system})", gauge="state by channel", mode=r.mode,
    )  # fmt: skip


def _spread(*parts: Tensor) -> list[Tensor]:
    lead = torch.broadcast_shapes(*(x.shape[:3] for x in parts))
    dtype = parts[0].dtype
    for x in parts[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype).expand(*lead, *x.shape[3:]) for x in parts]


def _wide(r: Recurrence, channel: int) -> Transition:
    """A (x) I of size `channel`, in its own structure where that has room for it."""
    A = r.A
    if isinstance(A, Identity):
        return Identity(A.n_state * channel)
    if isinstance(A, Scalar):
        A = A.widen()
    if isinstance(A, Diagonal):
        return A.map_tensors(
            lambda x: x.expand(*x.shape[:3], r.n_state).repeat_interleave(channel, 3)
        )
    eye = torch.eye(channel, dtype=r.dtype, device=r.device)
    return Dense(torch.kron(r.dense_transition().contiguous(), eye))


def _register(into: Tensor) -> Recurrence:
    """The values' channels from a shift register of what the heads see of x.

    The register holds Q x, Q an orthonormal basis of the rows of V over all tokens and taps: as
    many numbers a tap as a head has channels, if they are all taps of one projection.
    """
    n = len(into)
    rows = into.permute(3, 0, 1, 2, 4, 5).flatten(1, 4)
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    kept = int((sizes > _SAME_DIRECTION * sizes[:, :1]).sum(-1).max())
    Q = basis[:, :kept]
    shift = Shift(n).as_dense().reshape(n, n).to(into)
    first = torch.nn.functional.pad(Q, (0, 0, 0, (n - 1) * kept))
    coefficients = torch.einsum("kbjhpi,hri->kbjhpr", into, Q)
    at_output = [_moved(coefficients[tap], tap) for tap in range(n)]
    return Recurrence(
        Dense(torch.kron(shift, torch.eye(kept).to(into))[None, None, None]),
        first[None, None], torch.cat(at_output, dim=-1), system="register", gauge="register",
    )  # fmt: skip


def _moved(x: Tensor, tap: int) -> Tensor:
    """From the source token to the one that reads it, `tap` later."""
    return torch.cat([torch.zeros_like(x[:, :tap]), x[:, : x.shape[1] - tap]], dim=1)
