"""The tables of methods in README.md, from the registry.

    python scripts/readme_methods.py           # print them
    python scripts/readme_methods.py --write   # put them between the markers of README.md

tests/test_packaging.py fails when README.md and the registry disagree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ropepatch

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- methods: start -->\n", "<!-- methods: end -->"

FREQUENCIES = (
    "On the frequencies seam; these rewrite `inv_freq` and the gain of rotary modules, at no cost at run time."
)
ATTENTION = "On the attention seam; each of these also takes `logn`, which sharpens attention past the trained length."
EMBEDDINGS = "On the embeddings seam: position tables, for which `linear` and `nope` above have a form too."
OTHERS = "On models that learned a bias by distance (T5 and its kin, DeBERTa-v2, CPM-Ant), besides `linear`."


def table() -> str:
    """Markdown tables, one for each seam and one for what no rotary model takes, one row a method."""
    found: dict[str, list[Any]] = {"frequencies": [], "attention": [], "embeddings": [], "others": []}
    for info in ropepatch.methods():
        found["others" if info.mechanisms == ("relative_bias",) else info.seam].append(info)
    return (
        f"{FREQUENCIES}\n\n"
        + _rows(found["frequencies"], "options besides `factor`", hidden={"factor"})
        + f"\n{ATTENTION}\n\n"
        + _rows(found["attention"], "options", hidden={"logn"})
        + f"\n{EMBEDDINGS}\n\n"
        + _rows(found["embeddings"], "options besides `factor`", hidden={"factor"})
        + f"\n{OTHERS}\n\n"
        + _rows(found["others"], "options", hidden=set())
    )


def _rows(methods: Sequence[Any], options_title: str, *, hidden: set[str]) -> str:
    lines = [
        f"| method | also called | what it does | models | {options_title} | source |",
        "|---|---|---|---|---|---|",
    ]
    for info in methods:
        aliases = ", ".join(f"`{alias}`" for alias in info.aliases)
        options = ", ".join(f"`{option['name']}`" for option in info.options if option["name"] not in hidden)
        models = ", ".join(info.mechanisms)
        lines.append(f"| `{info.name}` | {aliases} | {info.summary} | {models} | {options} | {info.paper} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """README text with the tables between the markers."""
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
