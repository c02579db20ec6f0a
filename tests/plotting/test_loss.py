"""The loss figures: what is drawn is what the summary says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib")

from ropepatch.errors import UsageError
from ropepatch.plotting import loss_by_position, loss_heatmap


def _summary(
    losses: list[float], *, trained: int | None = 16, interval: bool = True, title: str = "run"
) -> dict[str, Any]:
    entries = [
        {
            "start": 8 * i,
            "end": 8 * i + 8,
            "loss": loss,
            "ci_low": math.exp(loss - 0.1) if interval else None,
            "ci_high": math.exp(loss + 0.1) if interval else None,
        }
        for i, loss in enumerate(losses)
    ]
    documents = [{"name": f"{k}.txt", "loss_by_position": [*losses[: len(losses) - k], *[None] * k]} for k in range(3)]
    return {"title": title, "trained_length": trained, "by_position": entries, "documents": documents}


def test_line_band_and_trained_length() -> None:
    panel = loss_by_position(_summary([3.0, 2.5, 2.0, 4.0])).axes[0]
    line, mark = panel.lines
    assert list(line.get_xdata()) == [4, 12, 20, 28]
    assert list(line.get_ydata()) == [3.0, 2.5, 2.0, 4.0]
    assert list(mark.get_xdata()) == [16, 16]
    (band,) = panel.collections
    points = band.get_paths()[0].vertices
    assert points[:, 1].min() == pytest.approx(1.9)
    assert points[:, 1].max() == pytest.approx(4.1)


def test_one_document_has_no_band_and_a_long_training_no_mark() -> None:
    panel = loss_by_position(_summary([3.0, 2.5], trained=4096, interval=False)).axes[0]
    assert not panel.collections
    assert len(panel.lines) == 1


def test_several_runs_differ_without_colour() -> None:
    runs = [_summary([3.0, 2.0 + i / 10], title=f"run {i}", trained=None) for i in range(8)]
    figure = loss_by_position(runs, titles=[f"name {i}" for i in range(8)])
    lines = figure.axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 8
    assert [line.get_label() for line in lines] == [f"name {i}" for i in range(8)]


def test_heatmap_leaves_open_what_was_not_reached() -> None:
    figure = loss_heatmap(_summary([3.0, 2.5, 2.0]))
    grid = figure.axes[0].images[0].get_array()
    assert grid.shape == (3, 3)
    assert grid[0].tolist() == [3.0, 2.5, 2.0]
    assert grid.mask.tolist() == [[False] * 3, [False, False, True], [False, True, True]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0.txt", "1.txt", "2.txt"]


def test_saved_and_refused(tmp_path: Path) -> None:
    loss_by_position(_summary([3.0, 2.0]), path=tmp_path / "a.png")
    loss_heatmap(_summary([3.0, 2.0]), path=tmp_path / "b.svg")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "b.svg").exists()
    with pytest.raises(UsageError, match="png or .svg"):
        loss_by_position(_summary([3.0]), path=tmp_path / "c.jpg")
    with pytest.raises(UsageError, match="no loss by position"):
        loss_by_position([])
    with pytest.raises(UsageError, match="one title for each run"):
        loss_by_position(_summary([3.0]), titles=["a", "b"])
    with pytest.raises(UsageError, match="no document"):
        loss_heatmap({"title": "x", "documents": [], "by_position": []})
