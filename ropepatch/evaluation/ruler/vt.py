"""Variable tracking: a chain of assignments in noise, and the question which variables hold its value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from ropepatch.evaluation.fitting import Draft
from ropepatch.evaluation.haystack import FILLER
from ropepatch.evaluation.prompt import TextEncoder
from ropepatch.evaluation.ruler.drawing import Draw
from ropepatch.evaluation.ruler.question import Question, RulerTask, joined

# RULER, scripts/data/synthetic/constants.py and variable_tracking.py.
TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
ANSWER_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, "
    "{num_v} variables are assigned the value {query}, they are: "
)

HOPS = 4
EXAMPLE_TOKENS = 500
"""What the solved example in front may have, its reply not counted."""


@dataclass(frozen=True)
class Wording:
    """Where implementations of this task differ.

    Attributes:
        template, answer_prefix: with the fields context, query and num_v.
        noise: a line of the haystack.
        joint: between the lines.
        behind_example: between the solved example and the question.
    """

    template: str = TEMPLATE
    answer_prefix: str = ANSWER_PREFIX
    noise: str = FILLER
    joint: str = "\n"
    behind_example: str = "\n\n"


RULER = Wording()


def chain(variables: Sequence[str], value: str) -> list[str]:
    """The assignments that give the value to the first variable and hand it on to each of the others."""
    first, *others = variables
    return [f"VAR {first} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(variables, others, strict=False))]


def in_noise(assignments: Sequence[str], lines: Sequence[str], places: Sequence[int], joint: str = "\n") -> Draft:
    """The assignments in their order, each before the line of the haystack that its place names.

    Args:
        places: ascending, 0 to len(lines) - 1: the haystack has the last word.

    Returns:
        The text; spare is what follows the last assignment, the marks "answer_0", ... are the assignments.
    """
    pieces = list(lines)
    where = [place + before for before, place in enumerate(places)]
    for position, text in zip(where, assignments, strict=True):
        pieces.insert(position, text)
    context, starts = joined(pieces, joint)
    marks = {f"answer_{i}": (starts[w], starts[w] + len(pieces[w])) for i, w in enumerate(where)}
    return Draft(context, (starts[where[-1] + 1], len(context)), marks)


def ask(context: str, value: str, count: int, wording: Wording = RULER) -> tuple[str, str]:
    """What the user says, and how the reply begins; `count` is the number of variables."""
    user = wording.template.format(context=context, query=value)
    return user, wording.answer_prefix.format(num_v=count, query=value)


def solved(context: str, value: str, variables: Sequence[str], wording: Wording = RULER) -> str:
    """An example with its reply, as it stands in front of the question."""
    user, reply = ask(context, value, len(variables), wording)
    return f"{user} {reply} {' '.join(variables)}"


class VariableTracking(RulerTask):
    """RULER's `vt`: one chain of four hops, after one solved example. A trial's chain is the same at every length."""

    most_tokens = 30
    name = "vt"
    filler = "the noise"

    def __init__(self, *, seed: int, encoder: TextEncoder) -> None:
        self._seed = seed
        self._example_lines = _example_lines(encoder)

    def question(self, trial: int, length: int) -> Question:
        draw = Draw(self._seed, self.name, trial)
        variables, value = _variables(draw, 5), _value(draw)
        example = _example(Draw(self._seed, self.name, trial, "example"), self._example_lines)

        def draft(units: int) -> Draft:
            places = sorted(Draw(self._seed, self.name, trial, "places").sample(units, HOPS + 1))
            context = in_noise(chain(variables, value), [FILLER] * units, places)
            user, _ = ask(context.text, value, len(variables))
            head = example + RULER.behind_example
            at = len(head) + user.index(context.text)
            marks = {name: (start + at, end + at) for name, (start, end) in context.marks.items()}
            return Draft(head + user, (context.spare[0] + at, context.spare[1] + at), marks)

        return Question(
            references=tuple(variables),
            reply=ask("", value, len(variables))[1],
            ideal=" ".join(variables),
            draft=draft,
            least=HOPS + 1,
            most=max(length, HOPS + 1),
            details={"value": value},
        )


def _variables(draw: Draw, letters: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) <= HOPS:
        found[draw.word(ascii_uppercase, letters)] = None
    return list(found)


def _value(draw: Draw) -> str:
    return str(10000 + draw.below(89999))


def _example(draw: Draw, lines: int) -> str:
    variables, value = _variables(draw, 3), _value(draw)
    context = in_noise(chain(variables, value), [FILLER] * lines, sorted(draw.sample(lines, HOPS + 1)))
    return solved(context.text, value, variables)


def _example_lines(encoder: TextEncoder) -> int:
    """How many lines of noise the example takes: as many as its tokens allow, as in RULER, and room for the chain."""
    lines = HOPS + 1
    while True:
        places = range(HOPS + 1)
        context = in_noise(chain(["AAA", "BBB", "CCC", "DDD", "EEE"], "12345"), [FILLER] * (lines + 1), places)
        if len(encoder.encode(" ".join(ask(context.text, "12345", HOPS + 1)))) > EXAMPLE_TOKENS:
            return lines
        lines += 1
