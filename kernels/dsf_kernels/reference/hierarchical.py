"""Hierarchical attention from its definition, by explicit matrices over the tokens."""

import itertools

import torch

FAR = -1e30  # the logarithm of nothing: finite, so that gradients are numbers


def _spans(length, branching):
    """Tokens in a node of every level below the root, from the leaves up, and in the root."""
    spans = [1]
    for b in branching[:0:-1]:
        spans.append(spans[-1] * b)
    return [s for s in spans if s < length] + [max(length, 1)]


def _members(length, span, real):
    """Which real tokens a node holds (batch, 1, node, token), and how many."""
    node = torch.arange(length, device=real.device) // span
    inside = torch.nn.functional.one_hot(node).mT.to(torch.float64)
    inside = inside * real[:, None, None, :]
    return node, inside, inside.sum(-1)


def _inputs(query, key, value, key_mask, scale):
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    real = real if key_mask is None else key_mask
    return query, key, value, real, query.shape[-1] ** -0.5 if scale is None else scale


def hierarchical_attention_reference(
    query, key, value, branching, key_mask=None, *, self_term=True, scale=None
):
    """Outputs (batch, time, head, channel) of softmax tied over the pairs of siblings of a tree.

    With n real tokens in a node, qbar and kbar their means, in the family of a parent P

        S_AB = scale qbar_A.kbar_B + log n_B,   lambda_A = log sum_{B != A} exp S_AB
        mu_A = sigmoid(g_A - lambda_A),   g_P = sum_A n_A/n_P log(e^g_A + e^lambda_A)
        M_ij = (product of mu over the ancestors of A below the root)
               (1 - mu_A) exp(S_AB - lambda_A) / n_B     for i in A, j in B
        M_ii = product of mu from the leaf up,   g_i = scale q_i.k_i (self_term, else -inf)

    Leaves not in key_mask (batch, time) are no keys. In float64, differentiable, with the
    matrix in memory. Source: Amizadeh et al. (2025), arXiv 2509.15448, restated.
    """
    q, k, v, real, scale = _inputs(query, key, value, key_mask, scale)
    length = q.shape[2]
    if not length:
        return value.double()
    spans = _spans(length, branching)
    levels = [_members(length, span, real) for span in spans]
    g = scale * (q * k).sum(-1) if self_term else torch.full_like(q[..., 0], FAR)
    g = g.masked_fill(~real[:, None], FAR)
    passed = []
    for (node, inside, n), (_, _, n_above), span, wide in zip(
        levels, levels[1:], spans, spans[1:], strict=False
    ):
        share = inside / n.clamp(min=1)[..., None]
        S = scale * (share @ q) @ (share @ k).mT
        parent = torch.arange(n.shape[-1], device=q.device) * span // wide
        seen = (parent[:, None] == parent) & ~torch.eye(len(parent), device=q.device).bool()
        seen = seen & (n > 0)[..., None] & (n > 0)[..., None, :]
        alone = ~seen.any(-1)
        logits = (S + n.clamp(min=1).log()[..., None, :]).masked_fill(~seen, FAR)
        lam = torch.logsumexp(logits, -1).masked_fill(alone, FAR)
        W = torch.exp(S.masked_fill(~seen, 0) - lam.masked_fill(alone, 0)[..., None]) * seen
        mu = torch.sigmoid(g - lam).masked_fill(alone, 1.0)
        leave = torch.sigmoid(lam - g).masked_fill(alone, 0.0)
        passed.append((node, parent, W, mu, leave))
        weight = torch.nn.functional.one_hot(parent).mT * n[..., None, :]
        weight = weight / n_above.clamp(min=1)[..., None]
        g = (weight @ torch.logaddexp(g, lam)[..., None])[..., 0]
        g = g.masked_fill(n_above == 0, FAR)
    mass = torch.ones_like(g)
    M = q.new_zeros(*q.shape[:3], length)
    for node, parent, W, mu, leave in reversed(passed):
        mass = mass[..., parent]
        M = M + ((mass * leave)[..., None] * W)[..., node, :][..., node]
        mass = mass * mu
    own = mass[..., :length] if self_term else torch.zeros_like(q[..., 0])
    M = (M + torch.diag_embed(own)) * real[:, None, None, :]
    return (M @ v).transpose(1, 2)


def hierarchical_stream_reference(query, key, value, branching, key_mask=None, *, scale=None):
    """Outputs of causal attention of every token to itself and the groups that ended before it.

        y_t = sum_G theta_tG vbar_G,   theta_tG = softmax_G(scale q_t.kbar_G + log n_G)

    G: the token and all left siblings on its line of ancestors; kbar, vbar means over the n real
    tokens of G. Otherwise as `hierarchical_attention_reference`. Source: derived.
    """
    q, k, v, real, scale = _inputs(query, key, value, key_mask, scale)
    length = q.shape[2]
    if not length:
        return value.double()
    spans = _spans(length, branching)
    logits = torch.diag_embed(scale * (q * k).sum(-1))
    seen = torch.eye(length, dtype=torch.bool, device=q.device)
    for span, wide in itertools.pairwise(spans):
        node, inside, n = _members(length, span, real)
        S = scale * q @ ((inside / n.clamp(min=1)[..., None]) @ k).mT
        parent = torch.arange(length, device=q.device) // wide
        part = (parent[:, None] == parent) & (node[:, None] > node)
        logits = torch.where(part, S[..., node], logits)
        seen = seen | part
    seen = seen & real[:, None, None, :]
    dead = ~seen.any(-1, keepdim=True)
    M = torch.softmax(logits.masked_fill(~seen, FAR), -1).masked_fill(dead, 0.0)
    return (M @ v).transpose(1, 2)
