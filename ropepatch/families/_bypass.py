"""Attention modules that never ask transformers' attention interface, but keep a core of their own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

CORE = "_attn"
TABLE = "_get_embed_positions"
_ARGUMENTS = ["query", "key", "value", "attention_mask"]


def bypassing(host: nn.Module) -> Iterator[str]:
    """Paths of modules whose `_attn(query, key, value, attention_mask)` gets rotated, cached, [B, H, L, D] tensors.

    GPT-J, CodeGen and GPT-NeoX Japanese are written so.
    """
    for path, module in host.named_modules():
        core = getattr(type(module), CORE, None)
        if (
            core is not None
            and list(inspect.signature(core).parameters)[1:5] == _ARGUMENTS
            and _divisor(module) is not None
            and _dropout(module) is not None
        ):
            yield path


def core_terms(module: Any) -> tuple[float, float]:
    """The factor on the products of queries and keys, and the probability of dropping a weight."""
    return 1.0 / float(_divisor(module)), _dropout(module).p


def _divisor(module: Any) -> Any:
    return getattr(module, "scale_attn", getattr(module, "norm_factor", None))


def _dropout(module: Any) -> Any:
    return getattr(module, "attn_dropout", getattr(module, "attention_dropout", None))
