"""Every error that ropepatch raises on purpose.

::

    RopepatchError                      anything this package refuses or could not do
    ├── UsageError                      the caller asked for something that cannot be (CLI exit status 2)
    │   ├── UnknownNameError            no such method, suite, task, ...; carries near names
    │   ├── OptionError                 unknown, missing or out-of-range option
    │   ├── UnsupportedModelError       the model has no such mechanism, or hides it
    │   ├── AlreadyPatchedError         a second patch without unpatch
    │   ├── NotPatchedError             unpatch of a model that is not patched
    │   ├── AlreadyScaledError          the checkpoint carries a native rope scaling already
    │   ├── CacheError                  a cache that does not belong to the model as it is patched now
    │   ├── PromptError                 a prompt that cannot be built (length, depth, digits, text)
    │   └── OutputConflictError         an output folder that belongs to another configuration
    ├── VerificationError               the patch was written but had no, or another, effect
    ├── RegistryError                   two entries claim one name
    ├── RecordError                     a patch record or result file that cannot be read
    ├── ModelLoadError                  a model folder or weights file that is missing or corrupt
    ├── OutputError                     an output folder that cannot be written
    ├── EndpointError                   an API server that cannot be reached, fails or refuses
    └── DependencyError                 a missing extra or an unsupported version

Each error carries `given`, `allowed` and `hint`; `str(error)` joins what is known into one message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class RopepatchError(Exception):
    """Base of all errors of this package.

    Args:
        message: what went wrong, naming the thing.
        given: what the caller passed, when that helps.
        allowed: what would have been accepted.
        hint: the likely fix, as an instruction.
    """

    exit_status = 1

    def __init__(
        self,
        message: str,
        *,
        given: Any = None,
        allowed: Iterable[Any] | str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.given = given
        self.allowed = allowed if allowed is None or isinstance(allowed, str) else tuple(allowed)
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        parts = [self.message]
        if self.given is not None:
            parts.append(f"given: {self.given!r}")
        if self.allowed is not None:
            allowed = self.allowed if isinstance(self.allowed, str) else _listing(self.allowed)
            parts.append(f"allowed: {allowed}")
        if self.hint:
            parts.append(self.hint)
        return " ".join(_sentence(part) for part in parts)

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments would be lost by the default pickling, which worker processes rely on.
        return _rebuild, (type(self), self.message, self.given, self.allowed, self.hint)


def _listing(names: tuple[Any, ...], most: int = 40) -> str:
    shown = ", ".join(map(str, names[:most]))
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown


def _sentence(text: str) -> str:
    text = text.strip()
    first = text.split(maxsplit=1)[0] if text else ""
    # Code and names keep their case: only a plain word starts a sentence with a capital.
    text = text[:1].upper() + text[1:] if first.rstrip(":,").isalpha() else text
    return text + ("" if text.endswith(("?", ".", "!")) else ".")


def _rebuild(cls: type[RopepatchError], message: str, given: Any, allowed: Any, hint: str | None) -> RopepatchError:
    return cls(message, given=given, allowed=allowed, hint=hint)


class UsageError(RopepatchError):
    """The caller asked for something that cannot be."""

    exit_status = 2


class UnknownNameError(UsageError):
    """A name that no registry entry, suite or option carries."""


class OptionError(UsageError):
    """An unknown, missing or out-of-range option."""


class UnsupportedModelError(UsageError):
    """The model has no mechanism that the method can change, or hides it."""


class AlreadyPatchedError(UsageError):
    """A second patch without unpatch."""


class NotPatchedError(UsageError):
    """unpatch of a model that is not patched."""


class AlreadyScaledError(UsageError):
    """The checkpoint carries a native rope scaling, and how to combine was not said."""


class CacheError(UsageError):
    """A cache of keys and values that does not belong to the model as it is patched now."""


class PromptError(UsageError):
    """A prompt that cannot be built as asked."""


class OutputConflictError(UsageError):
    """An output folder that belongs to another configuration."""


class VerificationError(RopepatchError):
    """The patch was written, but the model did not follow. The model has been restored."""


class RegistryError(RopepatchError):
    """Two entries claim one name."""


class RecordError(RopepatchError):
    """A patch record or result file that cannot be read."""


class ModelLoadError(RopepatchError):
    """A model folder or weights file that is missing or corrupt."""


class OutputError(RopepatchError):
    """An output folder that cannot be written."""


class EndpointError(RopepatchError):
    """An API server that cannot be reached, fails, or refuses what it is asked.

    Attributes:
        status: the HTTP status it answered with; None without an answer.
    """

    status: int | None = None


class DependencyError(RopepatchError):
    """A missing extra or an unsupported version of a dependency."""


def did_you_mean(given: str, names: Iterable[str]) -> str | None:
    """The hint "did you mean 'x' or 'y'?" for the names nearest to `given`, or None when none is near."""
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), lowered, n=3, cutoff=0.6)
    if not near:
        return None
    return "did you mean " + " or ".join(repr(lowered[name]) for name in near) + "?"


def first_line(error: Exception) -> str:
    """What another library's error says, in one line without its end mark; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__


def unknown_name(kind: str, given: str, names: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not among `names`, with near names suggested."""
    names = sorted(names)
    return UnknownNameError(f"unknown {kind} {given!r}", allowed=names, hint=did_you_mean(given, names))
