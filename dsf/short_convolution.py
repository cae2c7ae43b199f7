"""A depthwise causal short convolution, and the shift register that it is."""

from __future__ import annotations

import torch
from torch import Tensor

from dsf.errors import DsfShapeError
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Shift


def short_convolution(
    x: Float[Tensor, "batch time channel"],
    weight: Float[Tensor, "_channel kernel"],
    bias: Float[Tensor, " _channel"] | None = None,
    cache: Float[Tensor, "_batch _channel _past"] | None = None,
) -> Float[Tensor, "batch time channel"]:
    """The convolution of each channel with its own taps, nothing from the future.

        y_t = sum_{i < kernel} weight[:, kernel - 1 - i] x_{t-i} + bias

    The last tap acts on the current token, as in torch's Conv1d. `cache` holds the kernel - 1
    inputs before the first, oldest first (zeros if None). Raises DsfShapeError on other sizes.
    Cost: O(length x channel x kernel), elementwise, so a step gives the same bits.
    """
    kernel = weight.shape[1]
    if weight.shape[0] != x.shape[2]:
        raise DsfShapeError(
            f"dsf.short_convolution: weight: expected axes (channel={x.shape[2]}, kernel), got "
            f"{tuple(weight.shape)}; channel is fixed by x."
        )
    padded = torch.cat([_past(x, kernel, cache).mT, x], dim=1)
    length = x.shape[1]
    y = padded[:, kernel - 1 :] * weight[:, kernel - 1]
    for lag in range(1, kernel):
        start = kernel - 1 - lag
        y = y + padded[:, start : start + length] * weight[:, kernel - 1 - lag]
    return y if bias is None else y + bias


def short_convolution_step(
    x_t: Float[Tensor, "batch channel"],
    weight: Float[Tensor, "_channel kernel"],
    bias: Float[Tensor, " _channel"] | None = None,
    cache: Float[Tensor, "_batch _channel _past"] | None = None,
) -> tuple[Float[Tensor, "batch channel"], Float[Tensor, "batch channel _past"]]:
    """One token of `short_convolution`, and the cache of kernel - 1 inputs after it."""
    y = short_convolution(x_t[:, None], weight, bias, cache)[:, 0]
    kernel = weight.shape[1]
    past = torch.cat([_past(x_t[:, None], kernel, cache), x_t[..., None]], dim=2)
    return y, past[:, :, 1:]


def short_convolution_recurrence(
    weight: Float[Tensor, "_channel kernel"],
    bias: Float[Tensor, " _channel"] | None = None,
    cache: Float[Tensor, "_batch _channel _past"] | None = None,
) -> Recurrence:
    """The same convolution as a time-invariant system: every channel a head, `kernel` states.

        h_t = shift(h_{t-1}) + e_1 x_t,    y_t = (w_{kernel-1}, ..., w_0) h_t

    The values are x (batch, time, channel, 1). With a bias there is a second input, the constant
    1, which reaches the output through D = (0, bias): see `with_constant`. `cache` as in
    `short_convolution`. A register of kernel - 1 past inputs would do for a step, but y_t = C h_t
    also needs the oldest one, hence kernel states.
    """
    channel, kernel = weight.shape
    taps = weight.flip(1)[None, None, :, None, :]
    B = weight.new_zeros(1, 1, 1, kernel, 1 if bias is None else 2)
    B[..., 0, 0] = 1
    D = None
    if bias is not None:
        D = torch.stack([torch.zeros_like(bias), bias], -1)[None, None, :, None, :]
    h0 = None
    if cache is not None:
        if cache.shape[1:] != (channel, kernel - 1):
            raise _cache_error(cache, channel, kernel)
        # h_0 = (x_0, x_-1, ...): the first shift drops its last entry, whatever it is
        h0 = torch.nn.functional.pad(cache.flip(2), (0, 1))[..., None]
    return Recurrence(Shift(kernel), B, taps, D, h0, system="short_convolution", gauge="register")


def with_constant(
    values: Float[Tensor, "batch time head channel"],
) -> Float[Tensor, "batch time head 2 channel"]:
    """Values with a second input that is 1 at every step: what drives a biased convolution."""
    return torch.stack([values, torch.ones_like(values)], dim=3)


def _past(x: Tensor, kernel: int, cache: Tensor | None) -> Tensor:
    batch, _, channel = x.shape
    if cache is None:
        return x.new_zeros(batch, channel, kernel - 1)
    if cache.shape != (batch, channel, kernel - 1):
        raise _cache_error(cache, channel, kernel)
    return cache


def _cache_error(cache: Tensor, channel: int, kernel: int) -> DsfShapeError:
    return DsfShapeError(
        f"dsf.short_convolution: cache: expected axes (batch, channel={channel}, "
        f"past={kernel - 1}), got {tuple(cache.shape)}."
    )
