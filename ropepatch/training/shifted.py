"""Shifted sparse attention (S2, LongLoRA, arXiv 2309.12307), causally right: training sees groups of tokens only.

Half of the heads attend within groups of `group` tokens, the other half within groups shifted by half a group, so that
what a token learns travels on from group to group through the layers. In the paper the last half group, shifted, shares
a group with the first tokens; here the first half group of the shifted heads is a group of its own, and no token sees a
later one. After training the model attends to everything.

Each group is a call of the attention seam's kernels, so every method, window and document is what it is without groups,
and time and memory grow linearly with the window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ropepatch.attention.interface import attend
from ropepatch.attention.layer import Layer
from ropepatch.attention.scheme import Bias
from ropepatch.attention.visibility import INVISIBLE, Visibility
from ropepatch.errors import OptionError, UnsupportedModelError


@dataclass(frozen=True)
class ShiftedGroups:
    """What runs in place of the kernel, in `ropepatch.attention.interface`, while a model trains with groups.

    Attributes:
        group: tokens of a group.

    Raises:
        OptionError: groups of less than two tokens, which have no half.
    """

    group: int

    def __post_init__(self) -> None:
        if self.group < 2:
            raise OptionError("a group that can be shifted by its half has tokens", given=self.group, allowed=">= 2")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: Layer,
        seen: Visibility,
        *,
        number: int | None = None,
        layer_index: int | None = None,
    ) -> Tensor:
        """[B, H, T, V] from [B, H, T, D], [B, K, T, D] and [B, K, T, V]; arguments as of `interface.attend`.

        Raises:
            UnsupportedModelError: a cache, a mask from outside, or a single head.
        """
        del number, layer_index  # They name what a cache keeps, and training has none.
        heads = query.shape[1]
        if heads < 2:
            raise UnsupportedModelError("a model with one head has no half of its heads to shift groups for")
        if seen.extra is not None or not torch.equal(seen.q_slots, seen.k_slots):
            raise UnsupportedModelError(
                "shifted groups are for training on whole windows: without a cache, and without a mask of pairs",
                hint="leave train.shifted_groups out",
            )
        shared = heads // key.shape[1]
        border = heads // 2
        if border % shared:
            # The border cuts through heads that share their keys.
            key, value, shared = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1), 1
        parts = []
        for part, shift in ((slice(0, border), 0), (slice(border, heads), self.group - self.group // 2)):
            own = slice(part.start // shared, part.stop // shared)
            some = _some_heads(layer, part, seen)
            q, k, v = query[:, part], key[:, own], value[:, own]
            groups = [attend(q[:, :, g], k[:, :, g], v[:, :, g], some, alone) for g, alone in self._groups(seen, shift)]
            parts.append(torch.cat(groups, dim=2))
        return torch.cat(parts, dim=1)

    def _groups(self, seen: Visibility, shift: int) -> list[tuple[slice, Visibility]]:
        """The tokens of each group, and what they see by themselves; made once for all layers of a call."""
        name = ("groups", self.group, shift)
        made: list[tuple[slice, Visibility]] | None = seen.plans.get(name)
        if made is None:
            length = seen.q_slots.shape[0]
            starts = [0, *range(self.group - shift, length, self.group)]
            stops = [*starts[1:], length]
            made = seen.plans[name] = [
                (slice(a, b), _alone(seen, slice(a, b))) for a, b in zip(starts, stops, strict=True)
            ]
        return made


def _alone(seen: Visibility, group: slice) -> Visibility:
    """One group of the tokens: they see no others. A group within one document needs no numbers of documents."""
    documents = seen.q_documents[:, group] if seen.q_documents is not None else None
    if documents is not None and bool((documents == documents[:1, :1]).all()) and int(documents[0, 0]) != INVISIBLE:
        documents = None
    return replace(
        seen,
        q_positions=seen.q_positions[:, group],
        k_positions=seen.k_positions[:, group],
        q_slots=seen.q_slots[group],
        k_slots=seen.k_slots[group],
        q_documents=documents,
        k_documents=documents,
        plans={},
    )


def _some_heads(layer: Layer, heads: slice, seen: Visibility) -> Layer:
    scheme = layer.scheme
    if scheme.bias is not None:
        # One scheme for all layers that share it: plans are kept by it.
        name = ("heads", id(scheme), heads.start)
        kept = seen.plans.get(name)
        if kept is None:
            kept = seen.plans[name] = (scheme, replace(scheme, bias=_BiasOfHeads(scheme.bias, heads)))
        scheme = kept[1]
    sinks = layer.sinks[heads] if layer.sinks is not None else None
    return replace(layer, scheme=scheme, sinks=sinks)


@dataclass(frozen=True, eq=False)
class _BiasOfHeads:
    """The bias of some of the heads."""

    whole: Bias
    heads: slice

    @property
    def slopes(self) -> Tensor | None:
        slopes = self.whole.slopes
        return slopes[self.heads] if slopes is not None else None

    def __call__(self, q_positions: Tensor, k_positions: Tensor, module: Any) -> Tensor:
        return self.whole(q_positions, k_positions, module)[:, self.heads]
