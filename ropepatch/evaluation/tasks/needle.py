"""The needle task: sentences hidden in real text, asked for at the end (Kamradt's test, 2023, and RULER's kind).

A prompt is an instruction, the text with its needles, the question and the first words of the reply. `length` is the
exact number of tokens that the model is given. Needles stand between whole sentences of the running text, joined to
them by spaces, so that nothing but their content gives them away; the text behind the last needle takes up the rest of
the length and is cut at its far end, before the question (`fitting`).

Several needles are spread from the depth on: needle i of n stands at depth + (1 - depth) * i / n, as in Kamradt's
multi-needle test. Distractors stand at places of their own, (i + 1) / (n + 1), whatever the depth.

Prompts share prefixes: the text is the same for every depth and length up to the first thing hidden in it, and what a
trial hides is the same at every length and depth. Trials of keys and values differ in what they hide; trials of one
fixed needle would be the same prompt again, so each but the first begins its text elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from ropepatch.errors import PromptError, did_you_mean
from ropepatch.evaluation.draws import draw_number
from ropepatch.evaluation.fitting import Draft, Fitted, fit
from ropepatch.evaluation.haystack import Haystack, rotated
from ropepatch.evaluation.matching import found, is_exactly, squeezed
from ropepatch.evaluation.needles import CITIES, INSTRUCTION, RESTRICTION, Quiz, classic, numbers, own, uuids
from ropepatch.evaluation.prompt import Ids, TextEncoder
from ropepatch.evaluation.suite import GridSuite, register
from ropepatch.evaluation.task import Grade, Grid, GridTask, Place, Prompt
from ropepatch.evaluation.texts import RealText, default_text, read_text

VARIANTS = ("sentence", "number", "uuid")

_SPARE_TOKENS = 32
# Less text than this hides nothing; it is also what lets every length be met exactly.
_LEAST_TEXT = 32


def _variant(value: Any) -> Any:
    if value not in VARIANTS:
        hint = did_you_mean(str(value), VARIANTS)
        raise ValueError(f"no such variant; allowed: {', '.join(VARIANTS)}" + (f"; {hint}" if hint else ""))
    return value


def _as_list(value: Any) -> Any:
    return [str(value)] if isinstance(value, (str, int, float)) else value


Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Lines = Annotated[tuple[Line, ...], BeforeValidator(_as_list), Field(min_length=1)]


@register
class NeedleSuite(GridSuite):
    """Settings of a needle grid. Every trial is one (length, depth, trial).

    Attributes:
        depths: places of the (first) needle in the text, 0 (in front) to 1 (at the end).
        variant: `sentence`: Kamradt's needle or one of your own; `number`, `uuid`: drawn keys with values.
        needle, question, answer: of variant sentence: your own sentence or sentences, what to ask, and the phrase or
            phrases that must be found; all three or none (Kamradt's).
        reply: the first words of the reply to your own question; "Answer:" where they are not given.
        needles: of variants number and uuid: how many are hidden, and all asked for; 1 where it is not given.
        distractors: how many of the same form are hidden besides, not asked for.
        text: file or folder of real text, or `datasets:owner/name[:config][:split][:column]`; None: `default_text`.
    """

    name = "needle"

    task: Literal["needle"] = "needle"
    variant: Annotated[Literal["sentence", "number", "uuid"], BeforeValidator(_variant)] = "sentence"
    needle: Lines | None = None
    question: Line | None = None
    answer: Lines | None = None
    reply: Line | None = None
    needles: Annotated[int, Field(ge=1)] | None = None
    distractors: Annotated[int, Field(ge=0)] = 0
    text: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> NeedleSuite:
        given = [name for name in ("needle", "question", "answer") if getattr(self, name) is not None]
        if self.variant != "sentence":
            if self.reply is not None or given:
                raise ValueError(f"needle, question, answer and reply belong to variant sentence, not {self.variant}")
            return self
        if self.needles is not None:
            raise ValueError("needles belongs to variants number and uuid; variant sentence hides what needle lists")
        if len(given) in (1, 2) or (self.reply is not None and not given):
            raise ValueError(f"needle, question and answer go together (given only {', '.join(given) or 'reply'})")
        if self.answer is not None:
            if self.distractors:
                raise ValueError("distractors cannot be drawn for a needle of your own")
            for one in self.answer:
                if sum(squeezed(one) in squeezed(other) for other in self.answer) > 1:
                    raise ValueError(f"the answer {one!r} is part of another one, so they cannot be told apart")
        elif self.distractors > len(CITIES):
            raise ValueError(f"variant sentence has {len(CITIES)} distractors at most")
        return self

    def retrieval(self, tokenizer: Any) -> NeedleTask:
        return NeedleTask(
            tokenizer,
            self._quiz,
            default_text() if self.text is None else read_text(self.text, tokens=max(self.lengths)),
            grid=self.grid,
            seed=self.seed,
            own_texts=self.variant == "sentence",
            chat_template=self.chat_template,
        )

    def _quiz(self, trial: int) -> Quiz:
        if self.variant != "sentence":
            draw = numbers if self.variant == "number" else uuids
            return draw(self.seed, trial, self.needles or 1, self.distractors)
        if self.needle is None or self.question is None or self.answer is None:
            return classic(self.seed, trial, self.distractors)
        return own(self.needle, self.question, self.reply or "Answer:", self.answer)


class NeedleTask(GridTask):
    """Builds needle prompts for one tokenizer.

    Args:
        tokenizer: the model's own, fast Hugging Face tokenizer.
        quiz: what each trial hides and asks.
        text: what it is hidden in.
        grid: lengths, depths and trials; prompts beyond its longest length cannot be built.
        seed: of where the trials' texts begin.
        own_texts: begin each trial's text but the first elsewhere.
        chat_template: put the prompt into the tokenizer's chat template.

    Raises:
        PromptError: no chat template; a tokenizer without offsets, or without characters of what is hidden; a text that
            is too short, or holds the needle; a length that is too short (names the minimum).
    """

    name = "needle"

    def __init__(
        self,
        tokenizer: Any,
        quiz: Callable[[int], Quiz],
        text: RealText,
        grid: Grid,
        *,
        seed: int = 0,
        own_texts: bool = False,
        chat_template: bool = False,
    ) -> None:
        self.encoder = TextEncoder(tokenizer, chat_template=chat_template)
        self.quiz = quiz
        self.text = text
        self.seed = seed
        self.own_texts = own_texts
        self.grid = grid
        self._longest = max(grid.lengths)
        self._haystacks: dict[int, Haystack] = {}
        quizzes = [quiz(trial) for trial in range(grid.trials)]
        self._check_length(min(grid.lengths), max(map(self._minimum, quizzes)))
        self._haystack(0)
        content = squeezed(text.text)
        for needle in {needle for one in quizzes for needle in one.needles}:
            if squeezed(needle) in content:
                raise PromptError(f"the text {text.path} holds the needle already", given=needle)

    def inputs(self) -> dict[str, Any]:
        return {"text": self.text.identity}

    def build(self, place: Place) -> Prompt:
        """The prompt of one trial; its row has `needle_spans`: the tokens of each needle, first and one past the last.

        Raises:
            PromptError: `length` is too short (the message names the minimum), `depth` is not within 0..1, or the
                tokenizer cannot represent what is hidden.
        """
        length, depth, trial = place.length, self.depth_of(place), place.trial
        quiz, haystack = self.quiz(trial), self._haystack(trial)
        minimum = self._minimum(quiz)
        self._check_length(length, minimum)
        room = length - minimum + _LEAST_TEXT
        tokens, draft, _ = self._fit(length, quiz, haystack, depth, room)
        spans = [list(tokens.span(*draft.marks[needle])) for needle in quiz.needles]
        answer = self._answer(draft, quiz)
        expected = quiz.answers if len(quiz.answers) > 1 else quiz.answers[0]
        return Prompt(place, tokens.ids, answer, expected, len(answer) + _SPARE_TOKENS, {"needle_spans": spans})

    def enough(self, prompt: Prompt, text: str) -> bool:
        return all(found(_answers(prompt), text))

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The share of answers that the text contains; the row has `found` (of each, 0 or 1) and `exact`: whether the
        text's first line is the ideal answer and nothing else."""
        hits = found(_answers(prompt), text)
        exact = is_exactly(self.quiz(prompt.place.trial).ideal, text)
        return Grade(text.strip(), sum(hits) / len(hits), {"found": hits, "exact": int(exact)})

    def _haystack(self, trial: int) -> Haystack:
        part = trial if self.own_texts else 0
        if part not in self._haystacks:
            share = draw_number(2**32, "text", self.seed, part) / 2**32
            text = rotated(self.text, share) if part else self.text
            self._haystacks[part] = Haystack(self.encoder, self._longest, text)
        return self._haystacks[part]

    def _minimum(self, quiz: Quiz) -> int:
        """The tokens of the shortest prompt: everything but the text, and a little of that."""
        draft = self._draft(quiz, "", [(0, sentence) for sentence in (*quiz.needles, *quiz.distractors)])
        tokens = self.encoder.encode(draft.text)
        for start, end in draft.marks.values():
            self.encoder.check_known(draft.text, tokens, start, end)
        return len(tokens) + _LEAST_TEXT

    def _check_length(self, length: int, minimum: int) -> None:
        if length < minimum:
            raise PromptError("the length is too short for the prompt", given=length, allowed=f"at least {minimum}")

    def _fit(self, length: int, quiz: Quiz, haystack: Haystack, depth: float, room: int) -> Fitted:
        """The prompt with everything hidden at its place. Where that leaves no text of exactly `length` tokens, what is
        hidden last moves forward by a sentence."""
        limit = room
        while True:
            hidden = self._places(quiz, haystack, depth, room, limit)
            last = hidden[-1][0]
            base = haystack.tokens_before(last)

            def draft(extra: int, base: int = base, hidden: Sequence[tuple[int, str]] = hidden) -> Draft:
                return self._draft(quiz, haystack.text[: haystack.token_end(base + extra)], hidden)

            fitted = fit(self.encoder, length, draft, guess=room - base, most=len(haystack) - base)
            if fitted is not None:
                return fitted
            if last == 0:
                raise PromptError("no prompt of exactly this length can be built", given=length)
            limit = haystack.tokens_before(last) - 1

    def _places(self, quiz: Quiz, haystack: Haystack, depth: float, room: int, limit: int) -> list[tuple[int, str]]:
        """Where in the text each sentence goes (characters), in the order of the text."""
        n, others = len(quiz.needles), len(quiz.distractors)
        shares = [
            *((depth + (1 - depth) * i / n, needle) for i, needle in enumerate(quiz.needles)),
            *(((i + 1) / (others + 1), other) for i, other in enumerate(quiz.distractors)),
        ]
        cuts = [
            (haystack.sentence_end(min(math.floor(share * room + 0.5), limit)), sentence) for share, sentence in shares
        ]
        return sorted(cuts, key=lambda item: item[0])

    def _draft(self, quiz: Quiz, text: str, hidden: Sequence[tuple[int, str]]) -> Draft:
        context, done = "", 0
        marks = {}
        for cut, sentence in hidden:
            context = _joined(context, text[done:cut])
            start = len(_joined(context, sentence)) - len(sentence)
            context = _joined(context, sentence)
            marks[sentence] = (start, len(context))
            done = cut
        behind = text[done:].rstrip()
        spare = len(context), len(context := _joined(context, behind))
        head = f"{INSTRUCTION}\n\n"
        user = f"{head}{context}\n\n{quiz.question} {RESTRICTION}"
        whole = self.encoder.turn(user, quiz.reply, joint="\n")
        origin = whole.index(user) + len(head)

        def moved(span: tuple[int, int]) -> tuple[int, int]:
            return origin + span[0], origin + span[1]

        return Draft(whole, moved(spare), {name: moved(span) for name, span in marks.items()})

    def _answer(self, draft: Draft, quiz: Quiz) -> Ids:
        answer = self.encoder.answer(draft.text, quiz.ideal)
        if squeezed(self.encoder.decode(answer)) != squeezed(quiz.ideal):
            raise PromptError("the tokenizer cannot represent the answer", given=quiz.ideal)
        return answer


def _answers(prompt: Prompt) -> Sequence[str]:
    return [prompt.expected] if isinstance(prompt.expected, str) else prompt.expected


def _joined(before: str, behind: str) -> str:
    """Two pieces of running text, with a space between where there is no white space yet."""
    gap = " " if before and behind and not (before[-1].isspace() or behind[0].isspace()) else ""
    return f"{before}{gap}{behind}"
