"""The loop of `diagonal_scan`."""

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
