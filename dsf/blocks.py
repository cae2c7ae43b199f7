"""A whole layer as one linear map: projections, convolution, scan, norm, gate, projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from dsf import _block_factors as factors
from dsf._block_parts import frozen_parts
from dsf._flat_blocks import flat_recurrence
from dsf._frozen_layers import without_start
from dsf.axes import map_coords, to_xarray
from dsf.derivatives import Derivative, require_finite
from dsf.errors import DsfFidelityError, DsfShapeError
from dsf.maps import Rows, spans, system_attrs
from dsf.scanning import scan
from dsf.shapes import Inexact
from dsf.tracing import TOLERANCE, LayerTrace
from dsf.wrappers import System


@dataclasses.dataclass(frozen=True)
class Block:
    """One layer as a linear map of its input features, whatever depends on the input held fixed.

        v_t = sum_k V_tk x_{t-k},   y = scan(inner, v),   z_t = sum_h O_th y_th + R_t x_t

    x (batch, time, input) is what the layer was given, z (batch, time, output) what it made but
    for `offset`, the part of its biases. V (with `taps` > 1 where a convolution or token shift
    comes first) and O hold projections, gates, and norms of the traced point; `inner` is the
    traced recurrence. Each head is one system with state (state, channel); the layer is their sum.
    R (`around`) is there only where the layer adds its own input back, as ALBERT's attention does:
    views by head then have one part more, the last, which is R at t = j.

    Attention between two sequences has one axis of time, the keys' tokens first (`attrs["n_key"]`
    of them): x is zero at the queries, z at the keys.

    V and O are the derivatives of the layer's own code with its norms and gates as constants
    (`dsf.freezing.Frozen`), so `apply` costs a few passes of the layer, and nothing is length x
    length. An activation counts as a gate: silu(x) = [sigmoid(x)] x. `error` is the relative
    difference between the layer's output and this map of its input and biases; it would show if
    anything that depends on the input had not been held fixed.
    """

    name: str
    layer: int
    system: str
    inner: System = dataclasses.field(repr=False)
    input: Tensor = dataclasses.field(repr=False)
    output: Tensor = dataclasses.field(repr=False)
    taps: int
    error: float
    attrs: dict[str, Any] = dataclasses.field(repr=False)
    into: Derivative = dataclasses.field(repr=False)
    out_of: Derivative = dataclasses.field(repr=False)
    around: Derivative | None = dataclasses.field(repr=False, default=None)

    @property
    def n_head(self) -> int:
        """Number of heads, the input that is added back not counted."""
        return self.into.output.shape[2]

    @property
    def offset(self) -> Inexact[Tensor, "batch time output"]:
        """What the biases (and an initial state) add: the output less the map of the input."""
        return self.output - self.apply(self.input)

    def apply(
        self, x: Inexact[Tensor, "batch time input"], *, heads: bool = False
    ) -> Inexact[Tensor, "batch *head time output"]:
        """The map times x, without the offset; with `heads` each head's part (batch, head, ...).

        Cost: a few passes of the layer, linear in length; with `heads` one readout a head.
        """
        _check("apply", "x", x, self.input.shape)
        y = scan(self.inner, self.into.apply(x))
        added = [] if self.around is None else [self.around.apply(x)]
        if not heads:
            return sum(added, self.out_of.apply(y))
        own = torch.eye(self.n_head, dtype=y.dtype, device=y.device)[:, None, None, :, None]
        return torch.stack([*(self.out_of.apply(y * alone) for alone in own), *added], dim=1)

    def transposed(
        self, z: Inexact[Tensor, "batch time output"]
    ) -> Inexact[Tensor, "batch time input"]:
        """The transposed map times z; for z one at token l alone, row l of the map."""
        _check("transposed", "z", z, self.output.shape)
        values = torch.zeros_like(self.into.output, requires_grad=True)
        with torch.enable_grad():
            y = scan(self.inner, values)
        (v,) = torch.autograd.grad(y, values, self.out_of.transposed(z)[0])
        x = self.into.transposed(v)[0]
        return x if self.around is None else x + self.around.transposed(z)[0]

    def map(
        self,
        output: Inexact[Tensor, "*lead output"],
        input: Inexact[Tensor, "*tail input"],
        queries: Rows = None,
        keys: Rows = None,
        *,
        tokens: Sequence[str] | None = None,
        max_memory: int | None = None,
    ) -> xr.DataArray:
        """Entry (t, j) of each head's map between two directions: o_t . M_tj i_j.

        `output` and `input`: directions in feature space, (features,) for all tokens, (time,
        features), or (batch, time, features). Returns (batch, head, query, key), the layer's map
        being the sum over heads. Cost: taps + 2 products of the projections, and the inner map.
        """
        read = _directions("map", "output", output, self.output)
        write = _directions("map", "input", input, self.input)
        found = factors.between(self, read, write, queries, keys, max_memory)
        return self._labelled(found, queries, keys, tokens, "between two directions")

    def norm(
        self,
        queries: Rows = None,
        keys: Rows = None,
        *,
        heads: bool = True,
        probes: int | None = None,
        tokens: Sequence[str] | None = None,
        max_memory: int | None = None,
    ) -> xr.DataArray:
        """Frobenius norms of the feature blocks M_tj, (batch, head, query, key).

        With `heads` off that of the sum over heads, (batch, query, key). `probes`: estimate the
        squares by so many pairs of random sign directions instead (`map`), without V and O as
        arrays; unbiased for the square, whose relative standard error is at most
        sqrt(8 / probes). Exact cost: V and O as arrays (one product of the projections for each
        feature), then O(queries x keys x channel^2).
        """
        if probes is None:
            found = factors.norm(self, queries, keys, heads, max_memory)
        else:
            found = factors.sketched_norm(self, queries, keys, heads, probes, max_memory)
        how = "exact" if probes is None else f"{probes} random probes"
        return self._labelled(found, queries, keys, tokens, f"Frobenius norm ({how})")

    def trace(
        self,
        queries: Rows = None,
        keys: Rows = None,
        *,
        tokens: Sequence[str] | None = None,
        max_memory: int | None = None,
    ) -> xr.DataArray:
        """Traces of the feature blocks M_tj, (batch, head, query, key): how much copies.

        Each feature's gain on itself, summed. Raises DsfShapeError unless input and output have
        as many features. Cost as `norm`.
        """
        if self.input.shape[-1] != self.output.shape[-1]:
            raise DsfShapeError(
                f"dsf.Block.trace: expected as many output as input features, got "
                f"{self.output.shape[-1]} and {self.input.shape[-1]}. Use norm or map."
            )
        found = factors.trace(self, queries, keys, max_memory)
        return self._labelled(found, queries, keys, tokens, "trace")

    def jacobian(
        self, queries: Rows = None, keys: Rows = None, *, max_memory: int | None = None
    ) -> Inexact[Tensor, "batch head query key output input"]:
        """The feature blocks M_tj of some queries and keys, refused where they would not fit."""
        return factors.jacobian(self, queries, keys, max_memory)

    def recurrence(self, *, max_memory: int | None = None) -> System:
        """One plain system per head, with the features as input and output axes.

        The matrix state (state, channel) is written as one long state, A (x) I; taps become a
        shift register in front (`dsf.series`). Values: x (batch, time, 1, input, 1), shared by
        the heads, whose outputs add up to the layer. For small layers: B and C are dense. Raises
        DsfMemoryError otherwise.
        """
        return flat_recurrence(self, max_memory)

    def _labelled(
        self, found: Tensor, queries: Rows, keys: Rows, tokens: Sequence[str] | None, how: str
    ) -> xr.DataArray:
        length = self.input.shape[1]
        rows, cols = spans("dsf.Block", queries, keys, length)
        coords = map_coords("dsf.Block", length, rows, cols, tokens)
        dims = ("batch", "head", "query", "key") if found.ndim == 4 else ("batch", "query", "key")
        return to_xarray(
            found, dims, name="block_map", coords=coords,
            attrs={**system_attrs(self.inner), **self.attrs, "layer_name": self.name,
                   "scope": "whole block", "reduction": how, "error": self.error},
        )  # fmt: skip


# -- from a trace ------------------------------------------------------------------------------


def block_of(trace: LayerTrace, *, tolerance: float | None = None) -> Block:
    """The block of a traced layer: two recorded passes of its own code around the recurrence.

    Raises DsfFidelityError where the layer is not linear in its input and biases after freezing
    (see `Block`), DsfUnsupportedError for a trace without its pass, for modules that hold several
    layers, or where the values depend on several inputs. Cost: three passes of the layer, and one
    more where it adds its input back.
    """
    limit = TOLERANCE.get(trace.output.dtype, 1e-5) if tolerance is None else tolerance
    parts = frozen_parts(trace, limit)
    taps = factors.taps(trace.name, parts.into)
    for derivative in (parts.out_of, parts.around):
        if derivative is not None:
            factors.require_token_by_token(trace.name, derivative)
    if not parts.error <= limit:
        raise DsfFidelityError(
            f"dsf.trace(...).block: {trace.name}: expected the layer to be linear in its input "
            f"and biases once its norms and gates are held fixed, within {limit:.3g}, got a "
            f"relative difference of {parts.error:.3g}. It has a nonlinearity that "
            f"dsf.freezing.Frozen does not know. To look at its derivative all the same, pass a "
            f"larger tolerance=."
        )
    kept = ("precision", "class", "torch_version", "transformers_version", "float32_casts",
            "time", "n_key", "n_query")  # fmt: skip
    attrs = {name: trace.attrs[name] for name in kept if name in trace.attrs}
    if parts.around is not None:
        attrs["residual"] = "the last head: the input that the layer adds back"
    return Block(
        trace.name, trace.layer, trace.system, without_start(parts.inner),
        parts.into.inputs[0].detach(), parts.output.detach(), taps, parts.error, attrs,
        parts.into, parts.out_of, parts.around,
    )  # fmt: skip


def _check(function: str, name: str, x: Tensor, shape: torch.Size) -> None:
    if x.shape != shape:
        raise DsfShapeError(
            f"dsf.Block.{function}: {name}: expected axes (batch, time, features) = "
            f"{tuple(shape)}, got {tuple(x.shape)}; the traced layer fixes them."
        )
    require_finite(f"dsf.Block.{function}", name, x)


def _directions(function: str, name: str, given: Tensor, like: Tensor) -> Tensor:
    shape = like.shape
    if given.ndim > 3 or tuple(given.shape) not in [tuple(shape[i:]) for i in range(3)]:
        raise DsfShapeError(
            f"dsf.Block.{function}: {name}: expected axes (features={shape[2]},), (time, "
            f"features) or (batch, time, features) of {tuple(shape)}, got {tuple(given.shape)}."
        )
    return given.to(like).expand(shape)
