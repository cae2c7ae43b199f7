"""Small random transformers models, weights large enough that the mixers matter to the output."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 40
LENGTH = 13
BATCH = 2
PADDED = 4
"""Tokens of padding in the second row, where there is padding."""

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 32, **_IDS,
}  # fmt: skip
_ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 32, **_IDS,
}  # fmt: skip

logging.getLogger("transformers").setLevel(logging.ERROR)


def _build(model: str, config: str, **options: Any) -> Callable[[str | None], nn.Module]:
    def make(attention: str | None) -> nn.Module:
        chosen = {} if attention is None else {"attn_implementation": attention}
        settings = getattr(transformers, config)(**options, **chosen)
        return getattr(transformers, model)(settings)

    return make


SOFTMAX = {
    "bert": _build("BertModel", "BertConfig", **_ENCODER),
    "gpt2": _build("GPT2Model", "GPT2Config", vocab_size=VOCABULARY, n_embd=24, n_layer=2,
                   n_head=3, **_IDS),
    "llama": _build("LlamaModel", "LlamaConfig", **_DECODER),
    "qwen3": _build("Qwen3Model", "Qwen3Config", **_DECODER, head_dim=8, use_sliding_window=True,
                    sliding_window=5, max_window_layers=1),
    "mistral": _build("MistralModel", "MistralConfig", **_DECODER, sliding_window=5),
    "t5_encoder": _build("T5EncoderModel", "T5Config", vocab_size=VOCABULARY, d_model=24, d_kv=8,
                         d_ff=32, num_layers=2, num_heads=3, **_IDS),
    "albert": _build("AlbertModel", "AlbertConfig", **_ENCODER, embedding_size=24),
}  # fmt: skip
EAGER_ONLY = {
    "gemma2": _build("Gemma2Model", "Gemma2Config", **_DECODER, head_dim=8, sliding_window=5,
                     attn_logit_softcapping=2.0),
    "gpt_oss": _build("GptOssModel", "GptOssConfig", **_DECODER, head_dim=8, sliding_window=5,
                      num_local_experts=2, num_experts_per_tok=1),
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "layer_types": ["linear_attention", "full_attention"],
}
_LATENT = {**_DECODER, "num_key_value_heads": 4, "moe_intermediate_size": 16, "kv_lora_rank": 8,
           "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
           "mlp_layer_types": ["dense", "dense"], "linear_num_heads": 3, "linear_head_dim": 6,
           "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
_SSD = {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 5, "mamba_chunk_size": 8}
RECURRENT = {
    "mamba": _build("MambaModel", "MambaConfig", vocab_size=VOCABULARY, hidden_size=16,
                    state_size=4, num_hidden_layers=2, time_step_rank=3),
    "mamba2": _build("Mamba2Model", "Mamba2Config", vocab_size=VOCABULARY, hidden_size=16,
                     expand=2, head_dim=8, num_heads=4, n_groups=2, state_size=5,
                     num_hidden_layers=2, chunk_size=8),
    "recurrent_gemma": _build("RecurrentGemmaModel", "RecurrentGemmaConfig",
                              vocab_size=VOCABULARY, hidden_size=16, lru_width=16,
                              num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                              intermediate_size=48, attention_window_size=5, **_IDS),
    "falcon_mamba": _build("FalconMambaModel", "FalconMambaConfig", vocab_size=VOCABULARY,
                           hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=3),
    "jamba": _build("JambaModel", "JambaConfig", **_DECODER, num_experts=1,
                    num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=3, attn_layer_period=2,
                    attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "bamba": _build("BambaModel", "BambaConfig", **_DECODER, **_SSD, mamba_n_groups=1,
                    attn_layer_indices=[1]),
    "falcon_h1": _build("FalconH1Model", "FalconH1Config", **_DECODER, **_SSD, mamba_d_ssm=48),
    "granite": _build("GraniteMoeHybridModel", "GraniteMoeHybridConfig", **_DECODER, **_SSD,
                      num_local_experts=0, shared_intermediate_size=32,
                      layer_types=["mamba", "attention"]),
    "zamba2": _build("Zamba2Model", "Zamba2Config", **_DECODER, mamba_d_state=5, mamba_ngroups=1,
                     n_mamba_heads=4, mamba_headdim=12, chunk_size=8,
                     layers_block_type=["mamba", "hybrid"], num_mem_blocks=1, adapter_rank=4),
    "nemotron_h": _build("NemotronHModel", "NemotronHConfig", **_DECODER, head_dim=8,
                         ssm_state_size=5, mamba_num_heads=4, mamba_head_dim=12, n_groups=1,
                         chunk_size=8, layers_block_type=["mamba", "attention"]),
    "zamba": _build("ZambaModel", "ZambaConfig", **{**_DECODER, "num_hidden_layers": 3},
                    mamba_d_state=4, mamba_dt_rank=3, n_mamba_heads=3,
                    layers_block_type=["mamba", "hybrid", "hybrid"]),
    "qwen3_next": _build("Qwen3NextModel", "Qwen3NextConfig", **_DECODER, **_DELTA, head_dim=8,
                         mlp_only_layers=[0, 1]),
    "qwen3_5": _build("Qwen3_5TextModel", "Qwen3_5TextConfig", **_DECODER, **_DELTA, head_dim=8),
    "olmo_hybrid": _build("OlmoHybridModel", "OlmoHybridConfig", **_DECODER, **_DELTA),
    "kimi_linear": _build("KimiLinearModel", "KimiLinearConfig", **_LATENT),
    "rwkv": _build("RwkvModel", "RwkvConfig", **_DECODER, attention_hidden_size=20,
                   rescale_every=1),
    "minimax": _build("MiniMaxModel", "MiniMaxConfig", **_DECODER, block_size=8,
                      layer_types=["linear_attention", "full_attention"], num_local_experts=2,
                      num_experts_per_tok=1, experts_implementation="eager"),
    "xlstm": _build("xLSTMModel", "xLSTMConfig", vocab_size=VOCABULARY, hidden_size=24,
                    num_hidden_layers=2, num_heads=3, chunk_size=8, **_IDS),
    "lfm2": _build("Lfm2Model", "Lfm2Config", **_DECODER, layer_types=["conv", "full_attention"],
                   conv_bias=True, block_auto_adjust_ff_dim=False),
    "lfm2_moe": _build("Lfm2MoeModel", "Lfm2MoeConfig", **_DECODER, moe_intermediate_size=16,
                       layer_types=["conv", "full_attention"], num_dense_layers=2),
    "lfm3": _build("Lfm3Model", "Lfm3Config", **_DECODER, head_dim=8,
                   layer_types=["conv", "full_attention"]),
    "qwen3_5_moe": _build("Qwen3_5MoeTextModel", "Qwen3_5MoeTextConfig", **_DECODER, **_DELTA,
                          head_dim=8, num_experts=2, num_experts_per_tok=1,
                          moe_intermediate_size=16, shared_expert_intermediate_size=16,
                          experts_implementation="eager"),
    "bailing_hybrid": _build("BailingHybridModel", "BailingHybridConfig", **_LATENT, head_dim=6,
                             n_group=1, topk_group=1, num_local_experts=2),
    "glm5_next": _build("Glm5NextTextModel", "Glm5NextTextConfig",
                        **{**_LATENT, "layer_types": ["linear_attention"] * 2, "q_lora_rank": 8,
                           "qk_rope_head_dim": 0},
                        n_routed_experts=2, index_topk=16, index_head_dim=4, index_n_heads=2),
    "qwen4_exp": _build("Qwen4ExpTextModel", "Qwen4ExpTextConfig", **_DECODER, **_DELTA,
                        head_dim=8, num_experts=2, num_experts_per_tok=1, hc_lowrank=4,
                        moe_intermediate_size=16, shared_expert_intermediate_size=16,
                        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8,
                        indexer_budget=16, indexer_compress_ratio=4,
                        experts_implementation="eager"),
}  # fmt: skip
ALL = {
    **SOFTMAX, **EAGER_ONLY, **RECURRENT,
    # the state of transformers' RWKV is as wide as the model
    "rwkv_with_cache": _build("RwkvModel", "RwkvConfig", **_DECODER, rescale_every=1),
}  # fmt: skip


def model(
    name: str, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> nn.Module:
    """The named model with random weights of seed 0, in evaluation mode."""
    return made(ALL[name], dtype, attention)


def made(
    build: Callable[[str | None], nn.Module], dtype: torch.dtype, attention: str | None
) -> nn.Module:
    """What `build` gives, with random weights of seed 0, in evaluation mode."""
    torch.manual_seed(0)
    model = build(attention).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model


def inputs(padding: str = "none", length: int = LENGTH) -> dict[str, Tensor]:
    """Token ids and their mask; padding "left" or "right" covers part of the second row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :PADDED] = 0
    elif padding == "right":
        mask[1, -PADDED:] = 0
    return {"input_ids": ids, "attention_mask": mask}
