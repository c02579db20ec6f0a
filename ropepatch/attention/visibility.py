"""Who may see whom, kept in vectors instead of a matrix. It stands where a model expects its attention mask.

Shapes: B batch, b = 1 or B, T queries, N keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ropepatch.attention.scheme import Segment
from ropepatch.errors import UnsupportedModelError

INVISIBLE = -1


def _no_matrix(asked: str | None) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the model computes with its attention mask (an indexer, a learned mask, attention of its own), and the "
        "attention seam gives it positions in place of one",
        given=asked,
        hint="use a method of the frequencies seam",
    )


@dataclass(eq=False)
class Visibility:
    """Positions, documents and windows of one call; everything an attention layer must know besides q, k and v.

    Attributes:
        q_positions, k_positions: int64, [b, T] and [b, N]; positions count within a token's own document.
        q_slots, k_slots: int64, [T] and [N]; places in the cached sequence, which decide what comes after what.
        q_documents, k_documents: int64, [b, T] and [b, N]: tokens see their own document only, and -1 sees nothing and
            is seen by nothing (padding). None: one document and no padding.
        window: a query sees at most this many last slots, itself included; None is no window.
        chunk: a query sees its own chunk of this many positions only; None is no chunks.
        extra: a mask that came from outside, [1 or B, 1 or heads, T, N]: bool (True may see) or additive float.
        causal: False where the model lets tokens look ahead.
        cache: what keeps the keys of this call's past, or None.
        made_from: the mask function's arguments, where it ran before the model's call and must run again within it.
        part: how queries of this process reach keys that other processes hold (`part.Part`), or None.
    """

    q_positions: Tensor
    k_positions: Tensor
    q_slots: Tensor
    k_slots: Tensor
    q_documents: Tensor | None = None
    k_documents: Tensor | None = None
    window: int | None = None
    chunk: int | None = None
    extra: Tensor | None = None
    causal: bool = True
    cache: Any = None
    made_from: dict[str, Any] | None = None
    part: Any = None
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    # Masks are passed around by their dimensions: transformers takes a 4-D mask as finished.
    ndim = 4

    def dim(self) -> int:
        return 4

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types, args, kwargs
        raise _no_matrix(getattr(function, "__name__", None))

    def __getitem__(self, index: Any) -> Any:
        raise _no_matrix("indexing")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.q_positions.shape[0], 1, self.q_slots.shape[0], self.k_slots.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.q_positions.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    def to(self, *args: Any, **kwargs: Any) -> Visibility:
        """Itself on another device; dtypes are not changed."""
        device = kwargs.get("device", args[0] if args and not isinstance(args[0], torch.dtype) else None)
        if device is None or torch.device(device) == self.device:
            return self
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved, plans={})

    def contiguous(self) -> Visibility:
        """Itself: `generate` asks for it."""
        return self

    @property
    def single(self) -> bool:
        """All rows of the batch are alike."""
        return self.q_positions.shape[0] == 1 and (self.q_documents is None or self.q_documents.shape[0] == 1)

    def of_queries(self, rows: Tensor) -> Visibility:
        """Some of the queries, int64 [t], in the order of their slots, and what they see."""
        return replace(
            self,
            q_positions=self.q_positions[:, rows],
            q_slots=self.q_slots[rows],
            q_documents=None if self.q_documents is None else self.q_documents[:, rows],
            extra=None if self.extra is None else self.extra[:, :, rows],
            plans={},
        )

    def base_pairs(self, queries: slice, keys: slice) -> Tensor:
        """Pairs allowed by order, documents, window, chunk and a boolean mask from outside, [b, 1 or heads, t, n]."""
        q_slots, k_slots = self.q_slots[queries, None], self.k_slots[None, keys]
        seen = torch.ones_like(q_slots >= k_slots) if not self.causal else q_slots >= k_slots
        if self.window is not None:
            seen = seen & (k_slots > q_slots - self.window)
        seen = seen[None, None]
        if self.chunk is not None:
            q_chunk = torch.div(self.q_positions[:, queries], self.chunk, rounding_mode="floor")
            k_chunk = torch.div(self.k_positions[:, keys], self.chunk, rounding_mode="floor")
            seen = seen & (q_chunk[:, None, :, None] == k_chunk[:, None, None, :])
        if self.q_documents is not None and self.k_documents is not None:
            q_doc, k_doc = self.q_documents[:, None, queries, None], self.k_documents[:, None, None, keys]
            seen = seen & (q_doc == k_doc) & (k_doc != INVISIBLE)
        if self.extra is not None and self.extra.dtype == torch.bool:
            seen = seen & self.extra[:, :, queries, keys]
        return seen

    def pairs(self, segment: Segment, queries: slice, keys: slice) -> Tensor:
        """Pairs of one segment, bool, [b, 1 or heads, t, n]."""
        q_positions, k_positions = self.q_positions[:, queries], self.k_positions[:, None, None, keys]
        first, last = segment.first(q_positions)[:, None, :, None], segment.last(q_positions)[:, None, :, None]
        return self.base_pairs(queries, keys) & (k_positions >= first) & (k_positions <= last)
