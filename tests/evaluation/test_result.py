"""What `evaluate` returns: its figure and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from example_runs import configuration, documents, trials

from ropepatch.errors import UsageError
from ropepatch.evaluation.folder import suite_of
from ropepatch.evaluation.result import EvaluationResult


def result_of(rows: list[dict[str, Any]], **changes: Any) -> EvaluationResult:
    given = configuration(**changes)
    return EvaluationResult(rows, suite_of(given).summarise(rows, given), given, 0, 0, 0, 0, None, None)


def test_the_figure_is_the_suites_first(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    grid = result_of(trials(lambda *_: 1.0))
    assert grid.plot(tmp_path / "a.png").axes[0].images
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    form = {"form": "sliding", "window": 256, "stride": 64, "bos": "auto", "bos_token": None, "max_tokens": None}
    losses = result_of(documents([[3.0, 2.0], [2.0, 1.0]]), task="perplexity", **form)
    assert losses.plot().axes[0].lines
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        grid.plot(tmp_path / "a.gif")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_table_has_a_row_for_each_trial() -> None:
    pytest.importorskip("pandas", reason="tables are pandas's")
    rows = trials(lambda length, *_: float(length < 128))
    table = result_of(rows).to_pandas()
    assert len(table) == len(rows)
    assert table.groupby("length")["correct"].mean().to_dict() == {32: 1.0, 64: 1.0, 128: 0.0}
