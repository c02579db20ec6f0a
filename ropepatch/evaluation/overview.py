"""Runs of several suites in one table: a row for each setting, a column for each thing that a suite measured of it.

A setting is a model under a patch, whatever folders its runs are in: those of one suite that differ in nothing but
their grid are taken together. Within a suite settings are compared as `compare` does it.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ropepatch.errors import OptionError, did_you_mean
from ropepatch.evaluation.compare import conflict, find_base, read_runs, side_by_side
from ropepatch.evaluation.comparison import ALPHA, Comparison, ComparisonRow, Part, Run
from ropepatch.evaluation.folder import differences, suite_of
from ropepatch.evaluation.task import Place

if TYPE_CHECKING:
    from rich.console import RenderableType

GRID = ("lengths", "depths", "trials")
"""Settings that say how much was measured, not what: no trial depends on them."""


class Column(NamedTuple):
    """One thing that was measured: a part of one suite's comparison."""

    heading: str
    comparison: Comparison
    part: Part


@dataclass(frozen=True)
class Overview:
    """What `overview` returns.

    Attributes:
        comparisons: one for each suite, or several where runs of a suite asked other questions; each to its run of the
            base, or to its first run where it has none.
        settings: the rows, in the order in which they are shown.
        base: the setting that differences are to.
        runs: every run as it was read, suite by suite.
        models: whether there are several, so that a setting's name begins with its model's.
    """

    comparisons: list[Comparison]
    settings: list[str]
    base: str
    runs: list[Run]
    models: bool

    @cached_property
    def columns(self) -> list[Column]:
        """What was measured of all tasks of a suite together, suite by suite, lengths ascending."""
        found = [
            Column(f"{comparison.suite} {part} (n={comparison.trials(part)})", comparison, part)
            for comparison in self.comparisons
            for part in comparison.parts
        ]
        total, seen = Counter(column.heading for column in found), Counter[str]()
        for index, column in enumerate(found):
            seen[column.heading] += 1
            if total[column.heading] > 1:
                found[index] = column._replace(heading=f"{column.heading} #{seen[column.heading]}")
        return found

    @cached_property
    def differing(self) -> list[Column]:
        """The columns in which some setting has a difference to the base."""
        return [
            column
            for column in self.columns
            if self.has_base(column.comparison)
            and any(row.part == column.part and row.difference is not None for row in column.comparison.rows)
        ]

    def row(self, setting: str, column: Column) -> ComparisonRow | None:
        """What was measured of one setting there."""
        run = self._run(column.comparison, setting)
        return None if run is None else column.comparison.row(run.name, column.part)

    def has_base(self, comparison: Comparison) -> bool:
        """Whether the differences of these runs are to the base: it is among them."""
        base = self._run(comparison, self.base)
        return base is not None and base.name == comparison.base

    def sorted_by(self, key: str) -> Overview:
        """The same with the settings in another order; the base stays the base.

        Args:
            key: "name", or a suite and one of its own orders: "needle:16384", "ruler:effective",
                "perplexity:perplexity". Settings that this suite did not measure come last.

        Raises:
            OptionError: none of these, or not of these runs.
        """
        if key == "name":
            return dataclasses.replace(self, settings=sorted(self.settings))
        suite, _, order = key.partition(":")
        suites = list(dict.fromkeys(comparison.suite for comparison in self.comparisons))
        if suite not in suites or not order:
            allowed = ["name", *(f"{name}:LENGTH" for name in suites)]
            hint = did_you_mean(suite, suites)
            raise OptionError("unknown order of settings", given=key, allowed=allowed, hint=hint)
        refused: OptionError | None = None
        for comparison in self.comparisons:
            if comparison.suite != suite:
                continue
            try:
                runs = comparison.sorted_by(order).runs
            except OptionError as error:  # another comparison of this suite may have the length
                refused = error
                continue
            first = [self.setting(run) for run in runs]
            left = [setting for setting in self.settings if setting not in first]
            return dataclasses.replace(self, settings=[*first, *left])
        assert refused is not None
        raise refused

    def at(self, lengths: Sequence[int]) -> Overview:
        """The same with these lengths only; of losses, the ranges of positions that end there.

        Raises:
            OptionError: no suite measured one of them.
        """
        allowed = sorted({length for comparison in self.comparisons for length in comparison.lengths})
        for length in lengths:
            if length not in allowed:
                raise OptionError("no run measured this length", given=length, allowed=allowed)
        kept = [comparison for comparison in self.comparisons if set(lengths) & set(comparison.lengths)]
        shown = [comparison.at(sorted(set(lengths) & set(comparison.lengths))) for comparison in kept]
        measured = {self.setting(run) for comparison in shown for run in comparison.runs}
        settings = [setting for setting in self.settings if setting in measured]
        return dataclasses.replace(self, comparisons=shown, settings=settings)

    def setting(self, run: Run) -> str:
        """The row of a run: its title, after the model's name where there are several."""
        return f"{run.model}: {run.title}" if self.models else run.title

    def explanation(self) -> str:
        """How to read the table, in one paragraph."""
        how = (
            "A row is a setting; a column what one suite measured of it, with n trials (or documents). Accuracies and "
            "perplexities have their 95 % intervals."
        )
        words = [how]
        if self.differing:
            words.append(
                f"Differences are to {self.base}, on what both measured: of the accuracy, or of the mean loss in nats "
                f"per token, of which below 0 is better. * marks a p below {ALPHA:g} after adjustment (Holm) for all "
                "differences of its suite."
            )
        apart = [column.heading for column in self.columns if column not in self.differing]
        if apart:
            words.append(f"Without a difference to {self.base}: {', '.join(apart)}.")
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        rows = [
            {"setting": setting, "suite": column.comparison.suite, "column": column.heading}
            | row.to_dict(column.comparison.measure)
            for column in self.columns
            for setting in self.settings
            if (row := self.row(setting, column)) is not None
        ]
        return {
            "base": self.base,
            "settings": self.settings,
            "rows": rows,
            "suites": [{"suite": comparison.suite, **comparison.to_dict()} for comparison in self.comparisons],
            "explanation": self.explanation(),
        }

    def to_markdown(self) -> str:
        """Pipe tables: the scores of all suites, and their differences to the base."""
        from ropepatch.evaluation.tables import markdown, overview_lines

        return markdown(overview_lines(self))

    def table(self) -> RenderableType:
        """The same for the terminal, as a rich renderable."""
        from ropepatch.evaluation.tables import overview_lines, terminal

        return terminal(overview_lines(self))

    def _run(self, comparison: Comparison, setting: str) -> Run | None:
        return next((run for run in comparison.runs if self.setting(run) == setting), None)


