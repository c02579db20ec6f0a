"""How large each field of a tiny config may be, by what the field is called."""

from __future__ import annotations

import re
from typing import Any

HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM, LAYERS, VOCABULARY, LENGTH = 64, 4, 2, 16, 2, 128, 64
"""Hidden units, attention heads, key and value heads, units of a head, layers, tokens, positions."""

SPECIAL_TOKENS = 32
"""Special tokens have ids below this, ordinary tokens from here on."""

_INITIAL_DEVIATION = 0.125
"""1 / sqrt(HIDDEN): with the usual 0.02 so small a model would look at all positions alike."""

_WIDTH = (
    r"(.*_)?(hidden_size|d_model|n_embd|embedding_size|embedding_dim|emb_dim|embed_dim|d_embed|hidden_dim|dim_model|"
    r"input_dim|output_dim|word_embed_proj_dim|projection_dim|hidden_size_global|d_inner|d_latents|qk_channels|v_channels|lru_width|adapter_(in|out)_dim|adapter_input_size|intermediate_size|ffn_dim|ffn_hidden_size|"
    r"feed_forward_size|d_ff|dff|dim_ff|n_inner)(_mlp)?|dim"
)
# The first match counts.
_CAPS: tuple[tuple[str, int], ...] = (
    (r"num_hidden_layers|num_layers(_per_stack)?|n_layers?|depth|num_blocks|(num_)?(encoder|decoder)_layers", LAYERS),
    (r"mamba_(n|num)_heads", 2 * HIDDEN // HEAD_DIM),
    (r"(mamba_)?n_groups", 2),
    (r"(.*_)?(num_attention_heads|num_heads|attention_heads|n_heads?)", HEADS),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|num_query_groups)", KEY_VALUE_HEADS),
    (r"index(er)?_n_heads|index_topk_blocks|linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"index(er)?_head_dim", 2 * HEAD_DIM),
    (r"(.*_)?(head_dim|head_size|d_head|d_kv|dim_head|kv_channels)|rotary_dim", HEAD_DIM),
    (r"(.*_)?vocab_size(_.*)?|n_words|.*_group_vocab|ngram_vocab_size_base", VOCABULARY),
    (r"(.*_)?max_((encoder_|decoder_)?position_embeddings|seq_len|(source|target)_positions)", LENGTH),
    (r"n_ctx|n_positions|model_max_length", LENGTH),
    (r"(.*_)?(sliding_window|window_size)|local_attention|attention_chunk_size|index_topk", 16),
    (r"index_block_size", 4),
    (r"[qo]_lora_rank", 32),
    (r"kv_lora_rank", 16),
    (r"(n|num|moe_num)_(shared|routed|local)?_?experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|first_k_dense_replace|num_dense_layers", 1),
    (r"(.*_)?(moe|expert|shared|expert_ffn)_(.*_)?(intermediate|ffn|hidden)_size", 32),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"zero_expert_num", 2),
    (r"num_latents", 16),
    (r"(mamba_)?d_state|(ssm_)?state_size", 8),
    (r"(mamba_)?chunk_size", 16),
    (_WIDTH, HIDDEN),
    (r"image_size", 32),
    (r"patch_size", 8),
)
WHERE_UNSET = {
    "vocab_size": VOCABULARY,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
"""What a field gets that the class leaves None in its defaults, though its models cannot do without."""

_PATTERNS = tuple((re.compile(pattern), cap) for pattern, cap in _CAPS)
_KEY_VALUE = re.compile(r"(.*_)?(num_key_value_heads|num_kv_heads)")
_DEVIATION = re.compile(r"initializer_range|init_std")
_TOKEN_ID = re.compile(r"(.*_)?(token_(id|index)|token_ids|suppress_tokens|token_id_list)")


def is_token_id(name: str) -> bool:
    """Whether a field names one or several tokens of the vocabulary."""
    return _TOKEN_ID.fullmatch(name) is not None


def small(name: str, value: Any, heads: int | None) -> Any:
    """`value` cut down for a field called `name`; what no rule speaks of is returned as it is.

    Args:
        name: standard name of the field (that of most configs, not the class's own spelling).
        value: the value to cut down.
        heads: attention heads of the same config before it was cut down.
    """
    if isinstance(value, float) and _DEVIATION.fullmatch(name):
        return max(value, _INITIAL_DEVIATION)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if _KEY_VALUE.fullmatch(name) and value == heads:
        return min(value, HEADS)
    return next((min(value, cap) for pattern, cap in _PATTERNS if pattern.fullmatch(name)), value)
