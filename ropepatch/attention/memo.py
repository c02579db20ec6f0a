"""What a cache must remember for the attention seam: whose it is, the positions of its keys, and rotated keys.

Keys are cached unrotated. For one new token, turning the whole cache again would cost more than attending to it, so
the forms of keys are kept beside the cache and only new keys are turned.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ropepatch.attention.forms import key_form
from ropepatch.attention.growing import growing_type
from ropepatch.attention.layer import Layer
from ropepatch.attention.scheme import Segment
from ropepatch.attention.visibility import Visibility
from ropepatch.errors import CacheError

# Longer calls turn their keys once for many queries: nothing to gain by keeping them.
MOST_QUERIES = 32


@dataclass(eq=False)
class CacheNotes:
    """Rides on a cache object as an attribute, so it is copied with it.

    Attributes:
        token: of the patch under which the cache was filled.
        positions: int64 [b, slots], positions of all slots so far, once a call has stated any; else None.
        kept: int64 [n], the slots that are still held, where some were dropped; None is all.
        memos: rotated keys, by the attention layer's number and its place in the cache.
        cache: the cache (a weak reference), so that copies of notes stay with copies of it.
        alive: weak reference to the set of caches that an undone patch retires.
    """

    token: str
    positions: Tensor | None = None
    kept: Tensor | None = None
    memos: dict[tuple[int, int], Memo] = field(default_factory=dict, repr=False)
    cache: Any = field(default=None, repr=False)
    alive: Any = field(default=None, repr=False)
    # The keys that `positions` belong to, where its rows differ; and what the memos were turned by.
    _stamp: Tensor | None = field(default=None, repr=False)
    _turned_by: Tensor | None = field(default=None, repr=False)
    _seen: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Rotated keys are made again, and a weak reference cannot be pickled.
        return {"token": self.token, "positions": self.positions, "kept": self.kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(CacheNotes(**state)))

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheNotes:
        made = CacheNotes(self.token, self.positions, self.kept)
        cache = self.cache() if self.cache is not None else None
        copied, alive = memo.get(id(cache)), self.alive() if self.alive is not None else None
        if copied is not None and alive is not None:
            # An undone patch retires copies too, also those that were never used.
            made.attach(copied, alive)
        return made

    def attach(self, cache: Any, alive: Any) -> None:
        """Ride on a cache, and have it retired with the others when the patch is undone."""
        self.cache, self.alive = weakref.ref(cache), weakref.ref(alive)
        cache.ropepatch_notes = self
        alive.add(cache)

    def renew(self, token: str) -> None:
        """Forget everything: the cache is empty."""
        self.token, self.positions, self.kept = token, None, None
        self._stamp = self._turned_by = self._seen = None
        self.memos.clear()

    def check(self, cache: Any) -> None:
        """Drop rotated keys whose cache layer was cut back, reordered or replaced since.

        Raises:
            CacheError: rows were moved whose positions were given explicitly and differ.
        """
        self._seen = None
        if self._stamp is not None and not _starts_with(_first_keys(cache), self._stamp):
            raise CacheError(
                "rows of this cache were moved, and positions that were given explicitly cannot follow",
                hint="leave position_ids out: padding on the left is told by the attention mask",
            )
        for place, memo in list(self.memos.items()):
            keys = _keys(cache, memo.layer_index)
            if keys is memo.raw:
                continue
            if keys is not None and _starts_with(keys, memo.raw):
                memo.cut(keys)
            else:
                del self.memos[place]

    def note(self, cache: Any, positions: Tensor | None) -> None:
        """After a call: positions that were stated, for all slots so far."""
        self.positions, self._stamp, self._seen = positions, None, None
        if positions is not None and positions.shape[0] > 1 and not bool((positions == positions[:1]).all()):
            self._stamp = _first_keys(cache)

    def memo(self, number: int, layer_index: int | None, keys: Tensor, seen: Visibility) -> Memo | None:
        """The rotated keys of a layer whose cache now holds `keys`; None where the cache keeps something else."""
        cache = self.cache() if self.cache is not None else None
        if cache is None or layer_index is None or _keys(cache, layer_index) is not keys:
            return None
        if self._seen is not seen:
            self._forget_moved(seen)
        found = self.memos.get((number, layer_index))
        if found is None:
            found = self.memos[number, layer_index] = Memo(layer_index, keys)
        found.raw = keys
        return found

    def _forget_moved(self, seen: Visibility) -> None:
        """Once a call: rotated keys are of no use when a mask has moved their positions since."""
        new, old = seen.k_positions, self._turned_by
        if old is not None:
            n = min(new.shape[1], old.shape[1])
            if new.shape[0] != old.shape[0] or not torch.equal(new[:, :n], old[:, :n]):
                self.memos.clear()
        self._turned_by, self._seen = new, seen


def _starts_with(keys: Tensor | None, before: Tensor) -> bool:
    """`keys` is `before`, or a shorter view of the same memory: it was cut back."""
    if keys is None:
        return False
    return keys is before or (
        keys.data_ptr() == before.data_ptr()
        and keys.stride() == before.stride()
        and keys.shape[:2] == before.shape[:2]
        and keys.shape[2] <= before.shape[2]
    )


def _first_keys(cache: Any) -> Tensor | None:
    """The keys of the first layer that has any."""
    layers = getattr(cache, "layers", ())
    found = (getattr(layer, "keys", None) for layer in layers)
    return next((keys for keys in found if isinstance(keys, Tensor) and keys.numel()), None)


def _keys(cache: Any, index: int) -> Tensor | None:
    """The keys of a layer that gives new tensors or longer views with each call.

    One that is written in place would go unnoticed. Where a growing layer writes over what was cut off, `check` has
    seen the cut before.
    """
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    if index >= len(layers) or type(layers[index]) not in (DynamicLayer, growing_type()):
        return None
    keys = getattr(layers[index], "keys", None)
    return keys if isinstance(keys, Tensor) else None


class Memo:
    """Rotated keys of one layer, in buffers that grow by doubling."""

    def __init__(self, layer_index: int, raw: Tensor) -> None:
        self.layer_index, self.raw = layer_index, raw
        self.buffers: dict[str, tuple[Tensor, int]] = {}

    def cut(self, raw: Tensor) -> None:
        """Forget what lies behind the end of `raw`."""
        self.raw = raw
        self.buffers = {form: (buffer, min(filled, raw.shape[2])) for form, (buffer, filled) in self.buffers.items()}

    def keep(self, forms: Iterable[str]) -> None:
        """Drop the forms that the newest query no longer uses."""
        used = set(forms)
        self.buffers = {form: buffer for form, buffer in self.buffers.items() if form in used}

    def form(self, segment: Segment, k_BKND: Tensor, layer: Layer, seen: Visibility) -> Tensor:
        """All keys in the form of a segment, [B, K, N, D]."""
        if segment.query is None or segment.key is None:
            return key_form(k_BKND, segment, layer, seen.k_positions)
        n = k_BKND.shape[2]
        buffer, filled = self.buffers.get(segment.form, (None, 0))
        if buffer is None or buffer.shape[2] < n:
            grown = k_BKND.new_empty(*k_BKND.shape[:2], max(n + 64, n * 5 // 4), k_BKND.shape[3])
            if buffer is not None:
                grown[:, :, :filled] = buffer[:, :, :filled]
            buffer = grown
        if filled < n:
            new = slice(filled, n)
            with torch.no_grad():
                buffer[:, :, new] = key_form(k_BKND[:, :, new], segment, layer, seen.k_positions[:, new])
        self.buffers[segment.form] = (buffer, n)
        return buffer[:, :, :n]
