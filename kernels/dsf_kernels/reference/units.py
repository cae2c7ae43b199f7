"""How far a kernel is from its loop, in units of rounding."""

import math

import torch

# Half a unit in the last place over the value, at most; float32 is judged by the units alone.
HALF_ULP = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
UNDERFLOW = 2.0**-120
# The least that half a unit in the last place can be: half the distance of fp16's subnormals.
LEAST_HALF = {torch.float16: 2.0**-25}


def _run(function, tensors, grads, options):
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items() if v is not None}
    outputs = function(**{k: leaves.get(k) for k in tensors}, **options)
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    gradients = {
        f"grad {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return {"output": outputs[0].detach(), "final state": outputs[1].detach()} | gradients


def _found(kernel, tensors, seed, options):
    """A kernel's outputs and gradients; its arguments and random output gradients in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shapes = kernel(**tensors, **options)
    grads = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in shapes]
    found = _run(kernel, tensors, grads, options)
    exact = {k: v if v is None else v.double() for k, v in tensors.items()}
    return found, exact, [g.double() for g in grads]


def _worst(value, true, unit):
    """Largest error over `unit`, beyond half an ulp and underflow; inf where not finite."""
    half = (HALF_ULP[value.dtype] * true.abs()).clamp_min(LEAST_HALF.get(value.dtype, 0.0))
    error = (value.double() - true).abs() - half - UNDERFLOW
    ratio = torch.where(error > 0, error / unit, torch.zeros_like(error))
    ratio = torch.where(torch.isfinite(value) & torch.isfinite(true), ratio, math.inf)
    return float(ratio.max()) if ratio.numel() else 0.0


def error_units(
    kernel, reference, tensors, logs=(), *, unit=2.0**-24, seed=0, bound=None, **options
):
    """Largest error of a kernel's outputs and of every gradient: {name: units}.

    units = (|kernel - reference| - half an ulp of the result's type) / (unit * M), elementwise,
    with M the reference run on absolute values (of all but the tensors named in `logs`, which are
    logarithms already), gradients likewise; `unit` is the unit round-off of the coarsest type
    that operands are rounded to. `tensors`: {argument: tensor or None}, of unit size: differences
    below 2^-120 are float32 underflow and count 0, and half an ulp is that of the subnormals where
    the result is one. A non-finite result, or reference, gives inf. bound: the loop
    that gives M where `reference` subtracts; its terms must only add.
    """
    found, exact, grads = _found(kernel, tensors, seed, options)
    truth = _run(reference, exact, grads, options)
    size = {k: v if v is None or k in logs else v.abs() for k, v in exact.items()}
    most = _run(bound or reference, size, [g.abs() for g in grads], options)
    return {
        name: _worst(value, truth[name], unit * most[name].abs()) for name, value in found.items()
    }


def row_units(kernel, reference, tensors, *, unit=2.0**-24, seed=0, **options):
    """Largest error of outputs and gradients in units of `unit` times the size of their row.

    units = (|kernel - reference| - half an ulp) / (unit * S), elementwise, S the largest entry of
    the true row (last axis), or the root mean square of the whole where that is larger. For
    transitions such as I - b k k^T, whose run on absolute values grows without bound: rounding
    there is bounded by norms, not by signs. Otherwise as `error_units`.
    """
    found, exact, grads = _found(kernel, tensors, seed, options)
    truth = _run(reference, exact, grads, options)
    return {
        name: _worst(value, truth[name], unit * _row_size(truth[name]))
        for name, value in found.items()
    }


def _row_size(true):
    if not true.numel():
        return true
    return true.abs().amax(-1, keepdim=True).clamp_min(true.square().mean().sqrt())
