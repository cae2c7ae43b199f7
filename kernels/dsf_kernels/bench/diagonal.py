"""Cases of diagonal_scan and complex_diagonal_scan, h = a h + b, channels last."""

import contextlib
import importlib

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.diagonal_complex import complex_diagonal_scan
from dsf_kernels.diagonal_scan import diagonal_scan
from dsf_kernels.reference import complex_diagonal_scan_reference, diagonal_scan_reference


def case(dtype: torch.dtype, batch: int, length: int, width: int) -> Case:
    """Decays uniform in (0, 1), inputs of unit variance."""

    def draw(*shape):
        return torch.rand(shape, device="cuda").to(dtype), torch.randn(shape, device="cuda").to(
            dtype
        )

    decay, inputs = draw(batch, length, width)
    peers = {}
    with contextlib.suppress(ImportError):
        scan = importlib.import_module("accelerated_scan.scalar").scan
        last = tuple(t.mT.contiguous() for t in (decay, inputs))
        peers["accelerated-scan, time last"] = (scan, last)
        peers["accelerated-scan, with transposes"] = (
            lambda a, b: scan(a.mT.contiguous(), b.mT.contiguous()).mT.contiguous(),
            (decay, inputs),
        )
    with contextlib.suppress(ImportError):
        hgrn = importlib.import_module("fla.ops.hgrn").chunk_hgrn
        logs = decay.float().log().to(dtype)
        peers["fla chunk_hgrn"] = (lambda g, x: hgrn(x, g)[0], (logs, inputs))
    size = inputs.nbytes
    return Case(
        lambda a, b: diagonal_scan(a, b)[0], (decay, inputs), Work(3 * size, 0), Work(5 * size, 0),
        lambda a, b: diagonal_scan_reference(a, b)[0], draw(2, 701, 64), peers,
    )  # fmt: skip


def complex_case(batch: int, length: int, width: int, constant: bool = False) -> Case:
    """Log moduli uniform in (-1, 0), phases of unit variance; inputs and outputs as pairs."""

    def draw(*shape):
        size = (1, 1, width) if constant else shape
        log_modulus, phase = -torch.rand(size, device="cuda"), torch.randn(size, device="cuda")
        return log_modulus, phase, torch.randn(*shape, 2, device="cuda")

    def on_pairs(scan):
        def run(log_modulus, phase, pairs):
            return torch.view_as_real(scan(log_modulus, phase, torch.view_as_complex(pairs))[0])

        return run

    tensors = draw(batch, length, width)
    size, decays = tensors[2].nbytes, tensors[0].nbytes + tensors[1].nbytes
    return Case(
        on_pairs(complex_diagonal_scan), tensors, Work(2 * size + decays, 0),
        Work(3 * size + 2 * decays, 0), on_pairs(complex_diagonal_scan_reference),
        draw(2, 701, width), {}, by_row=True,
    )  # fmt: skip


CASES = {
    "a fp32 8 x 8192 x 2048": lambda: case(torch.float32, 8, 8192, 2048),
    "a bf16 8 x 8192 x 2048": lambda: case(torch.bfloat16, 8, 8192, 2048),
    "a fp32 1 x 65536 x 2048": lambda: case(torch.float32, 1, 65536, 2048),
    "a bf16 1 x 65536 x 2048": lambda: case(torch.bfloat16, 1, 65536, 2048),
    "a complex 8 x 8192 x 1024": lambda: complex_case(8, 8192, 1024),
    "a complex 1 x 65536 x 1024": lambda: complex_case(1, 65536, 1024),
    "a complex, constant decay, 8 x 8192 x 1024": lambda: complex_case(8, 8192, 1024, True),
}
