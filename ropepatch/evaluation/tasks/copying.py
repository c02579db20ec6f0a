"""The copy task: a list of random words, of which a stretch is to be repeated word for word.

The stretch is named by the words before it, which stand in the list once: the reply begins with them, and the model
goes on. They are not quoted in the question, where a nearer copy of them would lead away from the list. What is asked
for is what induction heads do (Olsson et al., arXiv 2209.11895), over a distance that the depth chooses. `length` is
the exact number of tokens that the model is given: the list has as many words as it takes, and its last word may be cut
short.

Prompts share prefixes: a trial's list is the same at every depth, and at every length up to the shorter one's end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ropepatch.errors import PromptError
from ropepatch.evaluation.draws import draw_number
from ropepatch.evaluation.fitting import Draft, Fitted, fewest, fit
from ropepatch.evaluation.matching import squeezed
from ropepatch.evaluation.prompt import Ids, TextEncoder
from ropepatch.evaluation.suite import GridSuite, register
from ropepatch.evaluation.task import Grade, Grid, GridTask, Place, Prompt
from ropepatch.evaluation.words import ADJECTIVES, NOUNS

INSTRUCTION = "Below is a list of words. Remember the words and their order."
QUESTION = "Now a part of the list begins again. Go on with its next {count} words, as they stand in the list."

CUE_WORDS = 4
MOST_WORDS = 200
_WORDS = ADJECTIVES + NOUNS
_SPARE_TOKENS = 8
_MARKS = ".,;:!?\"'()"


@register
class CopySuite(GridSuite):
    """Settings of a copy grid. Every trial is one (length, depth, trial).

    Attributes:
        depths: places of the stretch in the list, 0 (its beginning) to 1 (its end).
        words: how many words are to be repeated.
    """

    name = "copy"

    task: Literal["copy"] = "copy"
    words: Annotated[int, Field(ge=1, le=MOST_WORDS)] = 10

    def retrieval(self, tokenizer: Any) -> CopyTask:
        return CopyTask(
            tokenizer,
            grid=self.grid,
            seed=self.seed,
            words=self.words,
            chat_template=self.chat_template,
        )


class CopyTask(GridTask):
    """Builds copy prompts for one tokenizer.

    Args:
        tokenizer: the model's own, fast Hugging Face tokenizer.
        grid: lengths, depths and trials.
        seed: of the lists.
        words: how many are to be repeated.
        chat_template: put the prompt into the tokenizer's chat template, the words before the stretch as the beginning
            of the reply.

    Raises:
        PromptError: no chat template; a tokenizer without offsets, or without the letters of the words; a length that
            is too short (names the minimum).
    """

    name = "copy"

    def __init__(
        self,
        tokenizer: Any,
        grid: Grid,
        *,
        seed: int = 0,
        words: int = 10,
        chat_template: bool = False,
    ) -> None:
        self.encoder = TextEncoder(tokenizer, chat_template=chat_template)
        self.seed = seed
        self.words = words
        self.grid = grid
        self._lists: dict[int, list[str]] = {}
        self._counts: dict[tuple[int, int], int] = {}
        text = " ".join(_WORDS)
        self.encoder.check_known(text, self.encoder.encode(text), 0, len(text))
        self._check_length(min(grid.lengths), max(self._minimum(trial) for trial in range(grid.trials)))

    def build(self, place: Place) -> Prompt:
        """The prompt of one trial; its row has `list_words`, how many the list holds, and `copy_start`, `copy_end`: the
        tokens of the stretch in the list, end exclusive.

        Raises:
            PromptError: `length` is too short (the message names the minimum), `depth` is not within 0..1, or the
                tokenizer cannot represent the words.
        """
        length, depth, trial = place.length, self.depth_of(place), place.trial
        self._check_length(length, self._minimum(trial))
        (tokens, draft, _), count = self._fit(length, depth, trial)
        stretch = draft.marks["stretch"]
        start, end = tokens.span(*stretch)
        expected = draft.text[slice(*stretch)]
        answer = self._answer(draft, expected)
        details = {"list_words": count, "copy_start": start, "copy_end": end}
        return Prompt(place, tokens.ids, answer, expected, len(answer) + _SPARE_TOKENS, details)

    def enough(self, prompt: Prompt, text: str) -> bool:
        """Whether a word is wrong already, or all are there. The last word of the text may still be growing."""
        wanted, given = _words(str(prompt.expected)), _words(text)
        right = _right(wanted, given)
        if right == len(wanted):
            return True
        wrong = given[right:]
        growing = len(wrong) == 1 and not text[-1:].isspace() and wanted[right].startswith(wrong[0])
        return bool(wrong) and not growing

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The share of the words that are right up to the first wrong one; the row has `words_right`, their number."""
        wanted = _words(str(prompt.expected))
        right = _right(wanted, _words(text))
        return Grade(text.strip(), right / len(wanted), {"words_right": right})

    @property
    def _fewest(self) -> int:
        """Words of the shortest list: the cue, the stretch, and a last word that may be cut short."""
        return CUE_WORDS + self.words + 1

    def _minimum(self, trial: int) -> int:
        return len(self.encoder.encode(self._draft(trial, self._fewest, CUE_WORDS).text))

    def _check_length(self, length: int, minimum: int) -> None:
        if length < minimum:
            raise PromptError("the length is too short for the prompt", given=length, allowed=f"at least {minimum}")

    def _fit(self, length: int, depth: float, trial: int) -> tuple[Fitted, int]:
        """The prompt of exactly `length` tokens, and the words of its list. The stretch is placed first, in a list of
        about the right number of words; the words behind it take up the rest."""
        about = self._about(length, trial)
        while True:
            first = self._first(trial, about, depth)
            count = first + self.words + 1

            def draft(more: int, first: int = first, count: int = count) -> Draft:
                return self._draft(trial, count + more, first)

            # A word has at least one token.
            fitted = fit(self.encoder, length, draft, guess=about - count, most=length)
            if fitted is not None:
                return fitted, count + fitted.units
            if about == self._fewest:
                raise PromptError("no prompt of exactly this length can be built", given=length)
            about -= 1

    def _about(self, length: int, trial: int) -> int:
        """The words of a list that is as long as it may be, were the first words asked for: the others' own length
        makes a small difference."""

        @functools.cache
        def measure(more: int) -> int:
            return len(self.encoder.encode(self._draft(trial, few + more, CUE_WORDS).text))

        if (length, trial) not in self._counts:
            few, many = self._fewest, 50
            each = (measure(many) - measure(0)) / many
            guess = round((length - measure(0)) / each)
            more = fewest(measure, length, guess=guess, most=length, tokens_per_unit=each)
            self._counts[length, trial] = few + more
        return self._counts[length, trial]

    def _list(self, trial: int, count: int) -> list[str]:
        words = self._lists.setdefault(trial, [])
        for number in range(len(words), count):
            words.append(_WORDS[draw_number(len(_WORDS), "word", self.seed, trial, number)])
        return words[:count]

    def _draft(self, trial: int, count: int, first: int) -> Draft:
        """The prompt with a list of `count` words, of which those from number `first` on are asked for."""
        words = self._list(trial, count)
        cue = " ".join(words[first - CUE_WORDS : first])
        head = f"{INSTRUCTION}\n\n"
        user = f"{head}{' '.join(words)}\n\n{QUESTION.format(count=self.words)}"
        text = self.encoder.turn(user, cue, joint="\n")
        origin = text.index(user) + len(head)
        start = origin + len(" ".join(words[:first])) + 1
        stretch = " ".join(words[first : first + self.words])
        end = origin + len(" ".join(words))
        return Draft(text, (end - len(words[-1]) - 1, end), {"stretch": (start, start + len(stretch))})

    def _first(self, trial: int, count: int, depth: float) -> int:
        """Where the stretch begins in a list of `count` words: at its depth, or before that where the words in front of
        it stand in the list more than once."""
        last = count - 1 - self.words
        first = CUE_WORDS + math.floor(depth * (last - CUE_WORDS) + 0.5)
        # The list may become longer than `count`.
        words = f" {' '.join(self._list(trial, 2 * count))} "
        for candidate in range(first, CUE_WORDS - 1, -1):
            cue = " ".join(self._list(trial, candidate)[-CUE_WORDS:])
            if words.count(f" {cue} ") == 1:
                return candidate
        raise PromptError("every stretch of the list stands in it twice", given=count, hint="another seed")

    def _answer(self, draft: Draft, expected: str) -> Ids:
        answer = self.encoder.answer(draft.text, expected)
        if squeezed(self.encoder.decode(answer)) != squeezed(expected):
            raise PromptError("the tokenizer cannot represent the words", given=expected)
        return answer


def _words(text: str) -> list[str]:
    return [word for word in (piece.strip(_MARKS).casefold() for piece in text.split()) if word]


def _right(wanted: Sequence[str], given: Sequence[str]) -> int:
    """How many words are right up to the first wrong one."""
    for number, (one, other) in enumerate(zip(wanted, given, strict=False)):
        if one != other:
            return number
    return min(len(wanted), len(given))
