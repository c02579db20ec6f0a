"""Frequent words extraction: the three most frequent words of a coded text, whose words follow a zeta distribution."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase

import numpy as np
import numpy.typing as npt

from ropepatch.evaluation.fitting import Draft
from ropepatch.evaluation.ruler.drawing import Draw
from ropepatch.evaluation.ruler.question import Question, RulerTask

# RULER, scripts/data/synthetic/constants.py and freq_words_extraction.py.
TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
ANSWER_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"

NOISE = "..."
LETTERS = 6
_TOKENS_PER_WORD = 50
_FEWEST_WORDS = 5
# In units of m below: from here on the fourth word is ahead of the fifth whatever m is.
_CLEAR = 32


def ask(words: Sequence[str]) -> tuple[str, str]:
    """What the user says of a coded text, and how the reply begins."""
    return TEMPLATE.format(context=" ".join(words)), ANSWER_PREFIX


def ranks(vocabulary: int, entries: int) -> npt.NDArray[np.int64]:
    """The ranks (from 1) of the words of a text that grows word by word, shape [entries].

    RULER gives the word of rank k, in a text of n nominal words, int(n / (zeta(2) k^2)) entries. With m = n / zeta(2),
    the word's j-th entry is there from m = j k^2 on: sorted by that number, every beginning of the sequence is such a
    text (entries that come at the same m are added by rank).
    """
    # The first rank alone has m entries.
    rank = np.arange(1, vocabulary + 1)
    counts = entries // rank**2
    which = np.repeat(rank, counts)
    nth = np.concatenate([np.arange(1, count + 1) for count in counts])
    order = np.lexsort((which, nth * which**2))
    found: npt.NDArray[np.int64] = which[order][:entries]
    return found


class FrequentWords(RulerTask):
    """RULER's `fwe` with alpha 2. A unit of filler is one word of the text.

    The last word is the one that makes the text too long, and what is too much of it is cut off.
    """

    most_tokens = 50
    name = "fwe"
    filler = "the coded text"

    def __init__(self, *, seed: int) -> None:
        self._seed = seed

    def question(self, trial: int, length: int) -> Question:
        count = max(length // _TOKENS_PER_WORD, _FEWEST_WORDS)
        draw = Draw(self._seed, self.name, trial)
        found: dict[str, None] = {}
        while len(found) < count:
            found[draw.word(ascii_lowercase, LETTERS)] = None
        words = [NOISE, *list(found)[1:]]
        sequence = ranks(count, max(length, 100)) - 1
        clear = int(sum(_CLEAR // k**2 for k in range(1, count + 1)))

        def draft(units: int) -> Draft:
            entries = [words[rank] for rank in sequence[:units]]
            order = Draw(self._seed, self.name, trial, "order").shuffled(entries[:-1])
            user, _ = ask([*order, entries[-1]])
            end = user.rindex("\nQuestion: ")
            return Draft(user, (end - len(entries[-1]), end))

        return Question(
            references=tuple(words[1:4]),
            reply=ANSWER_PREFIX,
            ideal=" ".join(words[1:4]),
            draft=draft,
            least=clear + 1,
            most=len(sequence),
            details={"vocabulary": count},
        )
