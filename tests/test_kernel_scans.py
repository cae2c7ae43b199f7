"""dsf.scan by the Triton kernels: in the interpreter (a child process), and on the GPU.

Run as a script it prints the interpreter's errors as JSON.
"""

from __future__ import annotations

import dataclasses
import json

import kernel_laws
import pytest
import torch

import dsf
from dsf.transitions import (
    Diagonal,
    DiagonalLowRank,
    Householder,
    Identity,
    Scalar,
    Transition,
)

pytest.importorskip("triton", reason="triton is not installed")
EXACT, SIXTEEN = 2e-6, 2e-2
"""Largest difference from the float64 loop over the largest output: float32, bfloat16."""
BATCH, HEAD, N = 2, 2, 3


def systems(length: int, channel: int = 2, dtype: torch.dtype = torch.float32) -> dict:
    """{name: (system, values)}: each structure, axes of size 1, wrappers, a skip."""
    g = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    def make(A: Transition, time: int = length, head: int = HEAD, **more) -> dsf.Recurrence:
        B = draw(1 if time == 1 else BATCH, time, head, N, 1).to(dtype)
        C = draw(BATCH, length, head, 1, N).to(dtype)
        return dsf.Recurrence(A, B, C, **more)

    scalar = Scalar(-draw(BATCH, length, HEAD).abs(), n_state=N)
    diagonal = Diagonal(-draw(BATCH, length, HEAD, N).abs())
    signed = Diagonal(diagonal.log_decay, torch.where(diagonal.log_decay < -0.5, -1.0, 1.0))
    start = draw(BATCH, HEAD, N, channel)
    turning = Diagonal(diagonal.log_decay, phase=3 * draw(BATCH, length, HEAD, N))
    turned = draw(BATCH, HEAD, N, 1) + 1j * draw(BATCH, HEAD, N, 1)
    constant = Diagonal(-draw(1, 1, HEAD, N).abs(), phase=draw(1, 1, HEAD, N))
    pairs = draw(1, 1, HEAD, N, 1) + 1j, draw(1, 1, HEAD, 1, N) - 1j
    u, single = draw(BATCH, length, HEAD, channel).to(dtype), draw(BATCH, length, HEAD, 1)
    skip = draw(BATCH, length, HEAD, 1, 1).to(dtype)
    found = {
        "identity": (make(Identity(N), D=skip), u),
        "scalar": (make(scalar, initial_state=start), u),
        "scalar that does not vary": (make(Scalar(-draw(1, 1, HEAD).abs(), n_state=N), 1), u),
        "scalar of shared B": (make(scalar, head=1), u),
        "diagonal": (make(diagonal, initial_state=start), u),
        "diagonal of one channel": (
            make(diagonal, initial_state=start[..., :1]),
            single.to(dtype),
        ),
        "negative decays": (make(signed), single.to(dtype)),
        "complex decays": (
            make(turning, initial_state=turned, real_output=True),
            single.to(dtype),
        ),
        "complex pairs": (dsf.Recurrence(constant, *pairs, real_output=True), single),
    }
    found |= low_rank_systems(draw, length, u, start, dtype)
    backwards = {
        "anticausal": (dsf.anticausal(make(scalar)), u),
        "strictly anticausal": (dsf.anticausal(make(scalar), strict=True), u),
        "both ways": (
            dsf.Bidirectional(make(scalar), dsf.anticausal(make(diagonal), strict=True)), u,
        ),
    }  # fmt: skip
    return found | (backwards if length > 1 else {})


def low_rank_systems(draw, length, values, start, dtype) -> dict:
    """Householder matrices and diagonal plus rank 1, the written B their own or not."""
    shape = (BATCH, length, HEAD)
    key = torch.nn.functional.normalize(draw(*shape, N), dim=-1).to(dtype)
    strength = torch.sigmoid(draw(*shape)).to(dtype)
    written, other = (strength[..., None] * key)[..., None], draw(*shape, N, 1).to(dtype)
    C = draw(*shape, 1, N).to(dtype)
    log_decay = -draw(*shape, N).abs()
    erased = (log_decay.exp() * key).to(dtype)[..., None]
    gated = DiagonalLowRank(log_decay, left=written, right=erased)
    shared = DiagonalLowRank(log_decay[:1, :1], left=written[:1, :, :1], right=erased[:1, :, :1])
    plain = Householder(strength, key)
    return {
        "delta rule": (dsf.Recurrence(plain, written, C, initial_state=start), values),
        "Householder": (dsf.Recurrence(plain, other, C, initial_state=start), values),
        "delta rule with a decay a state": (dsf.Recurrence(gated, written, C), values),
        "low rank of axes of size 1": (dsf.Recurrence(shared, other, C), values),
    }


