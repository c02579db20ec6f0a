"""The passkey task: a number hidden in filler text, asked for at the end.

The wording is the benchmark's definition (Landmark Attention, Mohtashami and Jaggi, arXiv 2305.16300): five lines,
joined by newlines. Unlike other harnesses, `length` is the exact number of tokens that the model is given: the filler
before the key ends at a sentence, the filler behind the key takes up the rest and is cut at a token border at its far
end, before the question (`fitting`).

Prompts share prefixes: the filler before the key is always the same text from its beginning, for every depth, trial
and length, and a trial's key is the same at every length.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from ropepatch.errors import OptionError, PromptError
from ropepatch.evaluation.fitting import Draft, Fitted, fit
from ropepatch.evaluation.haystack import Haystack
from ropepatch.evaluation.prompt import Ids, TextEncoder
from ropepatch.evaluation.suite import GridSuite, register
from ropepatch.evaluation.task import Grade, Grid, GridTask, Place, Prompt
from ropepatch.evaluation.texts import RealText, read_text

INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. "
    "Find it and memorize them. I will quiz you about the important information there."
)
QUESTION = "What is the pass key?"
REPLY = "The pass key is"

MAX_DIGITS = 18
_SPARE_TOKENS = 3


@register
class PasskeySuite(GridSuite):
    """Settings of a passkey grid. Every trial is one (length, depth, trial).

    Attributes:
        depths: places of the key in the filler, 0 (first) to 1 (last).
        digits: of each key.
        text: file or folder of real text to hide the key in; None for the benchmark's repeated sentences.
    """

    name = "passkey"

    task: Literal["passkey"] = "passkey"
    digits: Annotated[int, Field(ge=1, le=MAX_DIGITS)] = 5
    text: str | None = None

    def retrieval(self, tokenizer: Any) -> PasskeyTask:
        return PasskeyTask(
            tokenizer,
            grid=self.grid,
            seed=self.seed,
            digits=self.digits,
            chat_template=self.chat_template,
            text=None if self.text is None else read_text(self.text, tokens=max(self.lengths)),
        )


def draw_key(seed: int, depth: float, trial: int, digits: int) -> str:
    """The key of a trial: `digits` digits, the first not 0, from a hash that is the same on every machine."""
    low, high = 10 ** (digits - 1), 10**digits
    if digits == 1:
        low = 0
    digest = hashlib.sha256(f"passkey|{seed}|{float(depth)!r}|{trial}|{digits}".encode()).digest()
    return str(low + int.from_bytes(digest, "big") % (high - low))


class PasskeyTask(GridTask):
    """Builds passkey prompts for one tokenizer.

    Args:
        tokenizer: the model's own, fast Hugging Face tokenizer.
        grid: lengths, depths and trials; prompts beyond its longest length cannot be built.
        seed: of the keys.
        digits: of each key.
        chat_template: put the prompt into the tokenizer's chat template, the question's last words ("The pass key
            is") as the beginning of the reply.
        text: real text to hide the key in, instead of the repeated sentences.

    Raises:
        PromptError: no chat template, a text that is too short, a tokenizer without offsets.
    """

    name = "passkey"

    def __init__(
        self,
        tokenizer: Any,
        grid: Grid,
        *,
        seed: int = 0,
        digits: int = 5,
        chat_template: bool = False,
        text: RealText | None = None,
    ) -> None:
        if not 1 <= digits <= MAX_DIGITS:
            raise OptionError("digits out of range", given=digits, allowed=f"1 to {MAX_DIGITS}")
        self.encoder = TextEncoder(tokenizer, chat_template=chat_template)
        self.seed = seed
        self.digits = digits
        self.text = text
        self.grid = grid
        self._check_length(max(grid.lengths), draw_key(seed, 0.0, 0, digits))
        self.haystack = Haystack(self.encoder, max(grid.lengths), text)
        self._last_cut: dict[tuple[int, float], int] = {}

    def inputs(self) -> dict[str, Any]:
        return {"text": None if self.text is None else self.text.identity}

    def build(self, place: Place) -> Prompt:
        """The prompt of one trial; its row has `key_start` and `key_end`: the tokens of the key's first mention, end
        exclusive.

        Raises:
            PromptError: `length` is too short (the message names the minimum), `depth` is not within 0..1, or the
                tokenizer cannot represent digits.
        """
        length, depth, trial = place.length, self.depth_of(place), place.trial
        key = draw_key(self.seed, depth, trial, self.digits)
        room = length - self._check_length(length, key)
        cut = self.haystack.cut(math.floor(depth * room + 0.5))
        while True:
            fitted = self._fit(length, depth, key, cut, room)
            if fitted is not None:
                break
            if cut == 0:
                raise PromptError("no prompt of exactly this length can be built", given=length)
            cut = self.haystack.cut(self.haystack.tokens_before(cut) - 1)
        tokens, draft, _ = fitted
        start, end = tokens.span(*draft.marks["key"])
        answer = self._answer(draft, key)
        details = {"key_start": start, "key_end": end}
        return Prompt(place, tokens.ids, answer, key, len(answer) + _SPARE_TOKENS, details)

    def enough(self, prompt: Prompt, text: str) -> bool:
        return len(text.strip()) >= len(prompt.expected)

    def grade(self, prompt: Prompt, text: str) -> Grade:
        output = text.strip()[: self.digits]
        return Grade(output, int(output == prompt.expected))

    def _check_length(self, length: int, key: str) -> int:
        """The tokens of a prompt without filler, which `length` must cover."""
        minimum = len(self.encoder.encode(self._draft("", key, "").text))
        if length < minimum:
            raise PromptError("the length is too short for the prompt", given=length, allowed=f"at least {minimum}")
        return minimum

    def _draft(self, before: str, key: str, behind: str) -> Draft:
        key_line = f"The pass key is {key}. Remember it. {key} is the pass key."
        head = f"{INSTRUCTION}\n{before}\n"
        user = f"{head}{key_line}\n{behind}\n{QUESTION}"
        text = self.encoder.turn(user, REPLY)
        origin = text.index(user)
        key_at = origin + len(head) + key_line.index(key)
        behind_at = origin + len(head) + len(key_line) + 1
        return Draft(text, (behind_at, behind_at + len(behind)), {"key": (key_at, key_at + len(key))})

    def _fit(self, length: int, depth: float, key: str, cut: int, room: int) -> Fitted | None:
        """The prompt with the key at `cut`, exactly `length` tokens; None when the key must move forward for it."""
        base = self.haystack.tokens_before(cut)

        def draft(extra: int) -> Draft:
            behind = self.haystack.text[cut : self.haystack.token_end(base + extra)] if extra else ""
            return self._draft(self.haystack.text[:cut], key, behind.strip())

        guess = self._last_cut.get((length, depth), room - base)
        fitted = fit(self.encoder, length, draft, guess=guess, most=len(self.haystack) - base)
        if fitted is not None:
            self._last_cut[length, depth] = fitted.units
        return fitted

    def _answer(self, draft: Draft, key: str) -> Ids:
        """The key's ids as they follow the prompt."""
        answer = self.encoder.answer(draft.text, key)
        if self.encoder.decode(answer).strip() != key:
            raise PromptError(
                "the tokenizer cannot represent the digits of the key", given=key, allowed="a tokenizer with digits"
            )
        return answer
