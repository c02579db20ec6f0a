"""A call of the model on a part of a sequence, whose other parts other processes hold.

Shapes: b = 1 or B rows, S tokens of the whole sequence, T of this part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ropepatch.attention.layer import Layer
from ropepatch.attention.scheme import Scheme
from ropepatch.attention.visibility import Visibility

# From query [B, H, T, D], key [B, K, N, D], value [B, K, N, V], a layer and who sees whom to [B, H, T, V].
Attend = Callable[[Tensor, Tensor, Tensor, Layer, Visibility], Tensor]


@dataclass(frozen=True, eq=False)
class Part:
    """What a part must know of the whole, and how its attention reaches the rest.

    Attributes:
        length: S.
        position_ids: int64 [b, S] of the whole; None where a token's position is its slot.
        attention_mask: [B, S] of the whole, as a caller states it, or None.
        documents: int64 [b, S], where there is no mask and positions tell documents apart; else None.
        queries: int64 [T], the slots whose attention is computed here; None is all of them (of some heads).
        exchange: from `attend` over the whole sequence, and this part's query, key and value, to this part's output.
        scheme: what layers without a seam compute; None where a patch gives every layer a seam.
    """

    length: int
    position_ids: Tensor | None
    attention_mask: Tensor | None
    documents: Tensor | None
    queries: Tensor | None
    exchange: Callable[[Attend, Tensor, Tensor, Tensor, Layer, Visibility], Tensor]
    scheme: Scheme | None = None
