"""What a model that does not count in rotary positions says of its own length, and what it counts in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ropepatch.families._site import Site
from ropepatch.surgery import _embeddings_grid, _embeddings_series, _relative_grid
from ropepatch.surgery._image_size import grid_of
from ropepatch.surgery.embeddings import table_length

_TABLES = ("learned", "sinusoidal")


def own_length(host: Any, sites: Sequence[Site]) -> tuple[int | None, str]:
    """Length of a model by its tables or windows, and the unit of all its lengths.

    Returns:
        A number, or None where there is neither or its config does not say; and "tokens", "time steps", or "patches"
        along the longer side of an image or a window.
    """
    tables = [site for site in sites if site.part == "text" and site.mechanism in _TABLES]
    if _embeddings_series.takes(host, tables):
        return _embeddings_series.context_length(host), "time steps"
    if tables and _embeddings_grid.takes(host, tables):
        grid = grid_of(host.config)
        return max(grid.size) if grid else None, "patches"
    if not tables and (windows := _relative_grid.windows(host)):
        return max(windows[0].size), "patches"
    return table_length(host, sites), "tokens"
