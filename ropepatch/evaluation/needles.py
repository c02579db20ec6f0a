"""What is hidden in a haystack, and what is asked: the classic needle, a user's own, or drawn keys with values.

The classic needle, its question and the words around both are those of Kamradt's "needle in a haystack" test
(github.com/gkamradt/LLMTest_NeedleInAHaystack, 2023); his test asks a second model for a grade, here the answer's
phrase is looked for. Needles of keys and values are worded in the style of RULER's (arXiv 2404.06654), not identically:
for RULER's own tasks there is the suite `ruler`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ropepatch.evaluation.draws import draw_number, draw_uuid
from ropepatch.evaluation.words import ADJECTIVES, NOUNS

INSTRUCTION = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct"
RESTRICTION = "Don't give information outside the document or repeat your findings"

NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
QUESTION = "What is the best thing to do in San Francisco?"
REPLY = "The best thing to do in San Francisco is"
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"

NUMBER_DIGITS = 7

CITIES = (
    "Amsterdam", "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Dublin", "Geneva", "Istanbul", "Kyoto", "Lagos",
    "Lima", "Lisbon", "London", "Madrid", "Mumbai", "Nairobi", "Oslo", "Paris", "Prague", "Rome", "Seoul", "Sydney",
    "Vienna",
)  # fmt: skip
_ACTIVITIES = (
    "drink tea in the garden of an old museum",
    "walk along the river before the shops open",
    "ride a tram to the last stop and back",
    "listen to the street musicians by the station",
    "buy warm bread and feed the birds",
    "climb the tallest tower at dusk",
    "borrow a bicycle and follow the canals",
    "watch the boats from the harbor wall",
)


@dataclass(frozen=True)
class Quiz:
    """One trial's contents.

    Attributes:
        needles: what is hidden, in the order of the text.
        distractors: what is hidden besides and not asked for.
        question, reply: the question, and the first words of its answer.
        answers: what must be found, one or more.
        ideal: how `reply` goes on in an ideal answer.
    """

    needles: tuple[str, ...]
    distractors: tuple[str, ...]
    question: str
    reply: str
    answers: tuple[str, ...]
    ideal: str


def classic(seed: int, trial: int, distractors: int) -> Quiz:
    """Kamradt's needle; distractors name other cities and other things to do."""
    cities = list(CITIES)
    others = []
    for number in range(distractors):
        city = cities.pop(draw_number(len(cities), "city", seed, trial, number))
        activity = _ACTIVITIES[draw_number(len(_ACTIVITIES), "activity", seed, trial, number)]
        others.append(f"The best thing to do in {city} is {activity}.")
    return Quiz((NEEDLE,), tuple(others), QUESTION, REPLY, (ANSWER,), ANSWER)


def own(needles: Sequence[str], question: str, reply: str, answers: Sequence[str]) -> Quiz:
    """A user's needles, in the order given, and what must be found."""
    return Quiz(tuple(needles), (), question, reply, tuple(answers), listing(answers))


def numbers(seed: int, trial: int, needles: int, distractors: int) -> Quiz:
    """Numbers of 7 digits under keys of two words ("quiet-river")."""
    low = 10 ** (NUMBER_DIGITS - 1)

    def draw(attempt: int) -> tuple[str, str]:
        adjective = ADJECTIVES[draw_number(len(ADJECTIVES), "adjective", seed, trial, attempt)]
        noun = NOUNS[draw_number(len(NOUNS), "noun", seed, trial, attempt)]
        return f"{adjective}-{noun}", str(low + draw_number(9 * low, "number", seed, trial, attempt))

    return _key_values("number", _distinct(draw, needles + distractors), needles)


def uuids(seed: int, trial: int, needles: int, distractors: int) -> Quiz:
    """UUIDs under keys that are UUIDs too."""

    def draw(attempt: int) -> tuple[str, str]:
        return draw_uuid("key", seed, trial, attempt), draw_uuid("value", seed, trial, attempt)

    return _key_values("UUID", _distinct(draw, needles + distractors), needles)


def listing(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *rest, last = items
    return f"{', '.join(rest)} and {last}" if rest else last


def _distinct(draw: Callable[[int], tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """The first `count` draws whose keys and values are all new."""
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    attempt = 0
    while len(pairs) < count:
        pair = draw(attempt)
        attempt += 1
        if seen.isdisjoint(pair):
            pairs.append(pair)
            seen.update(pair)
    return pairs


def _key_values(kind: str, pairs: list[tuple[str, str]], needles: int) -> Quiz:
    sentences = [f"The special magic {kind} for {key} is: {value}." for key, value in pairs]
    keys = listing([key for key, _ in pairs[:needles]])
    values = tuple(value for _, value in pairs[:needles])
    if needles == 1:
        question = f"What is the special magic {kind} for {keys} mentioned in the document?"
        reply = f"The special magic {kind} for {keys} is:"
    else:
        question = f"What are the special magic {kind}s for {keys} mentioned in the document?"
        reply = f"The special magic {kind}s for {keys} are, in this order:"
    return Quiz(tuple(sentences[:needles]), tuple(sentences[needles:]), question, reply, values, listing(values))
