"""The text that facts are hidden in, as tokens, with the places where a sentence begins."""

from __future__ import annotations

from random import Random
from typing import Any, Protocol

import numpy as np

from ropepatch.errors import PromptError
from ropepatch.evaluation.haystack import FILLER
from ropepatch.training.data.store import Store
from ropepatch.training.data.synthetic.gluing import Gluer
from ropepatch.training.data.synthetic.tasks import Said
from ropepatch.training.data.tokenising import Framing
from ropepatch.training.data.window import Numbers

_SLACK = 1024
"""Tokens in which a sentence border is looked for."""

_SPACES = ("Ġ", "▁", " ")
_CLOSING = "\"'”’)]Ċ\n"


class Hay(Protocol):
    """A haystack."""

    def take(self, random: Random, tokens: int) -> tuple[Numbers, Numbers]:
        """So many tokens in a row from somewhere: ids [tokens], and where sentences begin, ascending, 0 first."""

    def check(self, tokens: int) -> None:
        """Refuse where it cannot give so many."""


class Filler:
    """The repeated filler of the passkey benchmark, begun with any of its sentences."""

    def __init__(self, gluer: Gluer) -> None:
        sentences = [f" {sentence}." for sentence in FILLER.removesuffix(".").split(". ")]
        pieces = [piece.ids for piece in gluer.pieces([Said(sentence) for sentence in sentences])]
        self._ids = np.concatenate(pieces)
        self._begins = np.cumsum([0, *map(len, pieces)])[:-1]

    def take(self, random: Random, tokens: int) -> tuple[Numbers, Numbers]:
        shift = int(random.choice(self._begins.tolist()))
        size = len(self._ids)
        times = tokens // size + 2
        begins = (self._begins[None, :] + size * np.arange(times)[:, None]).ravel() - shift
        ids = np.tile(self._ids, times)[shift : shift + tokens]
        return ids, begins[(begins >= 0) & (begins < max(tokens, 1))]

    def check(self, tokens: int) -> None:
        pass


class Text:
    """Real text, from any of its sentences on.

    Args:
        store: tokenised documents; they follow each other without their begin and end tokens.
        where: names the text in messages.
    """

    def __init__(self, store: Store, tokenizer: Any, where: str) -> None:
        self.store, self.where = store, where
        framing = Framing(tokenizer)
        self._frame = np.asarray([*framing.lead, *framing.end], dtype=np.int64)
        self._ends, self._begins, self._lines = _vocabulary(tokenizer)

    def take(self, random: Random, tokens: int) -> tuple[Numbers, Numbers]:
        start = random.randrange(self.store.total - tokens - 2 * _SLACK + 1)
        # More than is needed: document borders fall out, and the first sentence has begun before.
        ids = self.store.span(start, start + tokens + 2 * _SLACK).astype(np.int64)
        ids = ids[~np.isin(ids, self._frame)]
        if len(ids) < tokens + _SLACK:
            raise PromptError(f"the documents of the haystack {self.where} are too short", allowed="longer documents")
        first = next(iter(self._sentences(ids[:_SLACK])), 0)
        ids = ids[first : first + tokens]
        return ids, np.concatenate([[0], self._sentences(ids)]).astype(np.int64)

    def check(self, tokens: int) -> None:
        if self.store.total < tokens + 2 * _SLACK:
            raise PromptError(
                f"the haystack {self.where} is too short: it has {self.store.total} tokens, "
                f"and a window may need {tokens + 2 * _SLACK}",
                hint="give more text or a shorter data.length",
            )

    def _sentences(self, ids: Numbers) -> Numbers:
        """Where a sentence begins after the first token; where none does, where words do; else every token."""
        before, here = ids[:-1], ids[1:]
        for found in (self._ends[before] & (self._begins[here] | self._lines[before]), self._begins[here]):
            if found.any():
                return np.flatnonzero(found) + 1
        return np.arange(1, len(ids))


def _vocabulary(tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every token: whether it ends a sentence, begins a word, and ends a line."""
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    marked = any(token.startswith(_SPACES) for token in tokens)
    begins = [token.startswith(_SPACES) if marked else not token.startswith("##") for token in tokens]
    ends = [token.rstrip(_CLOSING).endswith((".", "!", "?", "。", "！", "？")) for token in tokens]
    lines = [token.endswith(("Ċ", "\n")) for token in tokens]
    return np.asarray(ends), np.asarray(begins), np.asarray(lines)
