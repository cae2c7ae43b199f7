"""What every kernel does before its launch: checks with one form of message, and settings."""

import contextlib
import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TILE_STRIDE = 2**22


def check_tensor(
    function: str, name: str, tensor: Tensor, expected: dict[str, int | None], fixed_by: str
) -> None:
    """Raise unless `tensor` has the axes of `expected` (None: any size).

    Example of the message: ``dsf_kernels.scan: key: expected axes (batch=2, time=8), got (2, 7);
    time is fixed by value.``
    """
    shape = tuple(tensor.shape)
    right = len(shape) == len(expected) and all(
        want is None or got == want for got, want in zip(shape, expected.values(), strict=True)
    )
    if not right:
        axes = ", ".join(k if v is None else f"{k}={v}" for k, v in expected.items())
        raise ValueError(
            f"dsf_kernels.{function}: {name}: expected axes ({axes}), got {shape}; {fixed_by}."
        )


def check_kind(function: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise unless all tensors are bf16, fp16 or fp32, on one device that can run Triton."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in present.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"dsf_kernels.{function}: {name}: expected float32, bfloat16 or float16, "
                f"got {tensor.dtype}."
            )
    devices = {name: tensor.device for name, tensor in present.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"dsf_kernels.{function}: expected one device, got {listed}.")
    device = next(iter(devices.values()))
    if device.type == "cpu" and not INTERPRETED:
        raise NotImplementedError(
            f"dsf_kernels.{function}: expected CUDA tensors, got {device}. "
            "Use dsf.scan, which has a torch path for the CPU."
        )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one for a launch."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def narrow(tensor: Tensor, axis: int) -> Tensor:
    """The same values with a stride along `axis` that 32-bit offsets inside one tile can hold.

    Offsets to a tile are 64-bit; inside a tile they are 32-bit. Only a view whose stride exceeds
    2^22 elements is copied.
    """
    wide = any(abs(step) > MAX_TILE_STRIDE for step in (tensor.stride(axis), tensor.stride(-1)))
    return tensor.contiguous() if wide and tensor.numel() else tensor


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is not below `size` and `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())
