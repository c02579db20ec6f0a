"""How the models with ALiBi of their own build their attention: what is known of each, by model_type.

They ask no attention interface: the forward of one module projects, attends and projects back, and the slopes live in
a function. An `AlibiCore` names the parts, so that the middle can be computed elsewhere. Falcon's attention modules
are the same where it rotates.

Shapes: B batch, T tokens, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AlibiCore:
    """One architecture's ALiBi attention in parts.

    Attributes:
        parts: attributes that tell its attention modules from all others.
        slopes: the model that runs the layers to its slopes, [H], float32, CPU: scores per token of distance, after
            whatever scaling the model applies to its bias.
        split: (attention module, hidden states [B, T, width]) to q [B, H, T, D] and new k and v [B, K, T, D].
        join: (attention module, heads' outputs [B, T, H D], further positional arguments of its forward) to its output.
        scaling: of an attention module, the factor on the products of queries and keys.
        dropout: of an attention module, the probability that a weight is dropped in training.
        quiet: (name, value), the attribute of the model under which it builds its bias, and what stops it.
        way: the attention implementation whose outputs the slopes speak of; None where all agree.
        counts_gaps: padding between tokens takes up distance; otherwise only tokens do.
    """

    parts: tuple[str, ...]
    slopes: Callable[[Any], Tensor]
    split: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
    join: Callable[..., Tensor]
    scaling: Callable[[Any], float]
    dropout: Callable[[Any], float]
    quiet: tuple[str, Any]
    way: str | None = None
    counts_gaps: bool = False


def attention_paths(host: nn.Module, core: AlibiCore) -> Iterator[str]:
    """Paths of the attention modules, in module order."""
    for path, module in host.named_modules():
        if all(hasattr(module, name) for name in core.parts):
            yield path


def no_bias(*_: Any, **__: Any) -> None:
    """Stands for a function that builds the bias of a whole model."""


# -- BLOOM


def _bloom_slopes(owner: Any) -> Tensor:
    bias = owner.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), owner.num_heads, torch.float32)
    return _plain(bias[:, 0, 1])


def _bloom_split(module: Any, hidden_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = module._reshape(module.query_key_value(hidden_BTW))
    return q, k, v


def _bloom_join(module: Any, heads_BTW: Tensor, residual: Tensor) -> Tensor:
    out = nn.functional.dropout(module.dense(heads_BTW), p=module.hidden_dropout, training=module.training)
    return residual + out


# -- MPT


def _mpt_slopes(owner: Any) -> Tensor:
    # The last key is at distance 0, the one before it at 1.
    return _plain(-owner.build_mpt_alibi_tensor(owner.num_heads, 2)[:, 0, 0])


def _mpt_split(module: Any, hidden_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mixed = module.Wqkv(hidden_BTW)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    q, k, v = (part.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for part in mixed.chunk(3, dim=-1))
    return q, k, v


# -- Falcon


def _falcon_slopes(owner: Any) -> Tensor:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    # Falcon rounds its slopes to bfloat16, and scales the bias together with the products.
    bias: Tensor = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), owner.num_heads, torch.float32)
    return _plain(bias[:, 0, 1]) / math.sqrt(owner.config.hidden_size // owner.num_heads)


def _falcon_split(module: Any, hidden_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.transpose(1, 2) for part in module._split_heads(module.query_key_value(hidden_BTW)))
    return q, k, v


def _plain(slopes_H: Tensor) -> Tensor:
    return slopes_H.detach().float().cpu().clone()


CORES: dict[str, AlibiCore] = {
    "bloom": AlibiCore(
        parts=("query_key_value", "dense", "_reshape", "inv_norm_factor", "layer_idx"),
        slopes=_bloom_slopes,
        split=_bloom_split,
        join=_bloom_join,
        scaling=lambda module: float(module.inv_norm_factor),
        dropout=lambda module: float(module.attention_dropout.p),
        quiet=("build_alibi_tensor", no_bias),
    ),
    "mpt": AlibiCore(
        parts=("Wqkv", "out_proj", "softmax_scale", "clip_qkv", "layer_idx"),
        slopes=_mpt_slopes,
        split=_mpt_split,
        join=lambda module, heads_BTW: module.out_proj(heads_BTW),
        scaling=lambda module: float(module.softmax_scale),
        dropout=lambda module: float(module.attn_dropout_p),
        quiet=("build_mpt_alibi_tensor", no_bias),
        counts_gaps=True,
    ),
    "falcon": AlibiCore(
        parts=("query_key_value", "dense", "_split_heads", "inv_norm_factor", "layer_idx"),
        slopes=_falcon_slopes,
        split=_falcon_split,
        join=lambda module, heads_BTW: module.dense(heads_BTW),
        scaling=lambda module: float(module.inv_norm_factor),
        dropout=lambda module: float(module.attention_dropout.p),
        quiet=("use_alibi", False),
        # The eager way adds the bias twice: once to the scores and once more inside the mask.
        way="sdpa",
    ),
}