def overview(folders: Sequence[str | os.PathLike[str]], *, base: str | None = None) -> Overview:
    """Read the output folders of evaluations of several suites and set their settings side by side.

    Args:
        folders: two or more, of any suites, in any order.
        base: the setting that differences are to, by its title or by a folder's name; default that of the first.

    Raises:
        UsageError: fewer than two folders, or one of them twice.
        OptionError: no run is called `base`.
        RecordError: a folder is missing, unfinished from the first trial on, or corrupt.
        DependencyError: scipy is missing, which scores other than 0 and 1 take.
    """
    return overview_of(read_runs(folders), base=base)


def overview_of(runs: Sequence[Run], *, base: str | None = None) -> Overview:
    """`overview` of runs that were read before."""
    models = len({str(run.model) for run in runs}) > 1
    named = {run.name: f"{run.model}: {run.title}" if models else run.title for run in runs}
    own = named[(runs[0] if base is None else find_base(runs, base)).name]
    groups: list[list[Run]] = []
    # The base first: it then leads the groups that it belongs to.
    for run in sorted(_pooled(runs), key=lambda run: named[run.name] != own):
        for group in groups:
            if not any(named[run.name] == named[other.name] or conflict(other, run) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    suites = list(dict.fromkeys(run.summary["task"] for run in runs))
    groups.sort(key=lambda group: suites.index(group[0].summary["task"]))
    settings = [own, *(setting for setting in dict.fromkeys(named.values()) if setting != own)]
    by_suite = sorted(runs, key=lambda run: suites.index(run.summary["task"]))
    return Overview([side_by_side(group, group[0]) for group in groups], settings, own, by_suite, models)


def _pooled(runs: Sequence[Run]) -> list[Run]:
    """Runs of which those that differ in nothing but their grid are one, with the trials of all; the first's name."""
    found: list[Run] = []
    for run in runs:
        for index, other in enumerate(found):
            if run.measure == "accuracy" and not any(differences(_beside_grid(other), _beside_grid(run))):
                found[index] = _together(other, run)
                break
        else:
            found.append(run)
    return found


def _beside_grid(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.configuration.items() if name not in GRID}


def _together(first: Run, second: Run) -> Run:
    """One run of the trials of both; a trial that both have is the first's."""
    places = {Place.of(row) for row in first.rows}
    rows = [*first.rows, *(row for row in second.rows if Place.of(row) not in places)]
    summary = suite_of(first.configuration).summarise(rows, first.configuration, title=first.title)
    return dataclasses.replace(first, rows=rows, summary=summary)
