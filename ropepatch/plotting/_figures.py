"""A matplotlib figure as bytes or as a file, the same bytes for the same figure."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ropepatch.errors import UsageError
from ropepatch.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")


def figure_bytes(figure: Figure, kind: str = "png", *, dpi: int = 150) -> bytes:
    """`figure` drawn as "png" or "svg"; `dpi` is pixels per inch, for png."""
    import matplotlib

    buffer = io.BytesIO()
    # The default salts element names at random and stamps the date: two equal figures would differ.
    with matplotlib.rc_context({"svg.hashsalt": "ropepatch"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def figure_format(path: str | os.PathLike[str]) -> str:
    """The format that the ending of `path` names.

    Raises:
        UsageError: neither .png nor .svg.
    """
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise UsageError("a figure's file name must end in .png or .svg", given=str(path))
    return ending


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Draw `figure` to `path`, PNG or SVG by its ending, atomically.

    Raises:
        UsageError: another ending.
        OutputError: the file cannot be written.
    """
    write_atomic(Path(path), figure_bytes(figure, figure_format(path)))
