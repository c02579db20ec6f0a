"""Prose as RULER's haystack: words of a running text, with needles between its sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ropepatch.evaluation.fitting import Draft
from ropepatch.evaluation.haystack import is_sentence_end
from ropepatch.evaluation.ruler.question import joined
from ropepatch.evaluation.texts import RealText

_WORD = re.compile(r"\S+")
_CLOSING = re.compile(r"""[.!?]["'”’)\]]*\Z""")

# Words behind the last needle at least: the end of the text is where tokens are taken out.
_TAIL = 8


class Essay:
    """A text, its white space squeezed to single spaces (as RULER does), measured in words.

    Args:
        source: the text.
        most_words: how many of its words can be needed; the rest is not looked at.
    """

    def __init__(self, source: RealText, most_words: int) -> None:
        self.source = source
        # A word has a character and a space at least; most have several, so that this may give too many words only.
        spans = []
        for match in _WORD.finditer(source.text):
            spans.append(match.group())
            if len(spans) == most_words:
                break
        self.text = " ".join(spans)
        self.ends = np.cumsum([len(word) + 1 for word in spans], dtype=np.int64) - 1
        closing = (number for number, word in enumerate(spans, start=1) if _CLOSING.search(word))
        whole = [number for number in closing if is_sentence_end(self.text, int(self.ends[number - 1]))]
        self.sentences = np.asarray(whole, dtype=np.int64)

    def __len__(self) -> int:
        """The number of words."""
        return len(self.ends)

    def with_needles(self, words: int, needles: Sequence[str], depths: Sequence[float]) -> Draft:
        """The first so many words with the needles between their sentences.

        Args:
            words: of the text; the last sentence may be cut, and no needle stands behind it.
            needles: in the order in which they stand.
            depths: of each needle, 0..1 and ascending, as a share of the sentences.

        Returns:
            The text; spare is what follows the last needle, the marks "0", "1", ... are the needles.
        """
        whole = int(np.searchsorted(self.sentences, words - _TAIL, side="right"))
        pieces, at, where = [], 0, []
        for needle, depth in zip(needles, depths, strict=True):
            place = int(whole * depth)
            cut = int(self.ends[self.sentences[place - 1] - 1]) if place else 0
            pieces += [self.text[at:cut].strip()] if cut > at else []
            where.append(len(pieces))
            pieces.append(needle)
            at = cut
        pieces.append(self.text[at : int(self.ends[words - 1])].strip())
        text, starts = joined(pieces, " ")
        marks = {str(i): (starts[w], starts[w] + len(pieces[w])) for i, w in enumerate(where)}
        return Draft(text, (starts[-1], len(text)), marks)
