"""`ropepatch recipes`: list, show, copy and validate recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropepatch.cli._shared import JsonOption, print_json, say
from ropepatch.cli._training import OverridesArgument, RecipeArgument, report_validation

if TYPE_CHECKING:
    from ropepatch.training.recipe import Recipe

main = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False)


@main.callback()
def root() -> None:
    """List, show, copy and validate recipes. `ropepatch train RECIPE` runs one.

    \b
    Examples:
      ropepatch recipes ls
      ropepatch recipes show smollm2-135m/yarn
      ropepatch recipes cp smollm2-135m/yarn mine.yaml
      ropepatch recipes validate mine.yaml train.max_steps=50
    """


@main.command("ls")
def list_recipes(as_json: JsonOption = False) -> None:
    """List the shipped recipes.

    For each its model, its method, the tokens of a window, the optimizer steps, and what it is for.

    \b
    Examples:
      ropepatch recipes ls
      ropepatch recipes ls --json
    """
    from ropepatch._data import data_names
    from ropepatch.training.reading import load_recipe

    rows = [_row(name, load_recipe(name)) for name in data_names("recipes")]
    if as_json:
        print_json(rows)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for heading in ("recipe", "model", "method", "window", "steps", "description"):
        number = heading in ("window", "steps")
        table.add_column(heading, justify="right" if number else "left", no_wrap=number or heading == "recipe")
    for row in rows:
        cells = [row["name"], row["model"], row["method"] or "-", f"{row['window']:,}", f"{row['steps']:,}"]
        table.add_row(*map(Text, cells), Text(row["description"]))
    # A file or a pipe has no width: a recipe is a line.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


@main.command("show")
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Every setting, defaults included, instead of the file as it stands.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a recipe.

    The file as it stands, comments included; with overrides or --resolved, every setting as it would be run.

    \b
    Examples:
      ropepatch recipes show smollm2-135m/yarn
      ropepatch recipes show smollm2-135m/yarn lora.r=8 --resolved
    """
    from ropepatch._data import find_data
    from ropepatch.training.reading import dump, load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if as_json:
        print_json(loaded.model_dump())
    elif resolved or overrides:
        typer.echo(dump(loaded), nl=False)
    else:
        typer.echo(find_data("recipes", recipe).read_text(encoding="utf-8"), nl=False)


@main.command("cp")
def copy(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A shipped recipe's name (see ls), or accelerate/NAME: cpu, ddp, fsdp2, zero3, context_parallel.",
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The copy. [default: the name here]", show_default=False)
    ] = None,
) -> None:
    """Copy a shipped recipe to a file.

    Configurations for accelerate launch are copied the same way. No file is overwritten.

    \b
    Examples:
      ropepatch recipes cp smollm2-135m/pose-yarn-32k.yaml mine.yaml
      ropepatch recipes cp accelerate/fsdp2
    """
    from ropepatch._data import find_data
    from ropepatch.errors import OutputError, UsageError

    launch = recipe.removeprefix("accelerate/")
    source = find_data("recipes", recipe) if launch == recipe else find_data("accelerate", launch)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UsageError(f"{target} exists, and is not overwritten", hint="give another name") from None
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    say(f"wrote {target}")


@main.command("validate")
def validate(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Check a recipe up to its first step.

    Settings are checked one by one and together, the data is read, the patch and the adapters are put on, and one
    step is trained, on a tiny random model of the same architecture. What this machine lacks, and what could not be
    checked because it is on the hub, is told. Nothing is written.

    \b
    Examples:
      ropepatch recipes validate smollm2-135m/yarn
      ropepatch recipes validate mine.yaml train.max_steps=50
    """
    from ropepatch.training.reading import load_recipe

    report_validation(recipe, load_recipe(recipe, overrides or ()))


def _row(name: str, recipe: Recipe) -> dict[str, Any]:
    stages = recipe.train.stages or []
    return {
        "name": name,
        "description": recipe.description,
        "model": recipe.model.name,
        "method": recipe.patch.method if recipe.patch is not None else None,
        "window": recipe.data.length,
        "steps": recipe.train.max_steps or sum(stage.steps for stage in stages),
    }
