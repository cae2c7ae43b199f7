"""Random inputs of ZeroS and its quadratic definition, for the tests of its forms and weights."""

import torch
from model_laws import normal

LENGTH, WIDTH, CHANNEL = 100, 6, 5


def far(got, expected):
    assert got.shape == expected.shape
    return float((got - expected).abs().max())


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def inputs(length=LENGTH, zero=True, seed=0):
    """q, k, s, gates (first, higher, zero or None), v for one batch of two heads."""
    q = unit(normal(1, length, 2, WIDTH, seed=seed))
    k = unit(normal(1, length, 2, WIDTH, seed=seed + 1))
    s = normal(1, length, 2, seed=seed + 2)
    gate = torch.sigmoid(normal(3, 1, length, 2, seed=seed + 3))
    v = normal(1, length, 2, CHANNEL, seed=seed + 4)
    return q, k, s, (gate[0], gate[1], gate[2] if zero else None), v


def radial_by_definition(s, gates, causal=True):
    """sections 1-3: sigma1 delta/t + sigmah epsilon + sigma0/t, row by row."""
    first, higher, zero = gates
    length = s.shape[1]
    r = torch.zeros(s.shape[0], s.shape[2], length, length, dtype=s.dtype)
    for t in range(length):
        n = t + 1 if causal else length
        seen = s[:, :n]
        delta = seen - seen.mean(1, keepdim=True)
        epsilon = torch.softmax(seen, 1) - 1 / n - delta / n
        row = first[:, t : t + 1] * delta / n + higher[:, t : t + 1] * epsilon
        if zero is not None:
            row = row + zero[:, t : t + 1] / n
        r[:, :, t, :n] = row.transpose(1, 2)
    return r
