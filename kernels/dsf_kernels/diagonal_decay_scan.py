"""Linear recurrence with a matrix state and one decay per state and token: GLA, MetaLA, HGRN2,
RWKV-6.

Two kernels forward. `pair_kernel`, parallel over chunks of c tokens, gives the scores of the pairs
inside a chunk, the queries decayed from the chunk's start, the keys decayed to its end.
`walk_kernel` carries the state from chunk to chunk and writes the outputs.

The score of i > j is sum_n q_i a_{j+1} .. a_i k_j, a product of up to c decays that differ by
state. Blocks of 2, 4, .. c tokens are cut in their middle; the pairs that a cut of some length
parts are one matrix product, of queries decayed from the cut and keys decayed to it. Every factor
is a product of decays, at most 1, built by multiplication alone: nothing overflows, nothing is
divided or subtracted, and decays of 0 or of exp(-100) are exact. log2(c) products of c x c tiles,
and one exponential a token and state.

Backward: the scores again, the states at the chunks' starts (stored in the type of the values),
their gradients at the chunks' ends with the gradients of the values, and a kernel parallel over
chunks for the rest. The gradient of a log decay sums the pairs that span the token, cut by cut.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsf_kernels.diagonal_decay_launch import Chunks
from dsf_kernels.launch import (
    INTERPRETED,
    check_decay,
    check_kind,
    check_scale,
    check_tensor,
    check_type,
    on_device,
)
from dsf_kernels.sequences import (
    check_sequences,
    count_rows,
    edges,
    placed,
    results,
    start_states,
)

MAX_WIDTH = 256


@torch.library.custom_op("dsf::diagonal_decay_scan", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, initial: Tensor | None,
    scale: float, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = results(value, cu_seqlens, value.shape)
    n_rows = count_rows(value, cu_seqlens)
    if n_rows == 0 or value.numel() == 0:
        return out, start_states(value, key.shape[3], initial, cu_seqlens)
    shape = (n_rows, value.shape[2], key.shape[3], value.shape[3])
    final = value.new_empty(shape, dtype=torch.float32)
    with on_device(value):
        chunks = Chunks(query, key, value, log_decay, scale, cu_seqlens)
        chunks.walk(value, out=out, initial=initial, final=final)
    return out, final


@_forward.register_fake
def _(query, key, value, log_decay, initial, scale, cu_seqlens=None):
    shape = (count_rows(value, cu_seqlens), value.shape[2], key.shape[3], value.shape[3])
    return value.new_empty(value.shape), value.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("dsf::diagonal_decay_scan_adjoint", mutates_args=())
def _adjoint(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, initial: Tensor | None,
    grad: Tensor, grad_final: Tensor | None, scale: float, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_initial = start_states(value, key.shape[3], grad_final, cu_seqlens)
    grad_value = results(value, cu_seqlens, value.shape)
    if grad_initial.shape[0] == 0 or value.numel() == 0:
        zeros = [torch.zeros(t.shape).to(t) for t in (query, key, log_decay)]
        return zeros[0], zeros[1], grad_value, zeros[2], grad_initial
    with on_device(value):
        chunks = Chunks(query, key, value, log_decay, scale, cu_seqlens)
        start, end = chunks.states(), chunks.states()
        chunks.walk(value, initial=initial, saved=start)
        chunks.walk(grad, reverse=True, out=grad_value, initial=grad_final, final=grad_initial,
                    saved=end)  # fmt: skip
        grad_query, grad_key, grad_decay = chunks.gradients(grad, start, end)
    return grad_query, grad_key, grad_value, grad_decay, grad_initial


@_adjoint.register_fake
def _(query, key, value, log_decay, initial, grad, grad_final, scale, cu_seqlens=None):
    like = [torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for t in (query, key, value, log_decay)]  # fmt: skip
    state = (count_rows(value, cu_seqlens), *key.shape[2:], value.shape[3])
    return *like, value.new_empty(state, dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)


def _backward(ctx, grad, grad_final):
    query, key, value, log_decay, initial, cu_seqlens = ctx.saved_tensors
    grad = torch.zeros_like(value) if grad is None else grad
    *grads, grad_initial = _adjoint(
        query, key, value, log_decay, initial, grad, grad_final, ctx.scale, cu_seqlens
    )
    return *grads, None if initial is None else grad_initial.to(initial.dtype), None, None


_forward.register_autograd(_backward, setup_context=_save)


def _every_head(x: Tensor, value: Tensor) -> Tensor:
    """One head spread over those of the values."""
    one = x.dim() == value.dim() == 4 and x.shape[2] == 1
    return x.expand(-1, -1, value.shape[2], -1) if one else x


def _check(function, query, key, value, log_decay, bonus, initial_state, cu_seqlens=None):
    """Raise on wrong kinds and shapes."""
    names = {"value": value, "key": key, "query": query, "log_decay": log_decay, "bonus": bonus,
             "initial_state": initial_state}  # fmt: skip
    check_kind(function, names)
    check_tensor(function, "value", value, dict.fromkeys(("batch", "time", "head", "channel")),
                 "every size is fixed here")  # fmt: skip
    batch, length, n_head, channels = value.shape
    n_state = key.shape[-1]
    sizes = {"batch": batch, "time": length, "head": n_head, "state": n_state}
    for name in ("key", "query", "log_decay"):
        check_tensor(function, name, names[name], sizes, "sizes are fixed by value and key")
    check_type(function, "value", {"value": value, "key": key, "query": query})
    if bonus is not None:
        sizes = {"head": n_head, "state": n_state}
        check_tensor(function, "bonus", bonus, sizes, "sizes are fixed by key")
    sizes = {"head": n_head, "state": n_state, "channel": channels}
    if cu_seqlens is not None:
        check_sequences(function, cu_seqlens, value, initial_state, sizes)
    elif initial_state is not None:
        sizes = {"batch": batch} | sizes
        check_tensor(function, "initial_state", initial_state, sizes, "fixed by key and value")
    if min(n_state, channels) < 1:
        raise ValueError(
            f"dsf_kernels.{function}: expected state and channel of 1 at least, got "
            f"state={n_state}, channel={channels}."
        )
    check_decay(function, log_decay)
    gap = diagonal_decay_gap(n_state, channels)
    if gap:
        raise NotImplementedError(
            f'dsf_kernels.{function}: value: {gap}. Use dsf.scan(backend="chunked").'
        )


def diagonal_decay_gap(n_state: int, channels: int) -> str:
    """Why these sizes cannot run; "" when they can."""
    if max(n_state, channels) <= MAX_WIDTH:
        return ""
    return f"expected state and channel up to {MAX_WIDTH}, got state={n_state}, channel={channels}"


def _run(query, key, value, log_decay, initial, scale, cu_seqlens=None):
    """The operator on even widths, as GPU tests have covered.

    An odd one gets a state that is never written or read, or a channel of 0.
    """
    n_state, channels = key.shape[3], value.shape[3]
    states, more = (0, 0) if INTERPRETED else (n_state % 2, channels % 2)
    if states:
        query, key, log_decay = (pad(t, (0, states)) for t in (query, key, log_decay))
    value = pad(value, (0, more)) if more else value
    if initial is not None and (states or more):
        initial = pad(initial, (0, more, 0, states))
    output, final = _forward(query, key, value, log_decay, initial, scale, cu_seqlens)
    return output[..., :channels], final[:, :, :n_state, :channels]


def _before(query, key, value, log_decay, initial, bonus, scale, cu_seqlens=None):
    """Outputs that read the state before the step, y_t = scale C_t (h_{t-1} + diag(w) B_t u_t).

    h_{t-1} is the state of the same recurrence with tokens one place later; the last token is
    applied, and the bonus added, outside the kernel.
    """
    if value.shape[1] == 0:
        return _run(query, key, value, log_decay, initial, scale, cu_seqlens)
    late = [pad(t[:, :-1], (0, 0, 0, 0, 1, 0)) for t in (key, value, log_decay)]
    ends = [t[:, -1].float() for t in (key, value, log_decay)]
    direct = (query.float() * bonus.float() * key.float()).sum(3, keepdim=True) * value.float()
    if cu_seqlens is not None:
        owned, begins, last, filled = edges(cu_seqlens, value.shape[1])
        late = [t.masked_fill(begins[:, None, None], 0) for t in late]
        ends = [t[0, last].float() for t in (key, value, log_decay)]
        direct = direct.masked_fill(~owned[:, None, None], 0)
    output, state = _run(query, *late, initial, scale, cu_seqlens)
    final = ends[2].exp()[..., None] * state + ends[0][..., None] * ends[1][:, :, None]
    if cu_seqlens is not None:
        final = torch.where(filled[:, None, None, None], final, state)
    return (output.float() + scale * direct).to(value.dtype), final


def diagonal_decay_scan(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and the last state, of a matrix state under one decay per state and token.

    h_t = diag(exp(l_t)) h_{t-1} + B_t u_t, y_t = scale C_t h_t, with C = `query`, B = `key`,
    u = `value`, l = `log_decay` <= 0 (-inf resets exactly), h_0 = `initial_state` (zero when
    None). `key` None: B_t = 1 - exp(l_t), as -expm1(l_t) rounded to the type of value (MetaLA,
    HGRN2). With `bonus` w (RWKV-6) the output reads the state before the step:
    y_t = scale C_t (h_{t-1} + diag(w) B_t u_t).

    cu_seqlens (n + 1,): n sequences packed along time in one row, each with its own initial and
    final state (n, head, state, channel), as in `scalar_decay_scan`, with its errors.

    Shapes: query, key, log_decay (batch, time, head or 1, state), value (batch, time, head,
    channel), bonus (head, state), initial_state (batch, head, state, channel); time from 0, any
    strides (those of bf16 that do not read two states at once are copied);
    bf16, fp16 or fp32, one type for query, key, value, any for the others; state and channel 1 to
    256. Returns outputs like value and the final state in float32. Differentiable in all six
    tensors.
    Matrix products round their operands to bf16 for bf16 and to tf32 for fp16, and are exact
    float32 for fp32; decays, sums and the state are float32.
    Raises ValueError (shape, device; a log decay above 0 with DSF_KERNELS_CHECK=1, which makes
    each call wait for the GPU), TypeError (dtype), NotImplementedError (CPU tensor; wider than
    above).
    Cost: time x (4 N P + 128 (7 N + P)) operations a head forward with chunks of 64; memory
    beside the outputs: two of query's size and 64 numbers a token and head, in backward two
    states for 64 tokens too.
    Source: Yang et al. 2024 (GLA, section 4, chunk form), Peng et al. 2024 (RWKV-6), Chou et al.
    2024 (MetaLA), Qin et al. 2024 (HGRN2); measured figures in kernels/README.md.
    """
    check_scale("diagonal_decay_scan", scale)
    if key is None:
        key = -torch.expm1(log_decay.float()).to(value.dtype)
    query, key, log_decay = (_every_head(t, value) for t in (query, key, log_decay))
    given = (query, key, value, log_decay)
    _check("diagonal_decay_scan", *given, bonus, initial_state, cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens = placed("diagonal_decay_scan", cu_seqlens, value)
    if bonus is None:
        return _run(*given, initial_state, float(scale), cu_seqlens)
    return _before(*given, initial_state, bonus, float(scale), cu_seqlens)


def diagonal_decay_summary(key: Tensor, value: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """What a segment does to any state: (total, end) with h_L = diag(exp(total)) h_0 + end.

    total (batch, head, state) = sum of the log decays, end (batch, head, state, channel) = h_L
    from zero, both float32. Arguments and errors as `diagonal_decay_scan`; no gradient.
    """
    key, value, log_decay = key.detach(), value.detach(), log_decay.detach()
    key, log_decay = _every_head(key, value), _every_head(log_decay, value)
    _check("diagonal_decay_summary", key, key, value, log_decay, None, None)
    total = log_decay.sum(1, dtype=torch.float32)
    return total, _run(key, key, value, log_decay, None, 1.0)[1]
