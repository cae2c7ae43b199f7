"""How closed are the gates of a head, and how sparse do they make its output?"""

from __future__ import annotations

import xarray as xr
from torch import Tensor

from dsf.axes import named_sizes, to_xarray
from dsf.errors import DsfShapeError, DsfTypeError, DsfValueError
from dsf.measures._size_checks import require_copies
from dsf.wrappers import Gated

__all__ = ["gate_sparsity"]


def gate_sparsity(
    gate: Gated | Tensor, output: Tensor | None = None, *, threshold: float = 1e-2
) -> xr.Dataset:
    """The mean gate score of every head, and the share of small entries before and after gating.

    gate: a gated system, or its gates (batch, time, head, channel or 1), after the sigmoid; of a
    whole model stack the layers' gates along batch. output: what they multiply, (batch, time,
    head, channel), the heads' outputs before the output projection.

    Returns a Dataset over `head`, means over batch, time and channel: `gate_score` (mean gate),
    `gate_below` (share of gates with |g| < threshold); with `output` Y also `output_below`,
    `gated_below` (of |Y| and |g Y|), `mean_gated_below` (of |Y| times the gate's mean over batch
    and time: the control that shows whether the dependence on the token matters), `output_size`
    and `gated_size` (mean |Y|, |g Y|). The paper's thresholds are 1e-2 and 1e-3. Cost: one pass.
    Raises DsfTypeError, DsfShapeError, DsfValueError. Source: Qiu et al. (2025), section 4.
    """
    require_copies("gate_sparsity", gate, output)
    where = "dsf.gate_sparsity"
    g = gate.gate if isinstance(gate, Gated) else gate
    if not isinstance(g, Tensor):
        raise DsfTypeError(f"{where}: gate: expected a Gated system or a tensor, got {type(g)}.")
    axes = ("batch", "time", "head", "channel")
    if g.ndim != 4:
        raise DsfShapeError(f"{where}: gate: expected axes {axes}, got {tuple(g.shape)}.")
    if not threshold > 0:
        raise DsfValueError(f"{where}: threshold: expected above 0, got {threshold}.")
    if not g.numel():
        raise DsfValueError(
            f"{where}: gate: expected at least one, got {named_sizes(axes, g.shape)}"
        )
    g = g.detach().double()

    def below(x: Tensor) -> Tensor:
        return (x.abs() < threshold).double().mean((0, 1, 3))

    found = {"gate_score": g.mean((0, 1, 3)), "gate_below": below(g)}
    if output is not None:
        fits = output.ndim == 4 and all(
            a in (1, b) for a, b in zip(g.shape, output.shape, strict=True)
        )
        if not fits:
            raise DsfShapeError(
                f"{where}: output: expected axes {axes} that the gate {tuple(g.shape)} fits, got "
                f"{tuple(output.shape)}."
            )
        y = output.detach().double()
        found |= {
            "output_below": below(y), "gated_below": below(g * y),
            "mean_gated_below": below(g.mean((0, 1), keepdim=True) * y),
            "output_size": y.abs().mean((0, 1, 3)), "gated_size": (g * y).abs().mean((0, 1, 3)),
        }  # fmt: skip
    n_head = max(x.shape[0] for x in found.values())
    label = {"units": "1", "method": "means over batch, time and channel, float64",
             "gauge": "none", "threshold": threshold}  # fmt: skip
    return xr.Dataset({
        name: to_xarray(x.expand(n_head), ("head",), name=name, attrs={
            **label, "long_name": _LONG_NAMES[name]})
        for name, x in found.items()
    })  # fmt: skip


_LONG_NAMES = {
    "gate_score": "mean gate", "gate_below": "share of gates below the threshold",
    "output_below": "share of outputs below the threshold, ungated",
    "gated_below": "share of outputs below the threshold, gated",
    "mean_gated_below": "share of outputs below the threshold under the mean gate",
    "output_size": "mean size of the ungated output",
    "gated_size": "mean size of the gated output",
}  # fmt: skip

MEASURES = ()
