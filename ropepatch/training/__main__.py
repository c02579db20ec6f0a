"""`python -m ropepatch.training RECIPE [section.key=value ...] --output DIR`: the same as `ropepatch train`, for those
who launch several processes of a module."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ropepatch.errors import RopepatchError


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and return the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m ropepatch.training", description="Train a model as a recipe says, with one process or many."
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or the path of a YAML file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings in place of the recipe's")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--no-resume", action="store_true", help="refuse a folder that holds a run")
    given = parser.parse_intermixed_args(arguments)
    first = os.environ.get("RANK", "0") == "0"
    try:
        from ropepatch.training.reading import default_output, load_recipe
        from ropepatch.training.run import train

        recipe = load_recipe(given.recipe, given.overrides)
        output = given.output or default_output(given.recipe)
        train(recipe, output, resume=not given.no_resume)
    except RopepatchError as error:
        # All processes fail alike; one tells.
        if first:
            print(f"ropepatch: {error}", file=sys.stderr)
        return error.exit_status
    if first:
        print(f"wrote {output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
