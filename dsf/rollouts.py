"""A whole stack of layers as one linear map of its tokens: mixers, residual streams, MLPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import xarray as xr
from torch import Tensor

from dsf._block_factors import require_probes
from dsf.axes import map_coords, to_xarray
from dsf.derivatives import Derivative, require_finite
from dsf.errors import DsfShapeError, DsfValueError
from dsf.maps import Rows, span
from dsf.memory import require_memory
from dsf.shapes import Inexact

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with (done, total, label of the next part)."""
Tokens: TypeAlias = Sequence[str] | tuple[Sequence[str], Sequence[str]] | None
"""Texts of the tokens; of a map between two sequences those of the queries and of the keys."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A stack of layers as one linear map from its input to its output, frozen at one batch.

        x <- x + Block_l N x,      x <- x + J_l N' x      (norms N before, J_l the MLP's Jacobian)
        x <- N (x + Block_l x),    x <- N' (x + J_l x)    (norms after)

    or whatever else the model's own code says. `input` (batch, time, input) enters the first
    layer, or is the other sequence that its cross-attention reads (`source` "other"); `output`
    (batch, time, output) leaves the last. Attention weights, decays, gates and
    the scales of norms are constants of the traced batch; MLPs count by their Jacobians or not at
    all (`mlp`). M_tj, the block of this map from token j to token t, is never stored: rows cost
    one backward pass of the stack each, linear in length but for softmax maps.

    `error`: the map of the input, plus what biases and MLP outputs add through the same frozen
    stack, against the real output (relative 2-norm): what would show if anything else that
    depends on the input had not been held fixed.
    """

    layers: tuple[str, ...]
    input: Tensor = dataclasses.field(repr=False)
    output: Tensor = dataclasses.field(repr=False)
    mlp: str
    source: str
    error: float
    attrs: dict[str, Any] = dataclasses.field(repr=False)
    derivative: Derivative = dataclasses.field(repr=False)

    def apply(
        self, x: Inexact[Tensor, "batch key input"]
    ) -> Inexact[Tensor, "batch query output"]:
        """The map times x (a Jacobian-vector product of the frozen stack).

        Raises DsfValueError on NaN or infinity: a product of derivatives spreads it over all
        tokens, also over those before it.
        """
        _check("apply", "x", x, self.input)
        return self.derivative.apply(x)

    def transposed(
        self, z: Inexact[Tensor, "batch query output"]
    ) -> Inexact[Tensor, "batch key input"]:
        """The transposed map times z (a vector-Jacobian product); raises as `apply`."""
        _check("transposed", "z", z, self.output)
        return self.derivative.transposed(z)[0]

    def row(
        self,
        token: int,
        direction: Inexact[Tensor, " output"] | None = None,
        *,
        tokens: Tokens = None,
        max_memory: int | None = None,
    ) -> xr.DataArray:
        """Row `token` of the map: how its output depends on every token's input features.

        With a direction o of output features o . M_tj (batch, key, input), one backward pass;
        without, all of M_tj (batch, output, key, input), one for each output feature.
        """
        batch, length, n_out = self.output.shape
        if not -length <= token < length:
            raise DsfValueError(
                f"dsf.Rollout.row: token: expected a position within 0..{length - 1}, got {token}."
            )
        token %= length
        eye = torch.eye(n_out, dtype=self.output.dtype, device=self.output.device)
        given = eye if direction is None else self._direction("direction", direction)[None]
        if direction is None:
            require_memory(
                "dsf.Rollout.row", "row", ("batch", "output", "key", "input"),
                (batch, n_out, *self.input.shape[1:]), self.input.dtype, device=self.input.device,
                max_memory=max_memory, advice="Give a direction, or use norm.",
            )  # fmt: skip
        parts = [rows for _, rows in self._rows(token, lambda _: given, len(given))]
        found = torch.cat(parts).transpose(0, 1)
        dims = ("batch", "output", "key", "input")
        if direction is not None:
            found, dims = found[:, 0], ("batch", "key", "input")
        return self._labelled(found, dims, None, tokens, "row", token=token)

    def map(
        self,
        output: Inexact[Tensor, " output"],
        input: Inexact[Tensor, " input"],
        queries: Rows = None,
        *,
        tokens: Tokens = None,
        progress: Progress | None = None,
    ) -> xr.DataArray:
        """o . M_tj i for one output and one input direction, (batch, query, key)."""
        o = self._direction("output", output)[None]
        i = self._direction("input", input, self.input)
        return self._reduced(queries, tokens, progress, "between two directions", lambda _: o, 1,
                             lambda rows, which: (rows @ i).sum(0))  # fmt: skip

    def norm(
        self,
        queries: Rows = None,
        *,
        probes: int | None = None,
        tokens: Tokens = None,
        progress: Progress | None = None,
    ) -> xr.DataArray:
        """Frobenius norms ||M_tj||_F, (batch, query, key): how much j matters to t at all.

        Exact: one backward pass for each query and output feature. `probes`: estimated by so many
        random sign directions for each query; the square is unbiased, its relative standard error
        at most sqrt(2 / probes). progress: called before each query with (done, total, label),
        for a progress bar; so in `map`, `trace` and `contributions`.
        """
        n_out = self.output.shape[-1]
        if probes is not None:
            require_probes("dsf.Rollout.norm", probes)
        generator = torch.Generator().manual_seed(0)

        def signs(count: int) -> Tensor:
            drawn = torch.randint(0, 2, (count, n_out), generator=generator)
            return (drawn * 2 - 1).to(self.output) / count**0.5

        def axes(_: int) -> Tensor:
            return torch.eye(n_out, dtype=self.output.dtype, device=self.output.device)

        how = "exact" if probes is None else f"{probes} random probes"
        found = self._reduced(
            queries, tokens, progress, f"Frobenius norm ({how})",
            axes if probes is None else lambda _: signs(probes),
            n_out if probes is None else probes,
            lambda rows, which: rows.square().sum((0, -1)),
        )  # fmt: skip
        return found.copy(data=found.values**0.5)

    def trace(
        self, queries: Rows = None, *, tokens: Tokens = None, progress: Progress | None = None
    ) -> xr.DataArray:
        """Traces of the blocks M_tj, (batch, query, key): how far features arrive as they were.

        Raises DsfShapeError unless input and output have as many features. Cost as exact `norm`.
        """
        n_out = self.output.shape[-1]
        if self.input.shape[-1] != n_out:
            raise DsfShapeError(
                f"dsf.Rollout.trace: expected as many output as input features, got {n_out} and "
                f"{self.input.shape[-1]}. Use norm or map."
            )
        eye = torch.eye(n_out, dtype=self.output.dtype, device=self.output.device)
        return self._reduced(
            queries, tokens, progress, "trace", lambda _: eye, n_out,
            lambda rows, which: torch.einsum("nbji,ni->bj", rows, eye[which.start : which.stop]),
        )  # fmt: skip

    def contributions(
        self, *, tokens: Tokens = None, progress: Progress | None = None
    ) -> xr.DataArray:
        """||M_tj x_j||, (batch, query, key): what token j really sent to t.

        The M_tj x_j, the biases' part and what omitted MLPs made add up to the output. Cost: one
        forward product for each token.
        """
        found = self.input.new_zeros(*self.output.shape[:2], self.input.shape[1])
        for token in _told(range(self.input.shape[1]), "key", progress):
            alone = torch.zeros_like(self.input)
            alone[:, token] = self.input[:, token]
            found[..., token] = torch.linalg.vector_norm(self.derivative.apply(alone), dim=-1)
        rows = range(self.output.shape[1])
        return self._labelled(found, ("batch", "query", "key"), rows, tokens, "contributions")

    # -- helpers -------------------------------------------------------------------------------

    def _rows(self, token: int, directions: Callable[[int], Tensor], count: int) -> Any:
        """(which, rows (n, batch, key, input)) for `count` output directions at one token."""
        given = directions(token)

        def seeds(which: range) -> Tensor:
            found = self.output.new_zeros(len(which), *self.output.shape)
            found[:, :, token] = given[which.start : which.stop, None]
            return found

        return self.derivative.rows(seeds, count)

    def _reduced(
        self, queries: Rows, tokens: Tokens, progress: Progress | None, how: str,
        directions: Callable[[int], Tensor], count: int, reduce: Callable[[Tensor, range], Tensor],
    ) -> xr.DataArray:  # fmt: skip
        wanted = span("dsf.Rollout", "queries", queries, self.output.shape[1])
        found = self.input.new_zeros(self.input.shape[0], len(wanted), self.input.shape[1])
        for number, token in enumerate(_told(wanted, "query", progress)):
            for which, rows in self._rows(token, directions, count):
                found[:, number] += reduce(rows, which)
        return self._labelled(found, ("batch", "query", "key"), wanted, tokens, how)

    def _direction(self, name: str, given: Tensor, like: Tensor | None = None) -> Tensor:
        like = self.output if like is None else like
        if given.shape != like.shape[-1:]:
            raise DsfShapeError(
                f"dsf.Rollout: {name}: expected ({like.shape[-1]},) features, got "
                f"{tuple(given.shape)}."
            )
        require_finite("dsf.Rollout", name, given)
        return given.to(like)

    def _labelled(
        self, found: Tensor, dims: Sequence[str], rows: range | None,
        tokens: Any, how: str, **attrs: Any,
    ) -> xr.DataArray:  # fmt: skip
        n_query, n_key = self.output.shape[1], self.input.shape[1]
        read, written = _pair(tokens) if self.source == "other" else (tokens, tokens)
        coords = {
            **map_coords("dsf.Rollout", n_query, rows, range(0), read),
            **map_coords("dsf.Rollout", n_key, None, range(n_key), written),
        }
        return to_xarray(
            found, dims, name="rollout", coords=coords,
            attrs={**self.attrs, "reduction": how, "error": self.error, "mlp": self.mlp, **attrs},
        )  # fmt: skip


def _check(function: str, name: str, x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape:
        raise DsfShapeError(
            f"dsf.Rollout.{function}: {name}: expected axes (batch, time, features) = "
            f"{tuple(like.shape)}, got {tuple(x.shape)}; the traced batch fixes them."
        )
    require_finite(f"dsf.Rollout.{function}", name, x)


def _told(steps: range, axis: str, progress: Progress | None) -> Iterator[int]:
    """The steps, with a word before each and one at the end."""
    for done, step in enumerate(steps):
        if progress is not None:
            progress(done, len(steps), f"{axis} {step}")
        yield step
    if progress is not None:
        progress(len(steps), len(steps), "done")


def _pair(tokens: Any) -> tuple[Any, Any]:
    """The texts of two sequences: of the queries, of the keys."""
    if tokens is None:
        return None, None
    if len(tokens) != 2 or any(isinstance(part, str) for part in tokens):
        raise DsfShapeError(
            f"dsf.Rollout: tokens: expected a pair (texts of the queries, texts of the keys) for "
            f"a map between two sequences, got {len(tokens)} texts."
        )
    return tokens[0], tokens[1]
