"""From visibility and a scheme to a short list of rectangles of the score matrix, computed once for all layers.

Within one document positions grow with the slots, so what a query sees of a segment is one run of slots. A block of
queries then sees a rectangle whose inside needs no mask and whose edges need a small one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ropepatch.attention.scheme import Scheme, Segment
from ropepatch.attention.visibility import INVISIBLE, Visibility

# Documents are laid one after the other on a line; no position reaches this far.
_SPAN = 2**40
# An unmasked inside narrower than this is not worth a call of its own.
_NARROW = 64


@dataclass(frozen=True)
class Task:
    """The keys [start, stop) of one segment for a block of queries.

    Attributes:
        lows, highs: each query's own run of slots, int64, [b, t], where a mask is needed; None where none is.
        causal: the rectangle is a square, and its mask is exactly the causal one.
        irregular: the mask must be worked out pair by pair.
    """

    segment: Segment
    start: int
    stop: int
    lows: Tensor | None = None
    highs: Tensor | None = None
    causal: bool = False
    irregular: bool = False


@dataclass(frozen=True)
class Block:
    """Queries [start, stop) and their rectangles."""

    start: int
    stop: int
    tasks: tuple[Task, ...]


def make_plan(visibility: Visibility, scheme: Scheme, block_size: int, *, whole: bool = True) -> list[Block]:
    """The rectangles of a call; kept with the visibility, since all layers of one scheme share them.

    With `whole`, ordinary causal attention of a call without a past is one block, however long.
    """
    key = (id(scheme), block_size, whole)
    found = visibility.plans.get(key)
    if found is None:
        # The scheme itself is kept too: its id must not be given to another one meanwhile.
        found = visibility.plans[key] = (scheme, list(_blocks(visibility, scheme, block_size, whole)))
    plan: list[Block] = found[1]
    return plan


def _blocks(seen: Visibility, scheme: Scheme, block_size: int, whole: bool) -> Iterator[Block]:
    q_positions = seen.q_positions.cpu()
    line = line_of(seen)
    square = _whole(seen, scheme, line) if whole else None
    if square is not None:
        yield square
        return
    for start, stop in _cuts(q_positions, scheme.period, block_size):
        rows = q_positions[:, start:stop]
        low, high = int(rows.min()), int(rows.max()) + 1
        segments = scheme.segments(max(low, 0), max(high, 1))
        if line is None:
            n = seen.k_slots.shape[0]
            tasks = [Task(segment, 0, n, irregular=True) for segment in segments]
        else:
            tasks = []
            for segment in segments:
                tasks += _tasks(segment, *runs_of(seen, line, segment, q_positions, start, stop))
        yield Block(start, stop, tuple(tasks))


@dataclass(frozen=True)
class Line:
    """Places of queries and keys on one line, strictly increasing along the keys; [b, N] and [b, T]."""

    keys: Tensor
    documents: Tensor | None


def line_of(seen: Visibility) -> Line | None:
    """None where positions do not grow with the slots, or a mask from outside decides: then pairs are looked at."""
    if seen.extra is not None or not (seen.causal or (seen.window is None and seen.chunk is None)):
        return None
    keys = seen.k_positions.cpu()
    if seen.k_documents is None or seen.q_documents is None:
        documents = None
    else:
        k_documents, documents = seen.k_documents.cpu(), seen.q_documents.cpu()
        rows = max(keys.shape[0], k_documents.shape[0])
        keys, k_documents = keys.expand(rows, -1), k_documents.expand(rows, -1)
        padding = k_documents == INVISIBLE
        n = keys.shape[1]
        # Padding before the first token lies before everything, other padding after everything.
        before = padding & (padding.long().cumsum(1) == torch.arange(1, n + 1))
        order = torch.arange(n)
        keys = torch.where(
            padding, torch.where(before, order - 2 * n, _SPAN * 2**20 + order), keys + k_documents * _SPAN
        )
    if keys.shape[1] > 1 and not bool((keys[:, 1:] > keys[:, :-1]).all()):
        return None
    return Line(keys.contiguous(), documents)


def runs_of(
    seen: Visibility, line: Line, segment: Segment, q_positions: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Each query's first slot and one past its last, [b, t]."""
    rows = q_positions[:, start:stop]
    first, last = segment.first(rows).clamp(min=0), segment.last(rows)
    if seen.causal:
        last = torch.minimum(last, rows)
    if seen.chunk is not None:
        first = torch.maximum(first, torch.div(rows, seen.chunk, rounding_mode="floor") * seen.chunk)
    hidden = None
    if line.documents is not None:
        documents = line.documents[:, start:stop]
        size = max(rows.shape[0], documents.shape[0])
        first, last, documents = (x.expand(size, -1) for x in (first, last, documents))
        hidden = documents == INVISIBLE
        first, last = first + documents * _SPAN, last + documents * _SPAN
    keys = line.keys.expand(first.shape[0], -1).contiguous()
    lows = torch.searchsorted(keys, first.contiguous())
    highs = torch.searchsorted(keys, last.contiguous(), right=True)
    if seen.window is not None:
        # Windows are counted in slots.
        slots = seen.k_slots.cpu()
        border = torch.searchsorted(slots, (seen.q_slots[start:stop].cpu() - seen.window), right=True)
        lows = torch.maximum(lows, border[None].expand_as(lows))
    if hidden is not None:
        highs = torch.where(hidden, lows, highs)
    return lows, torch.maximum(lows, highs)


