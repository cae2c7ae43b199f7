"""One readable float64 loop per kernel: the definition that every kernel is held against."""

import math

import torch


def diagonal_scan_reference(decay, inputs, initial_state=None, *, log=False):
    """States of h_t = a_t h_{t-1} + b_t for t = 1..L, step by step in float64.

    decay, inputs: (batch, time, channel); initial_state: (batch, channel) or None for zero;
    a_t = decay_t, or exp(decay_t) when `log`. Returns states (batch, time, channel) and the
    final state (batch, channel). Differentiable. Cost: L steps.
    """
    decay, inputs = decay.double(), inputs.double()
    decay = decay.exp() if log else decay
    decay = decay.expand(inputs.shape)
    batch, length, channel = inputs.shape
    state = inputs.new_zeros(batch, channel) if initial_state is None else initial_state.double()
    states = []
    for t in range(length):
        state = decay[:, t] * state + inputs[:, t]
        states.append(state)
    stacked = torch.stack(states, 1) if states else inputs * decay
    return stacked, state


def scalar_decay_scan_reference(
    query, key, value, log_decay=None, initial_state=None, *, scale=1.0
):
    """Outputs of h_t = a_t h_{t-1} + B_t u_t, y_t = scale C_t h_t, step by step in float64.

    query (C), key (B): (batch, time, group, N), head k reads group k // (head / group);
    value (u): (batch, time, head, P); log_decay: (batch, time, head), (head,) or None for a = 1;
    initial_state: (batch, head, N, P) or None for zero. Returns outputs (batch, time, head, P)
    and the final state (batch, head, N, P). Differentiable. Cost: L steps of N P per head.
    """
    query, key, value = query.double(), key.double(), value.double()
    batch, length, head, n_channel = value.shape
    query = query.repeat_interleave(head // query.shape[2], 2)
    key = key.repeat_interleave(head // key.shape[2], 2)
    if log_decay is None:
        decay = value.new_ones(batch, length, head)
    else:
        decay = log_decay.double().exp().expand(batch, length, head)
    if initial_state is None:
        state = value.new_zeros(batch, head, key.shape[3], n_channel)
    else:
        state = initial_state.double()
    outputs = []
    for t in range(length):
        written = key[:, t, :, :, None] * value[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + written
        outputs.append(scale * torch.einsum("bhn,bhnp->bhp", query[:, t], state))
    stacked = torch.stack(outputs, 1) if outputs else value * scale
    return stacked, state


# Half a unit in the last place over the value, at most; float32 is judged by the units alone.
HALF_ULP = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
UNDERFLOW = 2.0**-120


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
    error = (value.double() - true).abs() - HALF_ULP[value.dtype] * true.abs() - UNDERFLOW
    ratio = torch.where(error > 0, error / unit, torch.zeros_like(error))
    ratio = torch.where(torch.isfinite(value), ratio, math.inf)
    return float(ratio.max()) if ratio.numel() else 0.0


def error_units(kernel, reference, tensors, logs=(), *, unit=2.0**-24, seed=0, **options):
    """Largest error of a kernel's outputs and of every gradient: {name: units}.

    units = (|kernel - reference| - half an ulp of the result's type) / (unit * M), elementwise,
    with M the reference run on absolute values (of all but the tensors named in `logs`, which are
    logarithms already), gradients likewise; `unit` is the unit round-off of the coarsest type
    that operands are rounded to. `tensors`: {argument: tensor or None}, of unit size: differences
    below 2^-120 are float32 underflow and count 0. A non-finite result gives inf.
    """
    found, exact, grads = _found(kernel, tensors, seed, options)
    truth = _run(reference, exact, grads, options)
    size = {k: v if v is None or k in logs else v.abs() for k, v in exact.items()}
    bound = _run(reference, size, [g.abs() for g in grads], options)
    return {
        name: _worst(value, truth[name], unit * bound[name].abs()) for name, value in found.items()
    }


def delta_scan_reference(
    query, key, value, write_strength, log_decay=None, initial_state=None, *, scale=1.0
):
    """Outputs of h_t = a_t (I - b_t B_t B_t^T) h_{t-1} + b_t B_t u_t, y_t = scale C_t h_t.

    Arguments as `scalar_decay_scan_reference`, with b = write_strength (batch, time, head) and
    a = 1 where log_decay is None. Step by step in float64, differentiable. Cost: L steps of N P
    per head.
    """
    query, key, value, write = (t.double() for t in (query, key, value, write_strength))
    batch, length, head, n_channel = value.shape
    query = query.repeat_interleave(head // query.shape[2], 2)
    key = key.repeat_interleave(head // key.shape[2], 2)
    decay = torch.ones_like(write) if log_decay is None else log_decay.double().exp()
    if initial_state is None:
        state = value.new_zeros(batch, head, key.shape[3], n_channel)
    else:
        state = initial_state.double()
    outputs = []
    for t in range(length):
        state = decay[:, t, :, None, None] * state
        held = torch.einsum("bhn,bhnp->bhp", key[:, t], state)
        error = write[:, t, :, None] * (value[:, t] - held)
        state = state + key[:, t, :, :, None] * error[:, :, None, :]
        outputs.append(scale * torch.einsum("bhn,bhnp->bhp", query[:, t], state))
    stacked = torch.stack(outputs, 1) if outputs else value * scale
    return stacked, state


def solve_condition(key, write_strength, log_decay, chunk):
    """Largest row sum of |(I + G)^-1| (I + |G|) over chunks: how rounding grows in the solve.

    G_ij = b_i exp(g_i - g_j) k_i . k_j for i > j in one chunk, g the cumulative log decay.
    """
    length, head = write_strength.shape[1:]
    key = key.double().repeat_interleave(head // key.shape[2], 2)
    worst = 1.0
    for first in range(0, length, chunk):
        part = slice(first, first + chunk)
        k, write = key[:, part].transpose(1, 2), write_strength[:, part].double().mT
        coupling = write[..., None] * (k @ k.mT)
        if log_decay is not None:
            g = log_decay[:, part].double().clamp_min(-1e3).cumsum(1).mT
            coupling = coupling * (g[..., :, None] - g[..., None, :]).clamp_max(0).exp()
        coupling = coupling.tril(-1)
        one = torch.eye(coupling.shape[-1], dtype=coupling.dtype, device=coupling.device)
        growth = torch.linalg.inv(one + coupling).abs() @ (one + coupling.abs())
        worst = max(worst, float(growth.sum(-1).max())) if growth.numel() else worst
    return worst


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


def diagonal_decay_scan_reference(
    query, key, value, log_decay, initial_state=None, bonus=None, *, scale=1.0
):
    """Outputs of h_t = diag(a_t) h_{t-1} + B_t u_t, y_t = scale C_t h_t, step by step in float64.

    query (C), key (B), log_decay (log a): (batch, time, head, N); value (u): (batch, time, head,
    P); initial_state: (batch, head, N, P) or None for zero; key None: B_t = 1 - a_t; with bonus w
    (head, N) y_t = scale C_t (h_{t-1} + diag(w) B_t u_t). Returns outputs (batch, time, head, P)
    and the final state (batch, head, N, P). Differentiable. Cost: L steps of N P per head.
    """
    query, value, log_decay = query.double(), value.double(), log_decay.double()
    key = -torch.expm1(log_decay) if key is None else key.double()
    decay = log_decay.exp()
    batch, length, head, n_channel = value.shape
    if initial_state is None:
        state = value.new_zeros(batch, head, query.shape[3], n_channel)
    else:
        state = initial_state.double()
    outputs = []
    for t in range(length):
        written = key[:, t, :, :, None] * value[:, t, :, None, :]
        after = decay[:, t, :, :, None] * state + written
        read = after if bonus is None else state + bonus.double()[:, :, None] * written
        outputs.append(scale * torch.einsum("bhn,bhnp->bhp", query[:, t], read))
        state = after
    stacked = torch.stack(outputs, 1) if outputs else value * scale
    return stacked, state


def selective_scan_reference(
    u, step_size, A, B, C, D=None, z=None, bias=None, initial_state=None, *, softplus=False
):
    """Outputs of h_t = exp(s_t A) h_{t-1} + s_t B_t u_t, y_t = (C_t h_t + D u_t) SiLU(z_t).

    Step by step in float64; s_t = step_size + bias, or its softplus. u, step_size, z: (batch,
    time, channel); A: (channel, state); B, C: (batch, time, group, state); D, bias: (channel,);
    initial_state: (batch, channel, state). Returns outputs like u and the final state.
    """
    u, A, step = u.double(), A.double(), step_size.double()
    batch, length, channels = u.shape
    B = B.double().repeat_interleave(channels // B.shape[2], 2)
    C = C.double().repeat_interleave(channels // C.shape[2], 2)
    step = step if bias is None else step + bias.double()
    step = torch.nn.functional.softplus(step, threshold=700) if softplus else step
    state = u.new_zeros(batch, *A.shape) if initial_state is None else initial_state.double()
    outputs = []
    for t in range(length):
        written = (step[:, t] * u[:, t])[..., None] * B[:, t]
        state = (step[:, t, :, None] * A).exp() * state + written
        outputs.append((C[:, t] * state).sum(-1))
    output = torch.stack(outputs, 1) if outputs else u
    output = output if D is None else output + D.double() * u
    return output if z is None else output * torch.nn.functional.silu(z.double()), state
