"""How the attention of a slice reaches the tokens of other processes: keys and values travel, or heads do.

Shapes: B batch, H query heads, K key heads, n processes, t tokens of a slice, S = n t tokens in all, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ropepatch.attention.layer import Layer
from ropepatch.attention.part import Attend
from ropepatch.attention.scheme import Bias, Scheme
from ropepatch.attention.visibility import Visibility
from ropepatch.errors import OptionError
from ropepatch.training.parallel.collectives import gather_slices, heads_for_slices, slices_for_heads


@dataclass(frozen=True, eq=False)
class KeysTravel:
    """Every process gets the keys and values of all tokens, and attends from its own queries ("all_gather")."""

    group: dist.ProcessGroup
    slots: Sequence[Tensor]

    def __call__(
        self, attend: Attend, q_BHtD: Tensor, k_BKtD: Tensor, v_BKtV: Tensor, layer: Layer, seen: Visibility
    ) -> Tensor:
        keys = gather_slices(k_BKtD, self.slots, self.group)
        return attend(q_BHtD, keys, gather_slices(v_BKtV, self.slots, self.group), layer, seen)


@dataclass(frozen=True, eq=False)
class HeadsTravel:
    """Every process attends over all tokens for its share of the heads ("ulysses", arXiv 2309.14509)."""

    group: dist.ProcessGroup
    # Layers share the plan of a scheme by its identity, so a scheme is restricted once.
    schemes: dict[int, tuple[Scheme, Scheme]] = field(default_factory=dict, repr=False)

    def __call__(
        self, attend: Attend, q_BHtD: Tensor, k_BKtD: Tensor, v_BKtV: Tensor, layer: Layer, seen: Visibility
    ) -> Tensor:
        n, heads, key_heads = self.group.size(), q_BHtD.shape[1], k_BKtD.shape[1]
        if heads % n:
            raise OptionError(
                "the attention heads cannot be shared out over the processes",
                given=f"{heads} heads, {n} processes",
                allowed="context_mode 'ulysses' needs a number of processes that divides the heads",
                hint="use context_mode 'all_gather'",
            )
        times = _times(heads // key_heads, key_heads, n)
        if times > 1:
            k_BKtD, v_BKtV = (x.repeat_interleave(times, dim=1) for x in (k_BKtD, v_BKtV))
        mine = heads // n
        start = self.group.rank() * mine
        layer = self._restricted(layer, slice(start, start + mine))
        q, k, v = (heads_for_slices(x, self.group) for x in (q_BHtD, k_BKtD, v_BKtV))
        return slices_for_heads(attend(q, k, v, layer, seen), self.group)

    def _restricted(self, layer: Layer, heads: slice) -> Layer:
        sinks = layer.sinks[heads] if layer.sinks is not None else None
        scheme = layer.scheme
        if scheme.bias is not None:
            known = self.schemes.get(id(scheme))
            if known is None:
                known = self.schemes[id(scheme)] = (scheme, replace(scheme, bias=_BiasOfHeads(scheme.bias, heads)))
            scheme = known[1]
        return replace(layer, sinks=sinks, scheme=scheme)


def _times(group: int, key_heads: int, n: int) -> int:
    """How often each key head is repeated so that they can be shared out: as seldom as its queries allow."""
    fewest = n // math.gcd(key_heads, n)
    return fewest if group % fewest == 0 else group


@dataclass(frozen=True)
class _BiasOfHeads:
    """Some heads of a bias."""

    whole: Bias
    heads: slice

    @property
    def slopes(self) -> Tensor | None:
        slopes = self.whole.slopes
        return None if slopes is None else slopes[self.heads]

    def __call__(self, q_positions: Tensor, k_positions: Tensor, module: Any) -> Tensor:
        return self.whole(q_positions, k_positions, module)[:, self.heads]
