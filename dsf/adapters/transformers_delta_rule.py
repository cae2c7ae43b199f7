"""transformers: gated delta rules of Qwen3-Next, Qwen3.5, OLMo hybrid, and Kimi's per channel."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from dsf.adapters._delta_rule import DeltaRuleFunction
from dsf.adapters._tapped import transformers_classes
from dsf.models.gated_delta_net import gated_delta_net_recurrence
from dsf.models.kimi_delta_attention import kimi_delta_attention_recurrence
from dsf.recurrence import Recurrence

_PARAMETERS = {
    "query": None, "key": None, "value": None, "g": None, "beta": None, "chunk_size": 64,
    "initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": False,
}  # fmt: skip


class _TransformersDeltaRule(DeltaRuleFunction):
    parameters: ClassVar[dict[str, Any]] = _PARAMETERS

    def named(self, args: tuple, kwargs: dict[str, Any], function: str = "") -> dict[str, Any]:
        """Queries, keys and values under the names that fla gives them."""
        given = super().named(args, kwargs, function)
        return {{"query": "q", "key": "k", "value": "v"}.get(n, n): x for n, x in given.items()}


class GatedDelta(_TransformersDeltaRule):
    """One log decay a head: A_t = exp(g_t) (I - beta_t k_t k_t^T)."""

    name = "transformers_gated_delta"
    system = "gated_delta_net"
    functions = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    covers = ("transformers: gated delta nets of Qwen3-Next, Qwen3.5, Qwen4-Exp and OLMo hybrid",)
    classes = transformers_classes({
        "qwen3_next": "Qwen3NextGatedDeltaNet", "qwen3_5": "Qwen3_5GatedDeltaNet",
        "qwen3_5_moe": "Qwen3_5MoeGatedDeltaNet", "qwen4_exp": "Qwen4ExpTextGatedDeltaNet",
        "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    })  # fmt: skip

    def recurrence(self, query: Tensor, key: Tensor, given: dict[str, Any]) -> Recurrence:
        """The gated delta rule; key heads may be fewer than value heads."""
        return gated_delta_net_recurrence(
            query, key, given["g"], given["beta"], initial_state=given["initial_state"]
        )


class KimiDelta(_TransformersDeltaRule):
    """One log decay a key channel: A_t = (I - beta_t k_t k_t^T) diag(exp(g_t))."""

    name = "transformers_kimi_delta"
    system = "kimi_delta_attention"
    functions = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
    covers = ("transformers: Kimi delta attention of Kimi Linear, GLM-5 Next and Bailing hybrid",)
    classes = transformers_classes({
        "kimi_linear": "KimiLinearDeltaAttention", "glm5_next": "Glm5NextTextLinearAttention",
        "bailing_hybrid": "BailingHybridDeltaAttention",
    })  # fmt: skip

    def recurrence(self, query: Tensor, key: Tensor, given: dict[str, Any]) -> Recurrence:
        """The delta rule with a decay for each channel of the key."""
        return kimi_delta_attention_recurrence(
            query, key, given["g"], given["beta"], initial_state=given["initial_state"]
        )


ADAPTERS = [GatedDelta, KimiDelta]
