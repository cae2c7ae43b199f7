"""flash-linear-attention: its Mamba and Mamba-2, from what enters and leaves their parts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.adapters._contract import Built, Visit, first_tensor
from dsf.adapters._tapped import Place, TappedLayer, method_of
from dsf.models.mamba import mamba_recurrence
from dsf.models.mamba2 import mamba2_recurrence


class _Parts(TappedLayer):
    """Base: the scan is inline, or one of mamba_ssm's where that is installed; its parts are not.

    The calls of `parts`, sub-modules of the layer, are recorded in the order in which they run.
    """

    parameters: ClassVar[dict[str, Any]] = {"input": None, "gate": None}
    parts: ClassVar[tuple[str, ...]] = ()
    releases = "flash-linear-attention 0.6.0"

    def places(self, module: nn.Module) -> list[Place]:
        """The parts of this layer alone."""
        return [method_of(getattr(module, name), "forward") for name in self.parts]


class Mamba(_Parts):
    """S6: in_proj gives the gate; u enters x_proj, which gives step size, B and C."""

    name = "flash_linear_attention.mamba"
    covers = ("flash-linear-attention: Mamba",)
    systems = ("mamba",)
    tapped = "in_proj, x_proj and out_proj"
    parts = ("in_proj", "x_proj", "out_proj")
    classes = frozenset({"fla.layers.mamba:Mamba"})

    def build(self, visit: Visit) -> list[Built]:
        """Values (batch, time, channel, 1)."""
        layer: Any = visit.module
        entered, selected, left = visit.taps
        gate = first_tensor(entered.result).chunk(2, -1)[1]
        u, parameters = selected.kwargs["input"], first_tensor(selected.result)
        sizes = (layer.dt_rank, layer.ssm_state_size, layer.ssm_state_size)
        dt, b, c = parameters.split(sizes, -1)
        recurrence = mamba_recurrence(
            layer.dt_proj(dt), -layer.A_log.to(u.dtype).exp(), b[:, :, None], c[:, :, None],
            layer.D.to(u.dtype), softplus=True,
        )  # fmt: skip

        def to_tapped(y: Tensor) -> Tensor:
            return y.squeeze(-1) * layer.act(gate)

        return [Built(
            "mamba", recurrence, u[..., None], lambda y: layer.out_proj(to_tapped(y)),
            first_tensor(visit.output), tapped=left.kwargs["input"], to_tapped=to_tapped,
        )]  # fmt: skip


class Mamba2(_Parts):
    """SSD: in_proj gives gate, step size, and what the short convolution makes u, B and C of.

    With several groups the layer's own torch code and the kernel of mamba_ssm disagree on which
    heads share one: head h reads group h mod groups in the one, h // (heads / groups) in the
    other. The recurrence is that of the code that ran.
    """

    name = "flash_linear_attention.mamba2"
    covers = ("flash-linear-attention: Mamba2",)
    systems = ("mamba2",)
    tapped = "in_proj and what enters norm or out_proj; the convolution from weights"
    parts = ("in_proj", "out_proj")
    classes = frozenset({"fla.layers.mamba2:Mamba2"})

    def places(self, module: nn.Module) -> list[Place]:
        """The norm holds the scan's output apart from the gate, where there is one."""
        norm = getattr(module, "norm", None)
        return [*super().places(module), *([] if norm is None else [method_of(norm, "forward")])]

    def build(self, visit: Visit) -> list[Built]:
        """Values (batch, time, head, channel)."""
        layer: Any = visit.module
        entered, left = visit.taps[:2]
        gate, mixed, dt = first_tensor(entered.result).split(
            [layer.intermediate_size, layer.conv_dim, layer.num_heads], -1)  # fmt: skip
        shared = layer.n_groups * layer.ssm_state_size
        u, b, c = self._convolved(visit, mixed).split(
            [layer.intermediate_size, shared, shared], -1)  # fmt: skip
        u = u.unflatten(-1, (layer.num_heads, -1))
        groups = self._grouping(layer)
        b, c = (groups(x.unflatten(-1, (layer.n_groups, -1))) for x in (b, c))
        skip = layer.D.to(u.dtype)
        per_channel = skip.numel() != layer.num_heads  # then no D of one head can say it
        recurrence = mamba2_recurrence(
            dt, -layer.A_log.to(u.dtype).exp(), b, c, None if per_channel else skip,
            step_bias=layer.dt_bias.to(u.dtype), softplus=True,
            limits=tuple(map(float, layer.dt_limit)),  # type: ignore[arg-type]
        )  # fmt: skip
        through = skip.view(layer.num_heads, -1) * u if per_channel else 0.0

        def to_tapped(y: Tensor) -> Tensor:
            y = (y + through).flatten(-2)
            return y if layer.norm is not None else y * layer.act(gate)

        def readout(y: Tensor) -> Tensor:
            y = to_tapped(y)
            return layer.out_proj(y if layer.norm is None else layer.norm(y, gate))

        return [Built(
            "mamba2", recurrence, u, readout, first_tensor(visit.output),
            tapped=left.kwargs["input"], to_tapped=to_tapped,
        )]  # fmt: skip

    def _convolved(self, visit: Visit, mixed: Tensor) -> Tensor:
        """The short convolution of in_proj's output, padding zero before and after."""
        layer: Any = visit.module
        mask = visit.kwargs.get("attention_mask", visit.args[1] if len(visit.args) > 1 else None)
        real = torch.ones_like(mixed[..., :1])
        if mask is not None and mask.shape == mixed.shape[:2]:
            real = mask[..., None].to(mixed.dtype)
        made = layer.conv1d((mixed * real).mT)[..., : mixed.shape[1]].mT
        return layer.act(made) * real

    def _grouping(self, layer: Any) -> Callable[[Tensor], Tensor]:
        """B or C of the groups -> of the heads, where the layer's torch code tiles them."""
        space = sys.modules["fla.layers.mamba2"].__dict__
        fused = space.get("is_fast_path_available") and layer.in_proj.weight.is_cuda
        if fused or layer.n_groups == 1:
            return lambda x: x
        return lambda x: x.repeat(1, 1, layer.num_heads // layer.n_groups, 1)


ADAPTERS = [Mamba, Mamba2]
