"""Runs side by side, as data: one row for each run at each length, with its difference to the base."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ropepatch.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from rich.console import RenderableType

ALPHA = 0.05
"""Differences whose adjusted p lies below are marked in tables."""

Measure = Literal["accuracy", "loss"]


class Part(NamedTuple):
    """Which trials a row is about.

    Attributes:
        task: its name in a suite of several; None for all tasks together.
        length: accuracy: tokens of the prompt. loss: one past the last position; None for all tokens.
        start: loss: the first position; None otherwise.
    """

    task: str | None
    length: int | None
    start: int | None = None

    def __str__(self) -> str:
        if self.length is None:
            return "all"
        return f"{self.length:,}" if self.start is None else f"{self.start:,}–{self.length - 1:,}"


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        name: its folder's name, made unique.
        path: the folder.
        title: what `run.json` calls it.
        model: the model's name.
        configuration: what was asked.
        summary: made afresh from its trials.
        rows: its trials.
        record: the content of `run.json`.
    """

    name: str
    path: Path
    title: str
    model: Any
    configuration: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def heading(self) -> str:
        """Name and title in one; the name alone says nothing more when the title begins with it."""
        return self.title if self.title.startswith(self.name) else f"{self.name}: {self.title}"

    @property
    def measure(self) -> Measure:
        """What the run measured: trials that are right or wrong, or losses of documents."""
        return "loss" if "perplexity" in self.summary else "accuracy"


