"""The contract of a system in dsf/models: one law a function, `law(layer, x)`, each reusable.

x is (batch, time, width) in float64. `LAWS` hold for every layer, `CAUSAL_LAWS` also for every
causal one. A new model file is tested by test_models.py without an edit; a layer with other
options than its `small` is tested with `check_all(layer, x)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dsf
from dsf.models._mixer import SequenceMixer
from dsf.wrappers import Gated, System, core

FACES_ATOL = 1e-10
"""Every pair of faces, float64, relative to the largest output (at least 1)."""
ALONE_ATOL = 1e-12
"""A sample alone against the same one in a batch: products may sum in another order."""
SLOPE_RTOL = 1e-6
"""A directional derivative in the parameters against extrapolated central differences."""
FLOAT32_RTOL = 2e-4
"""The layer in float32 against itself in float64."""


def load_golden(name: str) -> dict[str, Tensor]:
    """The arrays of tests/golden/<name>.npz as tensors; texts are left out."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as data:
        return {k: torch.from_numpy(data[k]) for k in data if data[k].dtype.kind in "fiubc"}


def load_parameters(layer: SequenceMixer, case: dict[str, Tensor], **renamed: str) -> None:
    """Put a case's `param.<name>` into the layer; `renamed` says which module a name goes to."""
    found = {k.removeprefix("param."): v for k, v in case.items() if k.startswith("param.")}
    own = layer.state_dict()
    moved = {}
    for name, value in found.items():
        head, _, rest = name.partition(".")
        moved[f"{renamed.get(head, head)}.{rest}" if rest else renamed.get(head, head)] = value
    layer.load_state_dict({k: v for k, v in moved.items() if k in own}, strict=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def fresh_input(width: int, length: int = 11, batch: int = 2, seed: int = 0) -> Tensor:
    """A seeded input (batch, time, width)."""
    return normal(batch, length, width, seed=seed)


def shaken(layer: SequenceMixer, size: float = 0.1, seed: int = 1) -> SequenceMixer:
    """The layer in float64 with noise on every parameter: a zero initial value hides faults.

    The noise is seeded, the layer's own start is not: call torch.manual_seed before building it.
    """
    layer = layer.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p += size * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return layer


def mixed_by_map(system: System, values: Tensor) -> Tensor:
    """map @ values, whatever axes the map has: what `scan` must give from a zero state."""
    r = core(system)
    weights = dsf.materialise(system, length=values.shape[1])
    if not has_channel_axis(system):
        weights = weights.unsqueeze(2)
    if r.n_input == r.n_output == 1:
        weights = weights[..., None, None]
    u = values if values.ndim == 5 else values.unsqueeze(3)
    y = torch.einsum("bhctsoi,bshic->bthoc", weights.to(u.dtype), u)
    return y.squeeze(3) if r.n_output == 1 else y


def has_channel_axis(system: System) -> bool:
    """Whether the map of a system has a channel axis: a gate of its own for every channel."""
    return isinstance(system, Gated) and system.gate.shape[3] > 1


def stepped(layer: SequenceMixer, x: Tensor) -> Tensor:
    """The outputs of `step`, token by token, each from the cache of the one before."""
    state, outputs = None, []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1)


