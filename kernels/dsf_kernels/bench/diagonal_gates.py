"""Cases of rglru_scan and gated_scan: gates fused, against the same gates made by torch."""

import contextlib
import importlib

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from dsf_kernels.bench import Case, Work
from dsf_kernels.diagonal_gates import gated_scan, rglru_scan
from dsf_kernels.diagonal_scan import diagonal_scan
from dsf_kernels.reference import gated_scan_reference, rglru_scan_reference


def _first(function, **options):
    return lambda *tensors: function(*tensors, **options)[0]


def _rglru_apart(x: Tensor, r: Tensor, i: Tensor, parameter: Tensor) -> Tensor:
    """The gates by torch, then `diagonal_scan`."""
    log_decay = -8.0 * softplus(parameter) * torch.sigmoid(r.float())
    root = torch.sqrt(-torch.expm1(2 * log_decay))
    written = (root * torch.sigmoid(i.float()) * x).to(x.dtype)
    return diagonal_scan(log_decay.to(x.dtype), written, log=True)[0]


def _gated_apart(logit: Tensor, u: Tensor) -> Tensor:
    """The same for a sigmoid decay that writes what it forgets."""
    return diagonal_scan(logsigmoid(logit), torch.sigmoid(-logit) * u, log=True)[0]


def case(dtype: torch.dtype, batch: int, length: int, width: int, unit: str = "rglru") -> Case:
    """Unit variance; unit: "rglru" (x, r, i), or "hgrn" (logits around 2, u), which writes 1 - a.

    The peers make the gates apart, rounded to the type of the data where they are stored.
    """

    def draw(*shape):
        return torch.randn(shape, device="cuda").to(dtype)

    if unit == "hgrn":

        def tensors(*shape):
            return draw(*shape) + 2, draw(*shape)

        peers = {"torch gates, diagonal_scan": (_gated_apart, tensors(batch, length, width))}
        with contextlib.suppress(ImportError):
            hgrn = importlib.import_module("fla.ops.hgrn").chunk_hgrn
            peers["torch gates, fla chunk_hgrn"] = (
                lambda g, u: hgrn(torch.sigmoid(-g) * u, logsigmoid(g))[0],
                peers["torch gates, diagonal_scan"][1],
            )
        given = tensors(batch, length, width)
        size = given[0].nbytes
        return Case(
            _first(gated_scan, complement=True), given, Work(3 * size, 0), Work(6 * size, 0),
            _first(gated_scan_reference, complement=True), tensors(2, 701, 64), peers, by_row=True,
        )  # fmt: skip

    def parts(*shape):
        parameter = torch.randn(shape[-1], device="cuda") - 4
        return draw(*shape), draw(*shape), draw(*shape), parameter

    given = parts(batch, length, width)
    size = given[0].nbytes
    return Case(
        _first(rglru_scan), given, Work(4 * size, 0), Work(8 * size, 0),
        _first(rglru_scan_reference), parts(2, 701, 64),
        {"torch gates, diagonal_scan": (_rglru_apart, given)}, by_row=True,
    )  # fmt: skip


CASES = {
    "a RG-LRU fp32 8 x 8192 x 2048": lambda: case(torch.float32, 8, 8192, 2048),
    "a RG-LRU bf16 8 x 8192 x 2048": lambda: case(torch.bfloat16, 8, 8192, 2048),
    "a HGRN fp32 8 x 8192 x 2048": lambda: case(torch.float32, 8, 8192, 2048, "hgrn"),
    "a HGRN bf16 8 x 8192 x 2048": lambda: case(torch.bfloat16, 8, 8192, 2048, "hgrn"),
}
