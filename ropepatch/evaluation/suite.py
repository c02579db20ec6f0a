"""What every suite is: its settings as a pydantic model, the job that they become, and what its finished trials say.

A suite is one file in `evaluation/tasks/`: a subclass of `Suite` (or of `RetrievalSuite`, for prompts with an answer)
registered under its name. Adding one touches no list.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ropepatch.registry import Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from ropepatch.evaluation.sharding import Ranks
    from ropepatch.evaluation.task import Grid, Place, Retrieval

Row = dict[str, Any]
Depth = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Length = Annotated[int, Field(gt=0)]
C = TypeVar("C", bound="type[Suite]")

SUITES: Registry[type[Suite]] = Registry("suite", "ropepatch.evaluation.tasks")


def register(suite: C) -> C:
    """File a suite under the name that its `task` field demands."""
    SUITES.register(suite.name)(suite)
    return suite


class Job(Protocol):
    """A suite on its way, for one model and tokenizer."""

    def places(self) -> list[Place]:
        """Every trial."""

    def inputs(self) -> Mapping[str, Any]:
        """What fixes the results besides the settings: a digest of every text that was read, under setting names."""

    def check(self) -> None:
        """Refuse what cannot be run, before anything is written."""

    def rows(self, left: Sequence[Place], ranks: Ranks, *, progress: bool) -> Generator[Row, None, None]:
        """Measure this process's share of the trials that are left; each row as soon as it is there."""

    def work(self) -> dict[str, Any]:
        """What this process computed, in plain numbers."""


class Suite(BaseModel):
    """Settings of a suite.

    Attributes:
        task: the suite's name.
        description: free text.
        seed: of everything that is drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]

    task: str
    description: str = ""
    seed: int = 0

    def job(self, model: Any, tokenizer: Any, *, chunk_size: int | None) -> Job:
        """What these settings mean for one model.

        Raises:
            PromptError, OptionError: they mean nothing for this tokenizer, or a text cannot be read.
        """
        raise NotImplementedError

    @classmethod
    def summarise(cls, rows: list[Row], configuration: dict[str, Any], *, title: str | None = None) -> dict[str, Any]:
        """The content of `summary.json`."""
        from ropepatch.evaluation.summary import summarise

        return summarise(rows, configuration, title=title)

    @classmethod
    def figures(cls, summary: Mapping[str, Any]) -> dict[str, Figure]:
        """The run's figures by file name; the first is the one that `EvaluationResult.plot` gives."""
        from ropepatch.plotting import heatmap

        return {"heatmap.png": heatmap(summary)}

    @classmethod
    def table(cls, summary: Mapping[str, Any]) -> Table | None:  # noqa: ARG003
        """What the command line shows of a finished run; None: accuracy by length."""
        return None

    @classmethod
    def sections(
        cls, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Mapping[str, bytes]
    ) -> list[str]:
        """What `report.html` says of the results, as ready HTML; `figures` are PNG files."""
        from ropepatch.evaluation.report import grid_sections

        return grid_sections(summary, rows, figures)


class RetrievalSuite(Suite):
    """Settings that all suites of prompts with an answer share.

    Attributes:
        lengths: exact prompt lengths in tokens.
        trials: prompts of each cell, with contents of their own.
        chat_template: put prompts into the tokenizer's chat template.
    """

    lengths: Annotated[tuple[Length, ...], Field(min_length=1)]
    trials: Annotated[int, Field(ge=1)]
    chat_template: bool = False

    @field_validator("lengths", "depths", mode="after", check_fields=False)
    @classmethod
    def _sorted_set(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(values)))

    def retrieval(self, tokenizer: Any) -> Retrieval:
        """The prompts of these settings for one tokenizer.

        Raises:
            PromptError: no chat template, a text that is too short, a tokenizer without offsets.
        """
        raise NotImplementedError

    def job(self, model: Any, tokenizer: Any, *, chunk_size: int | None) -> Job:
        from ropepatch.evaluation.retrieval import RetrievalJob

        return RetrievalJob(model, self.retrieval(tokenizer), seed=self.seed, chunk_size=chunk_size)


class GridSuite(RetrievalSuite):
    """Settings of a suite whose every trial is one (length, depth, trial).

    Attributes:
        depths: places of what is looked for, 0 (first) to 1 (last).
    """

    depths: Annotated[tuple[Depth, ...], Field(min_length=1)]

    @property
    def grid(self) -> Grid:
        """Its lengths, depths and trials."""
        from ropepatch.evaluation.task import Grid

        return Grid(self.lengths, self.depths, self.trials)
