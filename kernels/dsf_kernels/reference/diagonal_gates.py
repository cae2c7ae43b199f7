"""The loops of `gated_scan` and `rglru_scan`."""

import torch
from torch.nn.functional import logsigmoid, softplus

from dsf_kernels.reference.diagonal import diagonal_scan_reference


def sigmoid(x):
    """1 / (1 + e^-x), whose gradient keeps its digits where it is next to 1."""
    return logsigmoid(x).exp()


def gated_scan_reference(logit, inputs, initial_state=None, lower_bound=None, *, complement=False):
    """States of h_t = a_t h_{t-1} + w_t u_t, a_t = b + (1 - b) sigmoid(logit_t), in float64.

    w_t is 1, or 1 - a_t with `complement`; b = lower_bound (channel,), or 0 when None. logit,
    inputs (u): (batch, time, channel). Returns states and the final state, as
    `diagonal_scan_reference`, which steps.
    """
    logit, inputs = logit.double(), inputs.double()
    rest = 1.0 if lower_bound is None else 1 - lower_bound.double()
    shut = rest * sigmoid(-logit)
    decay = rest * sigmoid(logit) + (1 - rest)
    return diagonal_scan_reference(decay, shut * inputs if complement else inputs, initial_state)


def rglru_scan_reference(
    inputs, recurrence_logit, input_logit, parameter, initial_state=None, *, reset=None, c=8.0
):
    """States of h_t = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(input_logit_t) x_t, in float64.

    log a_t = -c softplus(parameter) sigmoid(recurrence_logit_t); x = inputs. Where 1 - a_t^2 is
    0 its root has no gradient. inputs, logits: (batch, time, channel); parameter: (channel,).
    Returns states and the final state.
    """
    rate = c * softplus(parameter.double())
    log_decay = -rate * sigmoid(recurrence_logit.double())
    gap = -torch.expm1(2 * log_decay)
    none = gap.detach() <= 0
    root = torch.sqrt(gap.masked_fill(none, 1.0)).masked_fill(none, 0.0)
    if reset is not None:
        root = root.masked_fill(reset[..., None], 1.0)
        log_decay = log_decay.masked_fill(reset[..., None], -torch.inf)
    written = root * sigmoid(input_logit.double()) * inputs.double()
    return diagonal_scan_reference(log_decay, written, initial_state, log=True)
