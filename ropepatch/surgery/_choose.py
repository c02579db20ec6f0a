"""Which attention modules a method of the attention seam changes, and whose rotation it takes over for that."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ropepatch.errors import OptionError, UnsupportedModelError
from ropepatch.methods._attention import AttentionMethod
from ropepatch.surgery._probe import FoundLayer
from ropepatch.surgery._select import check_layer_types
from ropepatch.surgery._start import Start


def numbered(layers: Sequence[int], count: int) -> set[int]:
    """The named ones of `count` attention modules, counted from 0, or back from the last with -1.

    Raises:
        OptionError: none are named, or some do not exist.
    """
    wrong = [n for n in layers if isinstance(n, bool) or not isinstance(n, int) or not -count <= n < count]
    if wrong or not layers:
        raise OptionError("no such attention layers", given=wrong or layers, allowed=f"0..{count - 1}")
    return {n % count for n in layers}


def choose(
    seen: Sequence[FoundLayer],
    found: Sequence[Start],
    layers: Sequence[int] | None,
    layer_types: Sequence[str] | None,
    method: AttentionMethod,
) -> set[int]:
    """Numbers of the attention modules that the method changes.

    Raises:
        OptionError: layers that do not exist or rotate nothing, or layer types that do not exist.
        UnsupportedModelError: no attention module rotates.
    """
    if layers is not None:
        chosen = numbered(layers, len(seen))
        still = sorted(n for n in chosen if seen[n].site is None)
        if still:
            raise OptionError(f"{method.name!r} changes rotary layers, and these rotate nothing", given=still)
        return chosen
    turned = {n for n, layer in enumerate(seen) if layer.site is not None}
    if layer_types is not None:
        check_layer_types((start.site for start in found), layer_types)
        return {n for n in turned if found[seen[n].site or 0].site.layer_type in layer_types}
    # Local layers are left alone beside far ones; where nothing else rotates, they are what can be changed.
    far = {n for n in turned if not seen[n].local} or turned
    if not far:
        raise UnsupportedModelError("no attention layer of this model rotates its queries and keys")
    return far


def taken(found: Sequence[Start], seen: Sequence[FoundLayer], chosen: set[int]) -> set[int]:
    """Indices of the sites whose rotation the seam takes over: those of chosen layers, and their equals.

    A layer shows by what it is turned, not by which of two equal sites.
    """
    used = {seen[number].site for number in chosen}
    return {
        index
        for index, start in enumerate(found)
        if any(
            other is not None
            and (index == other or _inside(found[other].site.path, start.site.path))
            and start.own.gain == found[other].own.gain
            and torch.equal(start.own.inv_freq, found[other].own.inv_freq)
            for other in used
        )
    }


def _inside(one: str, other: str) -> bool:
    """Two sites that share a module, or stand side by side in one: tables of single attention modules do not."""
    return one.rpartition(".")[0] == other.rpartition(".")[0]
