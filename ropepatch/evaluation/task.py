"""What every retrieval task is: places of a grid, a prompt for each, and a judgement of what came out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ropepatch.errors import PromptError
from ropepatch.evaluation.prompt import Ids, TextEncoder


class Place(NamedTuple):
    """Which trial of a run: unique within its folder.

    Attributes:
        task: name of the task; a suite may have several.
        length: tokens of the prompt (or of the document that is measured).
        depth: place of what is looked for, 0..1; None where a task has no such thing.
        trial: number within its cell, from 0.
    """

    task: str
    length: int
    depth: float | None
    trial: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Place:
        """The place that a finished trial's row names."""
        depth = row["depth"]
        return cls(str(row["task"]), int(row["length"]), None if depth is None else float(depth), int(row["trial"]))

    @property
    def order(self) -> tuple[str, int, float, int]:
        """A sort key: a missing depth comes first."""
        return self.task, self.length, -1.0 if self.depth is None else self.depth, self.trial


@dataclass(frozen=True, eq=False)
class Prompt:
    """One trial's prompt.

    Attributes:
        place: which trial; `place.length` equals len(ids).
        ids: the prompt's token ids, shape [length], int32.
        answer: ids of the ideal continuation as they follow the prompt, at least one: they are scored teacher-forced.
        expected: what the results call the answer: a text, or several of which each is looked for.
        most_tokens: how many tokens may be generated.
        details: further fields of the trial's row ("key_start": first token of the key, ...).
    """

    place: Place
    ids: Ids
    answer: Ids
    expected: str | Sequence[str]
    most_tokens: int
    details: Mapping[str, Any] = field(default_factory=dict)


class Grade(NamedTuple):
    """What a model's text is worth: the text as it is recorded, its headline score 0..1, further fields of the row."""

    output: str
    correct: float
    details: Mapping[str, Any] = {}


class Retrieval(ABC):
    """A suite of prompts, made ready for one tokenizer. Building the same place twice gives the same prompt.

    Attributes:
        encoder: the model's tokenizer.
    """

    encoder: TextEncoder

    @abstractmethod
    def places(self) -> list[Place]:
        """Every trial of the suite."""

    def inputs(self) -> Mapping[str, Any]:
        """What fixes the prompts besides the settings: a digest of every text that was read, under setting names."""
        return {}

    @abstractmethod
    def build(self, place: Place) -> Prompt:
        """The prompt of one trial.

        Raises:
            PromptError: it cannot be built: the length is too short (names the minimum), the tokenizer lacks digits.
        """

    @abstractmethod
    def enough(self, prompt: Prompt, text: str) -> bool:
        """Whether more text could not change the grade, so that generation may stop."""

    @abstractmethod
    def grade(self, prompt: Prompt, text: str) -> Grade:
        """Judge the generated text."""


class Grid(NamedTuple):
    """Lengths in tokens, depths, and how many trials each cell has."""

    lengths: Sequence[int]
    depths: Sequence[float] = (0.5,)
    trials: int = 1


class GridTask(Retrieval):
    """One task over lengths, depths and trials.

    Attributes:
        name: of the task.
        grid: what is asked.
        seed: of everything that is drawn.
    """

    name: ClassVar[str]
    grid: Grid
    seed: int

    def places(self) -> list[Place]:
        lengths, depths, trials = self.grid
        return [Place(self.name, n, depth, trial) for n in lengths for depth in depths for trial in range(trials)]

    @staticmethod
    def depth_of(place: Place) -> float:
        """The depth of a place.

        Raises:
            PromptError: it has none, or one that is not within 0..1.
        """
        if place.depth is None or not (math.isfinite(place.depth) and 0 <= place.depth <= 1):
            raise PromptError("depth out of range", given=place.depth, allowed="0 to 1")
        return place.depth
