"""The delta rule, plain or with one decay a token and head: matrix state, chunks of tokens.

With g the cumulative log decay in a chunk, e_i = exp(g_i), D_ij = exp(g_i - g_j), H the state at
the chunk's start, H' at its end (step c), K, Q, V its rows and beta its write strengths,

    G_ij = beta_i D_ij k_i . k_j (i > j),    T = (I + G)^-1,    A_ij = D_ij q_i . k_j (i >= j)
    delta = T beta (V - e K H)               what the tokens write
    Y = scale (e Q H + A delta),             H' = e_c H + (D_c K)^T delta

`solve_kernel` gives T, in float32 by forward substitution over blocks of 16 tokens, all chunks at
once; `forward_kernel` walks over the chunks of a head with the state in registers, a program a
slab of channels. W = T beta e K and U = T beta V (the usual WY form) are never formed: T is
applied to what the state leaves unexplained, which is smaller, and fewer bytes move.

Backward, from dY (times scale) and dH', walking the other way (`reverse_kernel`):

    r = T^T (A^T dY + D_c K dH'),    dH = e_c dH' + (e Q)^T dY - (e K)^T beta r

and then for all chunks at once (`gradient_kernel`), as the adjoint of the solve is
dG = -r delta^T:

    dV = beta r,    dbeta = r . (V - e K H) - sum_j (r_i . delta_j) D_ij k_i . k_j
    dQ = e dY H^T + (dY delta^T D) K,    with M_ij = -beta_i D_ij r_i . delta_j (i > j)
    dK = -e beta r H^T + D_c delta dH'^T + (dY delta^T D)^T Q + (M + M^T) K

so no gradient divides by beta, which may be 0. The gradient of a log decay is the sum of all terms
that span its step (pairs j < t <= i, rows i >= t that read H, rows j < t that H' keeps, and
e_c H . dH'), never a difference of prefix sums: exact where decays are 0.
"""

import torch
from torch import Tensor

from dsf_kernels.delta_launch import Plan, products
from dsf_kernels.launch import (
    check_decay,
    check_kind,
    check_matrix_state,
    check_scale,
    check_tensor,
    on_device,
    over_groups,
    start_state,
)
from dsf_kernels.sequences import check_sequences, count_rows, placed, results, start_states

MAX_WIDTH = 256


