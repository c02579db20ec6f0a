"""How many rows a run needs, and how long each is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ropepatch.training.recipe import Recipe
from ropepatch.training.stages import Schedule


class Place(NamedTuple):
    """Where a row stands: its stage, its number within the stage, and its tokens."""

    stage: int
    number: int
    length: int


@dataclass(frozen=True)
class Plan:
    """Rows by stage.

    Attributes:
        counts: rows of each stage.
        lengths: tokens of a row of each stage.
    """

    counts: tuple[int, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each stage, and one past the last row of all."""
        return (0, *accumulate(self.counts))

    def place(self, row: int) -> Place:
        """Where a row stands."""
        for stage, (start, count) in enumerate(zip(self.starts, self.counts, strict=False)):
            if row < start + count:
                return Place(stage, row - start, self.lengths[stage])
        raise IndexError(row)


def plan_rows(recipe: Recipe) -> Plan:
    """Rows and lengths of a whole run.

    Raises:
        OptionError: neither `train.max_steps` nor `train.stages` says how long it is, or they disagree.
    """
    schedule = Schedule.of(recipe)
    return Plan(
        tuple((leg.stop - leg.start) * schedule.batch_size for leg in schedule.legs),
        tuple(leg.length for leg in schedule.legs),
    )


def share(plan: Plan, mine: npt.NDArray[np.bool_]) -> Plan:
    """The plan of one source: as many rows of each stage as are marked `mine`, one mark a row."""
    counts = tuple(int(mine[start:stop].sum()) for start, stop in pairwise(plan.starts))
    return Plan(counts, plan.lengths)
