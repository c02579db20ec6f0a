"""What a made-up window says: the facts that are hidden, the questions at its end, and their answers.

`passkey` has the very wording of the evaluation suite of that name (Landmark Attention, arXiv 2305.16300): a model that
was trained on it knows the suite's question, and its score there tells how far it reaches, not that it retrieves in
general. `key_value` and `multi_hop` are worded apart from every evaluation suite: names are two words ("amber
lantern"), values are numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from ropepatch.evaluation.haystack import FILLER
from ropepatch.evaluation.tasks import passkey
from ropepatch.evaluation.words import ADJECTIVES, NOUNS

DIGITS = 5
"""Of every number."""

_HOPS = (2, 4)
_CHAINS = 3
_MOST_FACTS = 24
_MOST_QUESTIONS = 8
_TOKENS_PER_FACT = 96


@dataclass(frozen=True)
class Said:
    """A piece of text and the answers in it, as character spans."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Exam:
    """What a window says besides its haystack.

    Attributes:
        head: before the haystack; ends its line.
        facts: sentences hidden in the haystack, those that are asked for first.
        asked: how many are asked for.
        lines: each fact is a line of its own; otherwise it stands among the sentences.
        tail: behind the haystack: questions and answers.
        secrets: words that the haystack must not hold by accident.
    """

    head: str
    facts: tuple[str, ...]
    asked: int
    lines: bool
    tail: Said
    secrets: tuple[str, ...]


@dataclass(frozen=True)
class Names:
    """The words that names are made of."""

    adjectives: Sequence[str] = ADJECTIVES
    nouns: Sequence[str] = NOUNS

    def draw(self, random: Random, count: int) -> list[str]:
        """So many different names."""
        numbers = random.sample(range(len(self.adjectives) * len(self.nouns)), count)
        return [f"{self.adjectives[n // len(self.nouns)]} {self.nouns[n % len(self.nouns)]}" for n in numbers]

    def __len__(self) -> int:
        return len(self.adjectives) * len(self.nouns)


def make_exam(task: str, random: Random, names: Names, length: int, less: int) -> Exam:
    """The exam of one window.

    Args:
        task: "passkey", "key_value" or "multi_hop".
        length: tokens of the window: longer ones hide more.
        less: how many facts fewer than usual, down to the fewest; for windows with little room.
    """
    match task:
        case "passkey":
            return _passkey(random)
        case "key_value":
            return _key_value(random, names, max(2, min(length // _TOKENS_PER_FACT, _MOST_FACTS) - less))
        case _:
            return _multi_hop(random, names, max(1, _CHAINS - less), _HOPS[0] if less else random.randint(*_HOPS))


def fewest(task: str, less: int, length: int) -> bool:
    """Whether so many facts fewer are the fewest there are."""
    usual = {"passkey": 0, "key_value": min(length // _TOKENS_PER_FACT, _MOST_FACTS) - 2, "multi_hop": _CHAINS - 1}
    return less >= usual[task]


def words(task: str) -> list[str]:
    """Texts that hold every word a task may write over filler, for a tokenizer that is made for it.

    Digits stand by themselves in "0 1 2 3 4 5 6 7 8 9"; a tokenizer must be able to write every number of 5 digits.
    """
    random = Random(0)
    exams = [make_exam(name, random, Names(), 8 * _TOKENS_PER_FACT, 0) for name in tasks_of(task)]
    said = [text for exam in exams for text in (exam.head, *exam.facts, exam.tail.text)]
    drawn = [] if task == "passkey" else [" ".join(ADJECTIVES), " ".join(NOUNS)]
    return [FILLER, " ".join("0123456789"), *said, *drawn]


def tasks_of(task: str) -> tuple[str, ...]:
    """The tasks that a recipe's word stands for."""
    return ("passkey", "key_value", "multi_hop") if task == "mixed" else (task,)


def _passkey(random: Random) -> Exam:
    (key,) = _numbers(random, 1)
    fact = f"The pass key is {key}. Remember it. {key} is the pass key."
    tail = _say([(f"\n{passkey.QUESTION} {passkey.REPLY}", f" {key}")])
    return Exam(f"{passkey.INSTRUCTION}\n", (fact,), 1, True, tail, (key,))


def _key_value(random: Random, names: Names, count: int) -> Exam:
    keys, values = names.draw(random, count), _numbers(random, count)
    facts = [_fact(key, value) for key, value in zip(keys, values, strict=True)]
    asked = max(1, min(count // 3, _MOST_QUESTIONS))
    parts = [(f"\nWhat is the number of the {keys[n]}? It is", f" {values[n]}") for n in range(asked)]
    head = "Some of the sentences here say which number a thing has. Keep them in mind.\n"
    return Exam(head, tuple(facts), asked, False, _say(parts), (*keys, *values))


def _multi_hop(random: Random, names: Names, chains: int, hops: int) -> Exam:
    keys, values = names.draw(random, chains * (hops + 1)), _numbers(random, chains)
    facts, parts = [], []
    for chain in range(chains):
        stops = keys[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        facts += [f"From the {a} the way leads to the {b}." for a, b in pairwise(stops)]
        facts.append(_fact(stops[-1], values[chain]))
        walk = "".join(f" the {stop}," for stop in stops[1:])
        parts.append((f"\nWhere does the way from the {stops[0]} lead? To", f"{walk} number {values[chain]}"))
    head = "Some of the sentences here lead from one thing to the next. Keep them in mind.\n"
    return Exam(head, tuple(facts), hops + 1, False, _say(parts[:1]), (*keys, *values))


def _fact(key: str, value: str) -> str:
    return f"The number of the {key} is {value}."


def _numbers(random: Random, count: int) -> list[str]:
    """Different numbers of `DIGITS` digits, the first not 0."""
    low = 10 ** (DIGITS - 1)
    return [str(number) for number in random.sample(range(low, 10 * low), count)]


def _say(parts: Sequence[tuple[str, str]]) -> Said:
    """Questions, each with its answer behind it, and a full stop between two."""
    text, answers = "", []
    for question, answer in parts:
        start = len(text) + len(question)
        answers.append((start, start + len(answer)))
        text += f"{question}{answer}."
    return Said(text.removesuffix("."), tuple(answers))
