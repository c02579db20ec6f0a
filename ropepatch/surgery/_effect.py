"""Whether a scheme changes anything for a layer that sees a short window only."""

from __future__ import annotations

import torch

from ropepatch.surgery._probe import FoundLayer
from ropepatch.surgery._seam import Seam


def without_effect(seam: Seam, layer: FoundLayer) -> bool:
    """Whether a scheme shows a layer of limited reach nothing but the distances that it has anyway."""
    scheme, reach = seam.scheme, layer.reach
    if reach is None or scheme.bias is not None or scheme.scale is not None:
        return False
    last = 4 * max(seam.geometry.length, reach)
    queries = torch.arange(last)
    count = torch.zeros_like(queries)
    for segment in scheme.segments(0, last):
        low = torch.maximum(segment.first(queries).clamp(min=0), queries - reach + 1)
        high = torch.minimum(segment.last(queries), queries)
        held = high >= low
        if not bool(held.any()):
            continue
        if segment.query is None or segment.rotary is not None:
            return False
        at = segment.query(queries)
        for keys in (low, high):
            distance = at - (segment.key(keys) if segment.key is not None else 0)
            if bool((distance != queries - keys)[held].any()):
                return False
        count += torch.where(held, high - low + 1, 0)
    return torch.equal(count, (queries + 1).clamp(max=reach))
