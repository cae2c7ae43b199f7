"""The loop of `selective_scan`."""

import torch


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
