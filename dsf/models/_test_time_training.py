"""The layer of test-time training, whatever its inner model: projections, rates, one step."""

from __future__ import annotations

import abc
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsf.linearize import linearized
from dsf.models._heads import check_at_least, check_divides, merge_heads, split_heads
from dsf.models._inner_training import (
    InnerNorm,
    InnerRun,
    Tokens,
    Trained,
    train_sequence,
)
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.rotary import rotary_tables, rotate


class TrainedState(NamedTuple):
    """What `step` keeps: the inner layers, the last rate (batch, head, 1, 1), tokens seen."""

    memory: list[Trained]
    rate: Tensor
    position: int


class TestTimeTrainer(SequenceMixer):
    """Query, key and value by head, an inner model trained on (k, v), and what it says of q.

        strength_s = base_rate sigmoid(W_r x_s + b) / head width
        rate_t = max(1/i + offset_i, 0),   i = 1..mini_batch the place of t in its mini-batch
        y_t = W_o LN(q_t + LN(z_t(q_t)))     (not normalised: W_o LN(z_t(q_t)))

    widths are those of the inner layers' outputs, in head widths. normalised=False leaves norm,
    residual and the learned start out of the inner model. rope_base rotates q and k by the place
    in the mini-batch, None does not. The learned start W_0 acts through `readout`: the system is
    that of W - W_0, from a zero state.
    """

    __test__ = False  # no test, whatever the name says

    def __init__(
        self, width: int, n_head: int = 4, *, mini_batch: int = 16, base_rate: float = 1.0,
        widths: tuple[int, ...] = (1,), normalised: bool = True,
        rope_base: float | None = 10000.0, norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        check_divides(type(self).__name__, "n_head", n_head, "width", width)
        check_at_least(type(self).__name__, "mini_batch", 1, mini_batch)
        channel = width // n_head
        self.n_head, self.mini_batch, self.rope_base = n_head, mini_batch, rope_base
        self.base_rate, self.normalised, self.norm_eps = base_rate, normalised, norm_eps
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.strength = nn.Linear(width, n_head)
        self.offset = nn.Parameter(torch.zeros(mini_batch))
        self.post_norm = nn.LayerNorm(width, eps=norm_eps)
        self.start = nn.ParameterList()
        if normalised:
            sizes = [channel, *(channel * w for w in widths)]
            for n_in, n_out in itertools.pairwise(sizes):
                first = torch.cat([0.02 * torch.randn(n_head, n_in, n_out),
                                   torch.zeros(n_head, 1, n_out)], 1)  # fmt: skip
                self.start.append(nn.Parameter(first))
            self.inner_weight = nn.Parameter(torch.ones(n_head, channel))
            self.inner_bias = nn.Parameter(torch.zeros(n_head, channel))

    @abc.abstractmethod
    def started(self, tokens: Tokens, start: list[Tensor]) -> tuple[Recurrence, Tensor]:
        """The system from the learned start, and its values: its `<system>_recurrence`."""

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The weights' system and its values: the corrections, (batch, time, head, channel)."""
        system, values = self.started(self._tokens(x), [m.start for m in self._memory(x)])
        return system.replace(initial_state=None), values

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """What W_0 says of the queries, the inner norm and residual, norm and projection."""
        if self.normalised:
            run, tokens = self._run(x)
            z = y.transpose(1, 2) + run.query_features @ self.start[-1]
            y = self._spoken(z, tokens.query).transpose(1, 2)
        return self.out(self.post_norm(merge_heads(y)))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width): one pass, mini-batch after mini-batch."""
        run, tokens = self._run(x)
        return self._closed(run, tokens.query)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, TrainedState]:
        """One token; the state is the inner model and what its mini-batch has written."""
        memory, place = (None, 0) if state is None else (state.memory, state.position)
        if state is not None and place % self.mini_batch == 0:
            memory = [m.stepped(state.rate) for m in state.memory]
        run, tokens = self._run(x_t[:, None], memory, place)
        y = self._closed(run, tokens.query)[:, 0]
        return y, TrainedState(run.memory, tokens.rate, place + 1)

    def linearized(self, x: Tensor) -> Recurrence:
        """The Jacobian linearisation along this input, on changes of x: see `dsf.linearize`.

        The state is the inner model, what its mini-batch wrote, the last rate, the place in the
        sequence and the last output: large, for small layers.
        """
        memory = self._memory(x)
        sizes = [part.shape[1:] for m in memory for part in m]
        counts = [size.numel() for size in sizes]
        flat = torch.cat([part.flatten(1) for m in memory for part in m], 1)
        rest = flat.new_zeros(x.shape[0], self.n_head + 1 + x.shape[2])

        def cell(state: Tensor, x_t: Tensor) -> Tensor:
            *parts, last, place, _ = state.split([*counts, self.n_head, 1, x.shape[2]])
            pairs = [p.unflatten(0, s)[None] for p, s in zip(parts, sizes, strict=True)]
            turn = place % self.mini_batch == 0
            before = []
            for start, written in zip(pairs[::2], pairs[1::2], strict=True):
                new = Trained(start, written).stepped(last[None, :, None, None])
                before.append(Trained(torch.where(turn, new.start, start),
                                      torch.where(turn, new.written, written)))  # fmt: skip
            run, tokens = self._run(x_t[None, None], before, place)
            y = self._closed(run, tokens.query)[0, 0]
            kept = [part.flatten() for m in run.memory for part in m]
            return torch.cat([*kept, tokens.rate.flatten(), place + 1, y])

        width = x.shape[2]
        return linearized(
            cell, x, torch.cat([flat, rest], 1), lambda s: s[-width:], system=self.system
        )

    def _run(
        self, x: Tensor, memory: list[Trained] | None = None, place: int | Tensor = 0
    ) -> tuple[InnerRun, Tokens]:
        tokens = self._tokens(x, place)
        memory = self._memory(x) if memory is None else memory
        return train_sequence(memory, tokens, self._norm(), self.mini_batch), tokens

    def _tokens(self, x: Tensor, place: int | Tensor = 0) -> Tokens:
        q, k, v = (split_heads(f(x), self.n_head) for f in (self.query, self.key, self.value))
        at = (torch.arange(x.shape[1], device=x.device) + place).long() % self.mini_batch
        if self.rope_base is not None:
            cos, sin = (table[at] for table in rotary_tables(
                self.mini_batch, q.shape[-1], base=self.rope_base, pairing="neighbour",
                dtype=x.dtype, device=x.device))  # fmt: skip
            q, k = (rotate(part, cos, sin, "neighbour") for part in (q, k))
        rate = (1 / (at + 1).to(x.dtype) + self.offset[at]).clamp(min=0)
        strength = self.base_rate * torch.sigmoid(self.strength(x)) / q.shape[-1]
        return Tokens.by_head(q, k, v, rate[:, None].expand(strength.shape), strength)

    def _memory(self, x: Tensor) -> list[Trained]:
        start = list(self.start)
        if not start:
            channel = self.query.out_features // self.n_head
            start = [x.new_zeros(self.n_head, channel + 1, channel)]
        start = [w.expand(x.shape[0], *w.shape) for w in start]
        return [Trained(w, torch.zeros_like(w)) for w in start]

    def _norm(self) -> InnerNorm | None:
        if not self.normalised:
            return None
        return InnerNorm(self.inner_weight, self.inner_bias, self.norm_eps)

    def _spoken(self, z: Tensor, query: Tensor) -> Tensor:
        norm = self._norm()
        return z if norm is None else query + norm.forward(z)

    def _closed(self, run: InnerRun, query: Tensor) -> Tensor:
        y = self._spoken(run.output, query).transpose(1, 2)
        return self.out(self.post_norm(merge_heads(y)))
