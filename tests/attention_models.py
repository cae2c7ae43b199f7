"""More small random transformers models with softmax attention, next to `tiny_models`."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
from tiny_models import _DECODER, _ENCODER, _IDS, VOCABULARY, _build
from torch import Tensor, nn

_BOTH = {
    "vocab_size": VOCABULARY, "d_model": 24, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, **_IDS,
}  # fmt: skip
_T5 = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2,
       "num_heads": 3, "decoder_start_token_id": 0, **_IDS}  # fmt: skip
_GPT = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 3}

ENCODER_DECODERS = {
    "t5": _build("T5Model", "T5Config", **_T5),
    "bart": _build("BartModel", "BartConfig", **_BOTH),
    "marian": _build("MarianModel", "MarianConfig", **_BOTH, decoder_start_token_id=1),
}
INTERFACE = {
    "gpt_neox": _build("GPTNeoXModel", "GPTNeoXConfig", **_ENCODER),
    "gpt_bigcode": _build("GPTBigCodeModel", "GPTBigCodeConfig", **_GPT, **_IDS),
    "roberta": _build("RobertaModel", "RobertaConfig", **_ENCODER),
    "distilbert": _build("DistilBertModel", "DistilBertConfig", vocab_size=VOCABULARY, dim=24,
                         n_layers=1, n_heads=3, hidden_dim=32, **_IDS),
    "modernbert": _build("ModernBertModel", "ModernBertConfig", **_ENCODER, local_attention=6,
                         global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
    "gemma3": _build("Gemma3TextModel", "Gemma3TextConfig", **_DECODER, head_dim=8,
                     sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "afmoe": _build("AfmoeModel", "AfmoeConfig", **_DECODER, head_dim=8, sliding_window=5,
                    num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
                    num_dense_layers=2),
    "phi3": _build("Phi3Model", "Phi3Config", **_DECODER),
    "opt": _build("OPTModel", "OPTConfig", vocab_size=VOCABULARY, hidden_size=24, ffn_dim=32,
                  num_hidden_layers=2, num_attention_heads=3, word_embed_proj_dim=24, **_IDS),
    "diffllama": _build("DiffLlamaModel", "DiffLlamaConfig", **_DECODER),
    "deepseek_v3": _build("DeepseekV3Model", "DeepseekV3Config", vocab_size=VOCABULARY,
                          hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                          num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8,
                          qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6,
                          intermediate_size=32, first_k_dense_replace=2, **_IDS),
    "vit": _build("ViTModel", "ViTConfig", hidden_size=24, num_hidden_layers=2,
                  num_attention_heads=3, intermediate_size=32, image_size=8, patch_size=4),
    **ENCODER_DECODERS,
}  # fmt: skip
OWN = {
    "bloom": _build("BloomModel", "BloomConfig", vocab_size=VOCABULARY, hidden_size=24,
                    n_layer=1, n_head=3, **_IDS),
    "codegen": _build("CodeGenModel", "CodeGenConfig", vocab_size=VOCABULARY, n_embd=32,
                      n_layer=1, n_head=4, rotary_dim=4, **_IDS),
    "deberta": _build("DebertaModel", "DebertaConfig", **_ENCODER, relative_attention=True,
                      pos_att_type=["c2p", "p2c"]),
    "deberta_v2": _build("DebertaV2Model", "DebertaV2Config", **_ENCODER,
                         relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "falcon": _build("FalconModel", "FalconConfig", vocab_size=VOCABULARY, hidden_size=24,
                     num_hidden_layers=1, num_attention_heads=3, **_IDS),
    "gptj": _build("GPTJModel", "GPTJConfig", **_GPT, **_IDS, rotary_dim=4),
    "gpt_neo": _build("GPTNeoModel", "GPTNeoConfig", vocab_size=VOCABULARY, hidden_size=24,
                      num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=3,
                      window_size=5, **_IDS),
    "megatron_bert": _build("MegatronBertModel", "MegatronBertConfig", **_ENCODER),
    "mpnet": _build("MPNetModel", "MPNetConfig", **_ENCODER),
    "mpt": _build("MptModel", "MptConfig", vocab_size=VOCABULARY, d_model=24, n_heads=4,
                  n_layers=1),
    "openai": _build("OpenAIGPTModel", "OpenAIGPTConfig", **_GPT),
    "rembert": _build("RemBertModel", "RemBertConfig", **_ENCODER, input_embedding_size=24),
    "roformer": _build("RoFormerModel", "RoFormerConfig", **_ENCODER, embedding_size=24),
    "xglm": _build("XGLMModel", "XGLMConfig", vocab_size=VOCABULARY, d_model=24, ffn_dim=32,
                   num_layers=1, attention_heads=3, **_IDS),
}  # fmt: skip
OWN_DECODERS = {
    "megatron_bert_decoder": _build("MegatronBertModel", "MegatronBertConfig", **_ENCODER,
                                    is_decoder=True),
    "rembert_decoder": _build("RemBertModel", "RemBertConfig", **_ENCODER, is_decoder=True,
                              input_embedding_size=24),
    "roformer_decoder": _build("RoFormerModel", "RoFormerConfig", **_ENCODER, is_decoder=True,
                               embedding_size=24),
}  # fmt: skip
ALL = {**INTERFACE, **OWN}


def model(
    name: str, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> nn.Module:
    """The named model of this file or `tiny_models`: random weights of seed 0, evaluation mode."""
    known = {**ALL, **OWN_DECODERS}
    if name not in known:
        return tiny_models.model(name, dtype, attention)
    return tiny_models.made(known[name], dtype, attention)


def inputs(name: str, padding: str = "none", dtype: torch.dtype = torch.float32,
           queries: int = 9) -> dict[str, Any]:  # fmt: skip
    """What the named model takes; an encoder-decoder gets `queries` tokens to decode."""
    if name == "vit":
        generator = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator).to(dtype)}
    given: dict[str, Tensor] = tiny_models.inputs(padding)
    if name in ENCODER_DECODERS:
        given |= {f"decoder_{k}": v for k, v in tiny_models.inputs(padding, queries).items()}
    return given
