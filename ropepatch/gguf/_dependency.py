"""The package gguf writes the container; it comes with an extra."""

from __future__ import annotations

from typing import Any

from ropepatch.errors import DependencyError


def require_gguf() -> Any:
    """The module `gguf`.

    Raises:
        DependencyError: it is not installed; the message names the extra.
    """
    try:
        import gguf
    except ImportError as error:
        raise DependencyError(
            "GGUF files need the package gguf", hint="run: pip install 'ropepatch[export]'"
        ) from error
    return gguf
