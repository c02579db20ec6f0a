"""The table of methods in README.md, from the registry.

    python scripts/readme_methods.py           # print it
    python scripts/readme_methods.py --write   # put it between the markers of README.md

tests/test_packaging.py fails when README.md and the registry disagree.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ropepatch

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- methods: start -->\n", "<!-- methods: end -->"


def table() -> str:
    """A Markdown table, one row a method."""
    lines = [
        "| method | also called | what it does | options besides `factor` | source |",
        "|---|---|---|---|---|",
    ]
    for info in ropepatch.methods():
        aliases = ", ".join(f"`{alias}`" for alias in info.aliases)
        options = ", ".join(f"`{option['name']}`" for option in info.options if option["name"] != "factor")
        lines.append(f"| `{info.name}` | {aliases} | {info.summary} | {options} | {info.paper} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """README text with the table between the markers."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return before + START + table() + END + after


def main() -> None:
    if "--write" in sys.argv[1:]:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
