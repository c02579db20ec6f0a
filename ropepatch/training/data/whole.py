"""Whole documents, as many as fit into a window: for conversations, which must not be cut from their beginning."""

from __future__ import annotations

import numpy as np

from ropepatch.errors import PromptError
from ropepatch.evaluation.progress import say
from ropepatch.training.data.packing import Order, make_room
from ropepatch.training.data.plan import Plan
from ropepatch.training.data.shuffling import permutation
from ropepatch.training.data.store import Store
from ropepatch.training.data.window import IGNORED, Numbers, Window


class WholeWindows:
    """Windows of whole documents in a shuffled order, the next as long as it fits.

    A window takes from one epoch only. A document longer than a window is cut at its end; where nothing of it would be
    counted then, it is left out, and that is said.

    Args:
        store: tokenised documents, with marks.
        chosen: numbers of those in an epoch.
        plan: rows of this source.
        what: the seed and the source: what orders are drawn from.
        where: names the source in messages.
        packed: several documents a window; otherwise one.
        isolate: number the documents of a window.

    Raises:
        PromptError: no document has anything to count within a window.
    """

    def __init__(
        self,
        store: Store,
        chosen: Numbers,
        plan: Plan,
        *,
        what: tuple[object, ...],
        where: str,
        packed: bool,
        isolate: bool,
    ) -> None:
        self.store, self.plan, self.what, self.packed, self.isolate = store, plan, what, packed, isolate
        self.lengths = store.lengths
        self.chosen = self._counting(chosen, where)
        self._orders: dict[int, Order] = {}
        self._starts = self._walk()

    def window(self, number: int) -> Window:
        length = self.plan.place(number).length
        start, stop = int(self._starts[number]), int(self._starts[number + 1])
        epoch, first = divmod(start, len(self.chosen))
        documents = self._order(epoch).documents[first : first + stop - start].tolist()
        parts = [self.store.ids(document, 0, length) for document in documents]
        ids = np.concatenate(parts).astype(np.int64)
        marks = np.concatenate([self.store.marks(document, 0, length) for document in documents])
        labels = np.where(marks > 0, ids, IGNORED)
        numbers = np.ones(len(ids), dtype=np.int64)
        if self.isolate:
            sizes = [len(part) for part in parts]
            numbers = np.repeat(np.arange(1, len(parts) + 1), sizes)
        return Window(ids, labels, numbers)

    def _walk(self) -> Numbers:
        """Where each row begins on the line of all epochs, counted in documents, and where the last one ends."""
        if not self.packed:
            return np.arange(len(self.plan) + 1)
        starts = [0]
        for rows, length in zip(self.plan.counts, self.plan.lengths, strict=True):
            for _ in range(rows):
                epoch, first = divmod(starts[-1], len(self.chosen))
                ends = self._order(epoch).ends
                before = int(ends[first - 1]) if first else 0
                fitting = int(np.searchsorted(ends, before + length, side="right")) - first
                starts.append(starts[-1] + max(1, fitting))
        return np.asarray(starts, dtype=np.int64)

    def _order(self, epoch: int) -> Order:
        if epoch not in self._orders:
            make_room(self._orders)
            documents = self.chosen[permutation(len(self.chosen), *self.what, "documents", epoch)]
            self._orders[epoch] = Order(documents, np.cumsum(self.lengths[documents]))
        return self._orders[epoch]

    def _counting(self, chosen: Numbers, where: str) -> Numbers:
        """Those of which something counts within the shortest window."""
        used = [length for length, rows in zip(self.plan.lengths, self.plan.counts, strict=True) if rows]
        shortest = min(used, default=1)
        cut = [n for n in set(chosen.tolist()) if self.lengths[n] > shortest]
        # The first token of a window is predicted by nothing.
        lost = [n for n in cut if not self.store.marks(n, 1, shortest).any()]
        kept = chosen[~np.isin(chosen, lost)]
        if not len(kept):
            raise PromptError(
                f"no conversation of {where} has anything to train on within its first {shortest} tokens",
                hint="set a longer data.length",
            )
        if lost:
            say(f"{where}: {len(lost)} conversations are left out: nothing counts in their first {shortest} tokens")
        return kept
