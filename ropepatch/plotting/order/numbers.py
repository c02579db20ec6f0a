"""What the pictures of order show, as numbers: pure functions of tensors and schemes.

Shapes: P positions of a table, d its width; T queries, N keys; F = rotary_dim / 2 planes; H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ropepatch.attention.scheme import Rotary, Scheme
from ropepatch.errors import UsageError


class Distances(NamedTuple):
    """What becomes of the distances under a scheme.

    Attributes:
        relative: position of the query less that of the key as they are rotated, float64 [T, N]; 0 where nothing is
            rotated, NaN where the pair is invisible.
        segment: the number of the segment that holds a pair, int64 [T, N]; -1 where it is invisible.
    """

    relative: Tensor
    segment: Tensor


def position_cosines(table_Pd: Tensor) -> Tensor:
    """Cosine of the rows of all pairs of positions, float64 [P, P]; rows of zeros have cosine 0 with all others."""
    rows = table_Pd.double()
    norms = rows.norm(dim=-1, keepdim=True)
    unit = torch.where(norms > 0, rows / norms.clamp(min=torch.finfo(torch.float64).tiny), torch.zeros_like(rows))
    return unit @ unit.T


def wavelengths(inv_freq: Tensor) -> Tensor:
    """2 pi / f of every plane, float64 [F], in tokens; infinite where a plane does not turn."""
    return 2 * math.pi / inv_freq.double()


def scaled_distances(scheme: Scheme, q_positions: Tensor, k_positions: Tensor) -> Distances:
    """The distances that rotations of a scheme express; arguments int64, [T] and [N]."""
    q, k = q_positions.long(), k_positions.long()
    relative = torch.full((len(q), len(k)), math.nan, dtype=torch.float64)
    segment = torch.full((len(q), len(k)), -1, dtype=torch.int64)
    # Query by query: a scheme may have other segments, and other frequencies, for another query.
    for row, position in enumerate(q.tolist()):
        one = q[row : row + 1]
        for number, part in enumerate(scheme.segments(position, position + 1)):
            held = (k <= position) & (k >= part.first(one)) & (k <= part.last(one))
            shift = torch.zeros(len(k), dtype=torch.float64)
            if part.query is not None:
                shift = part.query(one).double() - (part.key(k).double() if part.key is not None else 0.0)
            relative[row] = torch.where(held, shift, relative[row])
            segment[row] = torch.where(held, number, segment[row])
    return Distances(relative, segment)


def match(relative: Tensor, rotary: Rotary) -> Tensor:
    """gain^2 x mean over the planes of cos(f n): the product of a query with an equal key that is n tokens away, where
    every plane has the same weight; 1 is the product at distance 0 without gain. float64, the shape of `relative`.
    """
    return rotary.gain**2 * (relative.double()[..., None] * rotary.inv_freq.double()).cos().mean(-1)


def bound(relative: Tensor, rotary: Rotary) -> Tensor:
    """gain^2 / F x sum over m = 1 .. F of |sum over i < m of e^(i n f_i)|, a bound of the product of any two.

    Source: RoFormer, arXiv 2104.09864, section 3.4.3, by Abel's transformation. float64, the shape of `relative`.
    """
    angle = relative.double()[..., None] * rotary.inv_freq.double()
    return rotary.gain**2 * torch.polar(torch.ones_like(angle), angle).cumsum(-1).abs().mean(-1)


def over_distance(
    measure: Callable[[Tensor, Rotary], Tensor], scheme: Scheme, rotary: Rotary | None, query: int, distances: Tensor
) -> Tensor:
    """`match` or `bound` of one query with the keys before it, times the scheme's factor on the scores.

    Dimensions that are not rotated are left out; a pair that is not rotated at all counts as one at distance 0.

    Args:
        measure: `match` or `bound`.
        scheme: what the attention computes.
        rotary: the layer's own frequencies; None where nothing is rotated.
        query: position of the query, in tokens.
        distances: int64 [N], 0 .. query.

    Returns:
        float64 [N]; NaN where the key is invisible.
    """
    found = scaled_distances(scheme, torch.tensor([query]), query - distances.long())
    values = torch.full((len(distances),), math.nan, dtype=torch.float64)
    for number, part in enumerate(scheme.segments(query, query + 1)):
        here = found.segment[0] == number
        used = part.rotary or rotary
        turns = part.query is not None and used is not None
        values[here] = measure(found.relative[0][here], used) if turns else 1.0  # type: ignore[arg-type]
    if scheme.scale is not None:
        values = values * scheme.scale(torch.tensor([query])).double()
    return values


def averaged(distances: Tensor, values: Tensor, most: int = 256) -> tuple[Tensor, Tensor]:
    """Means over at most `most` neighbouring groups of equal size (the last may be smaller), so that waves shorter
    than a pixel do not become noise.

    Args:
        distances: [N], sorted.
        values: float [N]; NaN is passed over.

    Returns:
        Mean distance and mean value of each group, float64.
    """
    size = -(-len(distances) // most)
    groups = zip(distances.double().split(size), values.double().split(size), strict=True)
    middle, mean = zip(*((x.mean(), y.nanmean()) for x, y in groups), strict=True)
    return torch.stack(middle), torch.stack(mean)


def bias_by_distance(scheme: Scheme, learned: Any, query: int, distances: Tensor) -> Tensor:
    """What is added to the scores of the query at `query`, float32 [H, N].

    Raises:
        UsageError: the scheme has no bias.
    """
    if scheme.bias is None:
        raise UsageError("the attention adds no bias to its scores")
    keys = (query - distances.long())[None]
    with torch.no_grad():
        return scheme.bias(torch.tensor([[query]]), keys, learned)[0, :, 0, :].float()


def circles(inv_freq: Tensor, positions: Tensor) -> Tensor:
    """Where each plane's unit vector points at each position, float64 [F, P, 2]."""
    angle = positions.double()[None, :] * inv_freq.double()[:, None]
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def spread(length: int, most: int) -> Tensor:
    """At most `most` whole positions, evenly from 0 to length - 1, int64, without repeats."""
    return torch.linspace(0, length - 1, min(length, most), dtype=torch.float64).round().long().unique()