def assert_near(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference over the largest expected entry (at least 1)."""
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} != {tuple(expected.shape)}"
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = float((got - expected).abs().max()) / scale if expected.numel() else 0.0
    assert error <= tolerance, f"{name}: relative difference {error:.2e} > {tolerance:.0e}"


# -- for every layer ---------------------------------------------------------------------------


@torch.no_grad()
def law_output_has_the_input_shape(layer: SequenceMixer, x: Tensor) -> None:
    """(batch, time, width) -> (batch, time, width), finite."""
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert bool(torch.isfinite(y).all())


@torch.no_grad()
def law_no_token_gives_no_output(layer: SequenceMixer, x: Tensor) -> None:
    """An empty sequence is a sequence: forward, scan and map of length 0."""
    none = x[:, :0]
    assert layer(none).shape == none.shape
    system, values = layer.recurrence(none)
    for backend in ("reference", "auto"):
        assert layer.readout(dsf.scan(system, values, backend), none).shape == none.shape
    assert dsf.materialise(system, length=0).numel() == 0


@torch.no_grad()
def law_forward_is_readout_of_scan(layer: SequenceMixer, x: Tensor) -> None:
    """forward = readout(scan(recurrence)), by the loop and by the fast path."""
    system, values = layer.recurrence(x)
    core(system).validate()
    expected = layer(x)
    for backend in ("reference", "auto"):
        y = layer.readout(dsf.scan(system, values, backend), x)
        assert_near(f"readout(scan, {backend})", y, expected, FACES_ATOL)


@torch.no_grad()
def law_forward_is_readout_of_map(layer: SequenceMixer, x: Tensor) -> None:
    """forward = readout(map @ values)."""
    system, values = layer.recurrence(x)
    y = layer.readout(mixed_by_map(system, values), x)
    assert_near("readout(map @ values)", y, layer(x), FACES_ATOL)


@torch.no_grad()
def law_samples_do_not_mix(layer: SequenceMixer, x: Tensor) -> None:
    """Another second sample leaves the first bit for bit; alone it is the same to round-off."""
    changed = x.clone()
    changed[1:] = 3 - 2 * changed[1:]
    assert torch.equal(layer(x)[0], layer(changed)[0])
    assert_near("one sample alone", layer(x[:1]), layer(x)[:1], ALONE_ATOL)


def law_gradient_in_the_input(layer: SequenceMixer, x: Tensor) -> None:
    """gradcheck of forward on four tokens of one sample."""
    short = x[:1, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(layer, (short,), fast_mode=True)


def law_gradient_in_the_parameters(layer: SequenceMixer, x: Tensor) -> None:
    """The slope along a random direction of all parameters, against differences."""
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    if not names:
        return
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    start = {n: p.detach() for n, p in layer.named_parameters()}
    along = {n: torch.randn(start[n].shape, dtype=start[n].dtype, generator=generator)
             for n in names}  # fmt: skip

    def loss(amount: Tensor) -> Tensor:
        moved = {n: start[n] + amount * along[n] if n in along else start[n] for n in start}
        return (weight * torch.func.functional_call(layer, moved, (x,))).sum()

    zero = torch.zeros((), dtype=x.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(zero), zero)

    @torch.no_grad()
    def difference(step: float) -> float:
        ahead, behind = (loss(torch.tensor(s * step, dtype=x.dtype)) for s in (1, -1))
        return float(ahead - behind) / (2 * step)

    found = (4 * difference(1e-5) - difference(2e-5)) / 3  # the error of order step^2 cancels
    assert abs(float(slope) - found) <= SLOPE_RTOL * max(1.0, float(slope.abs()))


@torch.no_grad()
def law_float32_stays_near(layer: SequenceMixer, x: Tensor) -> None:
    """The layer in float32 gives float32 near its float64 self."""
    y = copy.deepcopy(layer).float()(x.float())
    assert y.dtype == torch.float32
    assert_near("float32", y.double(), layer(x), FLOAT32_RTOL)


# -- for causal layers -------------------------------------------------------------------------


@torch.no_grad()
def law_forward_is_repeated_step(layer: SequenceMixer, x: Tensor) -> None:
    """forward = step after step, and a shorter input gives the same first outputs."""
    expected = layer(x)
    assert_near("repeated step", stepped(layer, x), expected, FACES_ATOL)
    assert_near("first token alone", layer(x[:, :1]), expected[:, :1], FACES_ATOL)


@torch.no_grad()
def law_the_future_is_not_seen(layer: SequenceMixer, x: Tensor) -> None:
    """Other tokens after t leave the outputs up to t bit for bit, large ones too."""
    before = layer(x)
    for t in range(x.shape[1] - 1):
        changed = x.clone()
        changed[:, t + 1 :] = 5 * changed[:, t + 1 :].flip(1) + 1
        assert torch.equal(layer(changed)[:, : t + 1], before[:, : t + 1]), f"after token {t}"


@torch.no_grad()
def law_map_is_lower_triangular(layer: SequenceMixer, x: Tensor) -> None:
    """The map's upper triangle is exactly zero."""
    system, values = layer.recurrence(x)
    weights = dsf.materialise(system, length=values.shape[1])
    axis = 3 if has_channel_axis(system) else 2
    by_position = weights.movedim((axis, axis + 1), (-2, -1))
    assert not bool(by_position.triu(1).any())


LAWS = [
    law_output_has_the_input_shape, law_no_token_gives_no_output, law_forward_is_readout_of_scan,
    law_forward_is_readout_of_map, law_samples_do_not_mix, law_gradient_in_the_input,
    law_gradient_in_the_parameters, law_float32_stays_near,
]  # fmt: skip
CAUSAL_LAWS = [
    law_forward_is_repeated_step, law_the_future_is_not_seen, law_map_is_lower_triangular,
]  # fmt: skip


def check_all(layer: SequenceMixer, x: Tensor) -> None:
    """Every law that concerns this layer."""
    for law in [*LAWS, *(CAUSAL_LAWS if layer.is_causal else [])]:
        law(layer, x)


def check_linearisation(
    layer: SequenceMixer, x: Tensor, tolerance: float, function: Callable | None = None
) -> None:
    """The map of `layer.linearized(x)` is the Jacobian of `function` (the layer) at one sample."""
    system = layer.linearized(x)
    assert system.mode == "linearised"
    jacobian = torch.autograd.functional.jacobian(function or layer, x)[0, :, :, 0]
    found = dsf.materialise(system)[0, 0].detach()
    assert_near("Jacobian", found, jacobian.permute(0, 2, 1, 3), tolerance)
