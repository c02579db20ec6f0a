"""Causal attention of a chunk over a cache, on the CPU, without a mask.

PyTorch's fast causal kernel serves only a chunk that starts a sequence; with a cache before it, transformers builds a
mask, which costs up to twice the time and a quadratic tensor. Here a chunk's attention is two calls of the unmasked
kernel, one over the cached keys and one causal over the chunk's own, joined exactly by their log-sum-exp. A single
token is one call, in which the query heads of a key head are rows of one product: the kernel's own way with grouped
heads reads the keys once for each query head.

Registered under a name of its own and selected on one model for as long as an evaluation runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ropepatch.attention.interface import NAME as SEAM

NAME = "ropepatch_chunked_prefill"


def past_and_own(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """Causal attention of the last n positions over all of them.

    Args:
        query: [batch, heads, n, dim], the last n positions.
        key, value: [batch, key_heads, past + n, dim]; heads is a multiple of key_heads.
        scale: of the scores; 1 / sqrt(dim) by default.

    Returns:
        [batch, heads, n, dim], in the query's dtype.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    batch, heads, n, dim = query.shape
    key_heads, past = key.shape[1], key.shape[2] - n
    # Without a mask a query's row does not matter, so the heads of one key head are laid out as further rows.
    rows = query.reshape(batch, key_heads, heads // key_heads * n, dim)
    if n == 1:
        return flash(rows, key, value, 0.0, False, scale=scale)[0].reshape(batch, heads, n, dim)
    seen, seen_lse = flash(rows, key[:, :, :past], value[:, :, :past], 0.0, False, scale=scale)
    seen, seen_lse = seen.reshape(batch, heads, n, dim), seen_lse.reshape(batch, heads, n, 1)
    own_key = key[:, :, past:].repeat_interleave(heads // key_heads, dim=1)
    own_value = value[:, :, past:].repeat_interleave(heads // key_heads, dim=1)
    own, own_lse = flash(query, own_key, own_value, 0.0, True, scale=scale)
    # softmax over the union: each part weighs exp(its log-sum-exp).
    weight = torch.sigmoid(seen_lse - own_lse.unsqueeze(-1))
    return torch.lerp(own.float(), seen.float(), weight).to(query.dtype)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    n, total = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is None and causal and (n == 1 or n < total):
        if query.shape[-1] == value.shape[-1] and kwargs.get("position_bias") is None:
            return past_and_own(query, key, value, scale=scaling).transpose(1, 2).contiguous(), None
        # The mask that the mask function below left out for the sake of the fast path.
        if n > 1:
            attention_mask = torch.ones(n, total, dtype=torch.bool, device=query.device).tril(total - n)[None, None]
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _mask(
    *,
    mask_function: Any,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if mask_function is causal_mask_function and attention_mask is None and allow_is_causal_skip:
        return None
    return sdpa_mask(
        mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs
    )


@contextmanager
def chunked_attention(model: nn.Module) -> Iterator[bool]:
    """Select this attention on a model whose attention is transformers' `sdpa` on the CPU, and put `sdpa` back after.

    Yields:
        Whether the model's attention needs no mask over the cache. A model on another device, or with another
        attention, is left as it is; one that is patched in the attention seam needs none either.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    selected: list[Any] = [
        config
        for config in configs.values()
        if isinstance(config, PreTrainedConfig) and config._attn_implementation == "sdpa"
    ]
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if not selected or not on_cpu:
        yield any(isinstance(c, PreTrainedConfig) and c._attn_implementation == SEAM for c in configs.values())
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    try:
        for config in selected:
            # The private field: the public setter would also change the sub-configs, which are in the list themselves.
            config._attn_implementation_internal = NAME
        yield True
    finally:
        for config in selected:
            config._attn_implementation_internal = "sdpa"