def _tasks(segment: Segment, lows: Tensor, highs: Tensor) -> list[Task]:
    filled = highs > lows
    if not bool(filled.any()):
        return []
    start, stop = int(lows[filled].min()), int(highs[filled].max())
    if not bool(filled.all()):
        return [Task(segment, start, stop, lows, highs)]
    inside_start, inside_stop = int(lows.max()), int(highs.min())
    rows = highs.shape[1]
    # The right edge is the diagonal: a causal square, one slot wider than the edge.
    square = rows > 1 and highs.shape[0] == 1 and stop - inside_stop == rows - 1 and inside_start < inside_stop
    if square and bool((highs[0, 1:] - highs[0, :-1] == 1).all()):
        inside_stop -= 1
        tasks = [Task(segment, inside_stop, stop, causal=True)]
        if start < inside_start:
            tasks.append(Task(segment, start, inside_start, lows, highs))
        if inside_start < inside_stop:
            tasks.append(Task(segment, inside_start, inside_stop))
        return tasks
    if inside_stop - inside_start < _NARROW and (start, stop) != (inside_start, inside_stop):
        return [Task(segment, start, stop, lows, highs)]
    tasks = [Task(segment, inside_start, inside_stop)]
    if start < inside_start:
        tasks.append(Task(segment, start, inside_start, lows, highs))
    if inside_stop < stop:
        tasks.append(Task(segment, inside_stop, stop, lows, highs))
    return tasks


def _cuts(q_positions: Tensor, period: int, block_size: int) -> Sequence[tuple[int, int]]:
    """Blocks of at most `block_size` queries that cross no border of a period, as far as few rows allow."""
    length = q_positions.shape[1]
    borders = {length}
    if period:
        for row in q_positions[:4]:
            number = torch.div(row, period, rounding_mode="floor")
            borders.update((torch.nonzero(number[1:] != number[:-1]).flatten() + 1).tolist())
    cuts: list[tuple[int, int]] = []
    start = 0
    for border in sorted(borders):
        while start < border:
            stop = min(start + block_size, border)
            cuts.append((start, stop))
            start = stop
    return cuts


def _whole(seen: Visibility, scheme: Scheme, line: Line | None) -> Block | None:
    """One causal square where the scheme is ordinary attention of a call without a past."""
    length = seen.q_slots.shape[0]
    if line is None or line.documents is not None or seen.window or seen.chunk or not (seen.single and seen.causal):
        return None
    if seen.k_slots.shape[0] != length or scheme.period or (scheme.bias is not None):
        return None
    rows = seen.q_positions[0].cpu()
    segments = scheme.segments(int(rows[0]), int(rows[-1]) + 1)
    if len(segments) != 1 or not torch.equal(rows, seen.k_positions[0].cpu()):
        return None
    (segment,) = segments
    if bool((segment.first(rows) > rows[0]).any()) or bool((segment.last(rows) < rows).any()):
        return None
    return Block(0, length, (Task(segment, 0, length, causal=length > 1),))
