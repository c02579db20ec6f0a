"""`ropepatch methods`: the methods, or one with its options."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropepatch.cli._shared import JsonOption, print_json
from ropepatch.errors import unknown_name

if TYPE_CHECKING:
    from ropepatch.api import MethodInfo


def main(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show this method only (or by alias).", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods, or show one with its options.

    \b
    Examples:
      ropepatch methods
      ropepatch methods yarn
      ropepatch methods --json
    """
    from ropepatch.api import methods

    known = methods()
    if name is None:
        if as_json:
            print_json([info.to_dict() for info in known])
        else:
            typer.echo(_table([("method", "seam", "summary"), *((i.name, i.seam, i.summary) for i in known)]))
        return
    info = next((info for info in known if name in (info.name, *info.aliases)), None)
    if info is None:
        raise unknown_name("method", name, [word for info in known for word in (info.name, *info.aliases)])
    if as_json:
        print_json(info.to_dict())
    else:
        typer.echo(_describe(info))


def _describe(info: MethodInfo) -> str:
    facts = [
        ("method", info.name),
        ("aliases", ", ".join(info.aliases) or "-"),
        ("seam", info.seam),
        ("mechanisms", ", ".join(info.mechanisms)),
        ("paper", info.paper),
        ("transformers", f"rope_type {info.rope_type}" if info.rope_type else "no word for it"),
    ]
    return "\n".join([info.summary, "", _table(facts), "", "options", *map(_option, info.options)])


def _option(option: dict[str, Any]) -> str:
    fate = "required" if option["required"] else f"default {option['default']}"
    help_text = textwrap.fill(option["help"], width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {option['name']} ({option['type']}, {fate})\n{help_text}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
