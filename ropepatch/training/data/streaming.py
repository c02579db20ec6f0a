"""Windows out of a data set that is read while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ropepatch.errors import PromptError
from ropepatch.evaluation.draws import draw_number
from ropepatch.training.data import hub
from ropepatch.training.data.plan import Plan
from ropepatch.training.data.tokenising import Framing, encode
from ropepatch.training.data.window import Numbers, Window
from ropepatch.training.recipe import HubSource

_BUFFER = 256
"""Documents among which the next is drawn."""


class StreamedWindows:
    """Windows cut out of documents as they come, shuffled within a buffer.

    Window n is the same whenever it is asked for: the stream's order follows from the seed, and what comes before n is
    read and passed over. So every process reads the whole stream, and a resumed run reads again what went before: that
    is the price of storing nothing.

    Args:
        source: the data set.
        tokenizer: the model's own.
        plan: rows of this source.
        what: the seed and the source.
        least: shorter documents are left out.
        isolate: number the documents of a window.
        keep: how many windows stay at hand, for rows that come a little out of order.

    Raises:
        PromptError: it cannot be loaded, or gives no window.
    """

    def __init__(
        self,
        source: HubSource,
        tokenizer: Any,
        plan: Plan,
        *,
        what: tuple[object, ...],
        least: int,
        isolate: bool,
        keep: int,
    ) -> None:
        self.source, self.tokenizer, self.plan = source, tokenizer, plan
        self.least, self.isolate, self.keep = least, isolate, keep
        self.seed = draw_number(2**31, *what, "stream")
        self._restart()
        if len(plan):
            self.window(0)

    def window(self, number: int) -> Window:
        if number in self._recent:
            return self._recent[number]
        if number < self._next:
            self._restart()
        while self._next <= number:
            self._recent[self._next] = next(self._windows)
            self._recent.pop(self._next - self.keep, None)
            self._next += 1
        return self._recent[number]

    def _restart(self) -> None:
        self._next = 0
        self._recent: dict[int, Window] = {}
        self._windows = self._read()

    # A worker process opens the stream itself.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_windows", "_recent", "_next")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._restart()

    def _read(self) -> Iterator[Window]:
        documents = self._documents()
        left: Numbers = np.empty(0, dtype=np.int64)
        for rows, length in zip(self.plan.counts, self.plan.lengths, strict=True):
            for _ in range(rows):
                parts: list[Numbers] = []
                missing = length
                while missing:
                    left = left if len(left) else next(documents)
                    parts.append(left[:missing])
                    left = left[missing:]
                    missing -= len(parts[-1])
                yield self._window(parts)

    def _window(self, parts: list[Numbers]) -> Window:
        ids = np.concatenate(parts)
        numbers = np.ones(len(ids), dtype=np.int64)
        if self.isolate:
            numbers = np.repeat(np.arange(1, len(parts) + 1), list(map(len, parts)))
        return Window(ids, ids, numbers)

    def _documents(self) -> Iterator[Numbers]:
        """Documents for ever, epoch after epoch, each epoch in another order."""
        framing = Framing(self.tokenizer)
        data = hub.load(self.source).shuffle(seed=self.seed, buffer_size=_BUFFER)
        epoch = 0
        while True:
            data.set_epoch(epoch)
            some = False
            for text in hub.texts(data, self.source):
                ids = encode(self.tokenizer, [text])[0] if text.strip() else []
                if ids and len(framing.lead) + len(ids) + len(framing.end) >= self.least:
                    some = True
                    yield np.asarray([*framing.lead, *ids, *framing.end], dtype=np.int64)
            if not some:
                raise PromptError(
                    f"the data set {self.source.name} has no document of data.min_tokens", given=self.least
                )
            epoch += 1
