"""What the verbs about recipes share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ropepatch.cli._shared import say

if TYPE_CHECKING:
    from ropepatch.training.recipe import Recipe

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe's name (ropepatch recipes ls), or the path of a YAML file.",
        show_default=False,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Settings in place of the recipe's own: names and list indices joined by dots, values in YAML.",
        show_default=False,
    ),
]


def report_validation(name: str, recipe: Recipe) -> None:
    """Validate a recipe and tell what came of it."""
    from ropepatch.training.validation import validate

    notes = validate(recipe)
    for note in notes:
        say(note)
    typer.echo(f"{name}: valid" + (" as far as it could be checked here" if notes else ""))