@dataclass(frozen=True)
class ComparisonRow:
    """One run at one length (or at one range of positions).

    Attributes:
        run: name of the run.
        part: what was measured.
        n: trials of this run (documents, where losses are compared).
        score: their mean: accuracy 0..1, or loss in nats per token.
        ci_low, ci_high: its 95 % interval, as in the run's summary (Wilson's for the accuracy of one task); None
            where there is none.
        shared: trials that the base has too; None for the base itself.
        difference: mean score minus the base's, over the shared trials; None without any.
        difference_low, difference_high: its 95 % interval; None where there is none.
        gained, lost: shared trials on which this run does better, and worse, than the base.
        p_value: two-sided test of the difference.
        p_adjusted: the same after Holm's adjustment over all rows of its table.
    """

    run: str
    part: Part
    n: int
    score: float
    ci_low: float | None
    ci_high: float | None
    shared: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    gained: int | None = None
    lost: int | None = None
    p_value: float | None = None
    p_adjusted: float | None = None

    @property
    def length(self) -> int | None:
        """The part's length."""
        return self.part.length

    @property
    def real(self) -> bool:
        """Whether the difference is more than chance makes, at 5 % over the whole table."""
        return self.p_adjusted is not None and self.p_adjusted < ALPHA

    def to_dict(self, measure: Measure) -> dict[str, Any]:
        """Plain data; the score under its own name."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("part", "score")}
        place: dict[str, Any] = {"run": fields.pop("run"), "task": self.part.task}
        if measure == "accuracy":
            return {**place, "length": self.part.length, "accuracy": self.score, **fields}
        return {
            **place,
            "start": self.part.start,
            "end": self.part.length,
            "loss": self.score,
            "perplexity": perplexity(self.score),
            **fields,
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        runs: the runs, in the order in which they are shown.
        rows: one for each part and run, parts in ascending order.
        base: name of the run that differences are to.
        measure: "accuracy" (more is better) or "loss" (less is better).
        fractional: whether some trial scores a part, so that shares of right ones do not describe them.
    """

    runs: list[Run]
    rows: list[ComparisonRow]
    base: str
    measure: Measure
    fractional: bool = False

    @property
    def suite(self) -> str:
        """Name of the suite that was run."""
        return str(self.runs[0].summary["task"])

    @property
    def parts(self) -> list[Part]:
        """What all tasks together were measured at, ascending."""
        return list(dict.fromkeys(row.part for row in self.rows if row.part.task is None))

    @property
    def task_parts(self) -> list[Part]:
        """The same of the single tasks, where there are several, in the suite's order."""
        return list(dict.fromkeys(row.part for row in self.rows if row.part.task is not None))

    @property
    def lengths(self) -> list[int]:
        """Every length that some run measured, ascending."""
        return [part.length for part in self.parts if part.length is not None]

    def trials(self, *parts: Part) -> str:
        """How many trials (or documents) the runs have in each of these parts: "6", or "2 to 6"."""
        counts = sorted({row.n for row in self.rows if row.part in parts})
        return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    def row(self, run: str, part: Part) -> ComparisonRow | None:
        """What one run has there."""
        return self._rows.get((run, part))

    @cached_property
    def _rows(self) -> dict[tuple[str, Part], ComparisonRow]:
        return {(row.run, row.part): row for row in self.rows}

    def differing(self) -> dict[str, list[Any]]:
        """Settings besides the patch and the grid in which the runs differ: a value for each run, by name."""
        beside = ("patch", "lengths", "depths", "trials", "trained_length")
        names = {name: None for run in self.runs for name in run.configuration if name not in beside}
        found = {name: [run.configuration.get(name) for run in self.runs] for name in names}
        return {name: values for name, values in found.items() if any(value != values[0] for value in values)}

    def sorted_by(self, key: str) -> Comparison:
        """The same with the runs in another order; the base stays the base.

        Args:
            key: a length (the best there first), "name", "effective" (the longest effective length first), or
                "perplexity" (the lowest first).

        Raises:
            OptionError: none of these, or not of these runs.
        """
        order = {part: str(part.length) for part in self.parts if part.length is not None}
        words = ["name", "effective"] if self.measure == "accuracy" else ["name", "perplexity"]
        runs = sorted(self.runs, key=lambda run: run.name)
        if key == "effective" and key in words:
            runs.sort(key=_reach, reverse=True)
        elif key == "perplexity" and key in words:
            runs.sort(key=lambda run: run.summary["loss"])
        elif key in order.values():
            part = next(part for part, word in order.items() if word == key)
            scores = {row.run: row.score for row in self.rows if row.part == part}
            sign = -1 if self.measure == "accuracy" else 1
            runs.sort(key=lambda run: sign * scores[run.name] if run.name in scores else math.inf)
        elif key != "name":
            allowed = [*words, *order.values()]
            raise OptionError("unknown order of runs", given=key, allowed=allowed, hint=did_you_mean(key, allowed))
        return dataclasses.replace(self, runs=runs)

    def at(self, lengths: Sequence[int]) -> Comparison:
        """The same with these lengths only (of losses, the ranges of positions that end there), the runs that have
        them, and the base. p stays as adjusted for all lengths.

        Raises:
            OptionError: no run measured one of them.
        """
        for length in lengths:
            if length not in self.lengths:
                raise OptionError("no run measured this length", given=length, allowed=self.lengths)
        rows = [row for row in self.rows if row.length in lengths]
        shown = {self.base, *(row.run for row in rows)}
        return dataclasses.replace(self, rows=rows, runs=[run for run in self.runs if run.name in shown])

    def explanation(self) -> str:
        """How to read the table, in one paragraph."""
        return " ".join(_explain(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        averages = ("average", "average_inc", "average_dec")
        overall = ("effective_length", "effective_length_relative", *averages, "perplexity", "bits_per_byte")
        return {
            "measure": self.measure,
            "base": self.base,
            "runs": [
                {
                    "name": run.name,
                    "path": str(run.path),
                    "title": run.title,
                    "model": run.model,
                    **{name: run.summary[name] for name in overall if name in run.summary},
                }
                for run in self.runs
            ],
            "differing_settings": self.differing(),
            "rows": [row.to_dict(self.measure) for row in self.rows],
            "explanation": self.explanation(),
        }

    def to_markdown(self) -> str:
        """Pipe tables: up to four runs as columns, more as rows."""
        from ropepatch.evaluation.tables import lines, markdown

        return markdown(lines(self))

    def table(self) -> RenderableType:
        """The same for the terminal, as a rich renderable."""
        from ropepatch.evaluation.tables import lines, terminal

        return terminal(lines(self))


def perplexity(loss: float | None) -> float | None:
    """exp of a loss in nats per token; None for None, and beyond the largest number."""
    return None if loss is None or loss > 700 else math.exp(loss)


def _reach(run: Run) -> tuple[int, int, float]:
    """A sort key: how far a run reaches, ties by the average of its accuracies."""
    scores = [entry["accuracy"] for entry in run.summary["by_length"]]
    lengths = run.summary["effective_length"], run.summary["effective_length_relative"]
    return lengths[0] or 0, lengths[1] or 0, sum(scores) / len(scores) if scores else 0.0


def _explain(comparison: Comparison) -> list[str]:
    tests = sum(row.p_value is not None for row in comparison.rows)
    if comparison.measure == "loss":
        scores = (
            "Perplexity with its 95 % interval over documents (none with a single document), for all tokens and by "
            f"their position. Differences are of the mean loss in nats per token to {comparison.base}'s, on the "
            "documents that both runs have: below 0 is better. Their intervals take documents as the sample "
            "(linearised ratio, Student's t); p is a two-sided sign-flip test over documents."
        )
    elif comparison.fractional:
        scores = (
            "Intervals of a run are those of its summary. Differences are to "
            f"{comparison.base}, on the trials that both runs have. Where all scores are 0 or 1 their interval is "
            "Newcombe's for paired shares and p McNemar's exact test; where a trial may score a part, a bootstrap "
            "interval (BCa, seeded) and a two-sided sign-flip test."
        )
    else:
        scores = (
            f"Intervals are 95 % Wilson intervals. Differences are to {comparison.base}, on the trials that both runs "
            "have, with Newcombe's interval for paired shares; p is McNemar's exact two-sided test of the trials that "
            "one run gets right and the other does not."
        )
    words = [scores]
    if tests > 1:
        words.append(
            f"p is adjusted (Holm) for all differences of its table, and * marks one below {ALPHA:g}; reports and JSON "
            "have the unadjusted p too."
        )
    if comparison.measure == "accuracy":
        summary = comparison.runs[0].summary
        words.append(
            "Effective length: the longest length with an accuracy above "
            f"{summary['effective_length_threshold']:.1%} there and at every shorter one (RULER); self-relative: with "
            f"at least {summary['effective_length_relative_share']:.0%} of the run's own accuracy at its shortest "
            "length (NoLiMa)."
        )
    differing = comparison.differing()
    if differing:
        words.append(f"The runs also differ in: {', '.join(differing)}.")
    return words