def _solved(value: Tensor, n_state: int, cu_seqlens: Tensor | None) -> Tensor:
    """An empty T: (batch x head, chunk, step, step)."""
    settings = products(value.dtype, n_state, value.shape[3])
    chunk = settings["CHUNK"]
    n_chunk = -(-value.shape[1] // chunk)
    if cu_seqlens is not None:
        n_chunk = value.shape[1] // chunk + count_rows(value, cu_seqlens)
    shape = (value.shape[0] * value.shape[2], n_chunk, chunk, chunk)
    return value.new_empty(shape, dtype=torch.float32 if settings["EXACT"] else torch.bfloat16)


@torch.library.custom_op("dsf::delta_scan", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, strength: Tensor, log_decay: Tensor | None,
    initial: Tensor | None, scale: float, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, final state, and T, which the backward pass uses again."""
    n_head, channels, n_state = *value.shape[2:], key.shape[3]
    n_rows = count_rows(value, cu_seqlens)
    out = results(value, cu_seqlens, value.shape)
    if n_rows == 0 or value.numel() == 0:
        final = start_states(value, n_state, initial, cu_seqlens)
        return out, final, _solved(value, n_state, cu_seqlens)
    final = value.new_empty((n_rows, n_head, n_state, channels), dtype=torch.float32)
    with on_device(value):
        plan = Plan(key, strength, log_decay, channels, cu_seqlens=cu_seqlens)
        plan.forward(query, key, value, scale, initial, out=out, final=final)
    return out, final, plan.solved


@_forward.register_fake
def _(query, key, value, strength, log_decay, initial, scale, cu_seqlens=None):
    shape = (count_rows(value, cu_seqlens), value.shape[2], key.shape[3], value.shape[3])
    final = value.new_empty(shape, dtype=torch.float32)
    return value.new_empty(value.shape), final, _solved(value, key.shape[3], cu_seqlens)


@torch.library.custom_op("dsf::delta_scan_adjoint", mutates_args=())
def _adjoint(
    query: Tensor, key: Tensor, value: Tensor, strength: Tensor, log_decay: Tensor | None,
    initial: Tensor | None, solved: Tensor, grad: Tensor, grad_final: Tensor | None,
    scale: float, decay_grad: bool, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, n_head, channels = value.shape
    n_state, device = key.shape[3], value.device
    n_rows = count_rows(value, cu_seqlens)
    grad_value = results(value, cu_seqlens, value.shape)
    if n_rows == 0 or value.numel() == 0:
        steps = value.new_zeros((batch, length, n_head), dtype=torch.float32)
        return (
            torch.zeros(query.shape, dtype=query.dtype, device=device),
            torch.zeros(key.shape, dtype=key.dtype, device=device),
            grad_value, steps, steps[:, : decay_grad * length].clone(),
            start_states(value, n_state, grad_final, cu_seqlens),
        )  # fmt: skip
    grad_initial = value.new_empty((n_rows, n_head, n_state, channels), dtype=torch.float32)
    with on_device(value):
        plan = Plan(key, strength, log_decay, channels, solved, cu_seqlens)
        chunks = (batch * n_head, plan.n_chunk, n_state, channels)
        states, adjoints = (plan.empty(*chunks, kind=plan.kind) for _ in range(2))
        written, pulled = (plan.empty(*value.shape, kind=plan.kind) for _ in range(2))
        heads = (batch, length, n_head, n_state)
        grad_query, grad_key = (results(t, cu_seqlens, heads) for t in (query, key))
        steps = [plan.empty(batch, n_head, plan.n_chunk * plan.chunk) for _ in range(2)]
        plan.forward(query, key, value, scale, initial, saved=(states, written))
        plan.reverse(query, key, grad, scale, grad_final, adjoints, pulled, grad_initial)
        plan.gradients(query, key, value, grad, scale, (states, adjoints, written, pulled),
                       (grad_query, grad_key, grad_value, *steps),
                       decay_grad)  # fmt: skip
        grad_strength = plan.steps(steps[0])
        grad_decay = plan.steps(steps[1]) if decay_grad else steps[1].mT[:, :0].clone()
    return (
        over_groups(grad_query, query), over_groups(grad_key, key), grad_value, grad_strength,
        grad_decay, grad_initial,
    )  # fmt: skip


@_adjoint.register_fake
def _(
    query, key, value, strength, log_decay, initial, solved, grad, grad_final, scale, decay_grad,
    cu_seqlens=None,
):  # fmt: skip
    batch, length, n_head, channels = value.shape
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
        torch.empty(value.shape, dtype=value.dtype, device=value.device),
        value.new_empty((batch, length, n_head), dtype=torch.float32),
        value.new_empty((batch, length if decay_grad else 0, n_head), dtype=torch.float32),
        value.new_empty(
            (count_rows(value, cu_seqlens), n_head, key.shape[3], channels), dtype=torch.float32
        ),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.scale, cu_seqlens = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2], cu_seqlens)


def _backward(ctx, grad, grad_final, _):
    query, key, value, strength, log_decay, initial, solved, cu_seqlens = ctx.saved_tensors
    wanted = log_decay is not None and ctx.needs_input_grad[4]
    grad = torch.zeros_like(value) if grad is None else grad
    *grads, grad_strength, grad_decay, grad_initial = _adjoint(
        query, key, value, strength, log_decay, initial, solved, grad, grad_final, ctx.scale,
        wanted, cu_seqlens,
    )  # fmt: skip
    grad_decay = grad_decay.to(log_decay.dtype) if wanted else None
    grad_initial = None if initial is None else grad_initial.to(initial.dtype)
    return *grads, grad_strength.to(strength.dtype), grad_decay, grad_initial, None, None


_forward.register_autograd(_backward, setup_context=_save)


def _checked(function, query, key, value, strength, log_decay, initial_state, cu_seqlens=None):
    """Raise on wrong kinds and shapes."""
    names = {"value": value, "query": query, "key": key, "write_strength": strength,
             "log_decay": log_decay, "initial_state": initial_state}  # fmt: skip
    check_kind(function, names)
    whole = initial_state if cu_seqlens is None else None
    check_matrix_state(function, query, key, value, whole, MAX_WIDTH)
    if cu_seqlens is not None:
        sizes = {"head": value.shape[2], "state": key.shape[3], "channel": value.shape[3]}
        check_sequences(function, cu_seqlens, value, initial_state, sizes)
    sizes = dict(zip(("batch", "time", "head"), value.shape, strict=False))
    for name in ("write_strength", "log_decay"):
        if names[name] is not None:
            check_tensor(function, name, names[name], sizes, "one number a token and head")
    check_decay(function, log_decay)


def delta_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write_strength: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and the last state, of the delta rule, plain or gated.

    h_t = a_t (I - beta_t B_t B_t^T) h_{t-1} + beta_t B_t u_t, y_t = scale C_t h_t, with
    C = `query`, B = `key`, u = `value`, beta = `write_strength` (any number; 0 writes nothing,
    1 replaces what a unit key holds, 2 reflects), a = exp(`log_decay`) <= 1 (-inf resets exactly;
    None: 1), h_0 = `initial_state` (zero when None). DeltaNet, Gated DeltaNet.

    cu_seqlens (n + 1,): n sequences packed along time in one row, each with its own initial and
    final state (n, head, state, channel), as in `scalar_decay_scan`, with its errors.

    Shapes: query, key (batch, time, group, state) with group dividing head (head k reads group
    k // (head / group)), value (batch, time, head, channel), write_strength, log_decay
    (batch, time, head), initial_state (batch, head, state, channel); state and channel 1 to 256,
    time from 0, any strides; bf16, fp16 or fp32, one type for query, key, value. Returns outputs
    like value and the final state in float32. Differentiable in all six tensors.
    Matrix products round their operands to bf16 for bf16 with state and channel from 33 to 128,
    and are exact float32 (slower) otherwise; sums, the state and the solve are float32 (the solve
    in 3 x tf32 beside bf16 products).
    Keys are meant to have norm 1 (then |I - beta B B^T| <= 1 for beta in [0, 2]); longer keys are
    legal, and errors grow with the condition of the solve.
    Raises ValueError (shape, device; a log decay above 0 with DSF_KERNELS_CHECK=1, which makes
    each call wait for the GPU), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: about time x (6 N P + 256 (N + P)) operations a head forward.
    Source: Yang et al. 2024 (DeltaNet, chunk form), Yang, Kautz, Hatamizadeh 2024 (gated);
    measured figures in kernels/README.md.
    """
    check_scale("delta_scan", scale)
    tensors = (query, key, value, write_strength, log_decay, initial_state)
    _checked("delta_scan", *tensors, cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens = placed("delta_scan", cu_seqlens, value)
    return _forward(*tensors, float(scale), cu_seqlens)[:2]


def delta_summary(
    key: Tensor, value: Tensor, write_strength: Tensor, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a segment does to any state: (total, end) with h_L = total h_0 + end.

    total (batch, head, state, state) = product of a_t (I - beta_t B_t B_t^T), later steps on the
    left; end (batch, head, state, channel) = h_L from zero; both float32, from exact float32
    products. Arguments and errors as `delta_scan`; no gradient.
    """
    key, value, write_strength = key.detach(), value.detach(), write_strength.detach()
    log_decay = None if log_decay is None else log_decay.detach()
    _checked("delta_summary", key, key, value, write_strength, log_decay, None)
    key, value = key.float(), value.float()
    batch, length, n_head, channels = value.shape
    n_state = key.shape[3]
    one = torch.eye(n_state, device=value.device).expand(batch, n_head, n_state, n_state)
    if min(batch, length, n_head) == 0:
        return one.contiguous(), start_state(value, n_state, None)
    total, end = value.new_empty(one.shape), start_state(value, n_state, None)
    nothing = value.new_zeros(()).expand(batch, length, n_head, n_state)
    with on_device(value):
        plan = Plan(key, write_strength, log_decay, channels)
        plan.forward(key, key, value, 1.0, None, final=end)
        plan.channels = n_state
        plan.forward(key, key, nothing, 1.0, one, final=total)
    return total, end
