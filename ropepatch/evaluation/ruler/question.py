"""What every task of RULER gives: one trial's question, for any amount of filler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ropepatch.evaluation.fitting import Draft


@dataclass(frozen=True)
class Question:
    """A trial's question. What is asked for does not depend on the amount of filler.

    Attributes:
        references: the texts that are looked for in the reply.
        reply: the words that the reply begins with (RULER's answer_prefix, without its leading space).
        ideal: how a perfect reply goes on.
        draft: what the user says with so many units of filler; its spare part is the end of the filler.
        least, most: units of filler.
        details: further fields of the trial's row.
    """

    references: tuple[str, ...]
    reply: str
    ideal: str
    draft: Callable[[int], Draft]
    least: int
    most: int
    details: Mapping[str, Any]


class RulerTask(ABC):
    """One of the 13 tasks.

    Attributes:
        name: RULER's name of it.
        most_tokens: RULER's tokens_to_generate.
        any_reference: whether one reference is enough (string_match_part) instead of all (string_match_all).
        filler: what the filler is made of, for messages.
    """

    most_tokens: ClassVar[int]
    any_reference: ClassVar[bool] = False
    name: str
    filler: str

    @abstractmethod
    def question(self, trial: int, length: int) -> Question:
        """The question of a trial; `length` (prompt tokens) decides what RULER makes depend on it.

        Raises:
            PromptError: there is no such question.
        """


def joined(pieces: Iterable[str], joint: str) -> tuple[str, list[int]]:
    """The pieces in one text, and the character at which each begins."""
    pieces = list(pieces)
    starts, at = [], 0
    for piece in pieces:
        starts.append(at)
        at += len(piece) + len(joint)
    return joint.join(pieces), starts
