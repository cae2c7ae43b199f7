"""Hierarchical attention: the projection of softmax onto a tree's ties, its streaming forms."""

import pytest
import torch
from hierarchical_cases import (
    FLAT,
    GRADIENT,
    LOSS,
    MATRIX,
    SETTINGS,
    SLACK,
    TIE,
    TREES,
    UNEVEN,
    VALUE,
    family_of,
    kl,
    map_of,
    near,
    qkv,
    softmax_of,
)
from model_laws import normal

import dsf
from dsf.models._hierarchical_core import tree_passes
from dsf.models.hierarchical_attention import (
    hierarchical_attention_recurrence,
    hierarchical_divergence,
)
from dsf.trees import (
    tree_from_branching,
    tree_from_nested,
)

# -- the projection ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_flat_tree_is_softmax(options):
    q, k, _ = qkv(12)
    near(map_of(q, k, TREES["flat"], **options), softmax_of(q, k, **options)[1].exp(), FLAT)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_rows_ties_certificate_and_fast_product(name, options):
    tree = TREES[name]
    n = tree.n_leaf
    q, k, v = qkv(n)
    system = hierarchical_attention_recurrence(q, k, tree, **options)
    M = dsf.materialise(system)
    near(M.sum(-1), torch.ones_like(M[..., 0]))
    assert float(M.min()) >= 0
    values: dict = {}
    for i in range(n):
        for j in range(n):
            if i != j:
                values.setdefault(family_of(tree, i, j), []).append(M[0, 0, i, j])
    for tied in values.values():
        assert float(torch.stack(tied).max() - torch.stack(tied).min()) <= TIE
    expected = torch.einsum("bhts,bshc->bthc", M, v)
    for backend in ("auto", "chunked", "reference"):
        near(dsf.scan(system, v, backend), expected)
    direct = kl(M, softmax_of(q, k, **options)[1])
    near(hierarchical_divergence(q, k, tree, **options), direct, LOSS)


@pytest.mark.parametrize("options", SETTINGS[:2], ids=str)
def test_value_of_the_root_is_the_objective_and_its_gradient_the_output(options):
    """N g = <M, S> + entropy(M), and N sqrt(d) dg/dq = M K."""
    self_term = options.get("self_term", True)
    tree = UNEVEN
    q, k, _ = qkv(tree.n_leaf)
    q.requires_grad_()
    real = torch.ones(2, tree.n_leaf, dtype=torch.bool)
    passes = tree_passes(q.transpose(1, 2), k.transpose(1, 2), real, tree, scale=0.5,
                         self_term=self_term, causal=False, family_bias=None)  # fmt: skip
    with torch.no_grad():
        M = map_of(q, k, tree, **options)
        S, _ = softmax_of(q, k)
        direct = (M * S).sum((-1, -2)) - torch.special.xlogy(M, M).sum((-1, -2))
        near(tree.n_leaf * passes.value, direct)
    (slope,) = torch.autograd.grad(passes.value.sum(), q)
    own = M.diagonal(dim1=-2, dim2=-1)
    assert bool((own == 0).all()) == (not self_term)
    near(tree.n_leaf * 2 * slope, torch.einsum("bhts,bshd->bthd", M, k), GRADIENT)


