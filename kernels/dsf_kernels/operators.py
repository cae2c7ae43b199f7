"""Operators of torch.library with a short way to their kernel.

`torch.library.custom_op` asks at every call whether an output shares memory with an input, and
goes through three Python wrappers: several times what the launch of a small kernel takes. The
operators made here have the same schema, fake tensors and gradients without it; in return the
function must give new tensors, which share no memory with each other or with an argument.
"""

from collections.abc import Callable

import torch
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
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
    near = function
    if backward is not None:
        _LIBRARY.impl(name, _differentiable(_below(call), backward), "Autograd")
        near = _differentiable(function, backward)

    def run(*arguments):
        return near(*arguments) if _plain(arguments) else call(*arguments)

    return run


def _plain(arguments: tuple) -> bool:
    """Whether nobody but autograd watches: the dispatcher then adds nothing but its time."""
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )
    return not watched and all(
        type(a) in (torch.Tensor, torch.nn.Parameter) and not a.is_meta
        for a in arguments
        if isinstance(a, torch.Tensor)
    )


def _below(call: Callable) -> Callable:
    def below(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return call(*arguments)

    return below


def _differentiable(below: Callable, backward: Callable) -> Callable:
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

    def run(*arguments):
        if torch.is_grad_enabled() and any(
            torch.is_tensor(a) and a.requires_grad for a in arguments
        ):
            return Differentiable.apply(*arguments)
        return below(*arguments)

    return run
