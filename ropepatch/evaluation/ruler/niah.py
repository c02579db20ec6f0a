"""Needles in a haystack: one or several magic numbers or UUIDs in noise, prose, or among needles of the same form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from ropepatch.evaluation.draws import draw_uuid
from ropepatch.evaluation.fitting import Draft
from ropepatch.evaluation.haystack import FILLER
from ropepatch.evaluation.ruler.drawing import Draw
from ropepatch.evaluation.ruler.essay import Essay
from ropepatch.evaluation.ruler.question import Question, RulerTask, joined
from ropepatch.evaluation.ruler.vocabulary import Vocabulary

# RULER, scripts/data/synthetic/constants.py and niah.py.
TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
)
ANSWER_PREFIX = "The special magic {type_needle_v} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."

# Of the needles in prose, in hundredths: RULER's 40 places.
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
_LEAST_WORDS = 50


@dataclass(frozen=True)
class Kind:
    """What one of the eight tasks hides, and in what. Fields as in RULER's synthetic.yaml."""

    haystack: Literal["noise", "essay", "needle"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


KINDS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", values="uuids"),
    "niah_multikey_1": Kind("essay", num_keys=4),
    "niah_multikey_2": Kind("needle"),
    "niah_multikey_3": Kind("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Kind("essay", num_values=4),
    "niah_multiquery": Kind("essay", num_keys=4, num_queries=4),
}


def needle(values: str, key: str, value: str) -> str:
    """The sentence that hides a value; `values` is "numbers" or "uuids"."""
    return NEEDLE.format(type_needle_v=values, key=key, value=value)


def among_lines(lines: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> Draft:
    """Needles on lines of their own, each before the line of the haystack that its place names.

    Args:
        lines: of the haystack.
        needles: in the order in which they stand.
        places: of each, ascending, 0 to len(lines) - 1: the haystack has the last word.

    Returns:
        The text; spare is what follows the last needle, the marks "0", "1", ... are the needles.
    """
    pieces = list(lines)
    where = [place + before for before, place in enumerate(places)]
    for position, text in zip(where, needles, strict=True):
        pieces.insert(position, text)
    context, starts = joined(pieces, "\n")
    marks = {str(i): (starts[w], starts[w] + len(pieces[w])) for i, w in enumerate(where)}
    return Draft(context, (starts[where[-1] + 1], len(context)), marks)


def ask(values: str, context: str, queries: Sequence[str], *, several: bool) -> tuple[str, str]:
    """What the user says, and how the reply begins.

    Args:
        values: "numbers" or "uuids".
        context: the haystack with its needles.
        queries: the keys that are asked for.
        several: whether more than one value is asked for; RULER puts the rest in the singular.
    """
    template, prefix = TEMPLATE, ANSWER_PREFIX
    if not several:
        for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
            template, prefix = template.replace(old, new), prefix.replace(old, new)
        values = values.removesuffix("s")
    query = f"{', '.join(queries[:-1])}, and {queries[-1]}" if len(queries) > 1 else queries[0]
    user = template.format(type_needle_v=values, context=context, query=query)
    return user, prefix.format(type_needle_v=values, query=query)


class Niah(RulerTask):
    """One of the eight needle tasks. A trial's needles are the same at every length."""

    most_tokens = 128

    def __init__(self, name: str, *, seed: int, words: Vocabulary, essay: Essay | None) -> None:
        self.name = name
        self.kind = KINDS[name]
        self.filler = f"the haystack of {name}" if essay is None else f"the text {essay.source.path}"
        self._seed = seed
        self._words = words
        self._essay = essay

    def question(self, trial: int, length: int) -> Question:
        kind = self.kind
        draw = Draw(self._seed, self.name, trial)
        pairs = self._pairs(trial)
        hidden = [next(pairs) for _ in range(kind.num_keys * kind.num_values)]
        # One key may have several values; then the other keys that were drawn with them are not used.
        keys = [hidden[i * kind.num_values][0] for i in range(kind.num_keys)]
        values = [
            [value for _, value in hidden[i * kind.num_values :][: kind.num_values]] for i in range(kind.num_keys)
        ]
        needles = draw.shuffled(
            [needle(kind.values, key, value) for key, group in zip(keys, values, strict=True) for value in group]
        )
        asked = draw.sample(kind.num_keys, kind.num_queries)
        queries = [keys[i] for i in asked]
        references = tuple(value for i in asked for value in values[i])
        if kind.haystack == "essay":
            depths = sorted(DEPTHS[i] / 100 for i in draw.sample(len(DEPTHS), len(needles)))
        else:
            depths = sorted(draw.random() for _ in needles)
        answers = [
            str(number) for value in references for number, text in enumerate(needles) if text.endswith(f" {value}.")
        ]

        def draft(units: int) -> Draft:
            if kind.haystack == "essay":
                assert self._essay is not None
                context = self._essay.with_needles(units, needles, depths)
            else:
                lines = [FILLER] * units if kind.haystack == "noise" else self._distractors(trial, units)
                context = among_lines(lines, needles, [int(depth * units) for depth in depths])
            user, _ = ask(kind.values, context.text, queries, several=len(references) > 1)
            at = user.index(context.text)
            marks = {name: (start + at, end + at) for name, (start, end) in context.marks.items()}
            return Draft(
                user,
                (context.spare[0] + at, context.spare[1] + at),
                {f"answer_{i}": marks[name] for i, name in enumerate(answers)},
            )

        return Question(
            references=references,
            reply=ask(kind.values, "", queries, several=len(references) > 1)[1],
            ideal=", ".join(references),
            draft=draft,
            least=_LEAST_WORDS if kind.haystack == "essay" else 1,
            most=length if self._essay is None else len(self._essay),
            details={"depths": [round(depth, 4) for depth in depths]},
        )

    def _pairs(self, trial: int) -> Iterator[tuple[str, str]]:
        """Keys with values, all different: first those that are hidden, then the distractors."""
        kind = self.kind
        draw = Draw(self._seed, self.name, trial, "values")
        seen: set[str] = set()
        keys = self._words.distinct_pairs(Draw(self._seed, self.name, trial, "keys"))
        number = 0
        while True:
            key = next(keys) if kind.keys == "words" else draw_uuid(self._seed, self.name, trial, "key", number)
            value = ""
            while not value or value in seen:
                if kind.values == "numbers":
                    value = str(10**6 + draw.below(9 * 10**6))
                else:
                    value = draw_uuid(self._seed, self.name, trial, "value", number)
            seen.add(value)
            number += 1
            yield key, value

    def _distractors(self, trial: int, n: int) -> list[str]:
        pairs = islice(self._pairs(trial), 1, 1 + n)
        return [needle(self.kind.values, key, value) for key, value in pairs]
