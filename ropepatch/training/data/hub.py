"""Documents out of data sets that the package `datasets` loads: of the hub, or of a folder it understands."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from ropepatch.errors import DependencyError, PromptError, first_line
from ropepatch.evaluation.texts import DATASETS
from ropepatch.training.data.files import no_column
from ropepatch.training.recipe import HubSource


def load(source: HubSource) -> Any:
    """The split of the data set, cut down to its column of text.

    Raises:
        PromptError: it cannot be loaded (unknown name, configuration or split), or has no such column.
        DependencyError: the package `datasets` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DependencyError(
            f"the data set {source.name} needs the package datasets", hint="pip install 'ropepatch[train]'"
        ) from error
    try:
        data = load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, streaming=source.streaming
        )
        columns = data.column_names
        if columns is None:  # a stream tells them with its first row only
            columns = list(next(iter(data), {}))
    except Exception as error:  # the loaders raise whatever their readers and the network do
        raise PromptError(f"cannot load the data set {source.name}: {first_line(error)}") from error
    if source.column not in columns:
        raise no_column(f"the data set {source.name}, split {source.split},", source.column, columns)
    return data.select_columns([source.column])


def named(name: str, column: str) -> HubSource:
    """The source that `datasets:owner/name[:config][:split]` names.

    Raises:
        PromptError: another form.
    """
    owner, *parts = name.removeprefix(DATASETS).split(":")
    if not owner or len(parts) > 2:
        raise PromptError("not the name of a data set", given=name, allowed=f"{DATASETS}owner/name[:config][:split]")
    config, split = (*parts, "", "")[:2]
    return HubSource(kind="dataset", name=owner, config=config or None, split=split or "train", column=column)


def values(data: Any, source: HubSource) -> Iterator[tuple[str, Any]]:
    """Where each value of the column stands, and the value.

    Raises:
        PromptError: a row that cannot be read.
    """
    rows = iter(data)
    for number in count(1):
        try:
            row = next(rows, None)
        except Exception as error:  # as above
            raise PromptError(f"cannot read the data set {source.name}: {first_line(error)}") from error
        if row is None:
            return
        yield f"the data set {source.name}, row {number}", row[source.column]


def texts(data: Any, source: HubSource) -> Iterator[str]:
    """The texts of the column, a document each.

    Raises:
        PromptError: a value that is no text, or a row that cannot be read.
    """
    for where, value in values(data, source):
        if value is None:
            continue
        if not isinstance(value, str):
            raise PromptError(f"{where}, holds no text in its column {source.column!r}", given=type(value).__name__)
        yield value
