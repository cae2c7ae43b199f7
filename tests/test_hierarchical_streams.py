"""Hierarchical attention: masks, causal streams, ranks, trees and the layer."""

import pytest
import torch
from hierarchical_cases import (
    LOSS,
    RANK_THRESHOLD,
    SETTINGS,
    SLACK,
    TIE,
    TREES,
    UNEVEN,
    kl,
    map_of,
    near,
    qkv,
    softmax_of,
)
from model_laws import check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfUnsupportedError, DsfValueError
from dsf.models.hierarchical_attention import (
    HierarchicalAttention,
    hierarchical_attention_recurrence,
    hierarchical_divergence,
)
from dsf.realisation import realise
from dsf.trees import (
    Tree,
    quadtree,
    tree_from_branching,
    tree_from_nested,
    tree_from_parents,
)
from dsf.wrappers import core

# -- masks, permutations, shifts ---------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_masking_is_taking_leaves_out(options):
    """A whole group, one of two siblings and a single leaf are gone."""
    q, k, v = qkv(12)
    letters = [[["a", "b"], "c"], ["d", ["e", ["f", "g", "h"]]], "i", [["j"]], ["k", "l"]]
    kept = [["b", "c"], ["d"], "i", ["k", "l"]]
    gone = [0, 4, 5, 6, 7, 9]
    real = torch.ones(2, 12, dtype=torch.bool)
    real[:, gone] = False
    whole, part = tree_from_nested(letters), tree_from_nested(kept)
    M = map_of(q, k, whole, key_mask=real, **options)
    keep = [i for i in range(12) if i not in gone]
    near(M[:, :, keep][..., keep], map_of(q[:, keep], k[:, keep], part, **options))
    assert not bool(M[..., gone].any())
    system = hierarchical_attention_recurrence(q, k, whole, key_mask=real, **options)
    y = dsf.scan(system, v)[:, keep]
    near(y, torch.einsum("bhts,bshc->bthc", M, v)[:, keep])
    direct = kl(M[:, :, keep][..., keep], softmax_of(q[:, keep], k[:, keep], **options)[1])
    near(hierarchical_divergence(q, k, whole, key_mask=real, **options), direct, LOSS)


def test_permuting_siblings_permutes_the_map():
    q, k, _ = qkv(8)
    M = map_of(q, k, tree_from_nested([["a", "b", "c"], ["d", "e"], ["f", "g", "h"]]))
    order = [3, 4, 7, 5, 6, 0, 2, 1]
    moved = map_of(q[:, order], k[:, order], tree_from_nested([["d", "e"], ["h", "f", "g"],
                                                               ["a", "c", "b"]]))  # fmt: skip
    near(moved, M[:, :, order][..., order])
    # the same tree over tokens that are not next to each other
    parents = [0] * 8 + [-1, 8, 8, 8]
    for slot, node in enumerate(order):
        parents[slot] = 9 if node < 3 else 10 if node < 5 else 11
    near(map_of(q[:, order], k[:, order], tree_from_parents(parents, 8)), moved)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_common_shift_of_all_logits_changes_nothing(shift):
    q, k, _ = qkv(12)
    one = torch.ones_like(q[..., :1])
    longer = [torch.cat([q, shift * one], -1), torch.cat([k, one], -1)]
    for options in SETTINGS:
        near(map_of(*longer, UNEVEN, scale=0.5, **options),
             map_of(q, k, UNEVEN, scale=0.5, **options), 1e-11)  # fmt: skip


def test_family_bias_is_added_to_the_scores():
    """On a flat tree it is an additive bias of softmax."""
    q, k, _ = qkv(12)
    bias = normal(1, 2, 1, 12, 12, seed=8)
    S, _ = softmax_of(q, k)
    off = torch.eye(12, dtype=torch.float64)
    near(map_of(q, k, TREES["flat"], family_bias=bias),
         torch.softmax(S + bias[:, :, 0] * (1 - off), -1))  # fmt: skip


