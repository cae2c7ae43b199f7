"""What every kernel does around its launch: checks with one form of message, and settings."""

import contextlib
import math
import os

import torch
from torch import Tensor

from dsf_kernels import compiler

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TILE_STRIDE = 2**22
CHECK = os.environ.get("DSF_KERNELS_CHECK", "0") == "1"


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


def check_decay(function: str, log_decay: Tensor | None) -> None:
    """Raise where a log decay is above 0 or NaN, if that can be seen without waiting.

    On the CPU it can; on a GPU it is looked at with DSF_KERNELS_CHECK=1 alone (set before the
    import; each call then waits for the GPU, except in a graph that is captured or compiled).
    """
    if log_decay is None or not log_decay.numel() or torch.compiler.is_compiling():
        return
    on_gpu = log_decay.device.type != "cpu"
    if on_gpu and (not CHECK or torch.cuda.is_current_stream_capturing()):
        return
    most = float(log_decay.detach().max())
    if not most <= 0.0:
        raise ValueError(
            f"dsf_kernels.{function}: log_decay: expected at most 0, a decay from 0 to 1, got "
            f'{most:.3g}. States that grow are run by dsf.scan(backend="reference").'
        )


def check_scale(function: str, scale: float) -> None:
    """Raise unless the factor on the outputs is finite and not 0."""
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(
            f"dsf_kernels.{function}: scale: expected a finite nonzero number, got {scale}."
        )


def check_type(function: str, like: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise unless all tensors are of the type of the one named `like`."""
    first = tensors[like]
    assert first is not None
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != first.dtype:
            raise TypeError(
                f"dsf_kernels.{function}: {name}: expected {first.dtype}, the type of {like}, "
                f"got {tensor.dtype}."
            )


def refuse_miscompiled(function: str, tensor: Tensor, affected: bool) -> None:
    """Raise on a GPU for what ptxas before 12.9 was seen to miscompile, where that is in use."""
    if tensor.is_cuda and affected and not compiler.sound():
        raise NotImplementedError(
            f"dsf_kernels.{function}: {tensor.dtype} of shape {tuple(tensor.shape)}: expected "
            f"ptxas 12.9 or newer, got {compiler.ptxas_version() or 'none'}, which makes wrong "
            "machine code of this kernel. Set TRITON_PTXAS_PATH to a newer one (torch wheels for "
            "CUDA 13 carry torch/bin/ptxas), or use the torch path of dsf.scan."
        )


def check_matrix_state(
    function: str, query: Tensor, key: Tensor, value: Tensor, initial: Tensor | None, widest: int
) -> None:
    """Raise unless these fit a (state, channel) matrix a head, whose keys may serve several heads.

    query, key (batch, time, group, state), group dividing head; value (batch, time, head,
    channel); initial (batch, head, state, channel) or None; state and channel 1 to `widest`.
    """
    check_tensor(function, "value", value, dict.fromkeys(("batch", "time", "head", "channel")), "")
    batch, length, n_head, channels = value.shape
    n_state = key.shape[-1] if key.shape else 0
    sizes = {"batch": batch, "time": length, "group": None, "state": n_state}
    for name, tensor in {"key": key, "query": query}.items():
        check_tensor(function, name, tensor, sizes, "sizes are fixed by value and key")
        groups = tensor.shape[2]
        if n_head and (groups == 0 or n_head % groups):
            raise ValueError(
                f"dsf_kernels.{function}: {name}: expected a group count that divides "
                f"head={n_head}, got {groups}."
            )
    check_type(function, "value", {"value": value, "key": key, "query": query})
    if max(n_state, channels) > widest or min(n_state, channels) < 1:
        raise ValueError(
            f"dsf_kernels.{function}: expected state and channel from 1 to {widest}, got "
            f"state={n_state}, channel={channels}."
        )
    if initial is not None:
        sizes = {"batch": batch, "head": n_head, "state": n_state, "channel": channels}
        check_tensor(function, "initial_state", initial, sizes, "fixed by key and value")


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


def start_state(value: Tensor, n_state: int, initial: Tensor | None) -> Tensor:
    """The state (batch, head, state, channel) before the first step, in float32: zero for None."""
    shape = (value.shape[0], value.shape[2], n_state, value.shape[3])
    zero = value.new_zeros(shape, dtype=torch.float32)
    return zero if initial is None else zero + initial


def over_groups(grad: Tensor, like: Tensor) -> Tensor:
    """Sum of the heads that share a group, in float32, in the type of `like`."""
    if grad.shape == like.shape:
        return grad.to(like.dtype)
    return grad.unflatten(2, (like.shape[2], -1)).sum(3, dtype=torch.float32).to(like.dtype)


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is not below `size` and `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())
