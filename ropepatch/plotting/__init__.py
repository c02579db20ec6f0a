"""Figures. matplotlib comes with the extra `eval` and is imported on first use."""

from __future__ import annotations

from ropepatch.plotting._dependency import require_matplotlib
from ropepatch.plotting._figures import figure_bytes, save_figure
from ropepatch.plotting._heatmap import heatmap

__all__ = ["figure_bytes", "heatmap", "require_matplotlib", "save_figure"]
