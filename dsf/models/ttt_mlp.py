"""TTT-MLP: the state is a network of two layers, trained on each token by one step of descent."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dsf.models._heads import check_at_least, check_query_key, check_shapes
from dsf.models._inner_training import (
    InnerNorm,
    Tokens,
    Trained,
    train_sequence,
    written_recurrence,
)
from dsf.models._test_time_training import TestTimeTrainer
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "ttt_mlp"


def ttt_mlp_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time head state"],
    value: Float[Tensor, "batch time head channel"],
    rate: Float[Tensor, "batch time head"],
    first: Float[Tensor, "_batch _head _row _hidden"],
    second: Float[Tensor, "_batch _head _inner _channel"],
    norm_weight: Float[Tensor, "_head _channel"] | None = None,
    norm_bias: Float[Tensor, "_head _channel"] | None = None,
    *,
    write_strength: Float[Tensor, "batch time head"] | None = None,
    mini_batch: int = 1,
    eps: float = 1e-6,
) -> tuple[Recurrence, Tensor]:
    """TTT-MLP's second layer as a system, and its values (batch, time, head, channel).

        z(x) = W_2^T [GELU(W_1^T [x; 1]); 1],     g_s = gradient in z of the loss of token s
        W_2,t = W_2,start - rate_t sum_{s <= t} beta_s k~_s g_s^T,     z_t = q~_t^T W_2,t
        k~_s = [GELU(W_1,start^T [k_s; 1]); 1],   q~_t = [GELU(W_1,t^T [q_t; 1]); 1]

    start: at the beginning of the mini-batch of t; beta is write_strength, 1 if None; the loss is
    |LN(z(k_s)) - (v_s - k_s)|^2 / 2, or |z(k_s) - v_s|^2 / 2 without norm_weight. W_1 descends
    like W_2, and acts through k~ and q~: with the values -g_s the system is exact along its
    trajectory, and its state is W_2 with its bias in the last row.

    first (batch, head, state + 1, hidden) and second (batch, head, hidden + 1, channel) are W_1
    and W_2 before the first token, biases below; second is the initial state. The scan gives z_t,
    before the layer's norm and residual. Cost O(length hidden (state + channel)); mini-batches
    longer than 1 keep 2 (hidden + 1) states. Raises DsfShapeError, DsfValueError. Source: Sun et
    al. (2024), arXiv 2407.04620, eqs. 4 to 7 and section 2.7.
    """
    check_query_key(f"dsf.{SYSTEM}_recurrence", query, key)
    check_at_least(f"{SYSTEM}_recurrence", "mini_batch", 1, mini_batch)
    batch, length, head, n_state = query.shape
    each, channel, hidden = (batch, length, head), value.shape[-1], first.shape[-1]
    check_shapes(f"dsf.{SYSTEM}_recurrence", "query, value and first", {
        "key": (key, (*each, n_state)), "value": (value, (*each, channel)), "rate": (rate, each),
        "first": (first, (batch, head, n_state + 1, hidden)),
        "second": (second, (batch, head, hidden + 1, channel)),
        "norm_weight": (norm_weight, (head, channel)), "norm_bias": (norm_bias, (head, channel)),
        "write_strength": (write_strength, each),
    })  # fmt: skip
    strength = rate.new_ones(rate.shape) if write_strength is None else write_strength
    run = train_sequence(
        [Trained(w, w.new_zeros(w.shape)) for w in (first, second)],
        Tokens.by_head(query, key, value, rate, strength),
        InnerNorm.of(norm_weight, norm_bias, eps), mini_batch,
    )  # fmt: skip
    q, k, u = (part.transpose(1, 2) for part in run[1:4])
    system = written_recurrence(
        SYSTEM, q, k, rate, strength, mini_batch, is_plain=False, start=second
    )
    return system, u


class TttMlp(TestTimeTrainer):
    """The TTT-MLP layer: z(x) = W_2 GELU(W_1 x + c_1) + c_2, both trained. See the base class.

    Its system is that of W_2 with the features that W_1 gives along the trajectory, exact along
    it (`ttt_mlp_recurrence`). Cost O(length x 4 x width^2 / n_head), state 16 width^2 / n_head.
    Source: Sun et al. (2024), sections 2.3 to 2.7.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I, values −∂ℓₜ/∂z along the trajectory", "B": "βₜ(gelu(W₁kₜ), 1)",
        "C": "(gelu(W₁qₜ), 1)", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Sun et al. (2024), arXiv 2407.04620, sections 2.3-2.7"

    def __init__(
        self, width: int, n_head: int = 4, *, mini_batch: int = 16, base_rate: float = 0.1,
        expand: int = 4, rope_base: float | None = 10000.0, norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, mini_batch=mini_batch, base_rate=base_rate, widths=(expand, 1),
            rope_base=rope_base, norm_eps=norm_eps,
        )  # fmt: skip

    def started(self, tokens: Tokens, start: list[Tensor]) -> tuple[Recurrence, Tensor]:
        """`ttt_mlp_recurrence` of the tokens."""
        query, key, value, rate, strength = tokens.by_time()
        first, second = start
        return ttt_mlp_recurrence(
            query, key, value, rate, first, second, self.inner_weight, self.inner_bias,
            write_strength=strength, mini_batch=self.mini_batch, eps=self.norm_eps,
        )  # fmt: skip

    @classmethod
    def small(cls, width: int) -> TttMlp:
        """Two heads, mini-batches of four tokens, rotated where the width of a head is even."""
        return cls(width, 2, mini_batch=4, rope_base=10000.0 if width // 2 % 2 == 0 else None)


LAYER = TttMlp
