"""The loop of `complex_diagonal_scan`."""

import torch


def complex_diagonal_scan_reference(log_modulus, phase, inputs, initial_state=None):
    """States of h_t = exp(l_t + i p_t) h_{t-1} + b_t for t = 1..L, step by step in complex128.

    l = log_modulus, p = phase: real (batch, time, channel), or size 1 to broadcast; b = inputs:
    complex (batch, time, channel); initial_state: complex (batch, channel) or None for zero.
    Returns states (batch, time, channel) and the final state (batch, channel). l = -inf is a
    transition of 0, with gradients 0. Differentiable. Cost: L steps.
    """
    inputs = inputs.to(torch.complex128)
    decay = torch.polar(log_modulus.double().exp(), phase.double()).expand(inputs.shape)
    batch, length, channel = inputs.shape
    state = inputs.new_zeros(batch, channel)
    if initial_state is not None:
        state = state + initial_state
    states = []
    for t in range(length):
        state = decay[:, t] * state + inputs[:, t]
        states.append(state)
    stacked = torch.stack(states, 1) if states else inputs * decay
    return stacked, state