# -- causal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("rows", ["tied", "free"])
def test_causal_recurrence(name, rows):
    """Lower triangular, a few states, equal to the matrix; free rows never look ahead."""
    tree = TREES[name]
    n = tree.n_leaf
    q, k, v = qkv(n)
    r = hierarchical_attention_recurrence(q, k, tree, rows=rows, causal=True)
    assert isinstance(r, dsf.Recurrence)
    M = dsf.materialise(r)
    near(M.sum(-1), torch.ones_like(M[..., 0]))
    for backend in ("auto", "reference"):
        near(dsf.scan(r, v, backend), torch.einsum("bhts,bshc->bthc", M, v))
    most = [max((len(c) for f, c in enumerate(tree.children)
                 if tree.depths[tree.n_leaf + f] == depth), default=1)
            for depth in range(max(tree.depths))]  # fmt: skip
    assert r.n_state - 1 <= sum(b - 1 for b in most)
    if rows == "tied":
        groups = tree.left_groups
        assert not bool(M.triu(1).any())
        for t in range(n):  # one number a group, spread over its tokens
            for node in groups[t]:
                first, stop, _ = tree.spans[node]
                near(M[..., t, first:stop], M[..., t, first : first + 1].expand(
                    -1, -1, stop - first))  # fmt: skip
        return
    log_p = softmax_of(q, k, causal=True)[1]
    tied = map_of(q, k, tree, causal=True)
    assert bool((kl(M, log_p) <= kl(tied, log_p) + SLACK).all())
    for t in range(n - 1):
        changed = k.clone()
        changed[:, t + 1 :] += 1
        other = hierarchical_attention_recurrence(q, changed, tree, rows="free", causal=True)
        assert torch.equal(dsf.materialise(other)[:, :, : t + 1], M[:, :, : t + 1])


def test_free_rows_are_softmax_over_groups():
    tree, (q, k, _) = UNEVEN, qkv(12)
    M = map_of(q, k, tree, rows="free", causal=True)
    for t, groups in enumerate(tree.left_groups):
        spans = [tree.spans[g] for g in groups]
        means = torch.stack([k[:, a:b].mean(1) for a, b, _ in spans], 2)
        n = torch.tensor([c for _, _, c in spans], dtype=torch.float64)
        theta = torch.softmax(0.5 * torch.einsum("bhd,bhgd->bhg", q[:, t], means) + n.log(), -1)
        for i, (a, b, _) in enumerate(spans):
            near(M[:, :, t, a:b], (theta[..., i] / n[i])[..., None].expand(-1, -1, b - a))


def test_tied_causal_leaks_within_a_group():
    """Documented: a later token of the same group changes earlier rows, none outside."""
    tree = tree_from_branching(64, (4, 4, 4))
    q, k, _ = qkv(64)
    M = map_of(q, k, tree, causal=True)
    changed = q.clone(), k.clone()
    for x in changed:
        x[:, 31] += 1
    gap = (map_of(*changed, tree, causal=True) - M).abs().amax((0, 1, 3))
    assert float(gap[28:31].max()) > 1e-3
    assert float(gap[:16].max()) == 0


# -- ranks -------------------------------------------------------------------------------------


def rank_bound(tree, t):
    """(10.1): two labels a level along the nodes that the cut t goes through."""
    node, levels = tree.n_node - 1, []
    while True:
        spans = [(c, tree.spans[c]) for c in tree.children[node - tree.n_leaf]]
        left = sum(stop <= t for _, (_, stop, _) in spans)
        right = sum(start >= t for _, (start, _, _) in spans)
        levels.append((right, left))
        inside = [c for c, (start, stop, _) in spans if start < t < stop]
        if not inside:
            break
        node = inside[0]
    row, column = levels[0]
    for p, q in levels[1:]:
        row, column = min(row, column + 1) + p, min(column, row + 1) + q
    return min(row, column)


@pytest.mark.parametrize(("tree", "most"), [
    (tree_from_branching(64, (2,) * 6), 3), (tree_from_branching(64, (4, 4, 4)), 5),
    (tree_from_branching(64, (2, 4, 8)), 6), (tree_from_branching(64, (8, 8)), 7),
    (tree_from_branching(32, (32,)), 16), (UNEVEN, None),
], ids=["2^6", "4^3", "2.4.8", "8.8", "flat", "uneven"])  # fmt: skip
def test_ranks_are_those_of_the_tree(tree, most):
    n = tree.n_leaf
    q, k, _ = qkv(n, head=1, batch=1)
    full, causal = map_of(q, k, tree)[0, 0], map_of(q, k, tree, causal=True)[0, 0]
    found = []
    for t in range(1, n):
        bound = rank_bound(tree, t)
        for block in (full[t:, :t], full[:t, t:], causal[t:, :t]):
            s = torch.linalg.svdvals(block)
            assert int((s > RANK_THRESHOLD * s[0]).sum()) == min(bound, t, n - t)
        found.append(min(bound, t, n - t))
    assert most in (None, max(found))


def test_bidirectional_realisation_has_the_ranks_as_orders():
    tree = tree_from_branching(64, (4, 4, 4))
    q, k, v = qkv(64, head=1, batch=1)
    system = hierarchical_attention_recurrence(q, k, tree)
    M = dsf.materialise(system)
    lower, _ = realise(M.tril(), tolerance=RANK_THRESHOLD)
    upper, _ = realise(M.triu(1).flip(-1, -2), tolerance=RANK_THRESHOLD)
    assert lower.n_state <= 6
    y = dsf.scan(lower, v) + dsf.scan(upper, v.flip(1)).flip(1)
    near(y, dsf.scan(system, v), 1e-11)


# -- trees -------------------------------------------------------------------------------------


