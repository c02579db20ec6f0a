"""Documents in a shuffled order, cut into windows of exactly a row's length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ropepatch.errors import PromptError
from ropepatch.training.data.plan import Plan
from ropepatch.training.data.shuffling import permutation
from ropepatch.training.data.store import Store
from ropepatch.training.data.window import Numbers, Window


class Order(NamedTuple):
    """The documents of one epoch: their numbers in the store, and one past the last token of each in the epoch."""

    documents: Numbers
    ends: Numbers


def choose(store: Store, where: str, *, least: int, long: int | None, times: int) -> Numbers:
    """The documents that an epoch holds, those of at least `long` tokens `times` times.

    Raises:
        PromptError: none has at least `least` tokens.
    """
    lengths = store.lengths
    counts = (lengths >= least).astype(np.int64)
    if long is not None:
        counts[lengths >= long] *= times
    chosen = np.repeat(np.arange(len(store)), counts)
    if not len(chosen):
        raise PromptError(
            f"no document of {where} has data.min_tokens",
            given=least,
            allowed=f"at most {lengths.max(initial=0)}, the longest document",
        )
    return chosen


class CutWindows:
    """Windows that are cut where they end: the rest of a document begins a later window.

    All epochs make one line of tokens, each with its documents in an order of its own, and windows take from it without
    a gap or an overlap, through all stages: no token is seen again before every other was seen. Windows of one epoch
    and stage are then shuffled, so that those of a long document do not follow each other.

    Args:
        store: tokenised documents.
        chosen: numbers of those in an epoch, as `choose` gives them.
        plan: rows of this source.
        what: the seed and the source: what orders are drawn from.
        where: names the source in messages.
        isolate: number the documents of a window.

    Raises:
        PromptError: an epoch is shorter than a window.
    """

    def __init__(
        self, store: Store, chosen: Numbers, plan: Plan, *, what: tuple[object, ...], where: str, isolate: bool
    ) -> None:
        self.store, self.chosen, self.plan, self.what, self.isolate = store, chosen, plan, what, isolate
        self.lengths = store.lengths
        self.total = int(self.lengths[chosen].sum())
        longest = max((n for n, count in zip(plan.lengths, plan.counts, strict=True) if count), default=0)
        if self.total < longest:
            raise PromptError(
                f"{where} has too little text: {self.total} tokens in all, and one window needs {longest}",
                hint="give more text, or set a shorter data.length",
            )
        used = [count * length for count, length in zip(plan.counts, plan.lengths, strict=True)]
        self._bases = [0, *np.cumsum(used).tolist()]
        self._orders: dict[int, Order] = {}
        self._shuffles: dict[tuple[int, int], Numbers] = {}

    def window(self, number: int) -> Window:
        start, length = self._start(number)
        ids = np.empty(length, dtype=np.int64)
        documents = np.ones(length, dtype=np.int64)
        at = 0
        for number_here, (document, begin, end) in enumerate(self._parts(start, start + length), 1):
            stop = at + end - begin
            ids[at:stop] = self.store.ids(document, begin, end)
            if self.isolate:
                documents[at:stop] = number_here
            at = stop
        return Window(ids, ids, documents)

    def _start(self, number: int) -> tuple[int, int]:
        """Where a window begins on the line of all epochs, and its length."""
        stage, index, length = self.plan.place(number)
        base = self._bases[stage]
        epoch = (base + index * length) // self.total
        # The windows of this stage that begin in this epoch.
        low = max(0, -((base - epoch * self.total) // length))
        high = min(self.plan.counts[stage], -((base - (epoch + 1) * self.total) // length))
        if (stage, epoch) not in self._shuffles:
            make_room(self._shuffles)
            self._shuffles[stage, epoch] = permutation(high - low, *self.what, "windows", stage, epoch)
        return base + (low + int(self._shuffles[stage, epoch][index - low])) * length, length

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The pieces of documents from start to stop on the line: document, first token, one past the last."""
        while start < stop:
            epoch, within = divmod(start, self.total)
            order = self._order(epoch)
            index = int(np.searchsorted(order.ends, within, side="right"))
            while start < stop and index < len(order.documents):
                document, end = int(order.documents[index]), int(order.ends[index])
                begin = within - (end - int(self.lengths[document]))
                size = min(end - within, stop - start)
                yield document, begin, begin + size
                start, within, index = start + size, within + size, index + 1

    def _order(self, epoch: int) -> Order:
        if epoch not in self._orders:
            make_room(self._orders)
            documents = self.chosen[permutation(len(self.chosen), *self.what, "documents", epoch)]
            self._orders[epoch] = Order(documents, np.cumsum(self.lengths[documents]))
        return self._orders[epoch]


def make_room(kept: dict[Any, Any], most: int = 2) -> None:
    """Make room for one more: a window touches two epochs at most, and rows come nearly in order."""
    while len(kept) >= most:
        kept.pop(next(iter(kept)))