def difference(system, values) -> float:
    """Of outputs, states and one gradient, over the largest of each."""
    device = values.device
    found, state = dsf.scan(system, values, "triton", return_state=True)
    expected, last = dsf.scan(system, values, "reference", return_state=True)
    pairs = [(found, expected)]
    if torch.is_tensor(state):
        pairs.append((state, last))
    if values.shape[1]:
        upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(device)
        leaves = [values.clone().requires_grad_() for _ in range(2)]
        for leaf, backend in zip(leaves, ("triton", "reference"), strict=True):
            (dsf.scan(system, leaf, backend) * upstream).sum().backward()
        pairs.append((leaves[0].grad, leaves[1].grad))
    wide = [(a.to(torch.complex128), b.to(torch.complex128)) for a, b in pairs if a.numel()]
    worst = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in wide]
    return float(max(worst, default=torch.tensor(0.0)))


def test_interpreted():
    found = kernel_laws.run_interpreted(__file__)
    assert {"identity 5", "both ways 5", "scalar 0"} <= set(found)
    wrong = {name: error for name, error in found.items() if not error <= EXACT}
    assert not wrong, wrong


@kernel_laws.on_gpu
@pytest.mark.parametrize("length", [0, 1, 63, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(systems(2)))
def test_on_the_gpu(name, dtype, length):
    cases = systems(length, 16, dtype)
    if name not in cases:
        pytest.skip("nothing to run backwards")
    system, values = torch.utils._pytree.tree_map(lambda x: x.cuda(), cases[name])
    assert difference(system, values) <= (EXACT if dtype == torch.float32 else SIXTEEN)
    assert "triton" in dsf.which_backend(system, values) or length == 1


GAPS = {
    "complex": ({"phase": torch.zeros(1, 1, 1, N)}, "no kernel for complex numbers"),
    "signs": ({"sign": -torch.ones(1, 1, 1, N)}, "no kernel for negative decays"),
    "rank 2": (
        {"left": torch.ones(1, 1, 1, N, 2), "right": torch.ones(1, 1, 1, N, 2)},
        "a low rank of 1, not 2",
    ),
    "float64": ({"left": torch.ones(1, 1, 1, N, 1).double()}, "A is torch.float64"),
}


@pytest.mark.parametrize("name", GAPS)
def test_what_has_no_kernel_is_told(name):
    change, message = GAPS[name]
    one = torch.ones(1, 1, 1, N, 1)
    A = DiagonalLowRank(-torch.ones(1, 1, 1, N), left=one, right=one)
    assert A.triton_gap(2) == ""
    assert "128 x 128 at most" in A.triton_gap(129)
    assert message in dataclasses.replace(A, **change).triton_gap(2)


def test_a_delta_rule_is_one_where_it_writes_what_it_erases():
    from dsf.kernel_scans import _is_delta_rule

    key, strength = torch.randn(2, 3, 1, N), torch.rand(2, 3, 1)
    A, B = Householder(strength, key), (strength[..., None] * key)[..., None]
    assert _is_delta_rule(A, B)
    assert not _is_delta_rule(A, B + 1e-6)
    assert not _is_delta_rule(A, B.clone().requires_grad_())
    with torch.no_grad():
        assert _is_delta_rule(A, B.clone().requires_grad_())


def test_the_backend_that_runs_is_told():
    system, values = systems(5)["scalar"]
    assert dsf.which_backend(system, values) == (
        "chunked (the kernels need CUDA tensors, the values are on cpu)"
    )
    query, key = torch.randn(2, 1, 5, 2, 4)
    rows = dsf.Recurrence(Identity(5), dsf.OneHot(5, 5), dsf.SoftmaxRows(query, key))
    assert dsf.which_backend(rows, torch.randn(1, 5, 2, 3)) == "fused attention"


if __name__ == "__main__":
    cases = {f"{k} {n}": case for n in (0, 5) for k, case in systems(n).items()}
    few = ("low rank of axes of size 1 0", "delta rule with a decay a state 0", "Householder 0")
    cases = {name: case for name, case in cases.items() if name not in few}
    cases["scalar 1"] = systems(1)["scalar"]
    print(json.dumps({name: difference(*case) for name, case in cases.items()}))
