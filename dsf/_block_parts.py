"""A traced layer taken apart at its scan: derivatives before it, after it, and around it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

from dsf._frozen_layers import (
    constant,
    frozen_output,
    frozen_readout,
    frozen_run,
    held,
    leaf,
    single,
    the_input,
)
from dsf.adapters import Built
from dsf.derivatives import Derivative, parameters_constant
from dsf.recurrence import Recurrence
from dsf.scanning import scan
from dsf.tracing import LayerTrace, relative_error
from dsf.wrappers import System


class Parts(NamedTuple):
    """d values / d input, the recurrence between, d output / d scan, d output / d input."""

    into: Derivative
    inner: System
    out_of: Derivative
    around: Derivative | None
    output: Tensor
    error: float


def frozen_parts(trace: LayerTrace, limit: float) -> Parts:
    """Without what goes around the scan, if the layer is the rest within `limit`; else with it.

    Of attention between two sequences input and output are put on its one axis of time, the
    other sequence first: zeros stand where a step has none.
    """
    source = single(trace)
    module, late = source.visit.module, trace.attrs.get("n_key", 0)
    turned = not getattr(module, "batch_first", True)  # torch.nn's (time, batch, feature)

    def placed(output: Tensor) -> Tensor:
        output = output.transpose(0, 1) if turned else output
        return pad(output, (0, 0, late, 0)) if late else output

    with parameters_constant(module, but_biases=True) as biases:
        given = pytree.tree_map(leaf, (source.visit.args, source.visit.kwargs))
        run, inner, values = _run(trace, given)
        x = the_input(trace, values, given)
        if late or turned:
            x, given = _placed(x, given, trace.attrs["n_query"] if late else 0, turned)
            run, inner, values = _run(trace, given)
        into = Derivative((x, *biases), values)
        made = relative_error(into.apply(x.detach(), *map(held, biases)), values)
    into, output = Derivative((x,), values), placed(trace.output)
    y = scan(constant(trace.recurrence), run.values.detach())
    with parameters_constant(module):
        leaf_y = y.detach().requires_grad_()
        out_of = Derivative((leaf_y,), placed(frozen_readout(trace, leaf_y)))
        at_zero = placed(frozen_readout(trace, torch.zeros_like(y)))
        read = relative_error(out_of.apply(y) + at_zero, output)
    if read <= limit:
        return Parts(into, inner, out_of, None, output, max(made, read))
    with parameters_constant(module, but_biases=True) as biases:
        leaf_y = y.detach().requires_grad_()
        made_of_both = placed(frozen_output(trace, run, leaf_y))
        whole = Derivative((leaf_y, x, *biases), made_of_both)
        found = whole.apply(y, x.detach(), *map(held, biases))
    around, out_of = Derivative((x,), made_of_both), Derivative((leaf_y,), made_of_both)
    return Parts(into, inner, out_of, around, output, max(made, relative_error(found, output)))


def _run(trace: LayerTrace, given: tuple) -> tuple[Built, System, Tensor]:
    run = frozen_run(trace, *given)
    leaves = pytree.tree_leaves(given)
    return (run, *_without_constants(constant(trace.recurrence), run.values, leaves))


def _placed(x: Tensor, given: tuple, n_query: int, turned: bool) -> tuple[Tensor, tuple]:
    """x (batch, time, feature) followed by n_query zeros, a new leaf; the arguments made of it."""
    whole = pad(x.detach().transpose(0, 1) if turned else x.detach(), (0, 0, 0, n_query))
    whole = whole.contiguous().requires_grad_()
    own = whole[:, : whole.shape[1] - n_query]
    own = own.transpose(0, 1) if turned else own
    return whole, pytree.tree_map(lambda a: own if a is x else a, given)


def _without_constants(system: System, values: Tensor, given: list) -> tuple[System, Tensor]:
    """The one input that is made of what the layer was given, where the others are constants.

    A biased convolution has an input that is 1: what it adds is part of the block's offset.
    """
    if values.ndim != 5 or not isinstance(system, Recurrence):
        return system, values
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]

    def depends(part: Tensor) -> bool:
        rows = torch.autograd.grad(
            part, leaves, torch.ones_like(part), retain_graph=True, allow_unused=True
        )
        return any(row is not None and bool(row.any()) for row in rows)

    kept = [i for i in range(values.shape[3]) if depends(values[:, :, :, i])]
    if len(kept) != 1:
        return system, values
    D = None if system.D is None else system.D[..., kept]
    B, _ = system.dense_input_output()
    return system.replace(B=B[..., kept], D=D), values[:, :, :, kept[0]]
