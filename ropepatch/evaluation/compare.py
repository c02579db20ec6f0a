"""`compare`: reads runs, refuses those that cannot be compared, and measures differences on the trials they share."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ropepatch.errors import OptionError, RecordError, UsageError, did_you_mean
from ropepatch.evaluation.comparison import Comparison as Comparison
from ropepatch.evaluation.comparison import ComparisonRow as ComparisonRow
from ropepatch.evaluation.comparison import Part
from ropepatch.evaluation.comparison import Run as Run
from ropepatch.evaluation.folder import RUN, Row, differences, read_rows, suite_of
from ropepatch.evaluation.scoring import wilson_interval
from ropepatch.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    holm,
    mcnemar_exact,
    newcombe_interval,
    sign_flip_test,
)
from ropepatch.evaluation.task import Place
from ropepatch.files import read_object


class Trial(NamedTuple):
    """What one trial (or document) adds to a part: a sum, and what it is a sum of (1 trial, or so many tokens)."""

    total: float
    weight: float = 1.0


Trials = Mapping[Place, Trial]


def compare(folders: Sequence[str | os.PathLike[str]], *, base: str | None = None, least: int = 2) -> Comparison:
    """Read the output folders of evaluations of one suite and set them side by side.

    Args:
        folders: as many as `least`, or more.
        base: the run that differences are to, by its folder's name or its title; default the first.
        least: 1 to have a single run in the same form.

    Raises:
        UsageError: fewer than two folders, or runs that cannot be compared (other tasks, no shared length, other
            questions under the same trial numbers, other documents); the message says which and why.
        OptionError: no run is called `base`.
        RecordError: a folder is missing, unfinished from the first trial on, or corrupt.
        DependencyError: scipy is missing, which scores other than 0 and 1 take.
    """
    return compare_runs(read_runs(folders, least=least), base=base)


def read_runs(folders: Sequence[str | os.PathLike[str]], *, least: int = 2) -> list[Run]:
    """The output folders of evaluations, of one suite or several, as runs with names of their own.

    Raises:
        UsageError: fewer than `least` folders, or one of them twice.
        RecordError: a folder is missing, unfinished from the first trial on, or corrupt.
    """
    if len(folders) < least:
        raise UsageError("comparing takes at least two folders", given=[str(folder) for folder in folders])
    paths = [Path(folder) for folder in folders]
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def compare_runs(runs: Sequence[Run], *, base: str | None = None) -> Comparison:
    """`compare` of runs that were read before."""
    first = runs[0] if base is None else find_base(runs, base)
    for run in runs:
        if run is not first and (reason := conflict(first, run) or _apart(first, run)):
            raise UsageError(f"the runs {first.path} and {run.path} cannot be compared: {reason}")
    return side_by_side(runs, first)


def side_by_side(runs: Sequence[Run], first: Run) -> Comparison:
    """Runs without a `conflict` as rows of one table, with differences to `first` where they share trials with it."""
    several = len({row["task"] for run in runs for row in run.rows}) > 1
    trials = {run.name: _trials(run, several) for run in runs}
    # Tasks stay in the order in which the suite has them.
    tasks = [None, *dict.fromkeys(cell.get("task") for run in runs for cell in run.summary["cells"])]
    parts = sorted(
        {part for own in trials.values() for part in own}, key=lambda part: (tasks.index(part.task), part.length or 0)
    )
    rows = [
        _row(run, part, trials[run.name][part], None if run is first else trials[first.name].get(part, {}))
        for part in parts
        for run in runs
        if part in trials[run.name]
    ]
    fractional = first.measure == "accuracy" and any(row["correct"] not in (0, 1) for run in runs for row in run.rows)
    return Comparison(list(runs), _adjusted(rows), first.name, first.measure, fractional)


def find_base(runs: Sequence[Run], base: str) -> Run:
    """The run of this folder name or, where none has it, the first of this title.

    Raises:
        OptionError: there is none.
    """
    for run in (*(run for run in runs if run.name == base), *(run for run in runs if run.title == base)):
        return run
    allowed = list(dict.fromkeys(name for run in runs for name in (run.name, run.title)))
    raise OptionError("no run is called so", given=base, allowed=allowed, hint=did_you_mean(base, allowed))


def read_run(path: Path, name: str | None = None) -> Run:
    """One evaluation folder, finished or not; the summary is made afresh from its trials. `name`: default its title.

    Raises:
        RecordError: the folder is missing, holds no finished trial, or is corrupt.
    """
    if not path.is_dir():
        raise RecordError(f"the path {path} is not an evaluation folder: no such folder")
    run = read_object(path / RUN)
    configuration, title = run.get("configuration"), run.get("title")
    if not isinstance(configuration, dict) or not isinstance(title, str):
        raise RecordError(f"the file {path / RUN} has no configuration or no title")
    rows = read_rows(path)
    summary = suite_of(configuration).summarise(rows, configuration, title=title)
    return Run(name or title, path, title, configuration.get("model"), configuration, summary, rows, run)


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    absolute = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in absolute) + 1):
        names = ["/".join(path.parts[-depth:]) for path in absolute]
        if len(set(names)) == len(names):
            return names
    raise UsageError("a folder is named twice", given=[str(path) for path in paths])


def conflict(first: Run, other: Run) -> str | None:
    """Why two runs are not measurements of the same thing; None where they are."""
    tasks = first.summary["task"], other.summary["task"]
    if tasks[0] != tasks[1]:
        return f"they ran different tasks ({tasks[0]} and {tasks[1]}), which ropepatch.overview takes"
    if first.measure == "loss":
        texts = first.configuration.get("text"), other.configuration.get("text")
        return "they read different texts" if any(differences(*texts)) else None
    base = _by_place(first.rows)
    for place, row in _by_place(other.rows).items():
        if place in base and base[place].get("answer") != row.get("answer"):
            return (
                f"they ask different questions: at {_words(place)} the answers are "
                f"{base[place].get('answer')!r} and {row.get('answer')!r} (seeds {base[place].get('seed')} and "
                f"{row.get('seed')})"
            )
    return None


def _apart(first: Run, other: Run) -> str | None:
    """Why two runs have nothing in common; None where they have."""
    if first.measure == "loss":
        shared = _by_place(first.rows).keys() & _by_place(other.rows).keys()
        return None if shared else "they share no document"
    lengths = [sorted({row["length"] for row in run.rows}) for run in (first, other)]
    if set(lengths[0]) & set(lengths[1]):
        return None
    return f"they share no prompt length ({lengths[0]} and {lengths[1]} tokens)"


def _trials(run: Run, several: bool) -> dict[Part, dict[Place, Trial]]:
    """A run's trials by part. `several`: whether the single tasks are parts of their own."""
    found: dict[Part, dict[Place, Trial]] = {}
    for place, row in _by_place(run.rows).items():
        for part, trial in _losses(row) if run.measure == "loss" else _scores(row, several):
            found.setdefault(part, {})[place] = trial
    return found


