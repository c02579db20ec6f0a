"""`ropepatch train`: adapt a model as a recipe says, into an output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropepatch.cli._matrix import is_first
from ropepatch.cli._shared import JsonOption, print_json
from ropepatch.cli._training import OverridesArgument, RecipeArgument, report_validation


def main(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the run. [default: runs/RECIPE]"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with what the folder holds; or refuse it.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try the recipe out up to its first step on a tiny model, and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Adapt a model as a recipe says: patch, adapters, data, training, and evaluation before and after.

    DIR gets the adapter (or the model, with lora=null), a log with the loss, speed and memory of every step, its
    checkpoints, the evaluations and a report. The same command again goes on where it stopped; a folder of another
    recipe is refused. This is one process; for several, let a launcher start the module:

    \b
      accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m ropepatch.training RECIPE

    \b
    Examples:
      ropepatch train smollm2-135m/yarn --output runs/yarn
      ropepatch train smollm2-135m/yarn train.max_steps=5 lora.r=8 --dry-run
      ropepatch train mine.yaml data.sources.0.path=books/ train.report_to=[trackio]
      ropepatch train mine.yaml lora=null train.learning_rate=2e-5
    """
    from ropepatch.training.checks import check, check_machine
    from ropepatch.training.reading import default_output, load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if dry_run:
        report_validation(recipe, loaded)
        return
    check(loaded)
    check_machine(loaded)
    from ropepatch.training.run import train

    result = train(loaded, output if output is not None else default_output(recipe), resume=resume)
    if not is_first():
        return
    if as_json:
        print_json({name: str(value) if isinstance(value, Path) else value for name, value in vars(result).items()})
    else:
        typer.echo(f"trained: {result.model}")
        typer.echo(f"report: {result.report}")
