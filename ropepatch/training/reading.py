"""Recipes from YAML files, with overrides, and back to YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ropepatch._data import data_names, find_data
from ropepatch.errors import OptionError, RecordError
from ropepatch.training._overrides import apply
from ropepatch.training._problems import describe
from ropepatch.training._yaml import parse, place, write
from ropepatch.training.recipe import Recipe


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe with the caller's settings in place of its own.

    What single settings may be is checked here; whether they fit together, `checks.check` tells.

    Args:
        name_or_path: a shipped recipe's name ("smollm2-135m/yarn"), or the path of a YAML file.
        overrides: `section.key=value`: names and list indices (from 0) joined by dots, the value in YAML:
            `train.max_steps=50`, `data.sources.0.weight=2`, `patch=null`.

    Raises:
        UnknownNameError, UsageError: no such recipe or file.
        RecordError: the file cannot be read, or is no YAML mapping; names line and column.
        OptionError: settings are unknown, missing or out of range; names every one.
    """
    document = _read(find_data("recipes", str(name_or_path)))
    problems = apply(document, overrides)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems += describe(error, Recipe)
    if problems:
        raise refusal(f"the recipe {name_or_path} cannot be run as asked", problems)
    return recipe


def default_output(name_or_path: str | Path) -> Path:
    """Where a run goes that was not told where: "runs" and the shipped recipe's name, or the file's."""
    name = str(name_or_path)
    bare = name.removesuffix(".yaml").removesuffix(".yml")
    shipped = bare in data_names("recipes") and not Path(name).is_file()
    return Path("runs") / (bare if shipped else Path(name).stem)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, defaults included; reading it gives an equal recipe."""
    return write(recipe.model_dump())


def refusal(message: str, problems: Sequence[str]) -> OptionError:
    """One error that tells of several problems, a line each."""
    if len(problems) == 1:
        return OptionError(f"{message}: {problems[0]}")
    lines = (f"({number}) {problem}" for number, problem in enumerate(problems, start=1))
    return OptionError(f"{message}, {len(problems)} problems:\n" + ";\n".join(lines))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"the recipe {file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"the recipe {file} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise RecordError(f"the recipe {file} is not YAML: {place(error)}") from error
    if not isinstance(content, dict):
        raise RecordError(f"the recipe {file} is not a mapping of sections", allowed=tuple(Recipe.model_fields))
    return content
