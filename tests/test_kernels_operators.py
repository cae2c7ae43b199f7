"""Operators of dsf_kernels: the short way when nobody watches, the dispatcher otherwise."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton", reason="triton is not installed")
from dsf_kernels.operators import operator


def _twice(x: torch.Tensor, by: float) -> torch.Tensor:
    return x * by


def _twice_backward(ctx, grad):
    return grad * ctx.rest[0], None


twice = operator("tested_twice", _twice, lambda x, by: torch.empty_like(x), _twice_backward)


@pytest.mark.parametrize("wanted", [False, True])
def test_value_and_gradient(wanted):
    x = torch.arange(3.0, requires_grad=wanted)
    y = twice(x, 2.0)
    assert torch.equal(y, 2 * x)
    assert y.requires_grad == wanted
    if wanted:
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 2.0))
        with torch.no_grad():
            assert not twice(x, 2.0).requires_grad


def test_watchers_see_the_operator():
    """Fake tensors, tracing and the profiler get the operator, not what is inside."""
    x = torch.ones(3)
    with FakeTensorMode() as mode:
        assert twice(mode.from_tensor(x), 2.0).shape == (3,)
    nodes = [str(n.target) for n in make_fx(lambda x: twice(x, 2.0))(x).graph.nodes]
    assert "dsf.tested_twice.default" in nodes
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        twice(x, 2.0)
    assert any(event.name == "dsf::tested_twice" for event in seen.events())
    assert twice(torch.ones(3, device="meta"), 2.0).is_meta


def test_compiles_whole():
    compiled = torch.compile(lambda x: twice(x, 2.0) + 1, backend="aot_eager", fullgraph=True)
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(compiled(x), torch.full((3,), 3.0))
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], torch.full((3,), 2.0))
