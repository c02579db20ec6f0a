"""The curve says what the summaries say: read back from the figure's own parts, not from pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ropepatch.errors import UsageError
from ropepatch.plotting import accuracy_curve, figure_bytes

pytest.importorskip("matplotlib", reason="figures need matplotlib")


def summary(values: dict[int, float], trained: int | None = 64, title: str = "run") -> dict[str, Any]:
    rows = [
        {"length": length, "accuracy": value, "ci_low": max(0.0, value - 0.1), "ci_high": min(1.0, value + 0.1)}
        for length, value in values.items()
    ]
    return {"title": title, "trained_length": trained, "by_length": rows}


FIRST = summary({32: 1.0, 128: 0.25, 64: 0.5})
SECOND = summary({64: 0.9, 256: 0.2}, title="other")


def lines_of(figure: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_lines_go_through_the_accuracies_in_order_of_length() -> None:
    found = lines_of(accuracy_curve([FIRST, SECOND]))
    assert list(found["run"].get_xdata()) == [32, 64, 128]
    assert list(found["run"].get_ydata()) == [1.0, 0.5, 0.25]
    assert list(found["other"].get_xdata()) == [64, 256]


def test_bands_are_the_intervals() -> None:
    figure = accuracy_curve(FIRST)
    (band,) = figure.axes[0].collections
    corners = {(round(x), round(y, 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(32, 0.9), (32, 1.0), (64, 0.4), (64, 0.6), (128, 0.15), (128, 0.35)}


def test_the_axis_is_logarithmic_in_two_and_shows_every_length() -> None:
    panel = accuracy_curve([FIRST, SECOND]).axes[0]
    assert panel.get_xscale() == "log"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["32", "64", "128", "256"]
    low, high = panel.get_ylim()
    assert low < 0 < 1 < high


def test_the_trained_length_is_marked_once() -> None:
    figure = accuracy_curve([FIRST, SECOND])
    marks = [line for name, line in lines_of(figure).items() if "trained length 64" in name]
    assert [list(line.get_xdata()) for line in marks] == [[64, 64]]
    assert not [name for name in lines_of(accuracy_curve(summary({32: 1.0}, None))) if "trained" in name]


def test_runs_differ_without_colour() -> None:
    figure = accuracy_curve([summary({32: 0.5, 64: 0.5}, None, f"run {k}") for k in range(24)])
    drawn = {(line.get_marker(), str(line._unscaled_dash_pattern)) for line in lines_of(figure).values()}
    assert len(drawn) == 24
    assert not figure.axes[0].collections
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"run {k}" for k in range(24)]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_equal_summaries_give_equal_files(kind: str) -> None:
    assert figure_bytes(accuracy_curve(FIRST), kind) == figure_bytes(accuracy_curve(FIRST), kind)


def test_bad_input_is_one_clear_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        accuracy_curve(FIRST, path=tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="at least one accuracy"):
        accuracy_curve(summary({}), path=tmp_path / "a.png")
    with pytest.raises(UsageError, match="one title for each run"):
        accuracy_curve([FIRST, SECOND], titles=["one"], path=tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
