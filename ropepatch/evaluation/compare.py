"""Several runs side by side: intervals for each, and differences to the first on the trials that both have."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch.errors import RecordError, UsageError
from ropepatch.evaluation.folder import RUN, Row, read_rows, suite_of
from ropepatch.evaluation.task import Place
from ropepatch.files import read_object

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Run:
    """One run of a comparison. `name` is its folder's name, made unique; `rows` are its trials."""

    name: str
    path: Path
    title: str
    model: Any
    configuration: dict[str, Any]
    summary: dict[str, Any]
    rows: list[Row]

    @property
    def heading(self) -> str:
        """Name and title in one; the name alone says nothing more when the title begins with it."""
        return self.title if self.title.startswith(self.name) else f"{self.name}: {self.title}"


@dataclass(frozen=True)
class ComparisonRow:
    """One run at one length.

    Attributes:
        run: name of the run.
        length: prompt length in tokens.
        n, accuracy, ci_low, ci_high: all trials of this run at this length, with the 95 % Wilson interval.
        shared: trials that the first run has too (same length, depth and number); None for the first run itself.
        difference: mean score minus the first run's, over the shared trials; None without any.
        gained, lost: shared trials on which this run scores higher, and lower, than the first.
        p_value: exact two-sided McNemar test of gained against lost.
    """

    run: str
    length: int
    n: int
    accuracy: float
    ci_low: float
    ci_high: float
    shared: int | None = None
    difference: float | None = None
    gained: int | None = None
    lost: int | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns: the runs, and one row for each length and run."""

    runs: list[Run]
    rows: list[ComparisonRow]

    @property
    def lengths(self) -> list[int]:
        """Every length that some run measured, ascending."""
        return sorted({row.length for row in self.rows})

    def explanation(self) -> str:
        """How to read the differences, in one paragraph."""
        return (
            f"Intervals are 95 % Wilson intervals. Differences are to {self.runs[0].name}, on the trials that both "
            "runs have; gained and lost count the trials that one run gets right and the other does not; p is "
            "McNemar's exact two-sided test of these counts."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "runs": [
                {
                    "name": run.name,
                    "path": str(run.path),
                    "title": run.title,
                    "model": run.model,
                    "effective_length": run.summary["effective_length"],
                    "effective_length_relative": run.summary["effective_length_relative"],
                }
                for run in self.runs
            ],
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def to_markdown(self) -> str:
        """A pipe table: one line for each length, one column for each run."""
        lines = [["length", *(run.heading for run in self.runs)], ["---:"] + ["---"] * len(self.runs)]
        lines += [[cell.replace("\n", "<br>") for cell in line] for line in self._lines()]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"

    def table(self) -> Table:
        """The same as a rich table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="accuracy, [95 % interval], difference to the first run", show_lines=True)
        table.add_column("length", justify="right")
        for run in self.runs:
            table.add_column(Text(run.heading))
        for line in self._lines():
            table.add_row(*map(Text, line))
        return table

    def _lines(self) -> list[list[str]]:
        found = {(row.length, row.run): row for row in self.rows}
        lines = [
            [f"{length:,}", *(_cell(found.get((length, run.name))) for run in self.runs)] for length in self.lengths
        ]
        return [*lines, ["effective", *(_tokens(run.summary["effective_length"]) for run in self.runs)]]


def compare(folders: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Read the output folders of two or more evaluations and set them side by side; the first is the base.

    Raises:
        UsageError: fewer than two folders, or runs that cannot be compared (other tasks, no shared length, or other
            questions under the same trial numbers); the message says which and why.
        RecordError: a folder is missing, unfinished from the first trial on, or corrupt.
    """
    if len(folders) < 2:
        raise UsageError("comparing takes at least two folders", given=[str(folder) for folder in folders])
    paths = [Path(folder) for folder in folders]
    runs = [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    lengths = sorted({entry["length"] for run in runs for entry in run.summary["by_length"]})
    rows = [
        row for length in lengths for run in runs if (row := _row(run, length, None if run is runs[0] else runs[0]))
    ]
    return Comparison(runs, rows)


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided exact p-value of McNemar's test: `gained` and `lost` as heads and tails of a fair coin.

    Quinn McNemar, Psychometrika 12, 1947. With no trial on which the runs differ the value is 1.
    """
    n = gained + lost
    tail: int = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    # Whole numbers up to the division: exact for any n.
    return min(1.0, 2 * tail / 2**n)


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
    return Run(name or title, path, title, configuration.get("model"), configuration, summary, rows)


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    absolute = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in absolute) + 1):
        names = ["/".join(path.parts[-depth:]) for path in absolute]
        if len(set(names)) == len(names):
            return names
    raise UsageError("a folder is named twice", given=[str(path) for path in paths])


def _check_comparable(first: Run, other: Run) -> None:
    def refuse(reason: str) -> UsageError:
        return UsageError(f"the runs {first.path} and {other.path} cannot be compared: {reason}")

    tasks = first.summary["task"], other.summary["task"]
    if tasks[0] != tasks[1]:
        raise refuse(f"they ran different tasks ({tasks[0]} and {tasks[1]})")
    lengths = [sorted({row["length"] for row in run.rows}) for run in (first, other)]
    if not set(lengths[0]) & set(lengths[1]):
        raise refuse(f"they share no prompt length ({lengths[0]} and {lengths[1]} tokens)")
    base = _by_key(first.rows)
    for key, row in _by_key(other.rows).items():
        if key in base and base[key].get("answer") != row.get("answer"):
            raise refuse(
                f"they ask different questions: at {_words(key)} the answers are "
                f"{base[key].get('answer')!r} and {row.get('answer')!r} (seeds {base[key].get('seed')} and "
                f"{row.get('seed')})"
            )


def _row(run: Run, length: int, first: Run | None) -> ComparisonRow | None:
    scores = next((entry for entry in run.summary["by_length"] if entry["length"] == length), None)
    if scores is None:
        return None
    row = ComparisonRow(run.name, length, *(scores[name] for name in ("n", "accuracy", "ci_low", "ci_high")))
    if first is None:
        return row
    own, base = _by_key(run.rows), _by_key(first.rows)
    pairs = [(own[key]["correct"], base[key]["correct"]) for key in own if key.length == length and key in base]
    if not pairs:
        return dataclasses.replace(row, shared=0)
    gained, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return dataclasses.replace(
        row,
        shared=len(pairs),
        difference=sum(a - b for a, b in pairs) / len(pairs),
        gained=gained,
        lost=lost,
        p_value=mcnemar_exact(gained, lost),
    )


def _words(place: Place) -> str:
    depth = "" if place.depth is None else f"depth {place.depth:g}, "
    return f"length {place.length}, {depth}trial {place.trial}"


def _by_key(rows: list[Row]) -> dict[Place, Row]:
    return {Place.of(row): row for row in rows}


def _cell(row: ComparisonRow | None) -> str:
    if row is None:
        return "–"
    lines = [f"{row.accuracy:.2f}  n={row.n}", f"[{row.ci_low:.2f}, {row.ci_high:.2f}]"]
    if row.difference is not None:
        lines.append(f"{row.difference:+.2f} p={row.p_value:.2g}")
        if row.shared != row.n:
            lines.append(f"({row.shared} shared)")
    return "\n".join(lines)


def _tokens(length: int | None) -> str:
    return "none" if length is None else f"{length:,} tokens"
