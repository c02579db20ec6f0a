"""The passkey task: a number hidden in filler text, asked for at the end.

The wording is the benchmark's definition (Landmark Attention, Mohtashami and Jaggi, arXiv 2305.16300): five lines,
joined by newlines. Unlike other harnesses, `length` is the exact number of tokens that the model is given.

How a prompt gets its exact length: the filler before the key ends at a sentence, the filler behind the key takes up
the rest and is cut at a token border at its far end, before the question. The text is tokenised as a whole and
measured, and the cut moved until the count is right. Where no cut of the text gives exactly that count (a tokenizer
may fuse a full stop with a newline), the last filler tokens are taken out of the id list instead; key and question
are untouched. Either way the ids that were counted are the ids that are evaluated.

Prompts share prefixes: the filler before the key is always the same text from its beginning, for every depth, trial
and length, and a trial's key is the same at every length.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ropepatch.errors import OptionError, PromptError
from ropepatch.evaluation.haystack import Haystack, RealText
from ropepatch.evaluation.prompt import Ids, TextEncoder, Tokens

INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. "
    "Find it and memorize them. I will quiz you about the important information there."
)
QUESTION = "What is the pass key?"
REPLY = "The pass key is"

MAX_DIGITS = 18
_SEARCH_STEPS = 8


@dataclass(frozen=True, eq=False)
class PasskeyPrompt:
    """One trial's prompt.

    Attributes:
        length: tokens of the prompt, equal to len(ids).
        depth: where in the filler the key was asked to be, 0..1.
        trial: number of the trial within its cell, from 0.
        key: the digits.
        ids: the prompt's token ids, shape [length], int32.
        answer: the ids of the key as they follow the prompt, found by tokenising prompt and key together.
        key_start, key_end: the tokens of the prompt that hold the key's first mention, end exclusive.
    """

    length: int
    depth: float
    trial: int
    key: str
    ids: Ids
    answer: Ids
    key_start: int
    key_end: int


@dataclass(frozen=True)
class _Draft:
    """A prompt's text, with the places that matter as character positions."""

    text: str
    key: tuple[int, int]
    behind: tuple[int, int]


def draw_key(seed: int, depth: float, trial: int, digits: int) -> str:
    """The key of a trial: `digits` digits, the first not 0, from a hash that is the same on every machine."""
    low, high = 10 ** (digits - 1), 10**digits
    if digits == 1:
        low = 0
    digest = hashlib.sha256(f"passkey|{seed}|{float(depth)!r}|{trial}|{digits}".encode()).digest()
    return str(low + int.from_bytes(digest, "big") % (high - low))


class PasskeyTask:
    """Builds passkey prompts for one tokenizer.

    Args:
        tokenizer: the model's own, fast Hugging Face tokenizer.
        longest: the longest length that will be asked for, in tokens.
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
        *,
        longest: int,
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
        self._check_length(longest, draw_key(seed, 0.0, 0, digits))
        self.haystack = Haystack(self.encoder, longest, text)
        self._last_cut: dict[tuple[int, float], int] = {}

    def build(self, length: int, depth: float, trial: int) -> PasskeyPrompt:
        """The prompt of one trial.

        Raises:
            PromptError: `length` is too short (the message names the minimum), `depth` is not within 0..1, or the
                tokenizer cannot represent digits.
        """
        if not (math.isfinite(depth) and 0 <= depth <= 1):
            raise PromptError("depth out of range", given=depth, allowed="0 to 1")
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
        tokens, draft = fitted
        start, end = tokens.span(*draft.key)
        return PasskeyPrompt(length, depth, trial, key, tokens.ids, self._answer(draft, key), start, end)

    def _check_length(self, length: int, key: str) -> int:
        """The tokens of a prompt without filler, which `length` must cover."""
        minimum = len(self.encoder.encode(self._draft("", key, "").text))
        if length < minimum:
            raise PromptError("the length is too short for the prompt", given=length, allowed=f"at least {minimum}")
        return minimum

    def _draft(self, before: str, key: str, behind: str) -> _Draft:
        key_line = f"The pass key is {key}. Remember it. {key} is the pass key."
        head = f"{INSTRUCTION}\n{before}\n"
        user = f"{head}{key_line}\n{behind}\n{QUESTION}"
        text = self.encoder.turn(user, REPLY)
        origin = text.index(user)
        key_at = origin + len(head) + key_line.index(key)
        behind_at = origin + len(head) + len(key_line) + 1
        return _Draft(text, (key_at, key_at + len(key)), (behind_at, behind_at + len(behind)))

    def _fit(self, length: int, depth: float, key: str, cut: int, room: int) -> tuple[Tokens, _Draft] | None:
        """The prompt with the key at `cut`, exactly `length` tokens; None when the key must move forward for it."""
        base = self.haystack.tokens_before(cut)
        most = len(self.haystack) - base
        tried: dict[int, tuple[Tokens, _Draft]] = {}

        def measure(extra: int) -> int:
            """The tokens of the prompt with `extra` filler tokens behind the key."""
            if extra not in tried:
                behind = self.haystack.text[cut : self.haystack.token_end(base + extra)] if extra else ""
                draft = self._draft(self.haystack.text[:cut], key, behind.strip())
                tried[extra] = (self.encoder.encode(draft.text), draft)
            return len(tried[extra][0])

        extra = self._last_cut.get((length, depth), room - base)
        for _ in range(_SEARCH_STEPS):
            extra = min(max(extra, 0), most)
            if extra in tried:
                break
            missing = length - measure(extra)
            if not missing:
                self._last_cut[length, depth] = extra
                return tried[extra]
            extra += missing
        # No cut of the text gives exactly this count. Take the surplus of the shortest text that is too long out of
        # its ids, at the far end of the filler.
        extra = max((e for e in tried if measure(e) <= length), default=0)
        while extra < most and measure(extra) < length:
            extra += 1
        surplus = measure(extra) - length
        tokens, draft = tried[extra]
        spare = tokens.inside(*draft.behind)
        if not 0 <= surplus <= len(spare):
            return None
        keep = np.delete(np.arange(len(tokens)), spare[len(spare) - surplus :])
        return Tokens(tokens.ids[keep], tokens.starts[keep], tokens.ends[keep]), draft

    def _answer(self, draft: _Draft, key: str) -> Ids:
        """The key's ids as they follow the prompt: what prompt and key together have beyond the prompt."""
        prompt = self.encoder.encode(draft.text).ids
        whole = self.encoder.encode(f"{draft.text} {key}").ids
        answer = whole[len(prompt) :]
        if not np.array_equal(whole[: len(prompt)], prompt) or not len(answer):
            raise PromptError("the tokenizer fuses the end of the question with the key, so they cannot be told apart")
        if self.encoder.decode(answer).strip() != key:
            raise PromptError(
                "the tokenizer cannot represent the digits of the key", given=key, allowed="a tokenizer with digits"
            )
        return answer
