"""The far_context suite: does a model make use of text that is far away?

The end of a document is predicted three times: behind its own far text, behind the same far text with its sentences in
another order, and alone. A model that only looks near has the same loss three times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from ropepatch.evaluation.suite import Suite, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from ropepatch.evaluation.suite import Job


@register
class FarContextSuite(Suite):
    """Settings of a far-context probe. Every trial is one document.

    Attributes:
        text: files, folders or data sets, as perplexity's.
        keep: tokens of the end that is predicted; it begins with a whole sentence.
        max_tokens: of each document, from its beginning: far text and end together.
    """

    name = "far_context"

    task: Literal["far_context"] = "far_context"
    text: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    keep: Annotated[int, Field(ge=2)] = 1024
    max_tokens: Annotated[int, Field(ge=4)] = 8192

    @field_validator("text", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def job(self, model: Any, tokenizer: Any, *, chunk_size: int | None) -> Job:
        from ropepatch.evaluation.perplexity.far import FarContextJob

        return FarContextJob(model, tokenizer, self, chunk_size=chunk_size)

    @classmethod
    def summarise(cls, rows: list[dict[str, Any]], configuration: dict[str, Any], *, title: str | None = None) -> Any:
        from ropepatch.evaluation.perplexity.far import summarise_far

        return summarise_far(rows, configuration, title=title)

    @classmethod
    def figures(cls, summary: Mapping[str, Any]) -> dict[str, Figure]:
        from ropepatch.plotting._loss import context_heatmap

        return {"heatmap.png": context_heatmap(summary)}

    @classmethod
    def table(cls, summary: Mapping[str, Any]) -> Table:
        from ropepatch.evaluation.perplexity.words import far_table

        return far_table(summary)

    @classmethod
    def sections(
        cls,
        summary: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],  # noqa: ARG003
        figures: Mapping[str, bytes],
    ) -> list[str]:
        from ropepatch.evaluation.perplexity.words import far_sections

        return far_sections(summary, figures)
