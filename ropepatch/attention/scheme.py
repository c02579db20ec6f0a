"""The attention scheme: the one type that every method of the attention seam is a value of.

    score(i, j) = scale(i) * < R(query_s(i)) q_i , R(key_s(j)) k_j > + bias_h(i, j)

for the one segment s that holds the pair (i, j) of query and key positions; a pair in no segment is invisible. A
segment holds the keys first_s(i) <= j <= last_s(i); keys after the query count only in encoders. Positions are those
of the tokens in their own document, so whatever depends on length depends on the query's own position: one forward,
chunked prefill and token-by-token generation then agree by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

# Beyond every position, and within the room that a document has on the line that plans are made on.
_END = 2**39

# From positions (int64, any shape) to positions (int64 or float, same shape) or to factors (float32, same shape).
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rotary:
    """The frequencies that a segment rotates by.

    Attributes:
        inv_freq: radians per position, float32, CPU, [rotary_dim / 2].
        gain: factor on cos and on sin; the rotated part of a score scales by its square.
    """

    inv_freq: Tensor
    gain: float = 1.0


@dataclass(frozen=True)
class Segment:
    """A set of visible pairs and the positions that they are rotated to.

    Attributes:
        first: lowest key position that the query at i holds; it may be negative.
        last: highest key position that the query at i holds; i at most counts, but in encoders. `last < first` holds
            nothing.
        query: position that the query is rotated to; None leaves queries and keys of the segment as they are.
        key: position that a key is rotated to; None with a `query` means position 0, where a rotation is the identity.
        form: a name for (key, rotary) within the scheme: segments of one form share their rotated keys.
        rotary: frequencies of this segment; None takes the layer's own.
    """

    first: Map
    last: Map
    query: Map | None
    key: Map | None
    form: str
    rotary: Rotary | None = None


class Bias(Protocol):
    """What is added to the scores, in float32."""

    @property
    def slopes(self) -> Tensor | None:
        """[heads], float32, CPU, where the bias is exactly -slope x distance (the fast form); else None."""
        ...

    def __call__(self, q_positions: Tensor, k_positions: Tensor, module: Any) -> Tensor:
        """The bias of all pairs.

        Args:
            q_positions, k_positions: int64, [B, T] and [B, N].
            module: the layer's learned part (an nn.Module), or None where the bias has none.

        Returns:
            float32, [B, heads, T, N], on the positions' device.
        """
        ...


@dataclass(frozen=True)
class Scheme:
    """One attention-seam method with its options.

    Attributes:
        segments: the disjoint segments that queries at positions lo..hi-1 need. Static schemes ignore the range.
        scale: factor on the scores of the query at i, float32; None is 1.
        bias: what is added to the scores; None is nothing.
        period: segments change abruptly at multiples of this many positions, so blocks of queries are cut there; 0 is
            never.
        keep: (first tokens, last tokens) that a cache needs to hold, None when it needs all.
    """

    segments: Callable[[int, int], Sequence[Segment]]
    scale: Map | None = None
    bias: Bias | None = None
    period: int = 0
    keep: tuple[int, int] | None = None


def everything(positions: Tensor) -> Tensor:
    """`first` of a segment that reaches back to the start."""
    return positions.new_zeros(()).expand_as(positions)


def ahead(positions: Tensor) -> Tensor:
    """`last` of a segment that reaches to the end, in an encoder."""
    return positions.new_full((), _END).expand_as(positions)


def own(positions: Tensor) -> Tensor:
    """A position as it is."""
    return positions


def static(*segments: Segment) -> Callable[[int, int], Sequence[Segment]]:
    """Segments that are the same for all queries."""

    def same(low: int, high: int) -> Sequence[Segment]:
        del low, high
        return segments

    return same


def rotated(rotary: Rotary | None = None, *, both_ways: bool = False) -> Scheme:
    """Ordinary rotary attention; `both_ways` as in encoders."""
    return Scheme(static(Segment(everything, ahead if both_ways else own, own, own, "own", rotary)))


def unrotated(bias: Bias | None = None, scale: Map | None = None, *, both_ways: bool = False) -> Scheme:
    """Attention without rotation; `both_ways` as in encoders."""
    last = ahead if both_ways else own
    return Scheme(static(Segment(everything, last, None, None, "raw")), bias=bias, scale=scale)
