"""The heatmap says what the summaries say: read back from the figure's own parts, not from pixels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ropepatch.errors import DependencyError, OutputError, UsageError
from ropepatch.plotting import figure_bytes, heatmap

pytest.importorskip("matplotlib")


def summary(values: dict[tuple[int, float], float], trained: int | None = 64, title: str = "run") -> dict[str, Any]:
    cells = [{"length": length, "depth": depth, "accuracy": value} for (length, depth), value in values.items()]
    return {"title": title, "trained_length": trained, "cells": cells}


FIRST = summary({(32, 0.0): 1.0, (32, 1.0): 0.5, (64, 0.0): 0.25, (64, 1.0): 0.75, (96, 0.0): 0.0, (96, 1.0): 1 / 3})
SECOND = summary({(32, 0.0): 0.9, (128, 0.5): 0.2}, title="other")


def texts(panel: Any) -> dict[tuple[int, int], str]:
    return {(round(text.get_position()[0]), round(text.get_position()[1])): text.get_text() for text in panel.texts}


def test_cells_carry_their_numbers_and_their_places() -> None:
    figure = heatmap(FIRST)
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["32", "64", "96"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "1"]
    np.testing.assert_allclose(panel.images[0].get_array(), [[1.0, 0.25, 0.0], [0.5, 0.75, 1 / 3]])
    assert texts(panel) == {
        (0, 0): "1.00",
        (1, 0): "0.25",
        (2, 0): "0.00",
        (0, 1): "0.50",
        (1, 1): "0.75",
        (2, 1): "0.33",
    }
    assert panel.get_title() == "run"


def test_the_scale_is_fixed_and_even_in_lightness() -> None:
    from matplotlib import colormaps

    figure = heatmap(summary({(32, 0.0): 0.4, (64, 0.0): 0.5}))
    assert figure.axes[0].images[0].get_clim() == (0.0, 1.0)
    colours = colormaps[figure.axes[0].images[0].get_cmap().name](np.linspace(0, 1, 33))[:, :3]
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()


def test_numbers_stand_out_from_their_cell() -> None:
    panel = heatmap(summary({(length, 0.0): length / 20 for length in range(21)}, trained=None)).axes[0]
    cmap = panel.images[0].get_cmap()
    for text in panel.texts:
        background = np.array(cmap(float(text.get_text())))[:3] @ [0.2126, 0.7152, 0.0722]
        ink = {"white": 1.0, "black": 0.0}[text.get_color()]
        assert abs(background - ink) > 0.4


def test_several_runs_share_axes_and_missing_cells_stay_empty() -> None:
    figure = heatmap([FIRST, SECOND], titles=["before", "after"])
    panels = figure.axes[:2]
    assert [panel.get_title() for panel in panels] == ["before", "after"]
    assert [panel.images[0].get_array().shape for panel in panels] == [(3, 4), (3, 4)]
    assert [panel.images[0].get_clim() for panel in panels] == [(0.0, 1.0), (0.0, 1.0)]
    found = texts(panels[1])
    assert found[(0, 0)] == "0.90"
    assert found[(3, 1)] == "0.20"
    assert sorted(found.values()).count("–") == 10
    assert np.ma.getmaskarray(np.ma.masked_invalid(panels[1].images[0].get_array())).sum() == 10


def test_many_runs_wrap_into_rows() -> None:
    runs = [{**FIRST, "title": f"run {k}"} for k in range(24)]
    figure = heatmap(runs)
    panels = figure.axes[:24]
    assert [panel.get_title() for panel in panels] == [f"run {k}" for k in range(24)]
    figure.draw_without_rendering()
    places = [panel.get_position() for panel in panels]
    columns = len({round(place.x0, 3) for place in places})
    assert 3 <= columns <= 8
    assert len({round(place.y0, 3) for place in places}) == -(-24 // columns)
    width, height = figure.get_size_inches()
    assert width < 17
    # A cell's number fits into it: a cell is at least as large as in a figure of one run.
    assert min(place.width * width for place in places) > 1.5
    assert min(place.height * height for place in places) > 0.6
    labelled = [any(label.get_text() for label in panel.get_xticklabels()) for panel in panels]
    assert labelled == [k + columns >= 24 for k in range(24)]


def test_a_last_row_that_is_not_full_leaves_nothing_behind() -> None:
    figure = heatmap([FIRST] * 7)
    assert len(figure.axes) == 7 + 1
    assert all(panel.images for panel in figure.axes[:7])


def test_tasks_without_a_depth_are_rows() -> None:
    cells = [
        {"task": task, "length": length, "depth": None, "accuracy": accuracy}
        for task, accuracy in (("vt", 0.25), ("niah_single_1", 0.75))
        for length in (32, 64)
    ]
    panel = heatmap({"title": "run", "trained_length": None, "cells": cells}).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["vt", "niah_single_1"]
    assert panel.get_ylabel() == "task"
    np.testing.assert_allclose(panel.images[0].get_array(), [[0.25, 0.25], [0.75, 0.75]])


@pytest.mark.parametrize(("trained", "edge"), [(64, 1.5), (63, 0.5), (80, 1.5), (1000, 2.5), (8, -0.5)])
def test_the_trained_length_is_marked_between_columns(trained: int, edge: float) -> None:
    figure = heatmap({**FIRST, "trained_length": trained})
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [edge]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"trained length {trained:,}"]


def test_an_unknown_trained_length_is_not_marked() -> None:
    figure = heatmap({**FIRST, "trained_length": None})
    assert not figure.axes[0].lines
    assert not figure.legends


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("b.SVG", b"<?xml")])
def test_the_ending_chooses_the_format(tmp_path: Path, name: str, start: bytes) -> None:
    heatmap(FIRST, path=tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_equal_summaries_give_equal_files(kind: str) -> None:
    assert figure_bytes(heatmap(FIRST), kind) == figure_bytes(heatmap(FIRST), kind)


def test_bad_input_is_one_clear_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        heatmap(FIRST, path=tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="at least one measured cell"):
        heatmap([], path=tmp_path / "a.png")
    with pytest.raises(UsageError, match="one title for each run"):
        heatmap([FIRST, SECOND], titles=["one"], path=tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="annot write"):
        heatmap(FIRST, path=tmp_path / "missing" / "a.png")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    with pytest.raises(DependencyError, match=r"pip install 'ropepatch\[eval\]'"):
        heatmap(FIRST)


def test_importing_the_package_does_not_import_matplotlib() -> None:
    program = "import sys, ropepatch.plotting; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
