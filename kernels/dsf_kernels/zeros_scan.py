"""ZeroS attention in one pass: a zero-sum softmax with gates on its orders.

One kernel sums the logits in float64, one writes from the sums what tokens are multiplied with,
one walks along time with three states of state x 64 channels in registers: a product of scores
and one with values in a chunk, three with the states. A long row of few heads is cut in time:
each segment first adds up its own states (zeros_segments).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsf_kernels.launch import check_kind, check_matrix_state, check_tensor, check_type
from dsf_kernels.operators import operator
from dsf_kernels.zeros_gradients import backward
from dsf_kernels.zeros_launch import MAX_WIDTH, fake, forward

_scan = operator("zeros_scan", forward, fake, backward)


class ZerosState(NamedTuple):
    """What ZeroS holds of the tokens it has seen.

    moments (batch, head, 3, state, channel), float32: of Z_j = k_j u_j^T the softmax mean less
    the plain mean, sum_j (s_j - c) Z_j, and sum_j Z_j. totals (batch, head, 3), float64:
    log sum_j exp(s_j), the mean c of the logits, and how many tokens.
    """

    moments: Tensor
    totals: Tensor


def zeros_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logit: Tensor,
    first: Tensor,
    higher: Tensor,
    zero: Tensor | None = None,
    initial_state: ZerosState | None = None,
) -> tuple[Tensor, ZerosState]:
    """Outputs, and what is held after the last token, of causal ZeroS.

    y_t = sum_{j<=t} W_tj (q_t . k_j) u_j, where, s = `logit`, c_t the mean of s_1 .. s_t, p_t the
    softmax of s_1 .. s_t,

        W_tj = higher_t (p_tj - 1/t) + (first_t - higher_t) (s_j - c_t)/t + zero_t/t,

    q = `query`, k = `key`, u = `value`. zero None: no zero order, rows of W sum to 0 and y_1 is
    exactly 0. initial_state: what an earlier call held after its last token, so that t counts on.

    Shapes: query, key (batch, time, head, state), value (batch, time, head, channel), logit and
    gates (batch, time, head); state and channel 1 to 128, time from 0, any strides; query, key,
    value of one type, bf16, fp16 or fp32. Logits must be finite. Returns outputs like value and a
    `ZerosState`. Differentiable in all tensors, once. The sums of logits are float64, so that a
    common offset costs no digits; states are float32, and those of fp32 inputs keep what rounding
    loses, so that errors do not grow with time; nothing of row t depends on later logits.
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: time x (12 N P + 4 c (N + P)) operations a head in chunks of c <= 128; backward about
    three times that. Memory beyond the outputs: 68 bytes a token and head, 112 backward; where a
    row is cut, states of at most 128 segments a head.
    Source: ZeroS (zero-sum linear attention), in a running normalised form.
    """
    name = "zeros_scan"
    moments, totals = (None, None) if initial_state is None else initial_state
    gates = {"logit": logit, "first": first, "higher": higher, "zero": zero}
    check_kind(name, {"value": value, "query": query, "key": key, "moments": moments} | gates)
    check_matrix_state(name, query, key, value, None, MAX_WIDTH)
    batch, _, n_head, channels = value.shape
    for what, tensor in {"query": query, "key": key}.items():
        expected = {"batch": None, "time": None, "head": n_head, "state": None}
        check_tensor(name, what, tensor, expected, "head is fixed by value")
    sizes = dict(zip(("batch", "time", "head"), value.shape, strict=False))
    for what, tensor in gates.items():
        if tensor is not None:
            check_tensor(name, what, tensor, sizes, "sizes are fixed by value")
    if moments is not None and totals is not None:
        lanes = {"batch": batch, "head": n_head}
        sizes = lanes | {"moment": 3, "state": key.shape[3], "channel": channels}
        check_tensor(name, "moments", moments, sizes, "sizes are fixed by key and value")
        check_tensor(name, "totals", totals, lanes | {"total": 3}, "sizes are fixed by value")
        if totals.dtype != torch.float64:
            raise TypeError(
                f"dsf_kernels.{name}: totals: expected float64, got {totals.dtype}; hand on what "
                "an earlier call returned."
            )
    check_type(name, "value", {"value": value, "query": query, "key": key})
    out, moments, totals = _scan(query, key, value, logit, first, higher, zero, moments, totals)
    return out, ZerosState(moments, totals)