def test_trees():
    paper = tree_from_branching(1024, (16, 8, 4, 2))
    assert paper.n_score == 5376
    assert paper.is_ordered
    assert hash(paper) == hash(tree_from_branching(1024, (16, 8, 4, 2)))
    text = {"title": ["w"], "body": [[["a", "b"], ["c"]], [["d", "e", "f"]], []]}
    tree = tree_from_nested(text)
    # the paragraph of one sentence and the sentence of one word are spliced out
    assert tree.n_leaf == 7
    assert sorted(len(c) for c in tree.children) == [2, 2, 2, 2, 3]
    quad = quadtree(4)
    assert [c for c in quad.children[:4]] == [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13),
                                              (10, 11, 14, 15)]  # fmt: skip
    assert quad.n_score == 5 * 16
    assert not quad.is_ordered
    near(map_of(*qkv(16)[:2], quad).sum(-1), torch.ones(2, 2, 16, dtype=torch.float64))
    assert isinstance(tree_from_branching(1, (2, 2)), Tree)
    near(map_of(*qkv(1)[:2], quadtree(1)), torch.ones(2, 2, 1, 1, dtype=torch.float64))
    for length in range(2, 12):  # the groups of a start do not depend on what follows
        short, long = (tree_from_branching(n, (2, 3, 2)) for n in (length, 12))
        for a, b in zip(short.left_groups, long.left_groups, strict=False):
            assert [short.spans[g] for g in a] == [long.spans[g] for g in b]


@pytest.mark.parametrize("options", [
    {"branching": (2, 2, 2)}, {"branching": (3, 2, 2), "self_term": False},
    {"branching": (4, 4), "rows": "free", "causal": True},
    {"branching": (100,), "rows": "free", "causal": True},
], ids=str)  # fmt: skip
def test_contract_with_options(options):
    torch.manual_seed(0)
    check_all(shaken(HierarchicalAttention(8, 4, **options)), fresh_input(8))


@torch.no_grad()
def test_layer_with_a_given_tree_and_mask():
    torch.manual_seed(0)
    layer = shaken(HierarchicalAttention(8, 4))
    x, real = fresh_input(8, length=12), torch.arange(12) < torch.tensor([[12], [7]])
    hidden = x.masked_fill(~real[..., None], 7.0)
    outputs = [layer(z, tree=UNEVEN, key_mask=real) for z in (x, hidden)]
    near(outputs[1][real], outputs[0][real])
    part = core(layer.recurrence(x, tree=UNEVEN)[0]).C
    every = part.tile(slice(0, 12), slice(0, 12))
    near(part.time_slice(3, 8).tile(slice(1, 4), slice(2, 9)), every[..., 4:7, 2:9], TIE)


def test_refusals():
    q, k, _ = qkv(12)
    with pytest.raises(DsfShapeError, match="expected 12 leaves"):
        map_of(q, k, quadtree(2))
    with pytest.raises(DsfValueError, match="'free' for causal=True"):
        map_of(q, k, UNEVEN, rows="free")
    with pytest.raises(DsfValueError, match="without a gap"):
        map_of(*qkv(16)[:2], quadtree(4), causal=True)
    with pytest.raises(DsfValueError, match="self term"):
        map_of(q, k, UNEVEN, causal=True, self_term=False)
    with pytest.raises(DsfValueError, match="one token"):
        map_of(*qkv(1)[:2], tree_from_branching(1, (2,)), self_term=False)
    for bad in ([], [[], {}]):
        with pytest.raises(DsfValueError, match="at least one token"):
            tree_from_nested(bad)
    with pytest.raises(DsfUnsupportedError, match="later tokens"):
        HierarchicalAttention(8).step(torch.zeros(1, 8))
    with pytest.raises(DsfValueError, match="power of two"):
        quadtree(3)
    with pytest.raises(DsfValueError, match="one root"):
        tree_from_parents([2, 2, 2], 2)
    with pytest.raises(DsfValueError, match="below the root, got 1"):
        tree_from_parents([2, 3, -1, 3], 2)
    with pytest.raises(DsfValueError, match="and positive numbers"):
        tree_from_branching(4, (0, 2))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"self_term": False}])
def test_no_token_is_no_group(options):
    q, k, v = qkv(0)
    tree = tree_from_branching(0, (2, 3))
    assert tree.n_leaf == 0
    system = hierarchical_attention_recurrence(q, k, tree, **options)
    assert dsf.scan(system, v).shape == (2, 0, 2, 4)
    assert dsf.materialise(system).shape == (2, 2, 0, 0)
    assert hierarchical_divergence(q, k, tree, **options).tolist() == [[0.0] * 2] * 2
    torch.manual_seed(0)
    layer = HierarchicalAttention(8, 2, **options).double()
    assert layer(fresh_input(8, length=0)).shape == (2, 0, 8)
