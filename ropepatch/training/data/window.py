"""One window as a source makes it, and the row that is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""A label that is not counted; torch's and transformers' number for it."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens of at most a row's length.

    Attributes:
        ids: token ids, int64 [n].
        labels: ids to be predicted at their own places (not shifted), `IGNORED` where the loss does not count, [n].
        documents: 1, 2, ... by packed document, [n].
    """

    ids: Numbers
    labels: Numbers
    documents: Numbers


class Source(Protocol):
    """What rows are made from."""

    def window(self, number: int) -> Window:
        """The window of the source's row `number`, the same whenever it is asked for."""


def to_row(window: Window, index: int, length: int, pad: int) -> dict[str, Any]:
    """A row of exactly `length` tokens, padded at the right (document 0, label `IGNORED`)."""
    missing = length - len(window.ids)
    if missing:
        ids = np.pad(window.ids, (0, missing), constant_values=pad)
        labels = np.pad(window.labels, (0, missing), constant_values=IGNORED)
        documents = np.pad(window.documents, (0, missing))
    else:
        ids, labels, documents = window.ids, window.labels, window.documents
    return {
        "input_ids": ids.tolist(),
        "labels": labels.tolist(),
        "documents": documents.tolist(),
        "index": index,
    }
