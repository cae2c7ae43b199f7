"""Coefficient dynamics: each weight of a map as the output of a small system, one a past token."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsf.errors import DsfUnsupportedError
from dsf.maps import materialise
from dsf.recurrence import Recurrence
from dsf.shapes import Float, Inexact
from dsf.transitions import Transition
from dsf.transitions._base import register, static


@register
@dataclasses.dataclass(frozen=True)
class CoefficientDynamics:
    """The weights of a causal map from one small system for every past token j.

        x_j = b_j k_j at t = j,   x_t = A_t x_(t-1) after it,   alpha_tj = phi(q_t.x_t) / eta_t

    A: a transition on the key axis. key, query (batch, time, head, state); injection b
    broadcasts to them. readout names phi: "identity", "exp", or "sigmoid" of the response plus
    `offset`; softcap c bends the response to c tanh(x/c) before it. eta is `normaliser` (batch,
    time, head), 1 if None; with sums_to_one it is sum_j phi(q_t.x_j), plus exp(sink). skip is
    D_t, what a token adds to its own weight. Source: Sieber et al. (2025), arXiv 2510.09389.
    """

    A: Transition
    injection: Tensor
    key: Tensor
    query: Tensor
    normaliser: Tensor | None = None
    sink: Tensor | None = None
    skip: Tensor | None = None
    readout: str = static(default="identity")
    sums_to_one: bool = static(default=False)
    offset: float = static(default=0.0)
    softcap: float | None = static(default=None)
    real_output: bool = static(default=False)
    system: str = static(default="")

    def collapsed(self) -> Recurrence:
        """The system of q_t.x_t: with phi the identity all small states sum up to one of size N.

        h_t = sum_j x_t^(j) v_j^T is the finite state of a linear readout; for another phi it gives
        the responses, and the small states have to be kept one by one.
        """
        B = self.injection * self.key
        return Recurrence(
            self.A, B[..., None], self.query[..., None, :], real_output=self.real_output,
            system=self.system, gauge="coefficient dynamics",
        )  # fmt: skip

    def state(self, token: int) -> Inexact[Tensor, "batch time head state"]:
        """x_t of one past token (0-based) at every step, zero before it is written."""
        written = self.injection * self.key
        length = self.query.shape[1]
        batch, _, head = self.collapsed().lead_shape()
        x = written[:, token].expand(batch, head, -1)[..., None]
        states = [torch.zeros_like(x)] * token + [x]
        for A in self.A.steps(length)[token + 1 :]:
            states.append(A.apply(states[-1]))
        return torch.stack(states, 1)[..., 0]

    def responses(self, *, max_memory: int | None = None) -> Inexact[
        Tensor, "batch head query key"]:  # fmt: skip
        """q_t.x_t for every past token; zero above the diagonal. Memory O(length^2)."""
        return materialise(self.collapsed(), length=self.query.shape[1], max_memory=max_memory)

    def phi(self, response: Inexact[Tensor, "*any"]) -> Inexact[Tensor, "*any"]:
        """The readout map, elementwise."""
        response = self._bent(response)
        if self.readout == "exp":
            return response.exp()
        return torch.sigmoid(response + self.offset) if self.readout == "sigmoid" else response

    def log_eta(self, *, max_memory: int | None = None) -> Float[Tensor, "batch time head"]:
        """log of the normaliser of a softmax, safe at any size of the responses.

        Raises DsfUnsupportedError unless phi is exp and rows sum to one.
        """
        if not (self.readout == "exp" and self.sums_to_one):
            raise DsfUnsupportedError(
                "dsf.CoefficientDynamics.log_eta: expected readout='exp' with sums_to_one, got "
                f"{self.readout!r}, {self.sums_to_one}. Take eta().log() where eta is positive."
            )
        return self._log_eta(self._bent(self.responses(max_memory=max_memory)))

    def eta(self, *, max_memory: int | None = None) -> Float[Tensor, "batch time head"]:
        """The normaliser eta_t."""
        if not self.sums_to_one:
            one = torch.ones_like(self.query[..., 0].real)
            return one if self.normaliser is None else self.normaliser * one
        if self.readout == "exp":
            return self.log_eta(max_memory=max_memory).exp()
        return self.phi(self.responses(max_memory=max_memory)).tril().sum(-1).transpose(1, 2)

    def weights(self, *, max_memory: int | None = None) -> Inexact[
        Tensor, "batch head query key"]:  # fmt: skip
        """alpha, the map of the system it came from: phi(responses) / eta, plus `skip`.

        Memory O(length^2); raises DsfMemoryError before allocating more than max_memory bytes.
        """
        response = self.responses(max_memory=max_memory)
        if self.readout == "exp" and self.sums_to_one:
            response = self._bent(response)
            log_eta = self._log_eta(response).transpose(1, 2)[..., None]
            return (response - log_eta).exp().tril()
        found = self.phi(response).tril()
        if self.sums_to_one:
            found = found / found.sum(-1, keepdim=True)
        elif self.normaliser is not None:
            found = found / self.normaliser.transpose(1, 2)[..., None]
        if self.skip is not None:
            own = self.skip.expand(-1, found.shape[-1], -1).transpose(1, 2)
            found = found + torch.diag_embed(own.real if self.real_output else own)
        return found

    def _bent(self, response: Tensor) -> Tensor:
        c = self.softcap
        return response if c is None else c * torch.tanh(response / c)

    def _log_eta(self, response: Tensor) -> Tensor:
        hidden = torch.ones_like(response, dtype=torch.bool).triu(1)
        total = torch.logsumexp(response.masked_fill(hidden, -torch.inf), -1).transpose(1, 2)
        return total if self.sink is None else torch.logaddexp(total, self.sink)
