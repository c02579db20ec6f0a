"""A time budget: trials go where the intervals are widest, as long as there is time.

A cell is all trials of one task, length and depth. Batches are chosen one after the other: of the cells whose Wilson
interval is the widest, each gets half as many trials as it has (at least one), the cheapest cells first, as far as the
batch is expected to fit into the time that is left. A cell without a trial has the interval 0 to 1, so the first round
gives every cell one trial. The trials of a batch are run together, so that they share prefixes.

Before each trial it is asked whether it is likely to end in time; where it is not, cheaper cells are tried. So the
budget is exceeded by one trial at most, and only by one that took longer than those before it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from ropepatch.errors import OptionError
from ropepatch.evaluation.progress import say, time_bar
from ropepatch.evaluation.scoring import wilson_interval
from ropepatch.evaluation.task import Place

if TYPE_CHECKING:
    from ropepatch.evaluation.sharding import Ranks
    from ropepatch.evaluation.suite import Job

Row = dict[str, Any]
Clock = Callable[[], float]


@runtime_checkable
class PlannedJob(Protocol):
    """A job that knows what its trials cost. Trials of another job are run one by one, by length."""

    def start_plan(self) -> bool:
        """Get ready for `costs`. Whether they are in seconds; otherwise in any unit of work."""

    def costs(self, places: Sequence[Place]) -> dict[Place, float]:
        """What trials that are run together cost, in the order in which `rows` yields them."""


@dataclass(frozen=True)
class Budget:
    """So much time, from now.

    Args:
        minutes: more than 0.
        clock: the time in seconds.

    Raises:
        OptionError: no positive number.
    """

    minutes: float
    clock: Clock = field(default=time.monotonic, repr=False)
    deadline: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        minutes = self.minutes
        if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < math.inf:
            raise OptionError("the budget is a number of minutes", given=minutes, allowed="more than 0")
        # Frozen: there is one moment from which the time counts.
        object.__setattr__(self, "deadline", self.clock() + 60 * minutes)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - self.clock()


@dataclass
class _Cell:
    """What is known of a cell, and what may still be run.

    Attributes:
        waiting: trials that are left.
        alone: cost of the next of them, run by itself.
        n: finished trials.
        score: sum of their scores.
    """

    waiting: list[Place]
    alone: float = 0.0
    n: int = 0
    score: float = 0.0

    @property
    def width(self) -> float:
        low, high = wilson_interval(self.score, self.n)
        # 3 of 7 and 4 of 7 are as wide, but for rounding.
        return round(high - low, 9)

    @property
    def share(self) -> list[Place]:
        return self.waiting[: max(1, self.n // 2)]


class _Measured(NamedTuple):
    place: Place
    score: float
    cost: float
    seconds: float


@dataclass
class Spender:
    """Spends a budget on the trials that are left.

    Args:
        job: whose trials they are.
        left: the trials.
        finished: rows of those that are done.
        ranks: the processes. The first one chooses each batch; all share it, and wait for each other at its end.
        budget: the time.
    """

    job: Job
    left: Sequence[Place]
    finished: Iterable[Row]
    ranks: Ranks
    budget: Budget

    def __post_init__(self) -> None:
        self.cells: dict[tuple[Any, ...], _Cell] = {}
        for place in sorted(self.left, key=lambda place: place.order):
            self.cells.setdefault(place[:3], _Cell([])).waiting.append(place)
        for row in self.finished:
            self._count(Place.of(row), row["correct"])
        self.trials = 0
        self._spent = (0.0, 0.0)
        self._pace: float | None = None

    def rows(self, *, progress: bool) -> Generator[Row, None, None]:
        """Measure trials until the time is used up; this process's share of them, each row as soon as it is there.

        Args:
            progress: show a bar on stderr, and say at the end what was left out.
        """
        if not self.left:
            return
        if isinstance(self.job, PlannedJob) and self.job.start_plan():
            self._pace = 1.0
        for cell in self.cells.values():
            self._weigh(cell)
        with time_bar(60 * self.budget.minutes, progress) as tell:
            while batch := self.ranks.from_first(self._choose(self.budget.left) if self.ranks.is_first else []):
                measured: list[_Measured] = []
                for row in self._run(batch, measured):
                    yield row
                    self.trials += 1
                    tell(60 * self.budget.minutes - self.budget.left, self.trials)
                everyone = self.ranks.gather(measured)
                if not everyone:
                    break
                self._learn(everyone)
        if progress and self.waiting:
            say(self.leftover())

    @property
    def waiting(self) -> list[Place]:
        """The trials that are left."""
        return [place for cell in self.cells.values() for place in cell.waiting]

    def leftover(self) -> str:
        """What the budget did not cover, in one line."""
        empty: dict[tuple[str, int], int] = {}
        for (task, length, _), cell in self.cells.items():
            if not cell.n:
                empty[task, length] = empty.get((task, length), 0) + 1
        many_tasks = len({task for task, _ in empty}) > 1
        missing = ", ".join(
            f"{task + ' ' if many_tasks else ''}{length:,} ({count} cell{'' if count == 1 else 's'})"
            for (task, length), count in sorted(empty.items())
        )
        return (
            f"the budget of {self.budget.minutes:g} minutes is used up; trials left: {len(self.waiting)}"
            + (f"; not one trial yet at length {missing}" if missing else "")
            + ". The same command goes on."
        )

    def _choose(self, seconds: float) -> list[Place]:
        """The next batch; empty when nothing that is left is likely to end in time."""
        cells = [cell for cell in self.cells.values() if cell.waiting and self._fits([cell.alone], seconds)]
        if seconds <= 0 or not cells:
            return []
        widest = max(cell.width for cell in cells)
        group = sorted((cell for cell in cells if cell.width == widest), key=lambda cell: cell.alone)
        shares = [cell.share for cell in group]
        wanted = [share[k] for k in range(max(map(len, shares))) for share in shares if k < len(share)]
        if not isinstance(self.job, PlannedJob) or self._pace is None:
            return wanted[: self.ranks.world_size]
        few, many = 1, len(wanted)
        while few < many:
            middle = (few + many + 1) // 2
            if self._fits(self._costs(wanted[:middle]).values(), seconds):
                few = middle
            else:
                many = middle - 1
        return wanted[:few]

    def _run(self, batch: list[Place], measured: list[_Measured]) -> Generator[Row, None, None]:
        costs = self._costs(batch)
        order = list(costs)
        following = dict(itertools.pairwise(order))
        before = self.budget.clock()
        with closing(self.job.rows(batch, self.ranks, progress=False)) as rows:
            for row in rows:
                now = self.budget.clock()
                place = Place.of(row)
                measured.append(_Measured(place, float(row["correct"]), costs[place], now - before))
                before = now
                yield row
                upcoming = following.get(place)
                if upcoming is not None and not self._fits([costs[upcoming]], self.budget.left, measured):
                    return

    def _learn(self, measured: Sequence[_Measured]) -> None:
        for trial in measured:
            cell = self.cells[trial.place[:3]]
            cell.waiting.remove(trial.place)
            self._count(trial.place, trial.score)
            self._weigh(cell)
        self._spent = self._with(measured)
        seconds, cost = self._spent
        self._pace = seconds / cost if cost else self._pace

    def _count(self, place: Place, score: float) -> None:
        cell = self.cells.setdefault(place[:3], _Cell([]))
        cell.n += 1
        cell.score += score

    def _weigh(self, cell: _Cell) -> None:
        if cell.waiting:
            cell.alone = sum(self._costs(cell.waiting[:1]).values())

    def _costs(self, places: list[Place]) -> Mapping[Place, float]:
        if isinstance(self.job, PlannedJob):
            return self.job.costs(places)
        return {place: float(place.length) for place in places}

    def _with(self, measured: Sequence[_Measured]) -> tuple[float, float]:
        seconds, cost = self._spent
        return seconds + sum(trial.seconds for trial in measured), cost + sum(trial.cost for trial in measured)

    def _fits(self, costs: Iterable[float], seconds: float, measured: Sequence[_Measured] = ()) -> bool:
        """Whether trials are likely to end within so many seconds; yes while nothing is known of the pace."""
        spent, cost = self._with(measured)
        pace = spent / cost if cost else self._pace
        if pace is None:
            return seconds > 0
        amounts = list(costs)
        return pace * max(sum(amounts) / self.ranks.world_size, max(amounts)) <= seconds
