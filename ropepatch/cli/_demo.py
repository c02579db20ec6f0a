"""The demo's runs: the same grid on one model, unpatched and under several methods, until the time is used up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from ropepatch.evaluation.compare import Comparison
    from ropepatch.evaluation.result import EvaluationResult


@dataclass(frozen=True)
class Setting:
    """One run: a folder name and a patch, or none."""

    name: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The line of Python that makes it."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f'ropepatch.patch(model, "{self.method}"{options})'


@dataclass(frozen=True)
class Grid:
    """What every run of the demo measures: prompt lengths in tokens, places of the key, prompts of each."""

    lengths: tuple[int, ...] = (4096, 10240)
    depths: tuple[float, ...] = (0.1, 0.9)
    trials: int = 1


MODEL = "demo:smollm2"

SETTINGS = (
    Setting("unpatched"),
    # The first patched run is the one that the before/after figure shows: the best of those measured untuned.
    Setting("abf", "abf", {"factor": 2}),
    Setting("yarn", "yarn", {"factor": 2}),
    Setting("linear", "linear", {"factor": 2}),
)

ALWAYS = 2
"""So many runs are made whatever the time: without before and after there is nothing to show."""

FIGURE, REPORT = "before_after.png", "report.html"


def run_demo(
    output: Path,
    *,
    model_name: str = MODEL,
    settings: Sequence[Setting] = SETTINGS,
    grid: Grid | None = None,
    minutes: float = 8.0,
    dtype: str = "auto",
    console: Console | None = None,
) -> Comparison:
    """Inspect, evaluate, patch and evaluate again; leave a folder for each run, a figure and a report in `output`.

    Args:
        output: the folder; the same call again resumes.
        model_name: what `load_model` takes.
        settings: the runs in order, the unpatched one first.
        grid: what each run measures; default `Grid()`.
        minutes: no further run is started that would likely end later than this, counted from now; the first two
            are made in any case.
        dtype: as for `load_model`.
        console: where to print; default standard output.

    Returns:
        The runs that were made, compared with the first.
    """
    import ropepatch
    from ropepatch.evaluation.compare import compare
    from ropepatch.evaluation.report import write_comparison_report
    from ropepatch.loading import load_model
    from ropepatch.plotting import heatmap, require_matplotlib

    require_matplotlib()
    grid = grid or Grid()
    console = console or Console()
    clock = _Clock(minutes)
    console.print(f"loading {model_name} (converted once, which takes about half a minute)", highlight=False)
    model, tokenizer = load_model(model_name, dtype=dtype)
    console.print(str(ropepatch.inspect(model)), markup=False, highlight=False, soft_wrap=True)

    done: list[Setting] = []
    for number, setting in enumerate(settings, start=1):
        if number > ALWAYS and not clock.has_time():
            console.print(
                f"left out for time: {', '.join(left.name for left in settings[number - 1 :])} "
                "(the same command with more --minutes adds them)"
            )
            break
        console.rule(f"run {number} of {len(settings)}: {setting.name}{clock.left(len(settings) - number + 1)}")
        with clock:
            result = _measure(model, tokenizer, setting, grid, output / setting.name, model_name, console)
        console.print(_sentence(result), highlight=False)
        done.append(setting)

    comparison = compare([output / setting.name for setting in done])
    shown = comparison.runs[:2]
    heatmap([run.summary for run in shown], titles=[run.heading for run in shown], path=output / FIGURE)
    write_comparison_report(comparison, output / REPORT, title=f"{model_name}, before and after")
    return comparison


def _measure(
    model: Any, tokenizer: Any, setting: Setting, grid: Grid, folder: Path, model_name: str, console: Console
) -> EvaluationResult:
    import ropepatch

    if setting.method is not None:
        console.print(setting.code, markup=False)
        ropepatch.patch(model, setting.method, **setting.options)
    try:
        return ropepatch.evaluate(
            model,
            tokenizer,
            "passkey",
            lengths=grid.lengths,
            depths=grid.depths,
            trials=grid.trials,
            seed=0,
            output=folder,
            model_name=model_name,
        )
    finally:
        if setting.method is not None:
            ropepatch.unpatch(model)


class _Clock:
    """How long the runs take, each timed by a `with`, and whether there is time for one more like the slowest."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._longest = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._longest = max(self._longest, time.monotonic() - self._began)

    def has_time(self) -> bool:
        return time.monotonic() + 1.1 * self._longest <= self._end

    def left(self, runs: int) -> str:
        """The remaining time of so many runs, in words; empty before anything was measured."""
        if not self._longest:
            return ""
        minutes = runs * self._longest / 60
        return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"


def _sentence(result: EvaluationResult) -> str:
    rows = result.summary["by_length"]
    return "found: " + ", ".join(f"{row['accuracy'] * row['n']:g} of {row['n']} at {row['length']:,}" for row in rows)
