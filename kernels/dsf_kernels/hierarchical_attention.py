"""Hierarchical attention: softmax tied over the pairs of siblings of a regular tree.

Passes over the tree (notation of `reference/hierarchical.py`): up, means of q, k, v, scores of
each family and g; down, outputs o and masses a = exp(c), o_i = o_P + a_P (part of i in its
subtree P). A tile of tokens holds whole subtrees, so that its levels share one product of queries
and keys, whose blocks are averaged, and one with the values; what a tile adds to its subtrees'
roots (their means, counts, g) are the items of the next tile. Backward goes up with the
gradients of o and a, and down with those of the means and of g, recomputing each tile.
"""

import torch
from torch import Tensor

from dsf_kernels.hierarchical_launch import LARGEST_FAMILY, Plan
from dsf_kernels.launch import check_kind, check_scale, check_tensor, check_type, on_device
from dsf_kernels.operators import operator

MAX_WIDTH = 128


def _outputs(query, key, value, mask, branching, self_term, scale):
    plan = Plan(query, key, value, mask, branching, self_term, scale)
    like = {"dtype": value.dtype, "device": value.device}
    out = torch.empty(value.shape, **like)
    local = torch.empty((0,) if plan.stages[0].top else value.shape, **like)
    return plan, out, local, kept_room(plan.room(), value.device)


def kept_room(size, device) -> Tensor:
    """Float32 numbers to be written; a zero in place of none, as kernels take its address."""
    like = {"dtype": torch.float32, "device": device}
    return torch.empty(size, **like) if size else torch.zeros(1, **like)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, branching: list[int],
    self_term: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, and for the way back the tokens' own parts and all numbers of the items."""
    plan, out, local, saved = _outputs(query, key, value, mask, branching, self_term, scale)
    if out.numel():
        with on_device(value):
            plan.forward(out, local, saved)
    return out, local, saved


def empty_gradients(query, key, value) -> tuple[Tensor, Tensor, Tensor]:
    """Room for gradients like these."""
    like = {"dtype": value.dtype, "device": value.device}
    return (
        torch.empty(query.shape, **like),
        torch.empty(key.shape, **like),
        torch.empty(value.shape, **like),
    )


def _adjoint_run(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grad: Tensor, out: Tensor,
    local: Tensor, saved: Tensor, branching: list[int], self_term: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = empty_gradients(query, key, value)
    if value.numel():
        plan = Plan(query, key, value, mask, branching, self_term, scale)
        with on_device(value):
            plan.backward(grad, out, local, saved, grads)
    return grads


def _adjoint_fake(query, key, value, *_):
    return empty_gradients(query, key, value)


_adjoint = operator("hierarchical_attention_adjoint", _adjoint_run, _adjoint_fake)
operator("hierarchical_attention", _forward, lambda *a: _outputs(*a)[1:])
_attention = torch.ops.dsf.hierarchical_attention.default  # where its gradient is registered


def _save(ctx, inputs, output):
    *tensors, ctx.branching, ctx.self_term, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _local, _saved):
    query, key, value, mask, *results = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    grads = _adjoint(
        query, key, value, mask, grad, *results, ctx.branching, ctx.self_term, ctx.scale
    )
    return *grads, None, None, None, None


torch.library.register_autograd("dsf::hierarchical_attention", _backward, setup_context=_save)


def checked(function, query, key, value, branching, mask, scale) -> float:
    """Raise on wrong kinds, shapes and trees; the scale, 1/sqrt(width) for None."""
    check_kind(function, {"value": value, "query": query, "key": key})
    check_type(function, "value", {"value": value, "query": query, "key": key})
    check_tensor(function, "value", value, dict.fromkeys(("batch", "time", "head", "channel")), "")
    batch, length, n_head, channels = value.shape
    sizes = {"batch": batch, "time": length, "head": n_head, "width": None}
    check_tensor(function, "query", query, sizes, "sizes are fixed by value")
    sizes["width"] = query.shape[3]
    check_tensor(function, "key", key, sizes, "sizes are fixed by value and query")
    if max(query.shape[3], channels) > MAX_WIDTH or min(query.shape[3], channels) < 1:
        raise ValueError(
            f"dsf_kernels.{function}: expected width and channel from 1 to {MAX_WIDTH}, got "
            f"width={query.shape[3]}, channel={channels}."
        )
    if not branching or min(branching) < 1 or max(branching[1:], default=1) > LARGEST_FAMILY:
        raise ValueError(
            f"dsf_kernels.{function}: branching: expected positive numbers from top to bottom, "
            f"below the first at most {LARGEST_FAMILY}, got {tuple(branching)}; a larger family "
            "needs levels between, or to be the first."
        )
    if mask is not None:
        check_tensor(function, "key_mask", mask, {"batch": batch, "time": length}, "one a token")
        if mask.dtype != torch.bool or mask.device != value.device:
            raise TypeError(
                f"dsf_kernels.{function}: key_mask: expected torch.bool on {value.device}, got "
                f"{mask.dtype} on {mask.device}."
            )
    scale = query.shape[3] ** -0.5 if scale is None else scale
    check_scale(function, scale)
    return float(scale)


def hierarchical_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branching: tuple[int, ...] = (16, 8, 4, 2),
    key_mask: Tensor | None = None,
    *,
    self_term: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Outputs of softmax attention tied over the pairs of siblings of a regular tree.

    For a child A of P, with n real tokens in a node and qbar, kbar, vbar their means,

        S_AB = scale qbar_A.kbar_B,   lambda_A = log sum_{B != A} n_B exp S_AB
        mu_A = sigmoid(g_A - lambda_A),   g_P = sum_A n_A/n_P log(e^g_A + e^lambda_A)
        o_A = o_P + a_P (1 - mu_A) sum_{B != A} n_B exp(S_AB - lambda_A) vbar_B,   a_A = a_P mu_A

    from o = 0, a = 1 at the root to y_i = o_i + a_i v_i at the tokens, whose g is scale q_i.k_i
    (without self_term, the published form, -inf, and y_i = o_i).

    branching: children of a node, from top to bottom; groups are windows of tokens, the last of
    each level may be short, and the root takes as many as there are. key_mask (batch, time):
    False takes a token out of the tree.
    Shapes: query, key (batch, time, head, width), value (batch, time, head, channel); width and
    channel 1 to 128, branching below the root 1 to 64, time from 0, any strides; bf16, fp16 or
    fp32, one type. Returns outputs like value. Differentiable in query, key and value, once.
    Products of tokens round to the type of the inputs (weights too), those of groups to tf32;
    for fp32 all are exact float32. Sums, means and masses are float32.
    Raises ValueError (shape, device, branching), TypeError (dtype), NotImplementedError (CPU).
    Cost: q, k, v and the output once, and once more the tokens' parts; about
    time x tile x 2 (width + channel) operations a head, tile = 64 tokens (32 in fp32), and the
    square of the root's groups when there are more than a tile of them.
    Source: Amizadeh et al. (2025), arXiv 2509.15448, algorithms 1 to 3, restated in logarithms;
    self term and masks derived.
    """
    name = "hierarchical_attention"
    scale = checked(name, query, key, value, branching, key_mask, scale)
    tensors = query, key, value, key_mask
    return _attention(*tensors, [int(b) for b in branching], bool(self_term), scale)[0]