def _scores(row: Row, several: bool) -> Iterator[tuple[Part, Trial]]:
    for task in (None, row["task"]) if several else (None,):
        yield Part(task, row["length"]), Trial(float(row["correct"]))


def _losses(row: Row) -> Iterator[tuple[Part, Trial]]:
    yield Part(None, None), Trial(row["nll"], row["tokens_scored"])
    # Ranges that double: few enough to read, and finest where the loss falls most.
    buckets = sorted(row.get("by_position", ()), key=lambda bucket: bucket["start"])
    width = buckets[0]["end"] - buckets[0]["start"] if buckets else 0
    ranges: dict[Part, Trial] = {}
    for bucket in buckets:
        number = bucket["start"] // width
        start = width << (number.bit_length() - 1) if number else 0
        part = Part(None, 2 * start or width, start)
        total, weight = ranges.get(part, Trial(0.0, 0.0))
        ranges[part] = Trial(total + bucket["nll"], weight + bucket["tokens"])
    yield from ranges.items()


def _row(run: Run, part: Part, own: Trials, base: Trials | None) -> ComparisonRow:
    row = ComparisonRow(run.name, part, len(own), *_score(run, part, own))
    if base is None:
        return row
    # Documents of which the runs scored other tokens (another maximum, another BOS policy) are not the same trial.
    shared = [place for place in own if place in base and own[place].weight == base[place].weight]
    if not shared:
        return dataclasses.replace(row, shared=0)
    pairs = [(base[place].total, own[place].total) for place in shared]
    weights = [own[place].weight for place in shared] if run.measure == "loss" else _task_weights(shared)
    better = -1 if run.measure == "loss" else 1
    gained, lost = (sum(sign * (b - a) > 0 for a, b in pairs) for sign in (better, -better))
    if run.measure == "loss":
        interval, p_value = _loss_difference(pairs, weights)
        difference = sum(b - a for a, b in pairs) / sum(weights)
    else:
        interval, p_value = _score_difference(pairs, weights)
        difference = sum(w * (b - a) for w, (a, b) in zip(weights, pairs, strict=True)) / sum(weights)
    low, high = interval or (None, None)
    return dataclasses.replace(
        row,
        shared=len(pairs),
        difference=difference,
        difference_low=low,
        difference_high=high,
        gained=gained,
        lost=lost,
        p_value=p_value,
    )


