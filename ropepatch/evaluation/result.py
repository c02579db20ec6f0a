"""What `evaluate` returns."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ropepatch.errors import DependencyError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EvaluationResult:
    """A finished evaluation.

    Attributes:
        trials: one dict a trial, in the order of length, depth, trial; the fields of `results.jsonl`.
        summary: the content of `summary.json`.
        configuration: what was asked.
        trie_size: distinct prompt and answer tokens of the trials that were run (not of those found in the folder).
        tokens_computed: how many of them went through the model; equal to `trie_size` in one process when `reuse`.
        tokens_decoded: further tokens that went through the model after a wrong answer token: generated, or guessed at.
        sum_of_prompts: prompt and answer tokens without any sharing.
        reuse: whether prefixes were shared; None when no trial was left to run.
        reuse_refused: why they were not, or None.
    """

    trials: list[dict[str, Any]]
    summary: dict[str, Any]
    configuration: dict[str, Any]
    trie_size: int
    tokens_computed: int
    tokens_decoded: int
    sum_of_prompts: int
    reuse: bool | None
    reuse_refused: str | None

    def to_pandas(self) -> pandas.DataFrame:
        """The trials as a table, one row a trial.

        Raises:
            DependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise DependencyError("to_pandas needs pandas", hint="run: pip install pandas") from error
        return pandas.DataFrame(self.trials)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The suite's first figure: the heatmap of accuracy, the loss by position, ...; saved too when `path` is given
        (.png or .svg).

        Raises:
            DependencyError: matplotlib is not installed.
            UsageError: `path` has another ending.
            OutputError: `path` cannot be written.
        """
        from ropepatch.evaluation.folder import suite_of
        from ropepatch.plotting import require_matplotlib, save_figure

        require_matplotlib()
        figure = next(iter(suite_of(self.configuration).figures(self.summary).values()))
        if path is not None:
            save_figure(figure, path)
        return figure
