"""`ropepatch methods`: the methods, or one with its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropepatch.cli._shared import JsonOption, print_json
from ropepatch.errors import unknown_name

if TYPE_CHECKING:
    from ropepatch.api import MethodInfo


def main(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show this method only, by name or alias.", show_default=False)
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
    options = [("option", "type", "default", "help")]
    options += [(o["name"], o["type"], _default(o), o["help"] or "") for o in info.options]
    return "\n".join([info.summary, "", _table(facts), "", _table(options)])


def _default(option: dict[str, Any]) -> str:
    return "required" if option.get("required") else str(option["default"])


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
