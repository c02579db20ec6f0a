"""The pictures of order show the numbers that they are given, and refuse what they cannot show."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="figures need matplotlib")

from ropepatch.attention.scheme import Scheme, Segment, own, rotated, static
from ropepatch.errors import UsageError
from ropepatch.methods._sinusoid import sinusoid_table
from ropepatch.plotting.order.lines import bias_curves, decay, plane_wavelengths
from ropepatch.plotting.order.planes import rotation_planes
from ropepatch.plotting.order.remap import distance_matrix
from ropepatch.plotting.order.table import position_likeness, position_table


def test_the_picture_of_sinusoids_is_the_table(tmp_path: Path) -> None:
    table = sinusoid_table(torch.arange(50), 128)
    figure = position_table(table, title="fifty", path=tmp_path / "a.png")
    panel = figure.axes[0]
    assert panel.images[0].get_array().tolist() == table.tolist()
    assert panel.get_title() == "fifty"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_likeness_shows_all_pairs_and_samples_a_long_table() -> None:
    values = position_likeness(sinusoid_table(torch.arange(10), 8)).axes[0].images[0].get_array()
    assert values.shape == (10, 10) and float(values[3, 3]) == pytest.approx(1)
    image = position_likeness(torch.randn(5000, 4)).axes[0].images[0]
    assert image.get_array().shape == (2048, 2048)
    assert image.get_extent() == [-0.5, 4999.5, 4999.5, -0.5]


@pytest.mark.parametrize("draw", [position_table, position_likeness])
def test_a_table_without_rows_is_refused(draw: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rows and columns"):
        draw(torch.zeros(0, 4))
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        draw(torch.ones(2, 2), path=tmp_path / "a.gif")


def test_decay_draws_both_measures_and_marks_the_trained_length() -> None:
    distances = torch.arange(100)
    top, bottom = decay(
        distances,
        {"a": (distances * 1.0, distances * 2.0), "b": (-distances * 1.0, distances * 3.0)},
        trained_length=64,
    ).axes
    assert list(top.lines[0].get_ydata()) == list(range(100))
    assert list(bottom.lines[1].get_ydata()) == [3 * d for d in range(100)]
    assert list(top.lines[2].get_xdata()) == [64, 64]
    with pytest.raises(UsageError, match="nothing to draw"):
        decay(distances, {})


def test_the_ramp_is_the_ratio_of_wavelengths() -> None:
    base = torch.tensor([1.0, 0.1, 0.01])
    scaled = base / torch.tensor([1.0, 2.0, 4.0])
    top, bottom = plane_wavelengths({"unpatched": base, "x": scaled}, trained_length=100, target_length=400).axes
    assert list(top.lines[0].get_ydata()) == pytest.approx([2 * math.pi, 20 * math.pi, 200 * math.pi])
    assert list(bottom.lines[0].get_ydata()) == pytest.approx([1, 2, 4])
    assert [line.get_ydata()[0] for line in top.lines[2:]] == [100, 400]
    (alone,) = plane_wavelengths({"still": torch.tensor([1.0, 0.0])}).axes
    assert math.isnan(alone.lines[0].get_ydata()[1])
    with pytest.raises(UsageError, match="numbers of planes"):
        plane_wavelengths({"a": base, "b": base[:2]})


def test_every_head_has_a_line_and_at_most_eight_are_named() -> None:
    panel = bias_curves(torch.arange(4), torch.arange(20.0)[:, None] * torch.arange(4.0)).axes[0]
    assert len(panel.lines) == 20
    named = [line.get_label() for line in panel.lines if not line.get_label().startswith("_")]
    assert named == [f"head {h}" for h in (0, 3, 5, 8, 11, 14, 16, 19)]
    assert list(panel.lines[3].get_ydata()) == [0, 3, 6, 9]


def test_the_matrix_leaves_invisible_pairs_open() -> None:
    near = Scheme(static(Segment(lambda i: i - 1, own, own, own, "own")))
    values = distance_matrix(near, 4, trained_length=2).axes[0].images[0].get_array()
    assert values.filled(-1).tolist() == [[0, -1, -1, -1], [1, 0, -1, -1], [-1, 1, 0, -1], [-1, -1, 1, 0]]
    with pytest.raises(UsageError, match="no token"):
        distance_matrix(rotated(), 0)


def test_planes_tell_trained_positions_from_later_ones() -> None:
    figure = rotation_planes(torch.tensor([1.0, 0.1, 0.0]), 40, trained_length=10, planes=[0, 2])
    first, still = figure.axes[:2]
    trained, later = (dots.get_offsets() for dots in first.collections)
    assert len(trained) == 10 and len(later) == 30
    assert trained[3].tolist() == pytest.approx([math.cos(3), math.sin(3)])
    assert "does not turn" in still.get_title()
    with pytest.raises(UsageError, match="No such plane"):
        rotation_planes(torch.tensor([1.0]), 4, planes=[1])
