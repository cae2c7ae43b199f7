"""TTT-MLP: the state is a network of two layers, trained on each token by one step of descent."""

from __future__ import annotations

from typing import ClassVar

from dsf.models._test_time_training import TestTimeTrainer

SYSTEM = "ttt_mlp"


class TttMlp(TestTimeTrainer):
    """The TTT-MLP layer: z(x) = W_2 GELU(W_1 x + c_1) + c_2, both trained. See the base class.

    Its system is that of W_2 with the features that W_1 gives along the trajectory,

        k~_t = [GELU(W_1 k_t + c_1); 1] at the start of the mini-batch,
        q~_t = [GELU(W_1 q_t + c_1); 1] with what tokens up to t wrote,

    exact along it. Cost O(length x 4 x width^2 / n_head), state 16 width^2 / n_head. Source: Sun
    et al. (2024), sections 2.3 to 2.7.
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

    @classmethod
    def small(cls, width: int) -> TttMlp:
        """Two heads, mini-batches of four tokens, rotated where the width of a head is even."""
        return cls(width, 2, mini_batch=4, rope_base=10000.0 if width // 2 % 2 == 0 else None)


LAYER = TttMlp
