"""Operators of torch.library with a short way to their kernel.

`torch.library.custom_op` asks at every call whether an output shares memory with an input, and
goes through three Python wrappers: several times what the launch of a small kernel takes. The
operators made here have the same schema, fake tensors and gradients without it; in return the
function must give new tensors, which share no memory with each other or with an argument.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

_LIBRARY = torch.library.Library("dsf", "FRAGMENT")


def operator(
    name: str, function: Callable, fake: Callable, backward: Callable | None = None
) -> Callable:
    """The operator dsf::`name` that runs `function`, whose annotations give its schema.

    fake: the same on tensors without data. backward(ctx, *gradients) gives a gradient for each
    argument; `ctx.saved_tensors` holds the arguments that are tensors or None, in order,
    `ctx.rest` the others. Once differentiable.
    """
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, function, device)
    torch.library.register_fake(f"dsf::{name}", fake, lib=_LIBRARY)
    call = getattr(torch.ops.dsf, name).default
    if backward is not None:
        _LIBRARY.impl(name, _differentiable(call, backward), "Autograd")
    return call


def _differentiable(call: Callable, backward: Callable) -> Callable:
    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            ctx.save_for_backward(*(a for a in arguments if a is None or torch.is_tensor(a)))
            ctx.set_materialize_grads(False)
            ctx.rest = [a for a in arguments if a is not None and not torch.is_tensor(a)]
            return below(*arguments)

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            return backward(ctx, *gradients)

    def below(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return call(*arguments)

    def run(*arguments):
        if torch.is_grad_enabled() and any(
            torch.is_tensor(a) and a.requires_grad for a in arguments
        ):
            return Differentiable.apply(*arguments)
        return below(*arguments)

    return run
