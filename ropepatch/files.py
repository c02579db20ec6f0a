"""Reading and writing result files: strict JSON, and writes that are there whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropepatch.errors import OutputError, RecordError


def to_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as strict JSON text: NaN and infinity are refused, since other readers reject them.

    Raises:
        RecordError: `value` holds something that JSON cannot say.
    """
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise RecordError(f"cannot be written as JSON: {error}", given=_short(value)) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        RecordError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise RecordError(f"the file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise RecordError(f"the file {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecordError(f"the file {path} must hold one JSON object", given=type(value).__name__)
    return value


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """One line of a JSON Lines file as an object; `where` names file and line for the message.

    Raises:
        RecordError: the line is not one JSON object.
    """
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:
        raise RecordError(f"{where} is corrupt: {error}", given=_short(line)) from error
    if not isinstance(value, dict):
        raise RecordError(f"{where} is corrupt: not a JSON object", given=_short(line))
    return value


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`: a reader sees the old file or the whole new one, never a part.

    Raises:
        OutputError: the folder cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~umask())  # mkstemp makes files that only their owner can read
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented strict JSON, atomically."""
    write_atomic(path, to_json(value, indent=2) + "\n")


def umask() -> int:
    """The permission bits that new files of this process do not get."""
    mask = os.umask(0)  # the only portable way to read it is to set it
    os.umask(mask)
    return mask


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _short(value: Any, limit: int = 80) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text if len(text) <= limit else text[:limit] + "..."
