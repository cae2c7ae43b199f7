"""The tiny recurrent models of transformers: which layer, what it is, its chunk length."""

from __future__ import annotations

# name: (path of its first recurrent layer, system, chunk length of the layer's own scan)
LAYERS = {
    "mamba": ("layers.0.mixer", "mamba", 1),
    "falcon_mamba": ("layers.0.mixer", "mamba", 1),
    "jamba": ("layers.0.mamba", "mamba", 1),
    "zamba": ("layers.0.mamba", "mamba", 1),
    "mamba2": ("layers.0.mixer", "mamba2", 8),
    "bamba": ("layers.0.mamba", "mamba2", 8),
    "falcon_h1": ("layers.0.mamba", "mamba2", 8),
    "granite": ("layers.0.mamba", "mamba2", 8),
    "zamba2": ("layers.0.mamba", "mamba2", 8),
    "nemotron_h": ("layers.0.mixer", "mamba2", 8),
    "qwen3_next": ("layers.0.linear_attn", "gated_delta_net", 64),
    "qwen3_5": ("layers.0.linear_attn", "gated_delta_net", 64),
    "qwen3_5_moe": ("layers.0.linear_attn", "gated_delta_net", 64),
    "qwen4_exp": ("layers.0.linear_attn", "gated_delta_net", 64),
    "olmo_hybrid": ("layers.0.linear_attn", "gated_delta_net", 64),
    "kimi_linear": ("layers.0.self_attn", "kimi_delta_attention", 64),
    "glm5_next": ("layers.0.self_attn", "kimi_delta_attention", 64),
    "bailing_hybrid": ("layers.0.self_attn", "kimi_delta_attention", 64),
    "rwkv": ("blocks.0.attention", "rwkv4", 1),
    "minimax": ("layers.0.self_attn", "lightning_attention", 8),
    "xlstm": ("blocks.0.mlstm_layer", "mlstm", 8),
    "recurrent_gemma": ("layers.0.temporal_block", "rglru", 1),
    "lfm2": ("layers.0.conv", "short_convolution", 3),
    "lfm2_moe": ("layers.0.conv", "short_convolution", 3),
    "lfm3": ("layers.0.conv", "short_convolution", 3),
}  # fmt: skip
LEAKING = ("rwkv", "xlstm", "recurrent_gemma", "lfm2")
"""Padded tokens reach the state: no mask there, or a bias after it."""
KINDS = ("mamba", "zamba", "mamba2", "qwen3_next", "kimi_linear", "rwkv", "minimax", "xlstm",
         "recurrent_gemma", "lfm2")  # fmt: skip
"""One model for each way of reading a layer."""
