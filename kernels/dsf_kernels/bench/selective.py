"""The selective scan (Mamba's S6) in bf16, with skip and softplus, without gate."""

import contextlib
import importlib

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.reference import selective_scan_reference
from dsf_kernels.selective_scan import selective_scan


def _draw(batch: int, length: int, channels: int, n_state: int) -> tuple[torch.Tensor, ...]:
    """u, step_size, A, B, C, D much as a layer starts: steps near 0.04, A = -1 .. -n_state."""

    def normal(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    rates = -torch.arange(1.0, n_state + 1, device="cuda").expand(channels, n_state).contiguous()
    rows = (batch, length, 1, n_state)
    step = -2.5 - normal(batch, length, channels).abs()
    return (normal(batch, length, channels), step, rates, normal(*rows), normal(*rows),
            torch.randn(channels, device="cuda"))  # fmt: skip


def _peers(tensors: tuple[torch.Tensor, ...]) -> dict:
    """mamba-ssm, channels before time, when it is installed; no other fast one is known."""
    peers = {}
    with contextlib.suppress(ImportError):
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        u, step, rates, B, C, D = tensors
        moved = (u.mT.contiguous(), step.mT.contiguous(), rates,
                 B[:, :, 0].mT.contiguous(), C[:, :, 0].mT.contiguous(), D)  # fmt: skip
        peers["mamba-ssm, time last"] = (lambda *t: scan(*t, delta_softplus=True), moved)
    return peers


def case(batch: int, length: int, channels: int, n_state: int = 16) -> Case:
    """One group, with skip and softplus, without gate, bias and initial state."""
    tensors = _draw(batch, length, channels, n_state)
    stream, rows = 2 * batch * length * channels, 2 * batch * length * n_state
    exponentials = batch * length * channels * n_state
    return Case(
        function=lambda *t: selective_scan(*t, softplus=True)[0],
        tensors=tensors,
        forward=Work(3 * stream + 2 * rows, 0.0, exponentials),
        backward=Work(5 * stream + 4 * rows, 0.0, exponentials),
        reference=lambda *t: selective_scan_reference(*t, softplus=True)[0],
        short=_draw(2, 257, 96, n_state),
        peers=_peers(tensors),
    )


CASES = {
    "b S6 bf16 8 x 4096 x 4096, N 16": lambda: case(8, 4096, 4096),
    "b S6 bf16 1 x 65536 x 4096, N 16": lambda: case(1, 65536, 4096),
    "b S6 bf16 1 x 2048 x 2048, N 16": lambda: case(1, 2048, 2048),
    "b S6 bf16 8 x 4096 x 2048, N 64": lambda: case(8, 4096, 2048, 64),
}
