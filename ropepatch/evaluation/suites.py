"""Evaluation suites by name: small YAML files that name a task and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ropepatch._data import data_names, find_data
from ropepatch.errors import OptionError, RecordError, did_you_mean
from ropepatch.evaluation.suite import SUITES, Suite


def load_suite(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Suite:
    """A suite with the caller's settings in place of its own.

    Args:
        name: a shipped suite's name, or the path of a YAML file.
        overrides: settings by name; None leaves the suite's own.

    Raises:
        UnknownNameError: no such suite, or the file names no task that we have.
        OptionError: the settings are wrong; names every one.
        RecordError: the file cannot be read or is no YAML mapping.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    content = _read(name)
    task = content.get("task")
    if not isinstance(task, str):
        raise OptionError(f"the suite {name} names no task", given=task, allowed=SUITES.names())
    kind = SUITES.get(task)
    try:
        return kind.model_validate({**content, **given})
    except ValidationError as error:
        problems = [_problem(kind, details) for details in error.errors()]
        raise OptionError(f"the suite {name} cannot be run as asked: " + "; ".join(problems)) from error


def suite_names() -> list[str]:
    """The names of the shipped suites, sorted."""
    return list(data_names("eval"))


def _problem(kind: type[Suite], details: Any) -> str:
    place = ".".join(map(str, details["loc"]))
    if details["type"] == "extra_forbidden":
        hint = did_you_mean(place, kind.model_fields)
        return f"{place}: {kind.name} has no such setting" + (f" ({hint})" if hint else "")
    return f"{place}: {details['msg']} (given {details['input']!r})"


def _read(name: str | Path) -> dict[str, Any]:
    import yaml

    file = find_data("eval", str(name))
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecordError(f"the suite file {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RecordError(f"the suite file {file} is not a mapping of settings")
    return content