def log_tied_matrix(tree, open_, share, stay, self_term):
    """Any block-tied row-stochastic matrix from logits: stay a node, share a pair of siblings."""
    n, sigmoid = tree.n_leaf, torch.nn.functional.logsigmoid
    never = torch.tensor(-torch.inf, dtype=torch.float64)
    closed = ~open_.any(-1)
    w = torch.log_softmax(share.masked_fill(~open_ & ~closed[..., None], -torch.inf), -1)

    def stays(x):
        if x < n and not self_term:
            return never
        alone = closed[tree.parents[x] - n, tree.slots[x]]
        return torch.zeros_like(never) if alone else sigmoid(stay[x])

    def entry(i, j):
        line = [i]
        while tree.parents[line[-1]] != tree.n_node - 1:
            line.append(tree.parents[line[-1]])
        if i == j:
            return torch.stack([stays(x) for x in line]).sum()
        a, b = family_of(tree, i, j)
        f, s, t = tree.parents[a] - n, tree.slots[a], tree.slots[b]
        if not open_[f, s, t]:
            return never
        leave = sigmoid(-stay[a]) if self_term or a >= n else torch.zeros_like(never)
        above = [stays(x) for x in line[line.index(a) + 1 :]]
        shared = w[f, s, t] - torch.tensor(tree.spans[b][2], dtype=torch.float64).log()
        return torch.stack([leave + shared, *above]).sum()

    return torch.stack([torch.stack([entry(i, j) for j in range(n)]) for i in range(n)])


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_convex_optimiser_finds_the_same(options):
    tree = tree_from_nested([["a", "b", ["c", "d"]], ["e", "f"], "g"])
    q, k, _ = qkv(7, batch=1, head=1)
    log_p = softmax_of(q, k, **options)[1][0, 0]
    slots = tree.table.shape[1]
    share = torch.zeros(*tree.table.shape, slots, dtype=torch.float64, requires_grad=True)
    stay = torch.zeros(tree.n_node, dtype=torch.float64, requires_grad=True)
    filled = tree.table < tree.n_node
    other = torch.ones(slots, slots, dtype=torch.bool)
    other = other.tril(-1) if options.get("causal") else other ^ torch.eye(slots, dtype=torch.bool)
    open_ = other & filled[:, None, :] & filled[:, :, None]

    def loss(share, stay):
        log_m = log_tied_matrix(tree, open_, share, stay, options.get("self_term", True))
        seen = log_m > -torch.inf
        gap = log_m.masked_fill(~seen, 0.0) - log_p.masked_fill(~seen, 0.0)
        return (log_m.exp() * gap).sum(), log_m.exp()

    optimiser = torch.optim.LBFGS([share, stay], max_iter=200, tolerance_grad=1e-11,
                                  tolerance_change=0, line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimiser.zero_grad()
        value, _ = loss(share, stay)
        value.backward()
        return value

    optimiser.step(closure)
    with torch.no_grad():
        value, found = loss(share, stay)
        near(found.sum(-1), torch.ones(7, dtype=torch.float64))
        best = hierarchical_divergence(q, k, tree, **options)[0, 0]
        assert abs(float(value - best)) <= VALUE
        near(map_of(q, k, tree, **options)[0, 0], found, MATRIX)
        for seed in range(5):  # any other matrix of the class is no better
            moved = [p + 0.3 * normal(*p.shape, seed=seed) for p in (share, stay)]
            assert float(loss(*moved)[0]) >= float(best) - SLACK


def test_block_constant_scores_lose_nothing():
    """Queries and keys equal within each group: the tie costs nothing."""
    tree = tree_from_branching(12, (4, 3))
    q, k, _ = (normal(1, 4, 2, 4, seed=i).repeat_interleave(3, 1) for i in range(3))
    near(map_of(q, k, tree), softmax_of(q, k)[1].exp())
    near(hierarchical_divergence(q, k, tree), torch.zeros(1, 2, dtype=torch.float64), SLACK)


def test_dissolving_a_node_never_costs():
    q, k, _ = qkv(12)
    trees = [[[["a", "b"], ["c", "d"]], [["e", "f", "g"], ["h", "i"]], ["j", "k", "l"]],
             [["a", "b", "c", "d"], [["e", "f", "g"], ["h", "i"]], ["j", "k", "l"]],
             [["a", "b", "c", "d"], ["e", "f", "g"], ["h", "i"], ["j", "k", "l"]],
             [["a", "b", "c", "d"], "e", "f", "g", "h", "i", ["j", "k", "l"]],
             list("abcdefghijkl")]  # fmt: skip
    losses = [hierarchical_divergence(q, k, tree_from_nested(t)) for t in trees]
    for finer, coarser in zip(losses[1:], losses, strict=False):
        assert bool((finer <= coarser + SLACK).all())
    near(losses[-1], torch.zeros(2, 2, dtype=torch.float64), SLACK)
