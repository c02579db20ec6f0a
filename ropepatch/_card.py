"""The section of a model card that says what a patch did."""

from __future__ import annotations

import json

from ropepatch.sidecar import Sidecar

BEGIN, END = "<!-- ropepatch: begin -->", "<!-- ropepatch: end -->"


def with_section(card: str, side: Sidecar, trained_length: int | None, more: str | None) -> str:
    """A model card with the patch's section in it, in place of one that is there.

    Args:
        card: the card so far; may be empty.
        trained_length: tokens, as the patch took it.
        more: Markdown to end the section with, such as a table of evaluations.
    """
    section = f"{BEGIN}\n{_section(side, trained_length, more)}\n{END}\n"
    before, begun, rest = card.partition(BEGIN)
    if begun:
        return before + section + rest.partition(END)[2].removeprefix("\n")
    return f"{card.rstrip()}\n\n{section}".lstrip("\n")


def _section(side: Sidecar, trained_length: int | None, more: str | None) -> str:
    patch = side.patch
    options = {name: value for name, value in patch.options.items() if value is not None}
    lines = [
        "## Long context\n",
        f"Patched with [ropepatch](https://pypi.org/project/ropepatch/) {patch.versions.get('ropepatch', '')}: method "
        f"`{patch.method}`" + (f" over `{json.dumps(patch.base)}`" if patch.base else "") + f", options "
        f"`{json.dumps(options)}`.",
    ]
    lengths = [("Trained length", trained_length), ("target length", patch.target_length)]
    said = ", ".join(f"{name} {length:,} tokens" for name, length in lengths if length is not None)
    if said:
        lines.append(said + ".")
    lines.append(
        "\n```python\nimport ropepatch\n\nmodel = ropepatch.from_pretrained(...)  # this folder or repository\n```"
    )
    if more:
        lines.append("\n" + more.strip())
    return "\n".join(lines)
