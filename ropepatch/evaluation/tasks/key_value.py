"""The key-value task: a JSON object of UUIDs, asked for the value under one of its keys.

The wording is the benchmark's definition (Liu et al., Lost in the Middle, arXiv 2307.03172; github.com/nelson-liu/
lost-in-the-middle, kv_retrieval.prompt). There the number of pairs is given; here the length is: the prompt holds as
many pairs as fit into exactly `length` tokens. What is left, less than a pair, lengthens the value of the last pair
that is not asked for, by hexadecimal digits.

Prompts share prefixes. As in the paper, the pair that is asked for is put among the others, at its depth: the others
are the same ones, in the same order, for every depth, trial and length of a seed; each trial has a key and a value of
its own, the same at every depth and length. `in_place`, each trial has an object of its own, and its depths ask for one
pair of it after the other: those prompts differ in their ends alone, and are read almost for the price of one.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from ropepatch.errors import PromptError
from ropepatch.evaluation.draws import draw_hex, draw_uuid
from ropepatch.evaluation.fitting import Draft, Fitted, fewest, fit
from ropepatch.evaluation.matching import found, is_exactly, squeezed
from ropepatch.evaluation.prompt import Ids, TextEncoder
from ropepatch.evaluation.suite import GridSuite, register
from ropepatch.evaluation.task import Grade, Grid, GridTask, Place, Prompt

INSTRUCTION = "Extract the value corresponding to the specified key in the JSON object below."
DATA = "JSON data:"
KEY = "Key:"
REPLY = "Corresponding value:"

_FEWEST_PAIRS = 2
_MOST_DIGITS = 400
_SPARE_TOKENS = 32


class Pair(NamedTuple):
    """A key and its value."""

    key: str
    value: str


@register
class KeyValueSuite(GridSuite):
    """Settings of a key-value grid. Every trial is one (length, depth, trial).

    Attributes:
        depths: places of the pair that is asked for, 0 (the first pair) to 1 (the last).
        in_place: ask for the pairs that stand at the depths of one object, an object a trial; otherwise one pair is
            moved through the same others, as in the paper.
    """

    name = "key_value"

    task: Literal["key_value"] = "key_value"
    in_place: bool = False

    def retrieval(self, tokenizer: Any) -> KeyValueTask:
        return KeyValueTask(
            tokenizer,
            grid=self.grid,
            seed=self.seed,
            chat_template=self.chat_template,
            in_place=self.in_place,
        )


class KeyValueTask(GridTask):
    """Builds key-value prompts for one tokenizer.

    Args:
        tokenizer: the model's own, fast Hugging Face tokenizer.
        grid: lengths, depths and trials.
        seed: of all keys and values.
        chat_template: put the prompt into the tokenizer's chat template, "Corresponding value:" as the beginning of the
            reply.
        in_place: each trial has an object of its own, and the pairs that stand at the depths are asked for.

    Raises:
        PromptError: no chat template; a tokenizer without offsets, or without the characters of UUIDs; a length that is
            too short (names the minimum).
    """

    name = "key_value"

    def __init__(
        self,
        tokenizer: Any,
        grid: Grid,
        *,
        seed: int = 0,
        chat_template: bool = False,
        in_place: bool = False,
    ) -> None:
        self.encoder = TextEncoder(tokenizer, chat_template=chat_template)
        self.seed = seed
        self.grid = grid
        self.in_place = in_place
        self._drawn: dict[tuple[int, ...], list[Pair]] = {}
        minimum = max(self._minimum(depth, trial) for depth in grid.depths for trial in range(grid.trials))
        self._check_length(min(grid.lengths), minimum)

    def build(self, place: Place) -> Prompt:
        """The prompt of one trial; its row has `pairs`, how many the object holds, and `pair_start`, `pair_end`: the
        tokens of the pair that is asked for, end exclusive.

        Raises:
            PromptError: `length` is too short (the message names the minimum), `depth` is not within 0..1, or the
                tokenizer cannot represent UUIDs.
        """
        length, depth, trial = place.length, self.depth_of(place), place.trial
        self._check_length(length, self._minimum(depth, trial))
        pairs = self._most_pairs(length, depth, trial)
        while (fitted := self._fill(length, depth, trial, pairs)) is None:
            # No number of digits comes out right: a pair less leaves more room for them.
            pairs -= 1
            if pairs < _FEWEST_PAIRS:
                raise PromptError("no prompt of exactly this length can be built", given=length)
        tokens, draft, _ = fitted
        start, end = tokens.span(*draft.marks["pair"])
        ordered, index = self._object(depth, trial, pairs)
        asked = ordered[index]
        answer = self._answer(draft, asked)
        details = {"pairs": pairs, "pair_start": start, "pair_end": end}
        return Prompt(place, tokens.ids, answer, asked.value, len(answer) + _SPARE_TOKENS, details)

    def enough(self, prompt: Prompt, text: str) -> bool:
        return all(found([str(prompt.expected)], text))

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """1 when the text contains the value, as in the paper; the row has `exact`: whether its first line is the value
        and nothing else (quotes aside)."""
        value = str(prompt.expected)
        exact = is_exactly(f'"{value}', text) or is_exactly(value, text)
        return Grade(text.strip(), found([value], text)[0], {"exact": int(exact)})

    def _object(self, depth: float, trial: int, count: int) -> tuple[list[Pair], int]:
        """So many pairs, and which of them is asked for."""
        index = math.floor(depth * (count - 1) + 0.5)
        if self.in_place:
            return self._pairs(count, trial), index
        asked = Pair(draw_uuid("asked key", self.seed, trial), draw_uuid("asked value", self.seed, trial))
        others = self._pairs(count - 1)
        return [*others[:index], asked, *others[index:]], index

    def _pairs(self, count: int, *trial: int) -> list[Pair]:
        """The first pairs of a trial, or of all trials."""
        drawn = self._drawn.setdefault(trial, [])
        while len(drawn) < count:
            what = (self.seed, *trial, len(drawn))
            drawn.append(Pair(draw_uuid("key", *what), draw_uuid("value", *what)))
        return drawn[:count]

    def _minimum(self, depth: float, trial: int) -> int:
        """The tokens of the shortest prompt."""
        draft = self._draft(depth, trial, _FEWEST_PAIRS)
        tokens = self.encoder.encode(draft.text)
        self.encoder.check_known(draft.text, tokens, *draft.marks["pair"])
        return len(tokens)

    def _check_length(self, length: int, minimum: int) -> None:
        if length < minimum:
            raise PromptError("the length is too short for the prompt", given=length, allowed=f"at least {minimum}")

    def _most_pairs(self, length: int, depth: float, trial: int) -> int:
        """As many pairs as fit into `length` tokens."""
        sizes: dict[int, int] = {}

        def size(pairs: int) -> int:
            if pairs not in sizes:
                sizes[pairs] = len(self.encoder.encode(self._draft(depth, trial, pairs).text))
            return sizes[pairs]

        few, many = _FEWEST_PAIRS, _FEWEST_PAIRS + 8
        each = (size(many) - size(few)) / (many - few)
        guess = few + round((length - size(few)) / each)
        # A pair has more than one token.
        reached = fewest(lambda more: size(few + more), length, guess=guess - few, most=length, tokens_per_unit=each)
        pairs = few + reached
        return pairs if size(pairs) == length else pairs - 1

    def _fill(self, length: int, depth: float, trial: int, pairs: int) -> Fitted | None:
        """The prompt with so many pairs, exactly `length` tokens, through digits at one value's end."""

        def draft(digits: int) -> Draft:
            return self._draft(depth, trial, pairs, digits)

        missing = length - len(self.encoder.encode(draft(0).text))
        return fit(self.encoder, length, draft, guess=missing, most=_MOST_DIGITS)

    def _draft(self, depth: float, trial: int, pairs: int, digits: int = 0) -> Draft:
        ordered, index = self._object(depth, trial, pairs)
        asked = ordered[index]
        last = pairs - 1 if index < pairs - 1 else pairs - 2
        longer = f"{ordered[last].value}{draw_hex(digits, 'digits', self.seed)}"
        ordered[last] = Pair(ordered[last].key, longer)
        lines = [f'"{pair.key}": "{pair.value}"' for pair in ordered]
        head = f"{INSTRUCTION}\n\n{DATA}\n{{"
        separator = ",\n "
        user = f'{head}{separator.join(lines)}}}\n\n{KEY} "{asked.key}"'
        text = self.encoder.turn(user, REPLY, joint="\n")
        starts = [text.index(user) + len(head)]
        for line in lines[:-1]:
            starts.append(starts[-1] + len(line) + len(separator))
        end = starts[last] + len(lines[last]) - len('"')
        pair = (starts[index], starts[index] + len(lines[index]))
        return Draft(text, (end - digits, end), {"pair": pair})

    def _answer(self, draft: Draft, asked: Pair) -> Ids:
        """The ids of the value with its quotes, as it stands in the object."""
        quoted = f'"{asked.value}"'
        answer = self.encoder.answer(draft.text, quoted)
        if squeezed(self.encoder.decode(answer)) != quoted:
            raise PromptError("the tokenizer cannot represent the value", given=quoted)
        return answer
