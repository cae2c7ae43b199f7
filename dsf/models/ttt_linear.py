"""TTT-Linear: the state is a linear model, trained on each token by one step of descent."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dsf.models._heads import check_at_least, check_query_key, check_shapes
from dsf.models._inner_training import (
    InnerNorm,
    Tokens,
    Trained,
    train_sequence,
    with_one,
    written_recurrence,
)
from dsf.models._test_time_training import TestTimeTrainer
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "ttt_linear"


def ttt_linear_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time head state"],
    value: Float[Tensor, "batch time head channel"],
    rate: Float[Tensor, "batch time head"],
    norm_weight: Float[Tensor, "_head _channel"] | None = None,
    norm_bias: Float[Tensor, "_head _channel"] | None = None,
    *,
    write_strength: Float[Tensor, "batch time head"] | None = None,
    mini_batch: int = 1,
    scale: float = 1.0,
    eps: float = 1e-6,
    initial_state: Float[Tensor, "_batch _head _row _channel"] | None = None,
) -> tuple[Recurrence, Tensor]:
    """TTT-Linear's weights as a system, and its values (batch, time, head, channel).

        W_t = W_start - rate_t sum_{s <= t} beta_s [k_s; 1] g_s^T,   z_t = scale [q_t; 1] W_t
        g_s = gradient in z of |LN(z_s) - (v_s - k_s)|^2 / 2 at z_s = [k_s; 1] W_start

    W_start is W at the beginning of the mini-batch of t; beta is write_strength, 1 if None. The
    scan gives z_t, before the layer's norm and residual. With the norm, g is nonlinear in W: the
    values are -g_s and the system is exact along its trajectory. Without (norm_weight None) the
    loss is |z - v|^2 / 2, the values are v, and the system is exact: for mini_batch = 1

        A_t = I - rate_t beta_t k~_t k~_t^T,   B_t = rate_t beta_t k~_t,   k~ = [k; 1],

    the delta rule, and for a mini-batch as long as the sequence linear attention. initial_state
    (batch, head, state + 1, channel) has W and the bias below it. scale multiplies q, not its 1.
    Cost O(length state channel); mini-batches longer than 1 keep 2 (state + 1) states. Raises
    DsfShapeError, DsfValueError. Source: Sun et al. (2024), arXiv 2407.04620, eqs. 4 to 7 and
    theorem 1.
    """
    check_query_key(f"dsf.{SYSTEM}_recurrence", query, key)
    check_at_least(f"{SYSTEM}_recurrence", "mini_batch", 1, mini_batch)
    batch, length, head, n_state = query.shape
    each, channel = (batch, length, head), value.shape[-1]
    check_shapes(f"dsf.{SYSTEM}_recurrence", "query and value", {
        "key": (key, (*each, n_state)), "value": (value, (*each, channel)), "rate": (rate, each),
        "norm_weight": (norm_weight, (head, channel)), "norm_bias": (norm_bias, (head, channel)),
        "write_strength": (write_strength, each),
        "initial_state": (initial_state, (batch, head, n_state + 1, channel)),
    })  # fmt: skip
    norm = InnerNorm.of(norm_weight, norm_bias, eps)
    strength = rate.new_ones(rate.shape) if write_strength is None else write_strength
    features = with_one(scale * query), with_one(key)
    corrections = value
    if norm is not None:
        start = initial_state
        if start is None:
            start = value.new_zeros(batch, head, n_state + 1, channel)
        tokens = Tokens.by_head(scale * query, key, value, rate, strength)
        memory = [Trained(start, start.new_zeros(start.shape))]
        run = train_sequence(memory, tokens, norm, mini_batch)
        corrections = run.correction.transpose(1, 2)
    system = written_recurrence(
        SYSTEM, *features, rate, strength, mini_batch, is_plain=norm is None, start=initial_state
    )
    return system, corrections


class TttLinear(TestTimeTrainer):
    """The TTT-Linear layer; normalised=False is the delta rule, with a bias. See the base class.

    Cost O(length x width^2 / n_head), state 2 width^2 / n_head. Source: Sun et al. (2024),
    sections 2.3 to 2.7.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I, values −∂ℓₜ/∂z along the trajectory (no norm: I − βₜkₜkₜᵀ)", "B": "βₜ(kₜ, 1)",
        "C": "(qₜ, 1)", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Sun et al. (2024), arXiv 2407.04620, eqs. 4-7"

    def __init__(
        self, width: int, n_head: int = 4, *, mini_batch: int = 16, base_rate: float = 1.0,
        normalised: bool = True, rope_base: float | None = 10000.0, norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, mini_batch=mini_batch, base_rate=base_rate, normalised=normalised,
            rope_base=rope_base, norm_eps=norm_eps,
        )  # fmt: skip

    def started(self, tokens: Tokens, start: list[Tensor]) -> tuple[Recurrence, Tensor]:
        """`ttt_linear_recurrence` of the tokens."""
        query, key, value, rate, strength = tokens.by_time()
        norm = (self.inner_weight, self.inner_bias) if self.normalised else ()
        return ttt_linear_recurrence(
            query, key, value, rate, *norm, write_strength=strength,
            mini_batch=self.mini_batch, eps=self.norm_eps, initial_state=start[0],
        )  # fmt: skip

    @classmethod
    def small(cls, width: int) -> TttLinear:
        """Two heads, mini-batches of four tokens, rotated where the width of a head is even."""
        return cls(width, 2, mini_batch=4, rope_base=10000.0 if width // 2 % 2 == 0 else None)


LAYER = TttLinear
