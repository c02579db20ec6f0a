"""Recipes, evaluation suites and matrices: found by path, else by name, from the installed wheel and a checkout alike.

The wheel carries them beside this file (`recipes/`, `eval/`, `matrices/`); in a checkout they lie at its root
(`recipes/`, `eval/suites/`, `eval/matrices/`), which is where an editable install finds them. Configurations of
accelerate lie in `recipes/accelerate/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ropepatch.errors import UsageError, unknown_name

Kind = Literal["recipes", "accelerate", "eval", "matrices"]

_SUFFIXES = (".yaml", ".yml")
_SINGULAR: dict[Kind, str] = {
    "recipes": "recipe",
    "accelerate": "launch configuration",
    "eval": "evaluation suite",
    "matrices": "matrix",
}
_IN_WHEEL: dict[Kind, str] = {
    "recipes": "recipes",
    "accelerate": "recipes/accelerate",
    "eval": "eval",
    "matrices": "matrices",
}
_IN_CHECKOUT: dict[Kind, str] = {**_IN_WHEEL, "eval": "eval/suites", "matrices": "eval/matrices"}
# Configurations of accelerate lie among the recipes, and are none.
_LEFT_OUT: dict[Kind, str] = {"recipes": "accelerate/"}


def data_names(kind: Kind) -> tuple[str, ...]:
    """The names that `find_data` knows, sorted: paths below the data folder, without suffix ("train/pose")."""
    return tuple(sorted(_named(kind)))


def find_data(kind: Kind, name: str) -> Path:
    """The YAML file that `name` means.

    Args:
        kind: "recipes", "accelerate", "eval" or "matrices".
        name: an explicit path (it has a folder separator or ends in .yaml or .yml and exists), or a name of
            `data_names(kind)`, with or without its suffix.

    Raises:
        UsageError: `name` is a path, and there is no such file.
        UnknownNameError: `name` is a name, and nothing is called so; the message suggests near names.
    """
    path = Path(name)
    looks_like_path = path.suffix in _SUFFIXES or path.name != name
    if looks_like_path and path.is_file():
        return path
    named = _named(kind)
    bare = name.removesuffix(path.suffix) if path.suffix in _SUFFIXES else name
    if bare in named:
        return named[bare]
    if looks_like_path:
        raise UsageError(f"no {_SINGULAR[kind]} file", given=name, allowed=("an existing .yaml file", *sorted(named)))
    raise unknown_name(_SINGULAR[kind], name, named)


def _named(kind: Kind) -> dict[str, Path]:
    for root in _roots(kind):
        if root.is_dir():
            files = sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES)
            found = {path.relative_to(root).with_suffix("").as_posix(): path for path in files}
            left_out = _LEFT_OUT.get(kind)
            return {name: path for name, path in found.items() if left_out is None or not name.startswith(left_out)}
    return {}


def _roots(kind: Kind) -> list[Path]:
    here = Path(__file__).resolve().parent
    roots = [here / _IN_WHEEL[kind]]
    checkout = here.parent.parent
    # Without this check an unrelated `recipes` folder in site-packages would count as ours.
    if (checkout / "pyproject.toml").is_file():
        roots.append(checkout / _IN_CHECKOUT[kind])
    return roots
