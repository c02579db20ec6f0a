"""Trials of several runs as one table, for whoever goes on with their own tools: CSV and Parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch.errors import DependencyError
from ropepatch.evaluation.comparison import Run
from ropepatch.files import write_atomic

if TYPE_CHECKING:
    import pandas


def trials_table(runs: Sequence[Run]) -> pandas.DataFrame:
    """One row for each trial of each run: who ran it (`run`, `model`, `method`, `options`, `dtype`, `trained_length`),
    then the fields of `results.jsonl`. Lists and mappings are JSON text.

    Raises:
        DependencyError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise DependencyError("tables of trials need pandas", hint="run: pip install 'ropepatch[eval]'") from error
    rows = [{**_run_columns(run), **_flat(row)} for run in runs for row in run.rows]
    # A field that is a text in one task and a list in another would have no type of its own: both are text here.
    return pandas.DataFrame(rows)


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Write the table of trials as CSV, atomically.

    Raises:
        DependencyError: pandas is not installed.
        OutputError: the file cannot be written.
    """
    write_atomic(path, trials_table(runs).to_csv(index=False))


def write_parquet(runs: Sequence[Run], path: Path) -> None:
    """Write the table of trials as Parquet, atomically.

    Raises:
        DependencyError: pandas or pyarrow is not installed.
        OutputError: the file cannot be written.
    """
    table = trials_table(runs)
    try:
        content = table.to_parquet(index=False)
    except ImportError as error:
        raise DependencyError("Parquet files need pyarrow", hint="run: pip install pyarrow") from error
    write_atomic(path, content)


def _run_columns(run: Run) -> dict[str, Any]:
    patch = run.configuration.get("patch") or {}
    return {
        "run": run.name,
        "model": run.model,
        "method": patch.get("method"),
        "options": json.dumps(patch.get("options", {}), ensure_ascii=False),
        "dtype": run.configuration.get("dtype"),
        "trained_length": run.summary["trained_length"],
    }


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
        for name, value in row.items()
    }
