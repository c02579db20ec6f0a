"""What the verbs share: option types, value parsing, JSON output and the error boundary."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer

from ropepatch.errors import OptionError, RopepatchError, UsageError

MODEL_HELP = "A folder, a hub id, or demo:smollm2."

PatchOption = Annotated[
    str | None, typer.Option("--patch", metavar="METHOD", help="Patch the model with this method first.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="An option of the method; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]

_WORDS = {"true": True, "false": False, "null": None, "none": None}

Number = TypeVar("Number", int, float)


@contextmanager
def error_boundary(*, debug: bool) -> Iterator[None]:
    """Turn a `RopepatchError` into one line on stderr and its exit status; Ctrl-C into status 130.

    Args:
        debug: let errors through with their traceback instead.
    """
    try:
        yield
    except RopepatchError as error:
        if debug:
            raise
        say(f"ropepatch: error: {' '.join(str(error).split())}")
        raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt:
        if debug:
            raise
        say("ropepatch: interrupted")
        raise typer.Exit(130) from None


def say(text: str) -> None:
    """A note to the person at the terminal: stderr, so that stdout holds results only."""
    typer.echo(text, err=True)


def print_json(document: Any) -> None:
    """Print the one JSON document of `--json`. Not-a-number and infinity are refused: JSON has no word for them."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_settings(items: list[str] | None, flag: str = "--set") -> dict[str, Any]:
    """The options that repeated `--set K=V` (or another `flag`) spell: `["factor=4", "truncate=false"]` gives factor 4,
    truncate False.

    Values are JSON scalars or lists (`[1, 2.5]`); true, false, none and null in any case; other numbers that Python
    reads (`.5`); anything else is a string.

    Raises:
        OptionError: an item without `=` or without a name, or a name given twice.
    """
    settings: dict[str, Any] = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise OptionError(f"{flag} takes NAME=VALUE", given=item, hint=f"for example {flag} factor=4")
        if key in settings:
            raise OptionError(f"{flag} {key} was given twice", given=item)
        settings[key] = _parse_value(value.strip())
    return settings


def check_patch_options(patch: str | None, settings: list[str] | None) -> None:
    """Refuse `--set` without `--patch`.

    Raises:
        UsageError: there are settings but no method that would take them.
    """
    if settings and patch is None:
        raise UsageError("--set needs --patch", given=" ".join(settings), hint="name the method that takes the option")


def apply_patch(model: Any, patch: str | None, options: dict[str, Any]) -> None:
    """Patch `model` as `--patch` and the parsed `--set` say; nothing without `--patch`.

    The keywords of `ropepatch.patch` itself (`original_length`, `on_scaled`, ...) may be set like options.

    Raises:
        OptionError: `--set` names one of the two things that are not options, model and method.
        RopepatchError: whatever `ropepatch.patch` refuses.
    """
    if patch is None:
        return
    for name in ("model", "method"):
        if name in options:
            raise OptionError(f"{name!r} is not an option of a method", given=f"--set {name}={options[name]}")
    from ropepatch.api import patch as patch_model

    patch_model(model, patch, **options)


def parse_ints(text: str, *, name: str) -> list[int]:
    """The whole numbers of `"1024,2048"`.

    Args:
        text: numbers separated by commas.
        name: the option, for the message ("--lengths").

    Raises:
        UsageError: an empty list, an empty item, or an item that is no whole number.
    """
    return _parse_numbers(text, int, name, "whole numbers", "1024,2048")


def parse_floats(text: str, *, name: str) -> list[float]:
    """The numbers of `"0,0.5,1"`; arguments and errors as in `parse_ints`."""
    return _parse_numbers(text, float, name, "numbers", "0,0.5,1")


def _parse_numbers(text: str, read: Callable[[str], Number], name: str, kind: str, example: str) -> list[Number]:
    try:
        return [read(item) for item in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{name} takes {kind} separated by commas", given=text, hint=f"for example {name} {example}"
        ) from None


def _parse_value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for read in (json.loads, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text
