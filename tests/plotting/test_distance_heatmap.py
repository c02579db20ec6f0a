"""The figure of distances says what the profiles say: read back from its own parts, not from pixels."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ropepatch.errors import UsageError
from ropepatch.plotting import distance_heatmap, figure_bytes

pytest.importorskip("matplotlib")


def profile(layers: list[list[list[float]]], *, length: int = 20, trained: int | None = 8, title: str = "a") -> Any:
    """Layers of heads of shares: the first tokens, then the buckets."""
    buckets = [0, 1, 2, 4, 8, 16]
    return {
        "title": title,
        "length": length,
        "trained_length": trained,
        "queries": [19],
        "first_tokens": 4,
        "buckets": buckets[: len(layers[0][0]) - 1],
        "layers": [
            {"path": "x", "first_tokens": [head[0] for head in heads], "shares": [head[1:] for head in heads]}
            for heads in layers
        ],
    }


ONE = profile(
    [
        [[0.2, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2], [0.4, 0.3, 0.1, 0.1, 0.1, 0.0, 0.0]],
        [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]],
    ]
)
# Another length, another number of heads in each layer.
OTHER = profile([[[0.1, 0.5, 0.4, 0.0]], [[0.0, 0.2, 0.2, 0.6]] * 3], length=4, trained=None, title="b")


def grid(figure: Any, number: int = 0) -> Any:
    return np.asarray(figure.axes[number].images[0].get_array())


def test_layers_are_means_of_their_heads() -> None:
    figure = distance_heatmap(ONE)
    np.testing.assert_allclose(
        grid(figure), [[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1], [0.5, 0.0, 0.0, 0.0, 0.0, 0.25, 0.25]]
    )
    panel = figure.axes[0]
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels == ["first 4", "0", "1", "2–3", "4–7", "8–15", "16–19"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "1"]
    assert list(panel.get_yticks()) == [0, 1]
    assert panel.get_title() == "a"


def test_heads_have_rows_of_their_own() -> None:
    figure = distance_heatmap([ONE, OTHER], heads=True, titles=["before", "after"])
    assert grid(figure).shape == (4, 7) and grid(figure, 1).shape == (4, 4)
    np.testing.assert_allclose(grid(figure)[1], [0.4, 0.3, 0.1, 0.1, 0.1, 0.0, 0.0])
    # Ticks stand where a layer's rows begin.
    assert list(figure.axes[0].get_yticks()) == [-0.5, 1.5]
    assert list(figure.axes[1].get_yticks()) == [-0.5, 0.5]
    assert [panel.get_title() for panel in figure.axes[:2]] == ["before", "after"]
    assert [panel.images[0].get_clim() for panel in figure.axes[:2]] == [(0.0, 1.0)] * 2


@pytest.mark.parametrize(("trained", "edge"), [(8, 4.5), (1, 1.5), (12, 5.085)])
def test_the_trained_length_stands_between_distances(trained: int, edge: float) -> None:
    figure = distance_heatmap({**ONE, "trained_length": trained})
    (line,) = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert line.get_xdata()[0] == pytest.approx(edge, abs=1e-3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"trained length {trained:,}"]


@pytest.mark.parametrize("trained", [None, 20, 100])
def test_a_trained_length_that_no_distance_reaches_is_not_marked(trained: int | None) -> None:
    figure = distance_heatmap({**ONE, "trained_length": trained})
    assert not [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert not figure.legends


def test_many_layers_leave_room_between_their_numbers() -> None:
    figure = distance_heatmap(profile([[[0.5, 0.5]] * 32] * 48, length=1), heads=True)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) > 8
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_equal_profiles_give_equal_files(kind: str, tmp_path: Path) -> None:
    assert figure_bytes(distance_heatmap(ONE), kind) == figure_bytes(distance_heatmap(ONE), kind)
    distance_heatmap(ONE, path=tmp_path / f"a.{kind}")
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{kind}"]


def test_bad_input_is_one_clear_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        distance_heatmap(ONE, path=tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="at least one profile"):
        distance_heatmap([], path=tmp_path / "a.png")
    with pytest.raises(UsageError, match="one title"):
        distance_heatmap([ONE, OTHER], titles=["one"], path=tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
