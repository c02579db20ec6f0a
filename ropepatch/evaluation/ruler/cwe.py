"""Common words extraction: the ten words of a numbered list that appear most often."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from ropepatch.evaluation.fitting import Draft
from ropepatch.evaluation.prompt import TextEncoder
from ropepatch.evaluation.ruler.drawing import Draw
from ropepatch.evaluation.ruler.question import Question, RulerTask
from ropepatch.evaluation.ruler.vocabulary import Vocabulary

# RULER, scripts/data/synthetic/constants.py and common_words_extraction.py.
TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
ANSWER_PREFIX = "Answer: The top 10 words that appear most often in the list are:"

COMMON = 10
SHORT = 4096
"""Below this length RULER repeats words less often."""


def numbered(words: Sequence[str]) -> str:
    """The words in one line, numbered from 1."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def ask(words: Sequence[str]) -> tuple[str, str]:
    """What the user says of a list of words, and how the reply begins."""
    return TEMPLATE.format(context=numbered(words)), ANSWER_PREFIX


def solved(words: Sequence[str], common: Sequence[str]) -> str:
    """An example with its reply, as it stands in front of the question."""
    return f"{' '.join(ask(words))} {numbered(common)}"


class CommonWords(RulerTask):
    """RULER's `cwe`. A unit of filler is one entry of an uncommon word.

    The last entry is the one that makes the list too long, and what is too much of it is cut off: so the last uncommon
    word may appear less often than the others. A common word is never a part of another word, since RULER's score
    looks for substrings.

    Where a list takes more words than there are, all its words are pairs of an adjective and a noun (RULER goes over to
    another list then, too).
    """

    most_tokens = 120
    name = "cwe"
    filler = "the list of words"

    def __init__(self, *, seed: int, encoder: TextEncoder, words: Vocabulary) -> None:
        self._seed = seed
        self._encoder = encoder
        self._words = words
        self._whole: dict[int, int] = {}

    def question(self, trial: int, length: int) -> Question:
        often, seldom = (6, 1) if length < SHORT else (30, 3)
        example = self._example(trial, *((20, 3, 1) if length < SHORT else (40, 10, 3)))
        pairs = self._needs_pairs(length, often, seldom)
        most = length if pairs else (len(self._words.singles) - COMMON) * seldom
        common, others = self._drawn(Draw(self._seed, self.name, trial), 0 if pairs else len(self._words.singles), most)

        def draft(units: int) -> Draft:
            uncommon = [others[entry // seldom] for entry in range(units)]
            entries = Draw(self._seed, self.name, trial, "order").shuffled([*common * often, *uncommon[:-1]])
            user, _ = ask([*entries, uncommon[-1]])
            text = f"{example}\n{user}"
            end = text.rindex("\nQuestion: ")
            return Draft(text, (end - len(f"{len(entries) + 1}. {uncommon[-1]}"), end))

        return Question(
            references=tuple(common),
            reply=ANSWER_PREFIX,
            ideal=numbered(common),
            draft=draft,
            least=10 * seldom,
            most=most,
            details={"words": "pairs" if pairs else "single"},
        )

    def _needs_pairs(self, length: int, often: int, seldom: int) -> bool:
        """Whether a list of every single word is too short for this length."""
        if often not in self._whole:
            words = self._words.singles
            entries = [*words[:COMMON] * often, *(word for word in words[COMMON:] for _ in range(seldom))]
            self._whole[often] = len(self._encoder.encode(" ".join(ask(entries))))
        # Nine tenths, since trials differ in their common words.
        return self._whole[often] * 0.9 < length

    def _drawn(self, draw: Draw, singles: int, most: int) -> tuple[list[str], list[str]]:
        words = self._words
        if singles:
            common = draw.shuffled(words.plain_singles)[:COMMON]
            return common, draw.shuffled([word for word in words.singles if word not in common])
        found: dict[str, None] = {}
        while len(found) < COMMON:
            found[f"{draw.choice(words.adjectives)}-{draw.choice(words.plain_nouns)}"] = None
        others = (pair for pair in words.distinct_pairs(draw) if pair not in found)
        return list(found), list(islice(others, most))

    def _example(self, trial: int, count: int, often: int, seldom: int) -> str:
        draw = Draw(self._seed, self.name, trial, "example")
        words = draw.shuffled(self._words.singles)[:count]
        common, uncommon = words[:COMMON], words[COMMON:]
        return solved(draw.shuffled([*common * often, *uncommon * seldom]), common)
