"""Figures. matplotlib comes with the extra `eval` and is imported on first use."""

from __future__ import annotations

from ropepatch.plotting._curve import accuracy_curve
from ropepatch.plotting._dependency import require_matplotlib
from ropepatch.plotting._distance import distance_heatmap
from ropepatch.plotting._figures import figure_bytes, save_figure
from ropepatch.plotting._heatmap import heatmap
from ropepatch.plotting._loss import loss_by_position, loss_heatmap
from ropepatch.plotting._training import training_curve

__all__ = [
    "accuracy_curve",
    "distance_heatmap",
    "figure_bytes",
    "heatmap",
    "loss_by_position",
    "loss_heatmap",
    "require_matplotlib",
    "save_figure",
    "training_curve",
]
