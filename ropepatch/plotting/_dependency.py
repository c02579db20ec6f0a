"""Is matplotlib there? Asked before a long run, not at its end."""

from __future__ import annotations

import importlib.util

from ropepatch.errors import DependencyError


def require_matplotlib() -> None:
    """Do nothing when matplotlib can be imported.

    Raises:
        DependencyError: it cannot; the message names the extra.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DependencyError("figures need matplotlib", hint="run: pip install 'ropepatch[eval]'")
