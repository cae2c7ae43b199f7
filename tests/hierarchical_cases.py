"""Trees, inputs and the plain definitions that the tests of hierarchical attention share."""

import torch
from model_laws import assert_near, normal

import dsf
from dsf.models.hierarchical_attention import hierarchical_attention_recurrence
from dsf.trees import tree_from_branching, tree_from_nested

FLAT = 1e-14
ROWS = 1e-13
TIE = 1e-15
LOSS = 1e-10
SLACK = 1e-12
GRADIENT = 1e-7
VALUE = 1e-6
MATRIX = 1e-7
RANK_THRESHOLD = 1e-12
UNEVEN = tree_from_nested(
    [[["a", "b"], "c"], ["d", ["e", ["f", "g", "h"]]], "i", [["j"]], ["k", "l"]]
)
TREES = {
    "flat": tree_from_branching(12, (12,)), "binary": tree_from_branching(16, (2, 2, 2, 2)),
    "4.3": tree_from_branching(12, (4, 3)), "short": tree_from_branching(11, (2, 3, 2)),
    "uneven": UNEVEN,
}  # fmt: skip


def near(got, expected, tolerance=ROWS):
    assert_near("difference", got, expected, tolerance)


def qkv(length, width=4, head=2, batch=2):
    return tuple(normal(batch, length, head, width, seed=i) for i in range(3))


def map_of(q, k, tree, **options):
    return dsf.materialise(hierarchical_attention_recurrence(q, k, tree, **options))


def softmax_of(q, k, *, self_term=True, causal=False, real=None):
    S = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    n = q.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    seen = seen if self_term else seen & ~torch.eye(n, dtype=torch.bool)
    seen = seen[None, None] if real is None else seen & real[:, None, None]
    return S, torch.log_softmax(S.masked_fill(~seen, -torch.inf), -1)


def kl(M, log_p):
    return torch.where(M > 0, M * (M.clamp(min=1e-300).log() - log_p), 0.0).sum((-1, -2))


def family_of(tree, i, j):
    """Family and children where leaves i and j part, from parents alone."""
    line = {}
    node = i
    while node != tree.n_node - 1:
        line[tree.parents[node]] = node
        node = tree.parents[node]
    node = j
    while tree.parents[node] not in line:
        node = tree.parents[node]
    return line[tree.parents[node]], node


SETTINGS = [{}, {"self_term": False}, {"causal": True}]
