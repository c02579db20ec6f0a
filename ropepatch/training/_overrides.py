"""`section.key=value` from the command line, written into a recipe's document before it is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from ropepatch.training._yaml import parse, place


def apply(document: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write `overrides` into `document`, in their order; sections that are not there are made.

    Names are not checked here: the schema does that, and names the same path.

    Args:
        document: a recipe as read; changed in place.
        overrides: each `path=value`: names and list indices (from 0) joined by dots, and a value in YAML.

    Returns:
        A line for each override that cannot be written.
    """
    problems: list[str] = []
    seen: set[str] = set()
    for item in overrides:
        path, equals, text = item.partition("=")
        path = path.strip()
        if not equals or not all(path.split(".")):
            problems.append(f"{item!r} is no override: write section.key=value, for example train.max_steps=50")
            continue
        if path in seen:
            problems.append(f"{path} is given twice (the second time as {text!r})")
            continue
        seen.add(path)
        try:
            value = parse(text)
        except yaml.YAMLError as error:
            problems.append(f"{path}: the value {text!r} is not YAML ({place(error)})")
            continue
        problem = _write(document, path.split("."), value)
        if problem:
            problems.append(problem)
    return problems


def _write(document: dict[str, Any], parts: list[str], value: Any) -> str | None:
    here: Any = document
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        path = ".".join(parts[:depth])
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                return f"{path} is a list of {len(here)}: take an index from 0 to {len(here) - 1} (given {part!r})"
            key: Any = int(part)
        elif isinstance(here, dict):
            key = part
            if not last and here.get(key) is None:
                # A list cannot grow by an index: nobody knows what its other items are.
                if parts[depth + 1].isdecimal():
                    return f"{path}.{part}".lstrip(".") + " is not in the recipe: give the whole list, [{...}, ...]"
                here[key] = {}
        else:
            return f"{path} is {here!r}, which has no {part!r}"
        if last:
            here[key] = value
        else:
            here = here[key]
    return None
