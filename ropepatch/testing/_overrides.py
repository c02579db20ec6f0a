"""What the general rules cannot know, by the config's own model_type: fields and their values."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_THREE_AXES = {**_ROPE, "mrope_section": [2, 3, 3]}
_THREE_AXES_OF_HALF = {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
_GLOBAL_HEAD: dict[str, Any] = {"head_dim": 16, "global_head_dim": 32}

OVERRIDES: dict[str, dict[str, Any]] = {
    # Its cache wants a number of layers that the config lacks.
    "blt": {"use_cache": False},
    "cohere_compass_text": {
        "layer_types": _SLIDING_THEN_FULL,
        "num_hidden_layers": 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": None},
    },
    # The modelling code reads a field that the class lacks; every released config has it.
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "bamba": {"attn_layer_indices": [1]},
    "glm4v_text": {"rope_parameters": _THREE_AXES},
    "glm4v_moe_text": {"rope_parameters": _THREE_AXES_OF_HALF},
    "glm_image_text": {"rope_parameters": _THREE_AXES},
    "glm_ocr_text": {"rope_parameters": _THREE_AXES},
    "qwen2_vl_text": {"rope_parameters": _THREE_AXES},
    "qwen2_5_vl_text": {"rope_parameters": _THREE_AXES},
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "position_embedding_type": "rope"},
    # One scaled layer, one that stays unscaled.
    "molmo2_text": {"rope_scaling_layers": [1]},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "deepseek_v4": {"head_dim": 64},  # of which an eighth is rotated
    # The relative terms, which all released models have and the class's defaults leave out.
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "head_dim": 32,
    },
    # The rotary form, as ESM-2 has it; the class's default is the older learned table.
    "esm": {"position_embedding_type": "rotary", "pad_token_id": 1},
    "falcon_h1": {"mamba_d_head": 16},
    "led": {"attention_window": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_THEN_FULL * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": 64,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": _GLOBAL_HEAD,
    "gemma4_unified_text": _GLOBAL_HEAD,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"use_mem_rope": True},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
