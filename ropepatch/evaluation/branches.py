"""Several continuations of what one cache holds, read side by side: the keys of the shared past are held once."""

from __future__ import annotations

import copy
from functools import cache as once
from typing import Any

import torch
from torch import Tensor


class Branches:
    """Stands in for the layers of a cache during one forward over a batch, whose rows all continue the cached tokens.

    Args:
        cache: a cache of growing layers, one row, at least one token. Its layers stand aside until `follow`.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._layers = [_branching_layer().of(layer) for layer in cache.layers]
        cache.layers[:] = self._layers

    def follow(self, row: int, tokens: int) -> None:
        """Let the cache hold what it held before, and the first `tokens` tokens of one row behind it."""
        self._cache.layers[:] = [layer.followed(row, tokens) for layer in self._layers]


@once
def _branching_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class BranchingLayer(DynamicLayer):
        """A growing layer that hands out its past to every row of a batch, and keeps the rows' own keys apart."""

        trunk: DynamicLayer
        own: tuple[Tensor, Tensor] | None

        @classmethod
        def of(cls, trunk: DynamicLayer) -> BranchingLayer:
            made = cls()
            made.__dict__.update(trunk.__dict__)
            made.trunk, made.own = trunk, None
            return made

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            del args, kwargs
            self.own = key_states, value_states
            keys, values = (
                torch.cat([past.expand(len(new), -1, -1, -1), new], dim=-2)
                for past, new in ((self.keys, key_states), (self.values, value_states))
            )
            return keys, values

        def followed(self, row: int, tokens: int) -> DynamicLayer:
            # A layer that takes the keys of another one has none of its own.
            if self.own is None or not tokens:
                return copy.copy(self.trunk)
            made = DynamicLayer()
            made.update(
                *(
                    torch.cat([past, new[row : row + 1, :, :tokens]], dim=-2)
                    for past, new in zip((self.keys, self.values), self.own, strict=True)
                )
            )
            return made

    return BranchingLayer