def _score(run: Run, part: Part, own: Trials) -> tuple[float, float | None, float | None]:
    """A part's mean and its interval: the summary's own where that has one."""
    totals, weights = zip(*own.values(), strict=True)
    if run.measure == "loss":
        from ropepatch.evaluation.perplexity.summary import loss_interval

        return sum(totals) / sum(weights), *(loss_interval(totals, weights) or (None, None))
    if part.task is None:
        entry = next(entry for entry in run.summary["by_length"] if entry["length"] == part.length)
        return entry["accuracy"], entry["ci_low"], entry["ci_high"]
    return sum(totals) / len(totals), *wilson_interval(sum(totals), len(totals))


def _task_weights(shared: Sequence[Place]) -> list[float]:
    """Weights under which every task counts the same, however many of its trials are shared."""
    trials = Counter(place.task for place in shared)
    return [1 / trials[place.task] for place in shared]


def _score_difference(pairs: Sequence[tuple[float, float]], weights: Sequence[float]) -> tuple[Interval | None, float]:
    if all(score in (0, 1) for pair in pairs for score in pair) and len(set(weights)) == 1:
        counts = Counter(pairs)
        both, gained, lost, neither = (counts[pair] for pair in ((1, 1), (0, 1), (1, 0), (0, 0)))
        return newcombe_interval(both, gained, lost, neither), mcnemar_exact(gained, lost)
    weighted = [(w * a, w * b) for w, (a, b) in zip(weights, pairs, strict=True)]
    first, second = zip(*weighted, strict=True)
    return bootstrap_interval([b - a for a, b in pairs], weights), sign_flip_test(first, second)


def _loss_difference(pairs: Sequence[tuple[float, float]], tokens: Sequence[float]) -> tuple[Interval | None, float]:
    from ropepatch.evaluation.perplexity.summary import loss_interval

    first, second = zip(*pairs, strict=True)
    interval = loss_interval([b - a for a, b in pairs], [int(count) for count in tokens])
    return None if interval is None else Interval(*interval), sign_flip_test(first, second)


def _adjusted(rows: list[ComparisonRow]) -> list[ComparisonRow]:
    """The rows with Holm's p: over all tasks together for one table, over the single tasks for another."""
    adjusted: dict[int, float] = {}
    for single in (False, True):
        tested = [
            (index, row.p_value)
            for index, row in enumerate(rows)
            if row.p_value is not None and (row.part.task is not None) == single
        ]
        values = holm([p_value for _, p_value in tested])
        adjusted |= dict(zip((index for index, _ in tested), values, strict=True))
    return [dataclasses.replace(row, p_adjusted=adjusted.get(index)) for index, row in enumerate(rows)]


def _words(place: Place) -> str:
    depth = "" if place.depth is None else f"depth {place.depth:g}, "
    return f"length {place.length}, {depth}trial {place.trial}"


def _by_place(rows: list[Row]) -> dict[Place, Row]:
    return {Place.of(row): row for row in rows}
