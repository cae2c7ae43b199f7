"""PaTH attention against the plain product of reflections, its limits and its streaming form."""

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models.forgetting_attention import forgetting_attention_recurrence
from dsf.models.path_attention import CHUNK, PathAttention, path_attention_recurrence
from dsf.models.softmax_attention import softmax_attention_recurrence

EXACT = 1e-12


def inputs(length, group=2, width=5, batch=2):
    """Queries of four heads; keys, unit directions, strengths in (0, 2), log gates, values."""
    q = normal(batch, length, 4, width)
    k, w = normal(batch, length, group, width, seed=1), normal(batch, length, group, width, seed=2)
    w = torch.nn.functional.normalize(w, dim=-1)
    beta = 2 * torch.sigmoid(normal(batch, length, group, seed=3))
    log_f = torch.nn.functional.logsigmoid(normal(batch, length, 4, seed=4) + 1)
    return q, k, w, beta, log_f, normal(batch, length, 4, 3, seed=5)


def plain_map(q, k, w, beta, log_f=None, scale=None):
    """Entry by entry: the key goes through every later reflection, then softmax."""
    batch, length, head, width = q.shape
    scale = width**-0.5 if scale is None else scale
    z = torch.full((batch, head, length, length), -torch.inf, dtype=q.dtype)
    for h in range(head):
        g = h // (head // k.shape[2])
        for j in range(length):
            x, gone = k[:, j, g], torch.zeros(batch, dtype=q.dtype)
            for t in range(j, length):
                if t > j:
                    x = (
                        x
                        - beta[:, t, g, None] * (w[:, t, g] * x).sum(-1, keepdim=True) * w[:, t, g]
                    )
                    gone = gone if log_f is None else gone + log_f[:, t, h]
                z[:, h, t, j] = scale * (q[:, t, h] * x).sum(-1) + gone
    return torch.softmax(z, -1)


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("forgets", [False, True])
def test_map_is_the_product_of_reflections(length, forgets):
    q, k, w, beta, log_f, v = inputs(length, batch=1)
    log_f = log_f if forgets else None
    r = path_attention_recurrence(q, k, w, beta, log_decay=log_f)
    expected = plain_map(q, k, w, beta, log_f)
    assert_near("map", dsf.materialise(r), expected, EXACT)
    y = torch.einsum("bhts,bshp->bthp", expected, v)
    for backend in ("reference", "auto"):
        assert_near(backend, dsf.scan(r, v, backend), y, EXACT)
    tile = dsf.materialise(r, queries=slice(length // 3, length), keys=slice(0, length // 2))
    assert_near("tile", tile, expected[:, :, length // 3 :, : length // 2], EXACT)


def test_nothing_to_attend_to():
    q, k, w, beta, log_f, v = inputs(0)
    r = path_attention_recurrence(q, k, w, beta, log_decay=log_f)
    assert dsf.scan(r, v).shape == (2, 0, 4, 3)
    assert dsf.materialise(r).shape == (2, 4, 0, 0)


def test_without_reflections_it_is_softmax_or_forgetting_attention():
    q, k, w, beta, log_f, v = inputs(40)
    none = torch.zeros_like(beta)
    got = dsf.scan(path_attention_recurrence(q, k, w, none, scale=0.3), v)
    assert_near("softmax", got, dsf.scan(softmax_attention_recurrence(q, k, scale=0.3), v), EXACT)
    lost = log_f.clone()
    lost[:, 17] = -torch.inf
    for gate in (log_f, lost):
        got = dsf.scan(path_attention_recurrence(q, k, w, none, log_decay=gate), v)
        expected = dsf.scan(forgetting_attention_recurrence(q, k, gate), v)
        assert_near("forgetting", got, expected, EXACT)


def test_one_direction_of_strength_one_erases_it():
    q, k, _, beta, _, _ = inputs(6)
    w = torch.zeros_like(k)
    w[..., 0] = 1
    r = path_attention_recurrence(q, k, w, torch.ones_like(beta))
    flat = k.clone()
    flat[..., 0] = 0
    z = torch.einsum("bthd,bshd->bhts", q, flat.repeat_interleave(2, 2))
    own = torch.einsum("bthd,bthd->bht", q, k.repeat_interleave(2, 2))
    z = torch.where(torch.eye(6, dtype=torch.bool), own[..., None], z) * q.shape[-1] ** -0.5
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = torch.softmax(z.masked_fill(hidden, -torch.inf), -1)
    assert_near("map", dsf.materialise(r), expected, EXACT)


def test_gradients_reach_every_coefficient():
    q, k, w, beta, log_f, v = (x[:1].clone().requires_grad_() for x in inputs(5))

    def run(q, k, w, beta, log_f, v):
        return dsf.scan(path_attention_recurrence(q, k, w, beta, log_decay=log_f), v)

    assert torch.autograd.gradcheck(run, (q, k, w, beta, log_f, v), fast_mode=True)


@pytest.mark.parametrize(
    "options",
    [{"forgets": True}, {"n_group": 2, "rank": None}, {"conv_size": 0, "forgets": True},
     {"n_group": 1, "rank": 3, "conv_size": 2, "bias": True}],
)  # fmt: skip
def test_options_keep_the_contract(options):
    torch.manual_seed(0)
    check_all(shaken(PathAttention(8, 4, **options), 0.5), fresh_input(8))


def test_sizes_are_checked():
    for bad in ({"conv_size": -1}, {"rank": 0}):
        with pytest.raises(DsfValueError, match=f"{next(iter(bad))}: expected at least"):
            PathAttention(8, 4, **bad)
    q, k, w, beta, log_f, _ = inputs(4)
    with pytest.raises(DsfShapeError, match="divides head=4, got 3"):
        path_attention_recurrence(q, *(x.repeat(1, 1, 2, 1)[:, :, :3] for x in (k, w)),
                                  beta.repeat(1, 1, 2)[:, :, :3])  # fmt: skip
    r = path_attention_recurrence(q, k, w, beta)
    bad = r.replace(C=type(r.C)(q, k, w, beta[..., :1], log_f))
    with pytest.raises(DsfShapeError, match=r"C.write_strength: expected shape \(2, 4, 2\)"):
        bad.validate()
